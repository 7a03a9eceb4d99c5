"""The config of an existing run, from the config.json in its workdir.

This is also the config file of commands that are given --workdir and no --config (command_line.py).
"""

import contextlib
import dataclasses
import os
import sys
from typing import Any

from perceiver_ar_jax.config import Config, InputError, defaults, reading


def get_config(workdir: str):
  """Returns the settings of the run in `workdir` as a ConfigDict, to be overridden like those of any config file."""
  config = defaults()
  config.update(dataclasses.asdict(load_config(workdir)))
  return config


def exists(workdir: str | os.PathLike) -> bool:
  """Returns whether `workdir` contains a run."""
  return _path(workdir).exists()


def load_config(workdir: str | os.PathLike) -> Config:
  """Returns the config that a run wrote; raises InputError where it is missing or invalid."""
  path = _path(workdir)
  if not path.exists():
    raise InputError(f"--workdir={workdir} contains no run (no config.json): train first, or check the path.")
  with reading(path, "give this user access"):
    text = path.read_text()
  try:
    return Config.from_json(text)
  except (ValueError, TypeError, AttributeError) as error:
    raise InputError(f"{path} cannot be read ({error}): restore it, or use another --workdir.") from error


def keep_split_rule(config: Config, workdir: str | os.PathLike) -> Config:
  """Returns `config` with the data.split_rule of the run in `workdir`, if any: its split must not change."""
  with contextlib.suppress(InputError):  # commands that need the run report it
    rule = load_config(workdir).data.split_rule
    if rule != config.data.split_rule:
      print(f"{workdir} was started with data.split_rule={rule}, and keeps it.", file=sys.stderr)
      return dataclasses.replace(config, data=dataclasses.replace(config.data, split_rule=rule))
  return config


def flatten(config: Config) -> dict[str, Any]:
  """Returns every setting by its dotted name, such as train.steps."""
  from flax import traverse_util  # imports JAX, which the command line does not need

  return traverse_util.flatten_dict(dataclasses.asdict(config), sep=".")


def _path(workdir: str | os.PathLike):
  from etils import epath  # takes longer to import than the rest of the command line

  return epath.Path(workdir) / "config.json"
