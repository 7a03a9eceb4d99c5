"""Metrics: one object per line, appended where files can be, and written as a whole on object stores."""

import errno
import json
import sys
import types

import jax
import pytest
from etils import epath

from perceiver_ar_jax.config import TransientError
from perceiver_ar_jax.training import checkpoint, metrics
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
  log = metrics.MetricsLog(workdir, tiny.config(), first_step, "bits", lambda *_: None)
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


class FakeTracker(types.ModuleType):
  """A package with the interface that wandb and trackio share; the call named `failing` raises an error."""

  def __init__(self, name, failing=None):
    super().__init__(name)
    self.calls, self.failing = [], failing

  def _call(self, call, **arguments):
    self.calls.append((call, arguments))
    if call == self.failing:
      raise ConnectionError("no route\nto host")

  def init(self, **arguments):
    self._call("init", **arguments)
    return self

  def log(self, values, step):
    self._call("log", values=values, step=step)

  def finish(self):
    self._call("finish")


def test_a_tracker_receives_all_metrics_and_a_restart_continues_its_run(tmp_path, monkeypatch):
  wandb = FakeTracker("wandb")
  monkeypatch.setitem(sys.modules, "wandb", wandb)
  monkeypatch.setenv("WANDB_PROJECT", "mine")
  close = checkpoint.Checkpointer.__exit__
  monkeypatch.setattr(
    checkpoint.Checkpointer,
    "__exit__",
    lambda self, *error: (wandb.calls.append(("saved", {})), close(self, *error))[1],
  )
  for steps in (3, 4):
    assert tiny.run(tmp_path / "run", train__tracker="wandb", train__steps=steps).returncode == 0
  names = [name for name, _ in wandb.calls]
  assert names == ["init", *["log"] * 4, "saved", "finish", "init", *["log"] * 2, "saved", "finish"]
  logged = [(arguments["step"], arguments["values"]) for name, arguments in wandb.calls if name == "log"]
  lines = [{"step": step, **values} for step, values in logged]
  assert lines == metrics.read_entries(epath.Path(tmp_path / "run")) and [step for step, _ in logged] == [
    1,
    2,
    3,
    3,
    4,
    4,
  ]
  assert "loss" in logged[0][1] and "eval_nats_per_token" in logged[-1][1]
  first, second = (arguments for name, arguments in wandb.calls if name == "init")
  assert first["id"] == second["id"] == (tmp_path / "run" / "tracker_id").read_text() and first["resume"] == "allow"
  assert first["project"] == "mine" and first["name"] == f"run-{first['id']}" and first["dir"] == str(tmp_path / "run")
  assert [each["config"]["train"]["steps"] for each in (first, second)] == [3, 4]


@pytest.mark.parametrize("failing", ["init", "log", "finish"])
def test_a_tracker_that_fails_costs_one_warning(failing, tmp_path, capsys):
  package = FakeTracker("trackio", failing)
  with metrics.track(package, epath.Path(tmp_path), tiny.config()) as track:
    for step in (1, 2):
      track(step, {"loss": 1.0})
  assert [name for name, _ in package.calls] == ["init", *["log"] * 2, "finish"][: {"init": 1, "log": 2}.get(failing)]
  warning = "Warning: the tracker failed; training continues without it (ConnectionError: no route to host)."
  assert capsys.readouterr().err.splitlines() == [warning]


def test_process_0_alone_tracks(tmp_path, monkeypatch):
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  package = FakeTracker("trackio")
  with metrics.track(package, epath.Path(tmp_path), tiny.config()) as track:
    track(1, {"loss": 1.0})
  assert not package.calls and not list(tmp_path.iterdir())


def test_a_tracker_that_is_not_installed_or_unknown_is_named(tmp_path, monkeypatch):
  for package in (None, types.ModuleType("trackio")):  # the latter as a folder in the current one is imported
    monkeypatch.setitem(sys.modules, "trackio", package)
    result = tiny.run(tmp_path / "run", train__tracker="trackio")
    tiny.expect_error(result, "train.tracker=trackio", "pip install -e '.[trackio]'", "train.tracker=none")
  tiny.expect_error(tiny.run(tmp_path / "run", train__tracker="wandbb"), "Did you mean 'wandb'")
  assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_the_real_packages_without_a_network(name, tmp_path, monkeypatch):
  monkeypatch.setenv("WANDB_MODE", "offline")
  monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when the package is imported
  package = pytest.importorskip(name)
  failures = []
  for steps in (3, 4):
    result = tiny.run(tmp_path / "run", train__tracker=name, train__steps=steps)
    assert result.returncode == 0
    failures += [line for line in result.stderr.splitlines() if "tracker failed" in line]
  assert not failures
  run_id = (tmp_path / "run" / "tracker_id").read_text()
  if name == "wandb":
    assert len(list((tmp_path / "run" / "wandb").glob(f"offline-run-*-{run_id}/run-{run_id}.wandb"))) == 2
  else:
    (run,) = package.Api().runs("perceiver_ar_jax")
    assert run.name == f"run-{run_id}"
