"""A workdir has one owner at a time, and a dead owner blocks nobody."""

import errno
import json
import os
import subprocess
import sys
import time

import pytest
from etils import epath

from perceiver_ar_jax.config import InputError
from perceiver_ar_jax.training import owner, workdir
from tests import tiny


@pytest.fixture(autouse=True)
def quick(monkeypatch):
  """Heartbeats and the time to watch for them, shortened."""
  monkeypatch.setattr(owner, "BEAT_SECONDS", 0.05)
  monkeypatch.setattr(owner, "WATCH_SECONDS", 1)


def _on_another_machine(monkeypatch, tmp_path):
  """From here on, owners are on a machine with locks of its own."""
  monkeypatch.setattr(owner, "_machine", lambda: "another machine")
  monkeypatch.setattr(owner, "_lock_files", lambda path: [str(tmp_path / "locks-of-another-machine")])


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
      with owner.Owner(epath.Path(tmp_path)):
        raise ZeroDivisionError
  assert not (tmp_path / "owner.json").exists()


def test_a_killed_owner_does_not_block_this_machine(tmp_path):
  program = f"""
import time
from etils import epath
from perceiver_ar_jax.training import owner
with owner.Owner(epath.Path({str(tmp_path)!r})):
  print("ready", flush=True)
  time.sleep(60)
"""
  process = subprocess.Popen([sys.executable, "-c", program], cwd=tiny.ROOT, stdout=subprocess.PIPE, text=True)
  assert process.stdout.readline() == "ready\n"
  with pytest.raises(InputError, match=f"process {process.pid} on "):
    owner.Owner(epath.Path(tmp_path)).__enter__()
  process.kill()
  process.wait()
  assert json.loads((tmp_path / "owner.json").read_text())["pid"] == process.pid
  with owner.Owner(epath.Path(tmp_path)) as ours:
    ours.check()


def test_a_living_owner_on_another_machine_is_seen_by_its_heartbeat(monkeypatch, tmp_path):
  with owner.Owner(epath.Path(tmp_path)) as first:
    with monkeypatch.context() as context:
      _on_another_machine(context, tmp_path)
      with pytest.raises(InputError, match="in use by another training run"):
        with owner.Owner(epath.Path(tmp_path)):
          pass
    first.check()


def test_a_dead_owner_on_another_machine_is_replaced(monkeypatch, tmp_path, capsys):
  dead = {"run": "1", "machine": "gone", "host": "node7", "pid": 1, "beats": 5}
  (tmp_path / "owner.json").write_text(json.dumps(dead))
  with owner.Owner(epath.Path(tmp_path)) as ours:
    ours.check()
  assert "last used on node7" in capsys.readouterr().out


@pytest.mark.parametrize("contents", ["", "null", '{"run": ', "[1]"])
def test_a_garbled_owner_file_does_not_block(contents, tmp_path):
  (tmp_path / "owner.json").write_text(contents)
  with owner.Owner(epath.Path(tmp_path)) as ours:
    ours.check()


def test_an_owner_that_was_taken_over_stops_before_it_saves_and_leaves_the_new_one(monkeypatch, tmp_path):
  first = owner.Owner(epath.Path(tmp_path))
  with first:
    first.check()
    with monkeypatch.context() as context:
      _on_another_machine(context, tmp_path)
      context.setattr(owner.Owner, "_watch_other_machine", lambda self: None)  # as if both had started at once
      second = owner.Owner(epath.Path(tmp_path)).__enter__()
    with pytest.raises(InputError, match="has been taken over by another training run"):
      first.check()
    time.sleep(0.2)  # neither does a heartbeat of the first take it back
    second.check()
  second.check()
  second.__exit__(None, None, None)


def test_object_stores_are_locked_in_the_machines_temporary_folder():
  (path,) = owner._lock_files(epath.Path("gs://bucket/run"))
  assert os.path.isdir(os.path.dirname(path))
  assert owner._lock_files(epath.Path("gs://bucket/other")) != [path]


def test_a_file_system_without_locks_uses_the_machines_temporary_folder(monkeypatch, tmp_path):
  real = owner.fcntl.flock

  def flock(file, operation):
    if file.name.endswith("/.lock"):
      raise OSError(errno.ENOLCK, "No locks available")
    real(file, operation)

  monkeypatch.setattr(owner.fcntl, "flock", flock)
  with owner.Owner(epath.Path(tmp_path)):
    with pytest.raises(InputError, match="in use"):
      owner.Owner(epath.Path(tmp_path)).__enter__()
