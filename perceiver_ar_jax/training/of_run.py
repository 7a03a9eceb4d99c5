"""The config of a run that is there, for commands that are given --workdir and no --config (command_line.py)."""

import dataclasses

from etils import epath

from perceiver_ar_jax import config as config_lib
from perceiver_ar_jax.training import workdir as workdir_lib


def get_config(workdir: str):
  """What `workdir`'s config.json holds, to be overridden as that of any config file."""
  config = config_lib.defaults()
  config.update(dataclasses.asdict(workdir_lib.load_config(epath.Path(workdir))))
  return config
