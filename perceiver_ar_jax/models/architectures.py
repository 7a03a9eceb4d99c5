"""The model architectures, in one table, and their size and floating-point operations, counted from the config alone.

All have the interface of perceiver_ar.PerceiverAR. No other module asks which architecture a config names.

FLOPs are those of matrix products, 2 per multiply-add, without those that the backward pass recomputes, and without
norms, softmax, dropout and the optimizer. XLA's own count visits the body of a loop once, and layers are a loop.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh
from ml_collections import config_dict

from perceiver_ar_jax.config import Config, ModelConfig, lookup, require, resolve
from perceiver_ar_jax.models import attention, layers, perceiver_ar, transformer_xl


class Architecture(NamedTuple):
  """A model class, and what is supported with it."""

  module: type[nn.Module]
  check: Callable[[ModelConfig], None]  # raises InputError for settings that it does not support
  flops: Callable[..., int]  # (config, rows, num_latents, training=) -> FLOPs of a step
  has_cross_attention: bool = True  # needed by the KV cache, context sharding, packing, attention pictures


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
  problem = f"mesh.context={shards} shards the inputs of a cross-attention, which {config.architecture} lacks"
  require(shards == 1 or architecture.has_cross_attention, f"{problem}: set it to 1.")


def make_model(config: ModelConfig) -> nn.Module:
  """The model that `config` describes; raises InputError for settings that are not supported."""
  check(config)
  return architecture_of(config).module(config)


def init_params(config: ModelConfig, key: jax.Array) -> dict:
  """Fresh parameters, boxed with their logical axes."""
  # Parameters do not depend on the context, so a sequence as short as the model allows traces fastest.
  tokens_1xM = jnp.ones((1, config.num_latents), jnp.int32)
  positions_1xMxP = jnp.ones((1, config.num_latents, config.position_dims), jnp.int32)
  return make_model(config).init(key, tokens_1xM, positions_1xMxP)["params"]


@functools.lru_cache
def abstract_params(config: ModelConfig) -> dict:
  """The parameters as jax.ShapeDtypeStructs, boxed with their logical axes; cached, so do not change the dict."""
  return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))


def num_params(config: ModelConfig) -> int:
  """Number of parameters; nothing is allocated."""
  return sum(leaf.size for leaf in jax.tree.leaves(abstract_params(config)))


def train_flops(config: Config) -> int:
  """FLOPs of one update over all devices: the forward and the backward pass."""
  rows = config.train.batch_size // config.train.microbatches
  step = architecture_of(config.model).flops(config.model, rows, config.model.num_latents, training=True)
  return config.train.microbatches * step


def eval_flops(config: Config) -> int:
  """FLOPs of scoring one batch of windows over all devices."""
  num_latents = config.eval.num_latents or config.model.num_latents
  return architecture_of(config.model).flops(config.model, config.eval.batch_size, num_latents, training=False)


def spend_flops(config: config_dict.ConfigDict, total: float) -> None:
  """Sets `train.steps` to the number of updates that `total` FLOPs pay for, at least one."""
  config.train.steps = max(int(total / train_flops(resolve(config))), 1)
