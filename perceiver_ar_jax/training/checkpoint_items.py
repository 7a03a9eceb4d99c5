"""The items of a checkpoint, as Orbax saves and restores them: arrays, JSON and the position of a data iterator.

Errors of `restore` are returned as a `Failure`: if a process raised, Orbax would make all others wait for it.
"""

import dataclasses
from typing import Any, Protocol

import orbax.checkpoint as ocp
from etils import epath


class Saveable(Protocol):
  """A data iterator that saves its complete position in files under a directory."""

  def save(self, directory: epath.Path) -> None: ...

  def restore(self, directory: epath.Path) -> None: ...


@dataclasses.dataclass
class Failure:
  """An error of a restore on this process, kept until all processes have finished theirs."""

  error: Exception


class _ReturnsErrors:
  def restore(self, *args, **kwargs):
    try:
      return super().restore(*args, **kwargs)
    except Exception as error:
      return Failure(error)


class ArrayHandler(_ReturnsErrors, ocp.StandardCheckpointHandler):
  """Saves and restores `Arrays`."""


class JsonHandler(_ReturnsErrors, ocp.JsonCheckpointHandler):
  """Saves and restores `Json`."""


class _IteratorHandler(ocp.CheckpointHandler):
  """The iterator writes its own files into the step, inside Orbax's atomic commit."""

  def save(self, directory: epath.Path, args: "Position") -> None:
    args.iterator.save(directory)

  def restore(self, directory: epath.Path, args: "Position") -> None:
    args.iterator.restore(directory)


class PositionHandler(_ReturnsErrors, _IteratorHandler):
  """Saves and restores a `Position`."""


@ocp.args.register_with_handler(ArrayHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class Arrays(ocp.args.StandardSave, ocp.args.StandardRestore):
  """A tree of arrays to save, or the shapes and shardings of one to restore."""

  item: Any = None


@ocp.args.register_with_handler(JsonHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class Json(ocp.args.JsonSave):
  """A dict to save; nothing to restore one."""

  item: Any = None


@ocp.args.register_with_handler(PositionHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class Position(ocp.args.CheckpointArgs):
  """The position of a data iterator to save, or the iterator to move to the saved position."""

  iterator: Saveable | None = None
