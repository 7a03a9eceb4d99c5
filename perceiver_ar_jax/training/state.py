"""The training state and its sharded initialisation."""

from flax import linen as nn
from flax import struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import optax

from perceiver_ar_jax.config import Config
from perceiver_ar_jax.models.perceiver_ar import PerceiverAR
from perceiver_ar_jax.parallel import sharding


@struct.dataclass
class TrainState:
  """All that an update changes. Random keys are functions of the seed and `step`, so they need no place here."""

  step: jax.Array
  """int32: updates done."""
  params: dict
  opt_state: optax.OptState


def abstract_state(config: Config, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
  """The state as jax.ShapeDtypeStructs with their shardings on `mesh`; nothing is allocated."""
  boxed = jax.eval_shape(lambda: _init(config, optimizer, jax.random.key(0)))
  return jax.tree.map(
      lambda leaf, layout: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout),
      nn.meta.unbox(boxed),
      sharding.shardings(boxed, mesh),
  )


def init_state(config: Config, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
  """A fresh state, each device creating only its own part; the same values on every mesh."""
  shape = abstract_state(config, optimizer, mesh)
  layout = jax.tree.map(lambda leaf: leaf.sharding, shape)
  with jax.set_mesh(mesh):
    init = jax.jit(lambda key: nn.meta.unbox(_init(config, optimizer, key)), out_shardings=layout)
    return init(jax.random.key(config.seed))


def _init(config: Config, optimizer: optax.GradientTransformation, key: jax.Array) -> TrainState:
  """The state with its weights still in the boxes that carry their logical axes."""
  model = config.model
  # Weights do not depend on the context, so a sequence as short as the model allows traces fastest.
  tokens_1xM = jnp.ones((1, model.num_latents), jnp.int32)
  dimensions = len(model.position_sizes) or 1
  positions_1xMxP = jnp.ones((1, model.num_latents, dimensions), jnp.int32)
  params = PerceiverAR(model).init(key, tokens_1xM, positions_1xMxP)["params"]
  return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=optimizer.init(params))
