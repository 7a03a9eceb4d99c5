"""A workdir has one owner at a time, and a dead owner does not block the next run."""

import errno
import json
import os
import subprocess
import sys
import time

import pytest
from etils import epath

from perceiver_ar_jax.config import InputError
from perceiver_ar_jax.training import workdir
from tests import tiny


@pytest.fixture(autouse=True)
def quick(monkeypatch):
  """Heartbeats and the time to watch for them, shortened."""
  monkeypatch.setattr(workdir, "BEAT_SECONDS", 0.05)
  monkeypatch.setattr(workdir, "WATCH_SECONDS", 1)


def _on_another_machine(monkeypatch):
  """From here on, owners are on a machine with locks of its own."""
  monkeypatch.setattr(workdir, "_machine", lambda: "another machine")
  monkeypatch.setattr(workdir.Owner, "_lock", lambda self, stack: True)


def test_a_second_run_is_refused_and_changes_nothing(tmp_path):
  with workdir.own(tiny.config(), epath.Path(tmp_path)):
    with pytest.raises(InputError, match=f"in use by another training run .process {os.getpid()} on "):
      with workdir.own(tiny.config(train__steps=14), epath.Path(tmp_path)):
        pass
    assert json.loads((tmp_path / "config.json").read_text())["train"]["steps"] == 12
  with workdir.own(tiny.config(), epath.Path(tmp_path)):
    pass


def test_an_error_releases_the_workdir(tmp_path):
  for _ in range(2):
    with pytest.raises(ZeroDivisionError):
      with workdir.Owner(epath.Path(tmp_path)):
        raise ZeroDivisionError
  assert not (tmp_path / "owner.json").exists()


@pytest.mark.slow
def test_a_killed_owner_does_not_block_this_machine(tmp_path):
  program = f"""
import time
from etils import epath
from perceiver_ar_jax.training import workdir
with workdir.Owner(epath.Path({str(tmp_path)!r})):
  print("ready", flush=True)
  time.sleep(60)
"""
  process = subprocess.Popen([sys.executable, "-c", program], cwd=tiny.ROOT, stdout=subprocess.PIPE, text=True)
  assert process.stdout.readline() == "ready\n"
  with pytest.raises(InputError, match=f"process {process.pid} on "):
    workdir.Owner(epath.Path(tmp_path)).__enter__()
  process.kill()
  process.wait()
  assert json.loads((tmp_path / "owner.json").read_text())["pid"] == process.pid
  with workdir.Owner(epath.Path(tmp_path)) as ours:
    ours.check()


def test_a_living_owner_on_another_machine_is_seen_by_its_heartbeat(monkeypatch, tmp_path):
  with workdir.Owner(epath.Path(tmp_path)) as first:
    with monkeypatch.context() as context:
      _on_another_machine(context)
      with pytest.raises(InputError, match="in use by another training run"):
        with workdir.Owner(epath.Path(tmp_path)):
          pass
    first.check()


def test_a_dead_owner_on_another_machine_is_replaced(monkeypatch, tmp_path, capsys):
  dead = {"run": "1", "machine": "gone", "host": "node7", "pid": 1, "beats": 5}
  (tmp_path / "owner.json").write_text(json.dumps(dead))
  with workdir.Owner(epath.Path(tmp_path)) as ours:
    ours.check()
  assert "last used on node7" in capsys.readouterr().out


@pytest.mark.parametrize("contents", ["", "null", '{"run": ', "[1]"])
def test_a_garbled_owner_file_does_not_block(contents, tmp_path):
  (tmp_path / "owner.json").write_text(contents)
  with workdir.Owner(epath.Path(tmp_path)) as ours:
    ours.check()


def test_an_owner_that_was_taken_over_stops_before_it_saves_and_leaves_the_new_one(monkeypatch, tmp_path):
  first = workdir.Owner(epath.Path(tmp_path))
  with first:
    first.check()
    with monkeypatch.context() as context:
      _on_another_machine(context)
      context.setattr(workdir.Owner, "_watch", lambda self, owner: None)  # as if both had started at once
      second = workdir.Owner(epath.Path(tmp_path)).__enter__()
    with pytest.raises(InputError, match="has been taken over by another training run"):
      first.check()
    time.sleep(0.2)  # neither does a heartbeat of the first take it back
    second.check()
  second.check()
  second.__exit__(None, None, None)


@pytest.mark.parametrize("storage", ["object store", "file system without locks"])
def test_without_locks_the_heartbeat_decides(storage, monkeypatch, tmp_path, capsys):
  def no_locks(file, operation):
    raise OSError(errno.ENOLCK, "No locks available")

  if storage == "object store":
    monkeypatch.setattr(workdir, "is_object_store", lambda path: True)
  monkeypatch.setattr(workdir.fcntl, "flock", no_locks)
  with workdir.Owner(epath.Path(tmp_path)):
    with pytest.raises(InputError, match=f"in use by another training run .process {os.getpid()} on "):
      workdir.Owner(epath.Path(tmp_path)).__enter__()
    left = (tmp_path / "owner.json").read_text()
  assert not (tmp_path / "owner.json").exists()
  (tmp_path / "owner.json").write_text(left)  # as if it had been killed
  with workdir.Owner(epath.Path(tmp_path)) as ours:
    ours.check()
  assert "did not release it" in capsys.readouterr().out


def test_urls_are_object_stores():
  assert workdir.is_object_store(epath.Path("gs://bucket/run")) and not workdir.is_object_store(epath.Path("/tmp/run"))
