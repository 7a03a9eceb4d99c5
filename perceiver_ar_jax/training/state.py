"""The training state and its sharded initialisation."""

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from perceiver_ar_jax.config import Config
from perceiver_ar_jax.models.architectures import init_params
from perceiver_ar_jax.parallel import sharding


@struct.dataclass
class TrainState:
  """Everything that an update changes. Random keys are functions of the seed and `step`, so they are not stored."""

  step: jax.Array  # int32[]: number of updates done
  params: dict
  opt_state: optax.OptState
  ema: dict | None = None  # exponential moving average of params (train.ema_decay)

  @property
  def params_to_evaluate(self) -> dict:
    """The averaged weights if there are any, else `params`."""
    return self.params if self.ema is None else self.ema


def abstract_state(config: Config, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
  """Returns the state as jax.ShapeDtypeStructs with their shardings on `mesh`; allocates nothing.

  Optimizer state that belongs to a weight and has its shape is sharded as the weight is; the rest is replicated.
  """
  params = abstract_params(config, mesh)
  weights = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(params)}
  replicated = NamedSharding(mesh, PartitionSpec())

  def place(path, leaf):
    name = jax.tree_util.keystr(path)
    weight = weights.get(max((known for known in weights if known in name), key=len, default=""))
    alike = weight is not None and weight.shape == leaf.shape
    return leaf.update(sharding=weight.sharding if alike else replicated)

  opt_state = jax.tree.map_with_path(place, jax.eval_shape(optimizer.init, params))
  ema = params if config.train.ema_decay else None
  return TrainState(jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated), params, opt_state, ema)


def abstract_params(config: Config, mesh: Mesh) -> dict:
  """Returns the weights of `abstract_state`."""
  boxed = jax.eval_shape(lambda: init_params(config.model, jax.random.key(0)))
  shapes, layout = nn.meta.unbox(boxed), sharding.shardings(boxed, mesh)
  return jax.tree.map(lambda leaf, sharded: leaf.update(sharding=sharded), shapes, layout)


def init_state(
  config: Config, optimizer: optax.GradientTransformation, mesh: Mesh, params: dict | None = None
) -> TrainState:
  """Returns the initial state, the same on every mesh; each device creates only its own shard.

  `params` are weights to start from, in the layout of `abstract_params`, which are donated; None: random ones, by the
  config's seed.
  """
  layout = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, optimizer, mesh))

  def init(key, params):
    if params is None:
      params = nn.meta.unbox(init_params(config.model, key))
    ema = params if config.train.ema_decay else None
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), ema)

  with jax.set_mesh(mesh):
    return jax.jit(init, out_shardings=layout, donate_argnums=1)(jax.random.key(config.seed), params)
