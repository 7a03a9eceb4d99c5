"""The config of an existing run or of exported weights (interop/export.py), from the config.json in the folder.

This module is also the config file of commands that are given --workdir and no --config (command_line.py).
"""

import dataclasses
import os

from perceiver_ar_jax.config import Config, InputError, defaults, reading, require

WEIGHTS, SENTENCEPIECE = "model.safetensors", "sentencepiece.model"  # files of exported weights


def get_config(workdir: str):
  """Returns the settings of the run in `workdir` as a ConfigDict, to be overridden like those of any config file."""
  config = defaults()
  config.update(dataclasses.asdict(load_config(workdir)))
  return config


def config_path(workdir: str | os.PathLike):
  """Returns the path of the config.json of a run, which exists if `workdir` contains one."""
  from etils import epath  # takes longer to import than the rest of the command line

  return epath.Path(workdir) / "config.json"


def load_config(workdir: str | os.PathLike) -> Config:
  """Returns the config of a run or of a folder of exported weights; InputError where it is missing or invalid."""
  path = config_path(workdir)
  require(path.exists(), f"--workdir={workdir} contains no run (no config.json): train first, or check the path.")
  with reading(path, "give this user access"):
    content = path.read_bytes()
  try:
    config = Config.from_json(content.decode())
  except (ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
    raise InputError(f"{path} cannot be read ({error}): restore it, or use another --workdir.") from error
  if config.data.sentencepiece == SENTENCEPIECE and (path.parent / WEIGHTS).exists():  # relative to the folder
    data = dataclasses.replace(config.data, sentencepiece=str(path.parent / SENTENCEPIECE))
    config = dataclasses.replace(config, data=data)
  return config
