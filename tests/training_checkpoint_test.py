"""Checkpoints: damaged ones are moved aside, unreadable ones never, and both are told apart whatever raises."""

import errno
import json
import pathlib
import shutil
import urllib.error

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import tensorflow as tf

from perceiver_ar_jax.config import InputError, OptimizerConfig, TransientError, checks
from perceiver_ar_jax.training import checkpoint
from perceiver_ar_jax.training import optimizer as optimizer_lib
from perceiver_ar_jax.training.step import TrainState


class Position:
  """A data iterator that consists of its position."""

  def __init__(self, value: int = 0):
    self.value = value

  def save(self, directory):
    directory.mkdir(exist_ok=True)
    (directory / "position.json").write_text(json.dumps({"position": self.value}))

  def restore(self, directory):
    self.value = json.loads((directory / "position.json").read_text())["position"]


def _state(step: int) -> TrainState:
  params = {"a": {"kernel": jnp.arange(600.0).reshape(20, 30) + step}, "b": jnp.ones(7, jnp.bfloat16)}
  return TrainState(jnp.int32(step), params, optax.adam(1e-3).init(params))


def _abstract(state: TrainState | None = None) -> TrainState:
  state = state or _state(0)
  return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """A workdir with the checkpoints of steps 1, 2 and 3."""
  workdir = tmp_path_factory.mktemp("saved")
  with checkpoint.Checkpointer(workdir, keep=3) as checkpointer:
    for step in (1, 2, 3):
      checkpointer.save(_state(step), Position(10 * step))
  return workdir


@pytest.fixture
def workdir(saved, tmp_path):
  """A copy of it, to be damaged."""
  return pathlib.Path(shutil.copytree(saved, tmp_path / "run"))


def _restore(workdir, data=None) -> int:
  with checkpoint.Checkpointer(workdir, keep=3) as checkpointer:
    state = checkpointer.restore(_abstract(), data or Position())
    jax.tree.map(lambda ours, expected: (ours == expected).all() or pytest.fail(), state, _state(int(state.step)))
    return int(state.step)


def _steps(workdir) -> dict[str, set[str]]:
  return {
    name: {path.name for path in (workdir / name).iterdir()} if (workdir / name).exists() else set()
    for name in ("checkpoints", "damaged")
  }


_INTACT = {"checkpoints": {"1", "2", "3"}, "damaged": set()}


def _largest(folder: pathlib.Path) -> pathlib.Path:
  files = (path for path in folder.rglob("*") if path.is_file() and path.name != "commit_success.txt")
  return max(files, key=lambda path: path.stat().st_size)


def _change(item: str, change):
  """A change of the largest file of an item."""

  def damage(step: pathlib.Path):
    path = _largest(step / item)
    path.write_bytes(change(path.read_bytes()))

  return damage


def _swap_rows(step: pathlib.Path):
  """Replaces a weight by valid files of the same values in another order."""
  state = _state(3)
  state.params["a"]["kernel"] = state.params["a"]["kernel"][::-1]
  shutil.rmtree(step / "params")
  with checkpoint.Checkpointer(step.parent.parent / "swapped") as checkpointer:
    checkpointer.save(state, Position())
  shutil.move(step.parent.parent / "swapped" / "checkpoints" / "3" / "params", step / "params")


DAMAGES = {
  f"{kind}_{item}": _change(item, change)
  for item in ("params", "optimizer", "fingerprint", "data")
  for kind, change in {"empty": lambda old: b"", "cut": lambda old: old[: len(old) // 2]}.items()
}
DAMAGES |= {
  f"no_{name.replace('/', '_')}": lambda step, name=name: (
    shutil.rmtree(step / name) if (step / name).is_dir() else (step / name).unlink()
  )
  for name in ("params", "optimizer", "fingerprint", "data", "data/position.json", "optimizer/_METADATA", "params/d")
}
DAMAGES["swapped_rows"] = _swap_rows


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_moved_and_the_one_before_it_used(name, workdir, capsys):
  DAMAGES[name](workdir / "checkpoints" / "3")
  data = Position()
  assert _restore(workdir, data) == 2 and data.value == 20
  assert _steps(workdir) == {"checkpoints": {"1", "2"}, "damaged": {"3"}}
  assert "step 3" in capsys.readouterr().err


@pytest.mark.parametrize("contents", [b"", b"{", b"\xff"])
def test_damaged_metrics_cost_no_checkpoint(contents, workdir):
  metrics = workdir / "checkpoints" / "3" / "metrics" / "metrics"
  metrics.parent.mkdir()
  metrics.write_bytes(contents)
  assert _restore(workdir) == 3


UNREADABLE = {
  "permission": (PermissionError(errno.EACCES, "Permission denied"), InputError),
  "permission_of_tensorstore": (ValueError("PERMISSION_DENIED: Error reading local file"), InputError),
  "stale": (OSError(errno.ESTALE, "Stale file handle"), TransientError),
  "device": (OSError(errno.EIO, "Input/output error"), TransientError),
  "device_of_tensorstore": (ValueError("INTERNAL: Error reading: Input/output error [EIO 5]"), TransientError),
  "http": (urllib.error.HTTPError("gs://", 503, "Slow Down", None, None), TransientError),
  "http_of_tensorstore": (ValueError("UNAVAILABLE: CURL error: HTTP response code: 503"), TransientError),
  "timeout": (TimeoutError("no answer"), TransientError),
  "memory": (MemoryError(), TransientError),
  "device_memory": (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes"), TransientError),
  "tensorflow": (tf.errors.UnavailableError(None, None, "Service Unavailable"), TransientError),
  "unknown": (RuntimeError("something new"), RuntimeError),
  "unknown_of_tensorstore": (ValueError("UNIMPLEMENTED: something new"), ValueError),
}


@pytest.mark.parametrize(
  ("name", "item"), [*((name, "params") for name in UNREADABLE), ("stale", "fingerprint"), ("memory", "data")]
)
def test_a_checkpoint_that_could_not_be_read_is_reported_and_stays(name, item, workdir, monkeypatch):
  error, expected = UNREADABLE[name]
  DAMAGES["cut_params"](workdir / "checkpoints" / "3")  # found before, and left there as well

  def fail(self, directory, *args, **kwargs):
    if {"2", item} <= {*pathlib.Path(directory).parts}:
      raise error
    return read(self, directory, *args, **kwargs)

  owner = {"params": ocp.StandardCheckpointHandler, "fingerprint": ocp.JsonCheckpointHandler, "data": Position}[item]
  read = owner.restore
  with monkeypatch.context() as context:
    context.setattr(owner, "restore", fail)
    with pytest.raises(expected) as raised:
      _restore(workdir)
  assert "step 2" in str(raised.value) + "".join(getattr(raised.value, "__notes__", []))
  assert _steps(workdir) == _INTACT
  assert _restore(workdir) == 2


def test_a_step_that_vanished_while_it_was_read_is_not_damaged(workdir, monkeypatch):
  def vanish(self, directory):
    shutil.rmtree(directory.parent)
    raise FileNotFoundError(directory)

  monkeypatch.setattr(Position, "restore", vanish)
  with pytest.raises(FileNotFoundError):
    _restore(workdir)
  assert _steps(workdir) == {"checkpoints": {"1", "2"}, "damaged": set()}


def test_readers_refuse_a_damaged_newest_checkpoint(workdir):
  with checkpoint.Checkpointer(workdir, read_only=True) as checkpointer:
    assert checkpointer.restore_params(_abstract().params)[0] == 3
  DAMAGES["cut_params"](workdir / "checkpoints" / "3")
  with checkpoint.Checkpointer(workdir, read_only=True) as checkpointer:
    with pytest.raises(InputError, match="step 3 in .* is damaged.*resume training"):
      checkpointer.restore_params(_abstract().params)
  assert _steps(workdir) == _INTACT
  shutil.rmtree(workdir / "checkpoints" / "3")  # as the message says
  with checkpoint.Checkpointer(workdir, read_only=True) as checkpointer:
    assert checkpointer.restore_params(_abstract().params)[0] == 2


def test_checkpoints_of_0_1_0_whose_fingerprints_have_no_version_are_restored(workdir):
  path = workdir / "checkpoints" / "3" / "fingerprint" / "metadata"
  checksums = json.loads(path.read_text())
  del checksums["fingerprint_version"], checksums["has_data"]
  path.write_text(json.dumps(dict.fromkeys(checksums, 0)))
  assert _restore(workdir) == 3


def test_a_checkpoint_of_another_structure_is_refused_and_not_moved(workdir):
  path = workdir / "checkpoints" / "3" / "fingerprint" / "metadata"
  saved = json.loads(path.read_text())
  path.write_text(json.dumps({name.replace("kernel", "weights"): value for name, value in saved.items()}))
  with pytest.raises(InputError, match=r"step 3 .* other arrays than this version and config: it lacks .*kernel"):
    _restore(workdir)
  assert _steps(workdir) == _INTACT


def test_a_full_disk_is_transient_wherever_a_save_meets_it(workdir, monkeypatch):
  full = [OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EDQUOT, "Disk quota exceeded")]
  full += [tf.errors.ResourceExhaustedError(None, None, "position; No space left on device")]
  full += [ValueError("RESOURCE_EXHAUSTED: Error writing local file: No space left on device")]
  for error in full:

    def fail(*args, error=error, **kwargs):
      raise error

    for owner in (Position, ocp.StandardCheckpointHandler, ocp.JsonCheckpointHandler):
      method = "save" if owner is Position else "async_save" if hasattr(owner, "async_save") else "save"
      with monkeypatch.context() as context:
        context.setattr(owner, method, fail)
        with pytest.raises(TransientError, match="The checkpoints before it are intact"):
          with checkpoint.Checkpointer(workdir, keep=3) as checkpointer:
            checkpointer.save(_state(4), Position(40))
      assert _restore(workdir) == 3
  with checkpoint.Checkpointer(workdir, keep=3) as checkpointer:
    checkpointer.save(_state(4), Position(40))
  assert _restore(workdir) == 4


@pytest.mark.slow
@pytest.mark.parametrize("name", optimizer_lib.OPTIMIZERS)
def test_the_state_of_every_optimizer_is_restored(name, tmp_path):
  """After an update, so that no moment has its initial value."""
  rule = optimizer_lib.make_optimizer(OptimizerConfig(name=name, learning_rate=0.1), steps=10)

  @jax.jit
  def update(state):
    gradients = jax.tree.map(lambda weight: weight + 1, state.params)
    updates, opt_state = rule.update(gradients, state.opt_state, state.params)
    return TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state)

  params = {"layers_0": {"kernel": jnp.ones((2, 128, 128)), "bias": jnp.ones((2, 4))}, "b": jnp.ones(7)}
  state = update(TrainState(jnp.int32(0), params, rule.init(params)))
  with checkpoint.Checkpointer(tmp_path) as checkpointer:
    checkpointer.save(state, Position())
  with checkpoint.Checkpointer(tmp_path) as checkpointer:
    restored = checkpointer.restore(_abstract(state), Position())
  jax.tree.map(np.testing.assert_array_equal, restored, state)
  jax.tree.map(np.testing.assert_array_equal, update(restored), update(state))


def test_a_run_that_may_no_longer_write_saves_nothing(workdir):
  def lost():
    raise InputError("taken over")

  with pytest.raises(InputError, match="taken over"):
    with checkpoint.Checkpointer(workdir, keep=3, before_save=lost) as checkpointer:
      checkpointer.save(_state(4), Position(40))
  assert _steps(workdir) == _INTACT


def test_a_save_that_fails_after_another_run_has_taken_over_names_that_run(workdir, monkeypatch):
  """Not a TransientError, after which the same command would be restarted and replace the other run in turn."""
  is_lost = []

  def check():
    if is_lost:
      raise InputError("taken over")

  def fail(*unused, **also_unused):
    is_lost.append(True)
    raise OSError(errno.EIO, "Input/output error")

  monkeypatch.setattr(ocp.JsonCheckpointHandler, "async_save", fail)
  with pytest.raises(InputError, match="taken over"):
    with checkpoint.Checkpointer(workdir, keep=3, before_save=check) as checkpointer:
      checkpointer.save(_state(4), Position(40))
  assert _restore(workdir) == 3


def test_checkpoints_of_a_url_are_not_written_to_a_local_folder(monkeypatch):
  folders = []
  monkeypatch.setattr(checkpoint, "_Manager", lambda directory, **options: folders.append(str(directory)))
  checkpoint.Checkpointer("gs://bucket/run")
  assert folders == ["gs://bucket/run/checkpoints"]


def _raised_from(error: Exception, cause: Exception) -> Exception:
  error.__cause__ = cause
  return error


_DEAD_PEER = jax.errors.JaxRuntimeError("UNAVAILABLE: Gloo AllGather failed: Connection reset by peer")
_TOO_LARGE = _raised_from(InputError("x"), jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"))
_DISK_FULL_AT_BARRIER = _raised_from(jax.errors.JaxRuntimeError("UNAVAILABLE"), OSError(errno.ENOSPC, "No space"))
_DEAD_PEER_AT_BARRIER = _raised_from(TimeoutError("Timed out while waiting for a barrier."), _DEAD_PEER)


@pytest.mark.parametrize("error", [_DEAD_PEER, _DEAD_PEER_AT_BARRIER])
def test_a_process_that_dies_during_a_save_is_not_reported_as_a_storage_failure(error, tmp_path, monkeypatch):
  def fail(*args, **names):
    raise error

  with checkpoint.Checkpointer(tmp_path) as checkpointer, pytest.raises(type(error)) as raised:
    monkeypatch.setattr(checkpointer._manager, "save", fail)
    checkpointer.save(_state(1), None)
  assert raised.value is error


@pytest.mark.parametrize(
  ("error", "exit_code", "is_explained"),
  [
    (InputError("x"), 1, True),
    (TransientError("x"), 75, True),
    (OSError(errno.ENOSPC, "No space left on device"), 75, True),
    (OSError(errno.ENOTCONN, "Transport endpoint is not connected"), 75, True),
    (tf.errors.ResourceExhaustedError(None, None, "events; No space left on device"), 75, True),
    (OSError(errno.ENOENT, "No such file or directory"), 75, False),
    (BrokenPipeError(errno.EPIPE, "Broken pipe"), 75, False),
    (KeyError("x"), 75, False),
    (MemoryError(), 75, False),
    (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"), 75, False),
    (_TOO_LARGE, 1, True),
    (_DISK_FULL_AT_BARRIER, 75, True),
    (_DEAD_PEER_AT_BARRIER, 75, False),
  ],
)
def test_errors_that_users_see(error, exit_code, is_explained, capsys):
  assert checks.report(error) == exit_code
  assert not (is_explained and checks.is_computation(error))  # several processes would wait for a dead one
  lines = capsys.readouterr().err.splitlines()
  assert len(lines) == 1 and lines[0].startswith("Error: ") if is_explained else type(error).__name__ in lines[-1]
