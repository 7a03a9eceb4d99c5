"""The command that converts an official checkpoint to a run; haiku.py documents it."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from etils import epath

from perceiver_ar_jax import command_line
from perceiver_ar_jax.config import Config, InputError
from perceiver_ar_jax.interop import haiku
from perceiver_ar_jax.models.architectures import architecture_of
from perceiver_ar_jax.parallel.mesh import make_mesh
from perceiver_ar_jax.training import checkpoint
from perceiver_ar_jax.training import optimizer as optimizer_lib
from perceiver_ar_jax.training import state as state_lib
from perceiver_ar_jax.training import workdir as workdir_lib


def run() -> None:
  """Parses the flags, writes the checkpoint and exits."""
  flags.DEFINE_string("checkpoint", None, "An official checkpoint.dill.")
  command_line.run(_main, required=("checkpoint", "workdir"))


def _main(config: Config) -> int:
  haiku_params, trained_steps = haiku.load(flags.FLAGS.checkpoint)
  workdir = command_line.WORKDIR.value
  count = write_checkpoint(config, haiku_params, workdir)
  print(
    f"Wrote {count:,} parameters, trained for {trained_steps:,} steps, as step 0 of {workdir}. To evaluate them, run"
    " python -m perceiver_ar_jax.main with this --config and --workdir and --mode=eval; without --mode, it trains them."
  )
  return 0


def write_checkpoint(config: Config, haiku_params: Mapping[str, Mapping[str, np.ndarray]], workdir: str) -> int:
  """Writes converted weights as step 0 of a run of `config` in `workdir`; returns their number.

  Raises:
    InputError: the weights do not fit `config.model`, or the workdir contains a run.
  """
  if not architecture_of(config.model).has_cross_attention:
    raise InputError(
      f"Official checkpoints are of Perceiver AR, not of model.architecture={config.model.architecture}: leave it out."
    )
  workdir, mesh = epath.Path(workdir), make_mesh(config.mesh)
  optimizer = optimizer_lib.make_optimizer(config.train.optimizer, config.train.steps)
  abstract = state_lib.abstract_state(config, optimizer, mesh)
  params, unused = haiku.params_of(haiku_params, config.model)
  if unused:
    raise InputError(
      f"The checkpoint contains parameters that the model of --config does not have: {', '.join(unused[:5])}"
      f"{' and others' if len(unused) > 5 else ''}. Give the config of the model that it was trained with."
    )
  _check_shapes(params, abstract.params)
  if (workdir / "checkpoints").exists():
    raise InputError(f"--workdir={workdir} already contains a run: give a new folder.")
  with workdir_lib.own(config, workdir), jax.set_mesh(mesh), checkpoint.Checkpointer(workdir) as checkpointer:
    params = jax.tree.map(lambda value, leaf: jax.device_put(value, leaf.sharding), params, abstract.params)
    layout = jax.tree.map(lambda leaf: leaf.sharding, abstract.opt_state)
    opt_state = jax.jit(optimizer.init, out_shardings=layout)(params)
    checkpointer.save(state_lib.TrainState(jnp.zeros((), jnp.int32), params, opt_state), data=None)
  return sum(leaf.size for leaf in jax.tree.leaves(params))


def _check_shapes(params: dict, expected: dict) -> None:
  def shapes(tree):
    return {
      jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
      for path, leaf in jax.tree.leaves_with_path(tree)
    }

  given = shapes(params)
  for name, shape in shapes(expected).items():
    if given[name] != shape:
      raise InputError(
        f"The checkpoint's parameter {name} has shape {given[name]}, and with --config it has {shape}: give the config"
        " of the model that it was trained with."
      )
