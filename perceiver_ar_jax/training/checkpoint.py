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
from perceiver_ar_jax.training import checkpoint_items as items_lib
from perceiver_ar_jax.training import fingerprint
from perceiver_ar_jax.training.state import TrainState

_HAS_DATA = "has_data"
"""Key next to the checksums: whether the step contains a data position."""

_DAMAGED, _UNREAD, _UNFIT = 1, 2, 3
"""Severity of an error at restore, in the order in which processes that met different ones decide together: damage,
could not be read, and valid but not for this config (InputError)."""


class _Damaged(ValueError):
  """The checkpoint's values are not those that were saved."""


class _FailedElsewhere(Exception):
  """This process succeeded, and another one failed."""


_DAMAGE = (_Damaged, FileNotFoundError, EOFError, UnicodeDecodeError, json.JSONDecodeError)
_DAMAGE_WORDS = re.compile(
  "^(DATA_LOSS|NOT_FOUND|OUT_OF_RANGE):"  # TensorStore; its other statuses have other causes as well
  "|Truncated Zstd|[Cc]orrupt|[Cc]hecksum|sstable|Read less bytes|No such file|Failed to find any matching files"
  "|was not found in the checkpoint|pytree structure error"
)


# Where several arrays fail, as on a full disk, Orbax raises the first error, and asyncio logs tracebacks of the others.
logging.getLogger("asyncio").addFilter(lambda record: "exception was never retrieved" not in record.getMessage())


class _Manager(ocp.CheckpointManager):
  """Reads the metrics of every step when it is made; damaged ones must not cost the steps."""

  def metrics(self, step: int):
    try:
      return super().metrics(step)
    except ValueError:  # what undecodable JSON raises
      return None


class Checkpointer:
  """The checkpoints of one workdir: the newest `keep`, and the best by nats per token at evaluation.

  Args:
    workdir: folder of the run.
    keep: how many of the newest checkpoints to keep.
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
    if not workdir.is_absolute():  # `absolute` would make a local path of a URL such as gs://bucket
      workdir = workdir.absolute()
    self._directory = workdir / "checkpoints"
    self._read_only = read_only
    self._before_save = before_save
    policies = ocp.checkpoint_managers
    distributed.wait_for_all("checkpoints")  # compilation or imports may have taken one of them much longer
    best = policies.BestN(
      get_metric_fn=lambda metrics: metrics["nats_per_token"],
      reverse=True,
      n=1,
      keep_checkpoints_without_metrics=False,
    )
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
          "params": items_lib.ArrayHandler(),
          "optimizer": items_lib.ArrayHandler(),
          "fingerprint": items_lib.JsonHandler(),
          "data": items_lib.DataHandler(),
        },
      )

  def __enter__(self) -> "Checkpointer":
    return self

  def __exit__(self, *unused) -> None:
    self._written(self._manager.close)  # waits for a save under way

  def save(self, state: TrainState, data: items_lib.Saveable | None) -> None:
    """Starts to save `state` and the position of `data`; returns once both may change again.

    Without `data` (weights from elsewhere), training resumed from here starts over with the data. A step that is saved
    already is left alone.

    Raises:
      TransientError: it, or the checkpoint before it, could not be written, and may be later (a full disk).
      InputError: this user may not write it, or this run may not (`before_save`).
    """
    step = int(state.step)
    if step in self._manager.all_steps():
      return
    self._before_save()
    checksums = fingerprint.of({"params": state.params, "optimizer": state.opt_state})
    items = {
      "params": items_lib.ArraySave(state.params),
      "optimizer": items_lib.ArraySave({"step": state.step, "opt_state": state.opt_state}),
      "fingerprint": items_lib.JsonSave(checksums | {_HAS_DATA: int(data is not None)}),
    }
    if data is not None:
      items["data"] = items_lib.DataSave(data)
    self._written(lambda: self._manager.save(step, args=ocp.args.Composite(**items)))

  def _written(self, write: Callable[[], None]) -> None:
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

  def restore(self, abstract: TrainState, data: items_lib.Saveable) -> TrainState | None:
    """Returns the newest good state in the layout of `abstract`, with `data` moved to its position.

    Returns None where no checkpoint exists. A damaged checkpoint is reported and moved to `damaged/`, and the one
    before it is used.

    Raises:
      InputError: every checkpoint is damaged, `data` does not fit the saved position, or a file may not be read.
      TransientError: a checkpoint could not be read, and may be later; nothing was moved.
    """
    items = {
      "params": items_lib.ArrayRestore(abstract.params),
      "optimizer": items_lib.ArrayRestore({"step": abstract.step, "opt_state": abstract.opt_state}),
      "data": items_lib.DataRestore(data),
    }
    restored = self._restore_newest(items, skip_damaged=True)
    if restored is None:
      return None
    _, values = restored
    return TrainState(params=values["params"], **values["optimizer"])

  def restore_params(self, abstract_params: dict) -> tuple[int, dict] | None:
    """Returns (step, weights) of the newest checkpoint, or None where no checkpoint exists.

    Raises:
      InputError: it is damaged (an older one is never used instead), or may not be read.
      TransientError: it could not be read, and may be later.
    """
    restored = self._restore_newest({"params": items_lib.ArrayRestore(abstract_params)}, skip_damaged=False)
    return restored and (restored[0], restored[1]["params"])

  def _restore_newest(self, items: dict[str, ocp.args.CheckpointArgs], skip_damaged: bool):
    """Returns (step, {item: value}) of the newest good checkpoint, or None where no checkpoint exists."""
    damaged = []
    steps = sorted(self._manager.all_steps(), reverse=True) if self._directory.exists() else []
    for index, step in enumerate(steps):
      values, error = self._attempt(step, items)
      severity = self._severity(step, error)
      worst = distributed.largest(severity)  # the same on all processes
      if worst == 0:
        self._set_aside(damaged)
        return step, values
      reason = checks.one_line(_root(error or _FailedElsewhere("another process cannot read it")))
      if worst > _DAMAGED:
        raise self._cannot_read(step, error, reason, worst, severity)
      if not skip_damaged:
        raise InputError(self._refusal(step, reason, steps[index + 1 :]))
      print(f"The checkpoint of step {step} in {self._directory} is damaged: {reason}", file=sys.stderr)
      damaged.append(step)
    if damaged:
      raise InputError(
        f"All checkpoints ({', '.join(map(str, sorted(damaged)))}) in {self._directory} are damaged; none was moved."
        " Put back a good copy, or start over with another --workdir."
      )
    return None

  def _attempt(self, step: int, items: dict[str, ocp.args.CheckpointArgs]) -> tuple[dict | None, Exception | None]:
    """Returns (values, None) of a step, or (None, the error)."""
    try:
      return self._restore_step(step, items), None
    except Exception as error:  # `_severity` classifies it
      return None, error

  def _severity(self, step: int, error: Exception | None) -> int:
    """0 without an error; `_DAMAGED` only where the error shows it: a checkpoint that is moved is lost to the run."""
    if error is None:
      return 0
    if isinstance(error, InputError):
      return _UNFIT
    if isinstance(error, _FailedElsewhere):
      return _DAMAGED  # whatever the other process says is at least as severe
    if checks.is_transient(error) or checks.is_denied(error) or not (self._directory / str(step)).exists():
      return _UNREAD
    error = _root(error)
    shows_damage = isinstance(error, _DAMAGE) or _DAMAGE_WORDS.search(checks.one_line(error))
    return _DAMAGED if shows_damage else _UNREAD

  def _cannot_read(self, step: int, error: Exception | None, reason: str, worst: int, severity: int) -> Exception:
    """The error to raise for a step that is not damaged."""
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

  def _refusal(self, step: int, reason: str, older: list[int]) -> str:
    """The message for those who only read: which step is damaged, and how to choose an older one."""
    fix = "Put back a good copy."
    if older:
      fix = (
        f"An older checkpoint is not used unasked. To use step {older[0]}, resume training with this --workdir, which"
        f" moves step {step} to damaged/, or move {self._directory / str(step)} to another folder yourself."
      )
    return f"The newest checkpoint in {self._directory}, of step {step}, is damaged: {reason}. {fix}"

  def _restore_step(self, step: int, items: dict[str, ocp.args.CheckpointArgs]) -> dict:
    values = self._restore_items(step, {"fingerprint": items_lib.JsonRestore()})
    saved = values["fingerprint"]
    arrays = {name: item for name, item in items.items() if name != "data"}
    values = self._restore_items(step, arrays)
    trees = {name: value["opt_state"] if name == "optimizer" else value for name, value in values.items()}
    differing = fingerprint.differences(saved, trees)
    if differing:
      raise _Damaged(f"the values of {', '.join(differing[:3])} are not those that were saved")
    if "optimizer" in items and int(values["optimizer"]["step"]) != step:
      raise _Damaged(f"its optimizer state is of step {values['optimizer']['step']}")
    if "data" in items and saved.get(_HAS_DATA, 1):  # last, so that a damaged step leaves the data position alone
      self._restore_items(step, {"data": items["data"]})
    return values

  def _restore_items(self, step: int, items: Mapping[str, ocp.args.CheckpointArgs]) -> Mapping[str, Any]:
    """Returns the values of some items of a step; raises on all processes if one of them fails."""
    values = self._manager.restore(step, args=ocp.args.Composite(**items))
    errors = [value.error for value in values.values() if isinstance(value, items_lib.Failure)]
    # The computations that follow need all processes.
    if distributed.largest(len(errors)):
      raise errors[0] if errors else _FailedElsewhere("another process cannot read it")
    return values

  def _set_aside(self, steps: list[int]) -> None:
    """Moves damaged steps out of the way of the run that resumes; deletes nothing."""
    if not steps or self._read_only:
      return
    if jax.process_index() == 0:
      with writing(self._directory.parent / "damaged", "give this user write access"):
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
      print(f"Step {step} was moved to {target}; the checkpoint before it is used.", file=sys.stderr)


def _root(error: BaseException) -> BaseException:
  """The error at the start of the chain of explicit causes; those that wrap it say less."""
  while error.__cause__ is not None:
    error = error.__cause__
  return error
