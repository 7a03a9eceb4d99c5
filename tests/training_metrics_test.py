"""Metrics: one object per line, appended where files can be, and written as a whole on object stores."""

import errno
import json

import pytest
from etils import epath

from perceiver_ar_jax.config import TransientError
from perceiver_ar_jax.training import metrics
from tests import tiny


@pytest.fixture(params=[False, True], ids=["files", "objects"])
def objects(request, monkeypatch):
  """Whether the run is in an object store, simulated by a local folder that refuses to append."""
  if request.param:
    monkeypatch.setattr(metrics, "is_object_store", lambda path: True)
    path_type = type(epath.Path("/tmp"))
    real = path_type.open

    def open_whole(path, mode="r", *args, **kwargs):
      assert "a" not in mode, "objects cannot be appended to"
      return real(path, mode, *args, **kwargs)

    monkeypatch.setattr(path_type, "open", open_whole)
  return request.param


def _read(workdir) -> list[dict]:
  """The logged objects of all files, in order."""
  return [json.loads(line) for path in workdir.glob("*.jsonl") for line in path.read_text().splitlines()]


def _log(workdir, first_step, steps, flush_at=()):
  log = metrics.MetricsLog(workdir, tiny.config(), first_step, "bits")
  for step in steps:
    log.write(step, {"loss": step / 2, "infinite": float("inf")})
    if step in flush_at:
      log.flush()
  return log


@pytest.mark.usefixtures("objects")
def test_lines_come_back_in_order(tmp_path):
  _log(epath.Path(tmp_path), 0, range(1, 6), flush_at=(2, 4)).flush()
  assert _read(tmp_path) == [{"step": step, "loss": step / 2} for step in range(1, 6)]


def test_a_killed_run_loses_and_repeats_no_step_of_its_checkpoint(objects, tmp_path):
  workdir = epath.Path(tmp_path)
  _log(workdir, 0, range(1, 8), flush_at=(3, 6))  # killed at step 7, which only a file has
  assert max(entry["step"] for entry in _read(workdir)) == (6 if objects else 7)
  _log(workdir, 3, range(4, 10), flush_at=(6, 9))  # resumed from the checkpoint of step 3: that of step 6 was damaged
  assert [entry["step"] for entry in _read(workdir)] == list(range(1, 10))


def test_a_line_that_a_kill_cut_short_is_dropped(tmp_path):
  (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
  _log(epath.Path(tmp_path), 5, [2]).flush()
  assert [entry["step"] for entry in _read(tmp_path)] == [1, 2]


def test_a_full_disk_is_transient(objects, monkeypatch, tmp_path):
  log = _log(epath.Path(tmp_path), 0, [1])

  def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")

  monkeypatch.setattr(type(epath.Path("/tmp")), "write_text" if objects else "open", full)
  with pytest.raises(TransientError, match="No space left on device"):
    log.write(2, {"loss": 1.0})
    log.flush()
