"""A workdir has one owner at a time, and a dead owner does not block the next run."""

import contextlib
import errno
import json
import os
import subprocess
import sys

import pytest
from etils import epath

from perceiver_ar_jax.config import InputError
from perceiver_ar_jax.training import workdir
from tests import tiny


def test_a_second_run_is_refused_and_changes_nothing(tmp_path):
  with workdir.own(tiny.config(), epath.Path(tmp_path)) as check:
    with pytest.raises(InputError, match=f"in use by another training run .process {os.getpid()} on "):
      with workdir.own(tiny.config(train__steps=14), epath.Path(tmp_path)):
        pass
    assert json.loads((tmp_path / "config.json").read_text())["train"]["steps"] == 12
    check()
  with workdir.own(tiny.config(), epath.Path(tmp_path)):
    pass


def test_an_error_releases_the_workdir(tmp_path):
  for _ in range(2):
    with pytest.raises(ZeroDivisionError):
      with workdir.own(tiny.config(), epath.Path(tmp_path)):
        raise ZeroDivisionError


@pytest.mark.slow
def test_a_killed_owner_does_not_block_this_machine(tmp_path):
  program = f"""
import time
from etils import epath
from perceiver_ar_jax.training import workdir
from tests import tiny
with workdir.own(tiny.config(), epath.Path({str(tmp_path)!r})):
  print("ready", flush=True)
  time.sleep(60)
"""
  process = subprocess.Popen([sys.executable, "-c", program], cwd=tiny.ROOT, stdout=subprocess.PIPE, text=True)
  assert process.stdout.readline() == "ready\n"
  with pytest.raises(InputError, match=f"process {process.pid} on "):
    workdir.own(tiny.config(), epath.Path(tmp_path)).__enter__()
  process.kill()
  process.wait()
  assert json.loads((tmp_path / "owner.json").read_text())["pid"] == process.pid
  with workdir.own(tiny.config(), epath.Path(tmp_path)) as check:
    check()


@pytest.mark.parametrize("contents", ["", "null", '{"run": ', "[1]"])
def test_a_garbled_owner_file_neither_blocks_nor_ends_a_run(contents, tmp_path):
  (tmp_path / "owner.json").write_text(contents)
  with workdir.own(tiny.config(), epath.Path(tmp_path)) as check:
    check()
    (tmp_path / "owner.json").write_text(contents)
    check()


@pytest.mark.parametrize("storage", ["object store", "file system without locks"])
def test_without_locks_the_last_run_owns_and_the_one_before_stops(storage, monkeypatch, tmp_path):
  def no_locks(file, operation):
    raise OSError(errno.ENOLCK, "No locks available")

  if storage == "object store":
    monkeypatch.setattr(workdir, "is_object_store", lambda path: True)
  monkeypatch.setattr(workdir.fcntl, "flock", no_locks)
  with contextlib.ExitStack() as stack:
    first = stack.enter_context(workdir.own(tiny.config(), epath.Path(tmp_path)))
    first()
    (tmp_path / "checkpoints" / "5").mkdir(parents=True)
    with pytest.raises(InputError, match="another config"):
      stack.enter_context(workdir.own(tiny.config(seed=7, model__latent_width=16), epath.Path(tmp_path)))
    first()  # a refused run does not end it
    second = stack.enter_context(workdir.own(tiny.config(), epath.Path(tmp_path)))
    with pytest.raises(InputError, match=f"has been taken over by another training run .process {os.getpid()} on "):
      first()
    second()


def test_urls_are_object_stores():
  assert workdir.is_object_store(epath.Path("gs://bucket/run")) and not workdir.is_object_store(epath.Path("/tmp/run"))
