"""The model architectures, in one table. All have the interface of perceiver_ar.PerceiverAR.

Nothing outside this module and those of the entries asks which architecture a config names.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh

from perceiver_ar_jax.config import ModelConfig, lookup, require
from perceiver_ar_jax.models import attention, layers, perceiver_ar, transformer_xl


class Architecture(NamedTuple):
  """A model class, and what is supported with it."""

  module: type[nn.Module]
  check: Callable[[ModelConfig], None]  # raises InputError for settings that it does not support
  flops: Callable[..., int]  # (config, rows, num_latents, training=) -> FLOPs of a step; see flops.py
  has_cross_attention: bool = True  # needed by the KV cache, context sharding and attention pictures


ARCHITECTURES = {
  "perceiver_ar": Architecture(perceiver_ar.PerceiverAR, perceiver_ar.check, perceiver_ar.flops),
  "transformer_xl": Architecture(
    transformer_xl.TransformerXL, transformer_xl.check, transformer_xl.flops, has_cross_attention=False
  ),
}


def architecture_of(config: ModelConfig) -> Architecture:
  """The config's architecture; raises InputError for an unknown name."""
  return lookup("model.architecture", config.architecture, ARCHITECTURES)


def check(config: ModelConfig, mesh: Mesh | None = None) -> None:
  """Raises InputError if the model does not exist or does not run on the mesh (None: on any)."""
  architecture = architecture_of(config)
  lookup("model.activation", config.activation, layers.ACTIVATIONS)
  lookup("model.remat", config.remat, layers.REMAT_POLICIES)
  architecture.check(config)
  attention.check(config, mesh)
  shards = mesh.shape["context"] if mesh else 1
  require(
    shards == 1 or architecture.has_cross_attention,
    f"mesh.context={shards} shards the inputs of a cross-attention, which {config.architecture} lacks: set it to 1.",
  )


def make_model(config: ModelConfig) -> nn.Module:
  """The model that `config` describes; raises InputError for settings that are not supported."""
  check(config)
  return architecture_of(config).module(config)


def init_params(config: ModelConfig, key: jax.Array) -> dict:
  """Fresh parameters, boxed with their logical axes."""
  # Parameters do not depend on the context, so a sequence as short as the model allows traces fastest.
  tokens_1xM = jnp.ones((1, config.num_latents), jnp.int32)
  dimensions = len(config.position_sizes) or len(config.rotary_axes) or 1
  positions_1xMxP = jnp.ones((1, config.num_latents, dimensions), jnp.int32)
  return make_model(config).init(key, tokens_1xM, positions_1xMxP)["params"]


def num_params(config: ModelConfig) -> int:
  """Number of parameters; nothing is allocated."""
  shapes = nn.meta.unbox(jax.eval_shape(lambda: init_params(config, jax.random.key(0))))
  return sum(leaf.size for leaf in jax.tree.leaves(shapes))
