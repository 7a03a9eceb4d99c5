"""How the items of a checkpoint are saved and restored by Orbax: arrays, JSON and the position of a data iterator.

Errors of `restore` are returned as a `Failure`: Orbax makes all processes wait for one that raises.
"""

import dataclasses
from typing import Protocol

import orbax.checkpoint as ocp
from etils import epath


class Saveable(Protocol):
  """A data iterator that saves its complete position in files under a directory."""

  def save(self, directory: epath.Path) -> None: ...

  def restore(self, directory: epath.Path) -> None: ...


class Failure:
  """An error of a restore on this process, kept until all processes have finished theirs."""

  def __init__(self, error: Exception):
    self.error = error


class ArrayHandler(ocp.StandardCheckpointHandler):
  """Arrays. Errors of `restore` are returned: Orbax makes all processes wait for one that raises."""

  def restore(self, *args, **kwargs):
    try:
      return super().restore(*args, **kwargs)
    except Exception as error:
      return Failure(error)


@ocp.args.register_with_handler(ArrayHandler, for_save=True)
@dataclasses.dataclass
class ArraySave(ocp.args.StandardSave):
  """A tree of arrays to save."""


@ocp.args.register_with_handler(ArrayHandler, for_restore=True)
@dataclasses.dataclass
class ArrayRestore(ocp.args.StandardRestore):
  """The shapes and shardings of a tree of arrays to restore."""


class JsonHandler(ocp.JsonCheckpointHandler):
  """JSON; errors of `restore` are returned."""

  def restore(self, *args, **kwargs):
    try:
      return super().restore(*args, **kwargs)
    except Exception as error:
      return Failure(error)


@ocp.args.register_with_handler(JsonHandler, for_save=True)
@dataclasses.dataclass
class JsonSave(ocp.args.JsonSave):
  """A dict to save."""


@ocp.args.register_with_handler(JsonHandler, for_restore=True)
@dataclasses.dataclass
class JsonRestore(ocp.args.JsonRestore):
  """A dict to restore."""


class DataHandler(ocp.CheckpointHandler):
  """Lets a data iterator write its own files into the step, inside Orbax's atomic commit."""

  def save(self, directory: epath.Path, args: "DataSave") -> None:
    args.iterator.save(directory)

  def restore(self, directory: epath.Path, args: "DataRestore") -> Failure | None:
    try:
      args.iterator.restore(directory)
    except Exception as error:
      return Failure(error)


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
