"""Checkpoints: weights, optimizer state, step and data position in one atomic Orbax step.

A step exists as a whole or not at all, whenever the process dies. Each contains a fingerprint of its values, so that
damaged files are noticed even where they still parse. A *damaged* checkpoint (values that differ, undecodable or
missing files) is moved aside, unless none is good, and the one before it is used. One that *could not be read* (no
permission, storage that does not answer, any unknown error) may be good: nothing moves, and the error is raised.
"""

import contextlib
import dataclasses
import functools
import json
import logging
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

from perceiver_ar_jax.config import InputError, TransientError, checks, reading, require, writing
from perceiver_ar_jax.parallel import distributed
from perceiver_ar_jax.training.step import TrainState
from perceiver_ar_jax.training.workdir import write_atomically

_VERSION = {"fingerprint_version": 2}
_HAS_DATA = "has_data"  # key next to the checksums: whether the step contains a data position
_DAMAGED, _UNREAD, _UNFIT = 1, 2, 3
"""Errors at restore: damage, could not be read, valid but not for this config. Processes act on the largest of all."""
_DAMAGE = (FileNotFoundError, EOFError, UnicodeDecodeError, json.JSONDecodeError)
_DAMAGE_MESSAGES = re.compile(
  "^(DATA_LOSS|NOT_FOUND|OUT_OF_RANGE):"  # TensorStore; its other statuses have other causes as well
  "|Truncated Zstd|[Cc]orrupt|[Cc]hecksum|sstable|Read less bytes|No such file|Failed to find any matching files"
  "|was not found in the checkpoint|pytree structure error"
)

# Where several arrays fail, as on a full disk, Orbax raises the first error, and asyncio logs tracebacks of the others.
logging.getLogger("asyncio").addFilter(lambda record: "exception was never retrieved" not in record.getMessage())


class _Damaged(ValueError):
  """The checkpoint is damaged; raised on all processes."""


class _IteratorHandler(ocp.CheckpointHandler):
  """Lets the iterator write its own files into the step, inside Orbax's atomic commit."""

  def save(self, directory: epath.Path, args: "_Position") -> None:
    args.iterator.save(directory)

  def restore(self, directory: epath.Path, args: "_Position") -> None:
    args.iterator.restore(directory)


@ocp.args.register_with_handler(_IteratorHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class _Position(ocp.args.CheckpointArgs):
  iterator: Any


class _Manager(ocp.CheckpointManager):
  """Reads the metrics of every step when it is constructed; damaged metrics must not cost the steps."""

  def metrics(self, step: int):
    with contextlib.suppress(ValueError):  # raised for undecodable JSON
      return super().metrics(step)


class Checkpointer(contextlib.AbstractContextManager):
  """The checkpoints of one workdir: the newest `keep`, and the best by nats per token at evaluation.

  With `read_only`, nothing is created, moved or deleted. `before_save` raises if this run may no longer write there.
  Data iterators save their complete position in files: `data.save(folder)`, `data.restore(folder)`.
  """

  def __init__(
    self, workdir: epath.PathLike, *, keep: int = 1, read_only: bool = False, before_save: Callable = lambda: None
  ):
    workdir = epath.Path(workdir)
    if not workdir.is_absolute():  # `absolute` would convert a URL such as gs://bucket to a local path
      workdir = workdir.absolute()
    self._directory, self._damaged = workdir / "checkpoints", workdir / "damaged"
    self._before_save = before_save
    self._arrays, self._json = ocp.StandardCheckpointHandler(), ocp.JsonCheckpointHandler()
    policies, by_loss = ocp.checkpoint_managers, lambda metrics: metrics["nats_per_token"]
    best = policies.BestN(get_metric_fn=by_loss, reverse=True, n=1, keep_checkpoints_without_metrics=False)
    preserved, writes = policies.AnyPreservationPolicy([policies.LatestN(keep), best]), not read_only
    access = {"cleanup_tmp_directories": writes, "read_only": read_only, "create": writes}
    options = ocp.CheckpointManagerOptions(preservation_policy=preserved, **access)
    distributed.wait_for_all("checkpoints")  # compilation or imports may have taken one process much longer
    with reading(self._directory, "give this user access"):
      self._manager = _Manager(self._directory, options=options)

  def __exit__(self, *unused) -> None:
    with self._writing():
      self._manager.close()  # waits for a save in progress

  def save(self, state: TrainState, data) -> None:
    """Starts to save `state`, unless its step is saved, and the position of `data`; both may change afterwards.

    Without `data` (weights from elsewhere), training resumed from here starts over with the data. Raises TransientError
    or InputError if it, or the checkpoint before it, could not be written.
    """
    step = int(state.step)
    if step in self._manager.all_steps():
      return
    self._before_save()
    trees = _trees(state)
    items = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
    items["fingerprint"] = ocp.args.JsonSave(fingerprint(trees) | {_HAS_DATA: int(data is not None)})
    if data is not None:
      items["data"] = _Position(data)
    with self._writing():
      self._manager.save(step, args=ocp.args.Composite(**items))

  def add_metrics(self, step: int, metrics: dict[str, float]) -> None:
    """Adds the metrics of an evaluation, with `nats_per_token`, to the saved `step`, as Orbax writes them.

    Waits for the save of `step`; raises as `save`.
    """
    with self._writing():
      self._manager.wait_until_finished()
      if jax.process_index() == 0:
        path = self._directory / str(step) / "metrics" / "metrics"
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, json.dumps(metrics))
    distributed.wait_for_all(f"metrics of step {step}")
    self._manager.reload()

  def has_metrics(self, step: int) -> bool:
    """Returns whether the saved `step` has the metrics of an evaluation."""
    return bool(self._manager.metrics(step))

  def restore(self, abstract: TrainState, data) -> TrainState | None:
    """Returns the newest good state in the layout of `abstract`, with `data` moved to its position.

    Returns None where no checkpoint exists. A damaged one is moved to `damaged/`, and the one before it is used. Raises
    InputError if all are damaged, or one does not fit or may not be read, and TransientError if it may be read later.
    """
    trees, damaged = _trees(abstract), []
    for step in reversed(self._steps()):
      try:
        restored = self._restore_step(step, trees, data)
      except _Damaged as error:  # on all processes
        print(f"The checkpoint of step {step} in {self._directory} is damaged: {error}", file=sys.stderr)
        damaged.append(step)
      else:
        if damaged:
          self._set_aside(damaged)
        return TrainState(**restored.pop("optimizer"), **restored)
    problem = f"All checkpoints ({', '.join(map(str, reversed(damaged)))}) in {self._directory} are damaged"
    require(not damaged, f"{problem}; none was moved. Put back a good copy, or start over with another --workdir.")
    return None

  def restore_params(self, abstract_params: dict, step: int | None = None) -> tuple[int, dict] | None:
    """Returns (step, weights) of the checkpoint of `step` (None: the newest), or None where no checkpoint exists.

    If it has averaged weights, returns these. Raises as `restore`, also if it is damaged (an older one is never used
    instead) or is not one of those kept.
    """
    steps = self._steps()
    if not steps:
      return None
    step = steps[-1] if step is None else step
    require(step in steps, f"{self._directory} has no checkpoint of step {step}; it has {', '.join(map(str, steps))}.")
    try:
      has_average = self._read_on_all(step, (self._directory / str(step) / "ema").exists)
      name = "ema" if has_average else "params"
      return step, self._restore_step(step, {name: abstract_params}, None)[name]
    except _Damaged as error:
      problem = f"The checkpoint of step {step} in {self._directory} is damaged: {error}. An older one is not used"
      fix = "put back a good copy, or resume training, which moves this one to damaged/"
      raise InputError(f"{problem} unasked: {fix}.") from error

  def _steps(self) -> list[int]:
    return sorted(self._manager.all_steps()) if self._directory.exists() else []

  @contextlib.contextmanager
  def _writing(self) -> Iterator[None]:
    """A context that writes a checkpoint or finishes the one before; raises as `save`."""
    try:
      yield
    except Exception as error:
      if checks.is_computation(error):  # another process died during the save: storage is not the cause
        raise
      self._before_save()  # raises if another run has taken over, which deletes unfinished saves when it starts
      message = f"A checkpoint could not be written to {self._directory} ({checks.one_line(error)})."
      message += " The checkpoints before it are intact."
      if checks.is_transient(error):
        raise TransientError(f"{message} To resume from the newest, {checks.WHEN_STORAGE_IS_BACK}") from error
      if checks.is_denied(error):
        raise InputError(f"{message} Give this user write access, and start the same command again.") from error
      raise

  def _restore_step(self, step: int, trees: dict[str, Any], data) -> dict[str, Any]:
    folder, restored = self._directory / str(step), {}
    saved = self._read_on_all(step, lambda: self._json.restore(folder / "fingerprint"))
    missing = [path for path in _leaves(trees) if path not in saved]
    problem = f"The checkpoint of step {step} in {self._directory} has other arrays than this version and config"
    fix = "Resume with the version that saved it, or start over with another --workdir."
    require(not missing, f"{problem}: it lacks {', '.join(missing[:3])}. {fix}")
    for name, tree in trees.items():
      args = (folder / name, None, ocp.args.StandardRestore(tree))
      restored[name] = self._read_on_all(step, functools.partial(self._arrays.restore, *args))
    if differing := differences(saved, restored):
      raise _Damaged(f"the values of {', '.join(differing[:3])} are not those that were saved")
    if "optimizer" in trees and int(restored["optimizer"]["step"]) != step:
      raise _Damaged(f"its optimizer state is of step {restored['optimizer']['step']}")
    if data and saved.get(_HAS_DATA, 1):  # last, so that a damaged step does not move the data position
      self._read_on_all(step, lambda: data.restore(folder / "data"))
    return restored

  def _read_on_all(self, step: int, read: Callable[[], Any]) -> Any:
    """Returns `read()`; raises on all processes the most severe error of one: what follows needs all of them."""
    value = error = None
    try:
      value = read()
    except Exception as any_error:  # `_severity` classifies it
      error = any_error
    severity = self._severity(step, error)
    worst = distributed.maximum(severity)
    if worst == 0:
      return value
    reason = checks.one_line(_root(error)) if severity == worst else "another process cannot read it: see its message"
    if worst == _DAMAGED:
      raise _Damaged(reason) from error
    message = f"Could not read the checkpoint of step {step} in {self._directory} ({reason})."
    if severity == worst and checks.is_denied(error) and severity != _UNFIT:
      raise InputError(f"{message} It may be good, so nothing was moved: give this user access to it.") from error
    if severity == worst and (severity == _UNFIT or not checks.is_transient(error)):
      error.add_note(f"{message} Nothing was moved.")
      raise error
    kind = InputError if worst == _UNFIT else TransientError
    raise kind(f"{message} It may be good, so nothing was moved: resume once storage and memory are back.") from error

  def _severity(self, step: int, error: Exception | None) -> int:
    """0 without an error; `_DAMAGED` only if the error proves it: the run loses a checkpoint that is moved."""
    if error is None:
      return 0
    if isinstance(error, InputError):
      return _UNFIT
    if checks.is_transient(error) or checks.is_denied(error) or not (self._directory / str(step)).exists():
      return _UNREAD
    root = _root(error)
    return _DAMAGED if isinstance(root, _DAMAGE) or _DAMAGE_MESSAGES.search(checks.one_line(root)) else _UNREAD

  def _set_aside(self, steps: list[int]) -> None:
    """Moves damaged steps out of the way of the run that resumes; deletes nothing."""
    if jax.process_index() == 0:
      with writing(self._damaged, "give this user write access"):
        self._damaged.mkdir(exist_ok=True)
        for step in steps:
          copies = sum(path.name.split("-")[0] == str(step) for path in self._damaged.iterdir())
          target = self._damaged / (f"{step}-{copies}" if copies else str(step))
          (self._directory / str(step)).rename(target)
          print(f"Step {step} was moved to {target}; the checkpoint before it is used.", file=sys.stderr)
    distributed.wait_for_all("damaged checkpoints are moved")
    self._manager.reload()


def _trees(state: TrainState) -> dict[str, Any]:
  """The arrays of a state as items of a checkpoint."""
  trees = {"params": state.params, "optimizer": {"step": state.step, "opt_state": state.opt_state}}
  return trees if state.ema is None else trees | {"ema": state.ema}


def _root(error: BaseException) -> BaseException:
  """Returns the error at the start of the chain of explicit causes, which says the most."""
  while error.__cause__ is not None:
    error = error.__cause__
  return error


def fingerprint(trees: Mapping[str, Any]) -> dict[str, int]:
  """Returns {path of an array: its checksum} of items of a checkpoint but for the step, and the version.

  A checksum is the uint32 sum, over the elements, of a hash of the element's bits and its index in the whole array: the
  same on every mesh, and changed by swapped rows, columns or shards. Each device sums its shard.
  """
  leaves = _leaves(trees)
  sums = jax.device_get(_sums(list(leaves.values())))
  return {path: int(value) for path, value in zip(leaves, sums)} | _VERSION


def differences(saved: Mapping[str, int], trees: Mapping[str, Any]) -> list[str]:
  """Returns the paths of arrays in `trees` whose checksum is not that of a `saved` fingerprint of this version."""
  if not _VERSION.items() <= saved.items():
    return []
  return [path for path, value in fingerprint(trees).items() if saved.get(path) != value]


def _leaves(trees: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the arrays that a fingerprint covers, by path."""
  covered = {name: tree["opt_state"] if name == "optimizer" else tree for name, tree in trees.items()}
  return {
    name + jax.tree_util.keystr(path): leaf
    for name, tree in covered.items()
    for path, leaf in jax.tree.leaves_with_path(tree)
  }


def _ordered_sum(leaf: jax.Array) -> jax.Array:
  if leaf.dtype == bool:
    bits = leaf.astype(jnp.uint32)
  else:  # types of 64 bits get a last axis of two
    unsigned = {8: jnp.uint32, 4: jnp.uint32, 2: jnp.uint16, 1: jnp.uint8}[leaf.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32)
  # One axis after the other, so that arrays of more than 2^32 elements need no wider index.
  index = jnp.zeros(bits.shape, jnp.uint32)
  for axis in range(bits.ndim):
    index = _mix(index + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) + jnp.uint32(0x9E3779B9))
  return _mix(bits + index).sum(dtype=jnp.uint32)


_sums = jax.jit(lambda leaves: list(map(_ordered_sum, leaves)))


def _mix(x: jax.Array) -> jax.Array:
  """A bijection of uint32 in which each input bit affects all output bits (the finalizer of MurmurHash3)."""
  x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
  return x ^ (x >> 16)
