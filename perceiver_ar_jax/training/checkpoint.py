"""Checkpoints: weights, optimizer, step and data position in one atomic Orbax step.

A step either is there as a whole or not at all, whenever the process dies. Every one carries a fingerprint
of its values, so that damaged files are noticed even where they still parse; `restore` then falls back to
the newest good one and moves the damaged ones aside, deleting nothing. Where none is good, nothing moves.
"""

import dataclasses
import json
import sys
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

from perceiver_ar_jax.config import InputError
from perceiver_ar_jax.parallel import distributed
from perceiver_ar_jax.training.state import TrainState

_HAS_DATA = "has_data"  # beside the bit sums: whether the step holds a data position


_SEVERITY = {type(None): 0, InputError: 2}
"""Of what a restore raised, to find the worst over all processes; any other error, damage, is 1."""


class Saveable(Protocol):
  """A data iterator whose complete position lives in files under a directory."""

  def save(self, directory: epath.Path) -> None: ...

  def restore(self, directory: epath.Path) -> None: ...


class _Failure:
  """What a restore raised on this process, to be weighed once all processes are through."""

  def __init__(self, error: Exception):
    self.error = error


class _ArrayHandler(ocp.StandardCheckpointHandler):
  """Arrays; what fails is returned, since Orbax makes all processes wait for one that raises."""

  def restore(self, *args, **kwargs):
    try:
      return super().restore(*args, **kwargs)
    except Exception as error:
      return _Failure(error)


@ocp.args.register_with_handler(_ArrayHandler, for_save=True)
@dataclasses.dataclass
class ArraySave(ocp.args.StandardSave):
  """A tree of arrays to save."""


@ocp.args.register_with_handler(_ArrayHandler, for_restore=True)
@dataclasses.dataclass
class ArrayRestore(ocp.args.StandardRestore):
  """The shapes and layout of a tree of arrays to restore."""


class DataHandler(ocp.CheckpointHandler):
  """Lets a data iterator write its own files into the step, inside Orbax's atomic commit."""

  def save(self, directory: epath.Path, args: "DataSave") -> None:
    args.iterator.save(directory)

  def restore(self, directory: epath.Path, args: "DataRestore") -> _Failure | None:
    try:
      args.iterator.restore(directory)
    except Exception as error:
      return _Failure(error)


@ocp.args.register_with_handler(DataHandler, for_save=True)
@dataclasses.dataclass
class DataSave(ocp.args.CheckpointArgs):
  """A data iterator whose position to save."""

  iterator: Saveable


@ocp.args.register_with_handler(DataHandler, for_restore=True)
@dataclasses.dataclass
class DataRestore(ocp.args.CheckpointArgs):
  """A data iterator to move to the saved position."""

  iterator: Saveable


class Checkpointer:
  """The checkpoints of one workdir: the newest `keep`, and the best by nats per token at evaluation."""

  def __init__(self, workdir: epath.PathLike, *, keep: int = 1, read_only: bool = False):
    self._directory = epath.Path(workdir).absolute() / "checkpoints"
    self._read_only = read_only
    policies = ocp.checkpoint_managers
    distributed.wait_for_all("checkpoints")  # compilation or imports may have taken one of them much longer
    best = policies.BestN(
      get_metric_fn=lambda metrics: metrics["nats_per_token"],
      reverse=True,
      n=1,
      keep_checkpoints_without_metrics=False,
    )
    self._manager = ocp.CheckpointManager(
      self._directory,
      options=ocp.CheckpointManagerOptions(
        preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), best]),
        cleanup_tmp_directories=not read_only,
        read_only=read_only,
        create=not read_only,
      ),
      item_handlers={
        "params": _ArrayHandler(),
        "optimizer": _ArrayHandler(),
        "fingerprint": ocp.JsonCheckpointHandler(),
        "data": DataHandler(),
      },
    )

  def __enter__(self) -> "Checkpointer":
    return self

  def __exit__(self, *unused) -> None:
    self._written(self._manager.close)  # waits for a save under way

  def save(self, state: TrainState, data: Saveable | None) -> None:
    """Starts to save `state` and the position of `data`; returns once both may change again.

    Without `data` (weights from elsewhere), training resumed from here starts over with the data. A step that is saved
    already is left alone.

    Raises:
      InputError: it, or the checkpoint before it, could not be written.
    """
    step = int(state.step)
    if step in self._manager.all_steps():
      return
    fingerprint = _fingerprint("params", state.params) | _fingerprint("optimizer", state.opt_state)
    items = {
      "params": ArraySave(state.params),
      "optimizer": ArraySave({"step": state.step, "opt_state": state.opt_state}),
      "fingerprint": ocp.args.JsonSave(fingerprint | {_HAS_DATA: int(data is not None)}),
    }
    if data is not None:
      items["data"] = DataSave(data)
    self._written(lambda: self._manager.save(step, args=ocp.args.Composite(**items)))

  def _written(self, write: Callable[[], None]) -> None:
    """Calls `write`; raises InputError if a checkpoint, this one or the one before, could not be written."""
    try:
      write()
    except TimeoutError:  # another process did not write its part: it is dead, and a restart mends that
      raise
    except (OSError, ValueError) as error:  # a full disk has many faces, TensorStore's own among them
      raise InputError(
        f"A checkpoint could not be written to {self._directory}: {' '.join(str(error).split())[:300]} Those before it"
        " are as they were: make room, and the same command goes on from the newest."
      ) from error

  def add_metrics(self, step: int, metrics: dict[str, float]) -> None:
    """Adds the metrics of an evaluation, `nats_per_token` among them, to the saved `step`; they decide on the best.

    Waits for the save of `step`. The file is written in the place and format of Orbax's own metrics, and atomically: a
    half-written one would keep Orbax from opening the directory.

    Raises:
      InputError: the checkpoint or the file could not be written.
    """
    self._written(self._manager.wait_until_finished)
    if jax.process_index() == 0:
      self._written(lambda: self._write_metrics(step, metrics))
    distributed.wait_for_all(f"metrics of step {step}")
    self._manager.reload()

  def _write_metrics(self, step: int, metrics: dict[str, float]) -> None:
    path = self._directory / str(step) / "metrics" / "metrics"
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(metrics))
    temporary.replace(path)

  def has_metrics(self, step: int) -> bool:
    """Returns whether the saved `step` has the metrics of an evaluation."""
    return bool(self._manager.metrics(step))

  def restore(self, abstract: TrainState, data: Saveable) -> TrainState | None:
    """The newest good state in the layout of `abstract`, with `data` moved to its position.

    Returns None where no checkpoint exists. A damaged one is reported and moved to `damaged/`, and the one
    before it is taken.

    Raises:
      InputError: every checkpoint is damaged, or `data` does not fit the saved position.
    """
    items = {
      "params": ArrayRestore(abstract.params),
      "optimizer": ArrayRestore({"step": abstract.step, "opt_state": abstract.opt_state}),
      "data": DataRestore(data),
    }
    restored = self._restore_newest(items)
    if restored is None:
      return None
    _, values = restored
    return TrainState(params=values["params"], **values["optimizer"])

  def restore_params(self, abstract_params: dict) -> tuple[int, dict] | None:
    """(step, weights) of the newest good checkpoint, or None; damaged ones are treated as in `restore`."""
    restored = self._restore_newest({"params": ArrayRestore(abstract_params)})
    return restored and (restored[0], restored[1]["params"])

  def _restore_newest(self, items: dict[str, ocp.args.CheckpointArgs]):
    """(step, {item: value}) of the newest checkpoint that is whole, or None where there is none at all."""
    damaged = []
    for step in sorted(self._manager.all_steps(), reverse=True) if self._directory.exists() else []:
      values, error = self._attempt(step, items)
      worst = distributed.largest(_SEVERITY.get(type(error), 1))  # the same on all processes
      if worst == _SEVERITY[InputError]:
        elsewhere = InputError(f"Another process cannot go on from step {step}: its own message says why.")
        raise error if isinstance(error, InputError) else elsewhere
      if worst:
        reason = " ".join(str(error or "another process cannot read it").split())[:300]
        print(f"The checkpoint of step {step} in {self._directory} is damaged: {reason}", file=sys.stderr)
        damaged.append(step)
      else:
        self._set_aside(damaged)
        return step, values
    if damaged:
      raise InputError(
        f"None of the checkpoints {sorted(damaged)} in {self._directory} can be read. Put back a good copy, or start"
        " anew with another --workdir."
      )
    return None

  def _attempt(self, step: int, items: dict[str, ocp.args.CheckpointArgs]) -> tuple[dict | None, Exception | None]:
    """(values, None) of a step, or (None, what is wrong with it)."""
    try:
      return self._restore_step(step, items), None
    except Exception as error:  # whatever a damaged file makes its reader raise; it is reported
      return None, error

  def _restore_step(self, step: int, items: dict[str, ocp.args.CheckpointArgs]) -> dict:
    saved = self._manager.restore(step, args=ocp.args.Composite(fingerprint=ocp.args.JsonRestore()))["fingerprint"]
    arrays = {name: item for name, item in items.items() if name != "data"}
    values = self._manager.restore(step, args=ocp.args.Composite(**arrays))
    _raise_together(values)
    found = _fingerprint("params", values["params"])
    if "optimizer" in items:
      found |= _fingerprint("optimizer", values["optimizer"]["opt_state"])
    differing = [name for name in found if saved.get(name) != found[name]]
    if differing:
      raise ValueError(f"the values of {', '.join(differing[:3])} are not those that were saved")
    if "optimizer" in items and int(values["optimizer"]["step"]) != step:
      raise ValueError(f"it says that it is of step {values['optimizer']['step']}")
    if "data" in items and saved.get(_HAS_DATA, 1):  # last, so that a step given up leaves the data where it was
      _raise_together(self._manager.restore(step, args=ocp.args.Composite(data=items["data"])))
    return {name: values[name] for name in arrays}

  def _set_aside(self, steps: list[int]) -> None:
    """Moves damaged steps out of the way of the run that goes on, deleting nothing."""
    if not steps or self._read_only:
      return
    if jax.process_index() == 0:
      self._move(steps)
    distributed.wait_for_all("damaged checkpoints are moved")
    self._manager.reload()

  def _move(self, steps: list[int]) -> None:
    damaged = self._directory.parent / "damaged"
    damaged.mkdir(exist_ok=True)
    for step in steps:
      copies = sum(path.name.split("-")[0] == str(step) for path in damaged.iterdir())
      target = damaged / (f"{step}-{copies}" if copies else str(step))
      (self._directory / str(step)).rename(target)
      print(f"Step {step} was moved to {target}; the checkpoint before it is taken.", file=sys.stderr)


def _raise_together(values: Mapping[str, Any]) -> None:
  """Raises what failed here or, if all went well here but not on another process, an error of its own."""
  errors = [value.error for value in values.values() if isinstance(value, _Failure)]
  # The computations that follow need all processes.
  if distributed.largest(len(errors)):
    raise errors[0] if errors else ValueError("another process cannot read it")


@jax.jit
def _bit_sums(leaves: list[jax.Array]) -> list[jax.Array]:
  """uint32 sums of each array's bits: the same on every mesh, different after almost any damage."""
  kinds = {4: jnp.uint32, 2: jnp.uint16, 1: jnp.uint8}

  def bit_sum(leaf):
    bits = jax.lax.bitcast_convert_type(leaf, kinds[leaf.dtype.itemsize])
    return bits.astype(jnp.uint32).sum(dtype=jnp.uint32)

  return [bit_sum(leaf) for leaf in leaves]


def _fingerprint(prefix: str, tree) -> dict[str, int]:
  """{path of each array: its bit sum}."""
  paths, leaves = zip(*jax.tree.leaves_with_path(tree))
  sums = jax.device_get(_bit_sums(list(leaves)))
  return {prefix + jax.tree_util.keystr(path): int(value) for path, value in zip(paths, sums)}
