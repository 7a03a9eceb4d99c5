"""Checkpoints: weights, optimizer state, step and data position in one atomic Orbax step.

A step exists as a whole or not at all, whenever the process dies. Each carries a fingerprint of its values
(training/fingerprint.py), so that damaged files are noticed even where they still parse. `restore` separates two kinds
of failure. A *damaged* checkpoint (values that differ, undecodable or missing files) is moved aside, and the one before
it is used; nothing is deleted, and nothing moves where no checkpoint is good. A checkpoint that *could not be read*
(no permission, storage that does not answer, no memory, any unknown error) may be good: nothing moves, and the error
is raised.
"""

import json
import logging
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from perceiver_ar_jax.config import InputError, TransientError, checks, reading, writing
from perceiver_ar_jax.parallel import distributed
from perceiver_ar_jax.training import fingerprint
from perceiver_ar_jax.training.checkpoint_items import (
  ArrayHandler,
  Arrays,
  Failure,
  Json,
  JsonHandler,
  Position,
  PositionHandler,
  Saveable,
)
from perceiver_ar_jax.training.owner import write_atomically
from perceiver_ar_jax.training.state import TrainState

_HAS_DATA = "has_data"
"""Key next to the checksums: whether the step contains a data position."""
_DAMAGED, _UNREAD, _UNFIT = 1, 2, 3
"""Severity of an error at restore: damage, could not be read, and valid but not for this config (InputError).

Processes with different errors act on the largest."""
_ELSEWHERE = "another process cannot read it"


class _Damaged(ValueError):
  """The checkpoint's values are not those that were saved."""


class _FailedElsewhere(Exception):
  """This process succeeded, and another process failed at least as severely as by damage."""


_DAMAGE = (_Damaged, _FailedElsewhere, FileNotFoundError, EOFError, UnicodeDecodeError, json.JSONDecodeError)
_DAMAGE_MESSAGES = re.compile(
  "^(DATA_LOSS|NOT_FOUND|OUT_OF_RANGE):"  # TensorStore; its other statuses have other causes as well
  "|Truncated Zstd|[Cc]orrupt|[Cc]hecksum|sstable|Read less bytes|No such file|Failed to find any matching files"
  "|was not found in the checkpoint|pytree structure error"
)


# Where several arrays fail, as on a full disk, Orbax raises the first error, and asyncio logs tracebacks of the others.
logging.getLogger("asyncio").addFilter(lambda record: "exception was never retrieved" not in record.getMessage())


class _Manager(ocp.CheckpointManager):
  """Reads the metrics of every step when it is constructed; damaged metrics must not cost the steps."""

  def metrics(self, step: int):
    try:
      return super().metrics(step)
    except ValueError:  # raised for undecodable JSON
      return None


class Checkpointer:
  """The checkpoints of one workdir: the newest `keep`, and the best by nats per token at evaluation.

  Args:
    workdir: folder of the run.
    keep: number of newest checkpoints to keep.
    read_only: only restore; nothing is created, moved or deleted.
    before_save: called before each save; raises if this run may no longer write to the workdir.
  """

  def __init__(
    self,
    workdir: epath.PathLike,
    *,
    keep: int = 1,
    read_only: bool = False,
    before_save: Callable[[], None] = lambda: None,
  ):
    workdir = epath.Path(workdir)
    if not workdir.is_absolute():  # `absolute` would convert a URL such as gs://bucket to a local path
      workdir = workdir.absolute()
    self._directory = workdir / "checkpoints"
    self._damaged = workdir / "damaged"
    self._read_only = read_only
    self._before_save = before_save
    policies = ocp.checkpoint_managers
    best = policies.BestN(
      get_metric_fn=lambda metrics: metrics["nats_per_token"],
      reverse=True,
      n=1,
      keep_checkpoints_without_metrics=False,
    )
    distributed.wait_for_all("checkpoints")  # compilation or imports may have taken one process much longer
    with reading(self._directory, "give this user access"):
      self._manager = _Manager(
        self._directory,
        options=ocp.CheckpointManagerOptions(
          preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), best]),
          cleanup_tmp_directories=not read_only,
          read_only=read_only,
          create=not read_only,
        ),
        item_handlers={
          "params": ArrayHandler(),
          "optimizer": ArrayHandler(),
          "fingerprint": JsonHandler(),
          "data": PositionHandler(),
        },
      )

  def __enter__(self) -> "Checkpointer":
    return self

  def __exit__(self, *unused) -> None:
    self._write(self._manager.close)  # waits for a save in progress

  def save(self, state: TrainState, data: Saveable | None) -> None:
    """Starts to save `state` and the position of `data`; returns once both may change again.

    Without `data` (weights from elsewhere), training resumed from here starts over with the data. A saved step is left
    alone.

    Raises:
      TransientError: it, or the checkpoint before it, could not be written, and may be later (a full disk).
      InputError: this user may not write it, or this run may not (`before_save`).
    """
    step = int(state.step)
    if step in self._manager.all_steps():
      return
    self._before_save()
    checksums = fingerprint.compute({"params": state.params, "optimizer": state.opt_state})
    items = {
      "params": Arrays(state.params),
      "optimizer": Arrays({"step": state.step, "opt_state": state.opt_state}),
      "fingerprint": Json(checksums | {_HAS_DATA: int(data is not None)}),
    }
    if data is not None:
      items["data"] = Position(data)
    self._write(lambda: self._manager.save(step, args=ocp.args.Composite(**items)))

  def add_metrics(self, step: int, metrics: dict[str, float]) -> None:
    """Adds the metrics of an evaluation, with `nats_per_token`, which decides on the best, to the saved `step`.

    Waits for the save of `step`. The file has the path and format of Orbax's own metrics and is written atomically:
    half of a file would keep Orbax from opening the directory.

    Raises:
      InputError, TransientError: as `save`.
    """

    def write():
      path = self._directory / str(step) / "metrics" / "metrics"
      path.parent.mkdir(exist_ok=True)
      write_atomically(path, json.dumps(metrics))

    self._write(self._manager.wait_until_finished)
    if jax.process_index() == 0:
      self._write(write)
    distributed.wait_for_all(f"metrics of step {step}")
    self._manager.reload()

  def has_metrics(self, step: int) -> bool:
    """Returns whether the saved `step` has the metrics of an evaluation."""
    return bool(self._manager.metrics(step))

  def restore(self, abstract: TrainState, data: Saveable) -> TrainState | None:
    """Returns the newest good state in the layout of `abstract`, with `data` moved to its position.

    Returns None where no checkpoint exists. A damaged checkpoint is reported and moved to `damaged/`, and the one
    before it is used.

    Raises:
      InputError: every checkpoint is damaged, `data` does not fit the saved position, or a file may not be read.
      TransientError: a checkpoint could not be read, and may be later; nothing was moved.
    """
    items = {
      "params": Arrays(abstract.params),
      "optimizer": Arrays({"step": abstract.step, "opt_state": abstract.opt_state}),
      "data": Position(data),
    }
    restored = self._restore_newest(items, skip_damaged=True)
    return restored and TrainState(params=restored[1]["params"], **restored[1]["optimizer"])

  def restore_params(self, abstract_params: dict) -> tuple[int, dict] | None:
    """Returns (step, weights) of the newest checkpoint, or None where no checkpoint exists.

    Raises:
      InputError: it is damaged (an older one is never used instead), or may not be read.
      TransientError: it could not be read, and may be later.
    """
    restored = self._restore_newest({"params": Arrays(abstract_params)}, skip_damaged=False)
    return restored and (restored[0], restored[1]["params"])

  def _write(self, write: Callable[[], object]) -> None:
    """Calls `write`, which writes this checkpoint or finishes the one before; raises as `save`."""
    try:
      write()
    except Exception as error:
      message = (
        f"A checkpoint could not be written to {self._directory} ({checks.one_line(error)}). The checkpoints before it"
        " are intact."
      )
      if checks.is_transient(error):
        raise TransientError(f"{message} To resume from the newest, {checks.WHEN_STORAGE_IS_BACK}") from error
      if checks.is_denied(error):
        raise InputError(f"{message} Give this user write access, and start the same command again.") from error
      raise

  def _restore_newest(self, items: dict[str, ocp.args.CheckpointArgs], skip_damaged: bool):
    """Returns (step, {item: value}) of the newest good checkpoint, or None where no checkpoint exists."""
    damaged = []
    steps = sorted(self._manager.all_steps(), reverse=True) if self._directory.exists() else []
    for step in steps:
      values, error = None, None
      try:
        values = self._restore_step(step, items)
      except Exception as any_error:  # `_severity` classifies it
        error = any_error
      severity = self._severity(step, error)
      worst = distributed.maximum(severity)  # the same on all processes
      if worst == 0:
        self._set_aside(damaged)
        return step, values
      reason = checks.one_line(_root(error)) if error else _ELSEWHERE
      if worst > _DAMAGED:
        raise self._unread(step, error, reason, worst, severity)
      if not skip_damaged:
        raise self._refusal(step, reason, [older for older in steps if older < step])
      print(f"The checkpoint of step {step} in {self._directory} is damaged: {reason}", file=sys.stderr)
      damaged.append(step)
    if damaged:
      raise InputError(
        f"All checkpoints ({', '.join(map(str, sorted(damaged)))}) in {self._directory} are damaged; none was moved."
        " Put back a good copy, or start over with another --workdir."
      )
    return None

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

  def _unread(self, step: int, error: Exception | None, reason: str, worst: int, severity: int) -> Exception:
    """Returns the error to raise for a step that is not damaged."""
    where = f"the checkpoint of step {step} in {self._directory}"
    if severity < worst:
      kind = InputError if worst == _UNFIT else TransientError
      return kind(f"Another process cannot resume from {where}: see its message. Nothing was moved.")
    if worst == _UNFIT:
      return error
    if checks.is_denied(error):
      kind, fix = InputError, "give this user access to it."
    elif checks.is_transient(error):
      kind, fix = TransientError, "start the same command again once storage and memory are available."
    else:
      error.add_note(f"This happened while restoring {where}. Nothing was moved.")
      return error
    result = kind(f"Could not read {where} ({reason}). It may be good, so nothing was moved: {fix}")
    result.__cause__ = error
    return result

  def _refusal(self, step: int, reason: str, older: list[int]) -> InputError:
    """Returns the error for commands that only read: the damaged step, and how to choose an older one."""
    fix = "Put back a good copy."
    if older:
      fix = (
        f"An older checkpoint is not used unasked. To use step {older[0]}, resume training with this --workdir, which"
        f" moves step {step} to damaged/, or move {self._directory / str(step)} to another folder yourself."
      )
    return InputError(f"The newest checkpoint in {self._directory}, of step {step}, is damaged: {reason}. {fix}")

  def _restore_step(self, step: int, items: dict[str, ocp.args.CheckpointArgs]) -> Mapping[str, Any]:
    saved = self._restore_items(step, {"fingerprint": Json()})["fingerprint"]
    arrays = {name: item for name, item in items.items() if name != "data"}
    if missing := fingerprint.missing(saved, _checked({name: item.item for name, item in arrays.items()})):
      raise InputError(
        f"The checkpoint of step {step} in {self._directory} has other arrays than this version and config: it lacks"
        f" {', '.join(missing[:3])}. Resume with the version of perceiver_ar_jax that saved it, or start over with"
        " another --workdir."
      )
    values = self._restore_items(step, arrays)
    trees = _checked(values)
    if differing := fingerprint.differences(saved, trees):
      raise _Damaged(f"the values of {', '.join(differing[:3])} are not those that were saved")
    if "optimizer" in items and int(values["optimizer"]["step"]) != step:
      raise _Damaged(f"its optimizer state is of step {values['optimizer']['step']}")
    if "data" in items and saved.get(_HAS_DATA, 1):  # last, so that a damaged step does not move the data position
      self._restore_items(step, {"data": items["data"]})
    return values

  def _restore_items(self, step: int, items: Mapping[str, ocp.args.CheckpointArgs]) -> Mapping[str, Any]:
    """Returns the values of some items of a step; raises on all processes if one of them fails."""
    values = self._manager.restore(step, args=ocp.args.Composite(**items))
    errors = [value.error for value in values.values() if isinstance(value, Failure)]
    if distributed.maximum(len(errors)):  # the computations that follow need all processes
      raise errors[0] if errors else _FailedElsewhere(_ELSEWHERE)
    return values

  def _set_aside(self, steps: list[int]) -> None:
    """Moves damaged steps out of the way of the run that resumes; deletes nothing."""
    if not steps or self._read_only:
      return
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


def _checked(values: Mapping[str, Any]) -> dict[str, Any]:
  """The trees that a fingerprint covers."""
  return {name: value["opt_state"] if name == "optimizer" else value for name, value in values.items()}


def _root(error: BaseException) -> BaseException:
  """Returns the error at the start of the chain of explicit causes, which says the most."""
  while error.__cause__ is not None:
    error = error.__cause__
  return error
