"""Attention between the last slots of a sequence and the whole of it, and the blocks made of it.

One attention serves cross-attend and self-attention alike: queries always stand on the last M of L slots,
so causality is a static offset (design: sequences are right-aligned). Shape letters: perceiver_ar.py.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from perceiver_ar_jax.config import ModelConfig
from perceiver_ar_jax.models import attention_kernels
from perceiver_ar_jax.models import positions as positions_lib
from perceiver_ar_jax.parallel.sharding import constrain

kernel_init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")
ACTIVATION_FNS: dict[str, Callable[[jax.Array], jax.Array]] = {
  "squared_relu": lambda x: jnp.square(jax.nn.relu(x)),
  "gelu": functools.partial(jax.nn.gelu, approximate=True),
}

MAPS = "intermediates"
"""The collection in which attention leaves the newest query's map, whatever the kernel, where a caller makes it mutable
(initialisation never does; layers under a scan hand none on)."""


def dense(
  config: ModelConfig, features: int, name: str | None, axes: tuple[str, str], init=kernel_init, **kwargs
) -> nn.Dense:
  """A Dense with bias, its kernel [in, out] carrying the logical `axes`; computes in `config.dtype`."""
  return nn.Dense(
    features,
    name=name,
    dtype=config.dtype,
    param_dtype=jnp.float32,
    kernel_init=nn.with_logical_partitioning(init, axes),
    bias_init=nn.with_logical_partitioning(nn.initializers.zeros_init(), axes[1:]),
    **kwargs,
  )


def layer_norm(name: str | None) -> nn.LayerNorm:
  """LayerNorm with scale and offset over the last axis, in float32; the Dense after it casts."""
  return nn.LayerNorm(
    epsilon=1e-5,
    name=name,
    dtype=jnp.float32,
    use_fast_variance=False,
    scale_init=nn.with_logical_partitioning(nn.initializers.ones_init(), ("norm",)),
    bias_init=nn.with_logical_partitioning(nn.initializers.zeros_init(), ("norm",)),
  )


def drop(module: nn.Module, rate: float, x):
  """`x` with a share `rate` of its elements 0 and the others scaled up."""
  if not rate:
    return x
  kept = jax.random.bernoulli(module.make_rng("dropout"), 1 - rate, x.shape)
  kept = checkpoint_name(kept, attention_kernels.SAVED)  # a byte an element, and dearer to draw again than to keep
  return jnp.where(kept, x / (1 - rate), 0)


class KeysValues(nn.Module):
  """Keys and values of normalised inputs, not yet rotated; `width` is that of all heads together."""

  config: ModelConfig
  num_heads: int
  width: int

  @nn.compact
  def __call__(self, inputs_BxLxE):
    """Returns k_BxLxHxK and v_BxLxHxK."""

    def heads(name):
      projected = dense(self.config, self.width, name, ("width", "heads"))(inputs_BxLxE)
      return projected.reshape(*inputs_BxLxE.shape[:2], self.num_heads, self.width // self.num_heads)

    return heads("key"), heads("value")


class Attention(nn.Module):
  """Multi-head attention from normalised latents to `Keys`, projected back to the latents' width."""

  config: ModelConfig
  num_heads: int
  width: int

  @nn.compact
  def __call__(
    self,
    normed_BxMxD,
    keys: attention_kernels.Keys | attention_kernels.Cached,
    rotary_BxM,
    valid_BxL,
    keep_own: bool = False,
  ):
    """`rotary_BxM`: the latents' rotary positions, or None when positions are absolute. `Cached` keys want M = 1."""
    config = self.config
    query = dense(config, self.width, "query", ("width", "heads"))(normed_BxMxD)
    q_BxMxHxK = turn(config, query.reshape(*normed_BxMxD.shape[:2], self.num_heads, -1), rotary_BxM)
    if self.is_mutable_collection(MAPS) and isinstance(keys, attention_kernels.Keys):
      weights_BxHx1xL = attention_kernels.probabilities(q_BxMxHxK[:, -1:], keys.all()[0], valid_BxL, keep_own)
      self.sow(MAPS, "weights_BxHxL", weights_BxHx1xL[:, :, 0])
    if isinstance(keys, attention_kernels.Cached):
      attended_BxMxHxK = keys.attend(q_BxMxHxK, valid_BxL)
    else:
      attend = attention_kernels.KERNELS[config.attention]
      attended_BxMxHxK = attend(q_BxMxHxK, keys, valid_BxL, keep_own, config.attention_chunk)
    return dense(config, config.latent_width, "out", ("heads", "width"))(attended_BxMxHxK.reshape(query.shape))


def turn(config: ModelConfig, x_BxLxHxK, rotary_BxL):
  """Queries or keys rotated by their positions as the config says; as they are where positions are None."""
  if rotary_BxL is None:
    return x_BxLxHxK
  wavelength = config.rotary_max_wavelength or config.max_context
  return positions_lib.rotate(x_BxLxHxK, rotary_BxL, fraction=config.rotary_fraction, max_wavelength=wavelength)


class MLP(nn.Module):
  """Two Dense layers with the config's activation between them."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x_BxMxD):
    config = self.config
    hidden_BxMxF = dense(config, config.mlp_widening * config.latent_width, "up", ("width", "mlp"))(x_BxMxD)
    hidden_BxMxF = ACTIVATION_FNS[config.activation](hidden_BxMxF)
    return dense(config, config.latent_width, "down", ("mlp", "width"))(hidden_BxMxF)


class Context(NamedTuple):
  """Inputs as ids, and how to embed any run of them."""

  embed: Callable
  """(weights, tokens_BxC, positions_BxCxP) -> x_BxCxE; a pure function."""
  weights: Any
  tokens_BxL: jax.Array
  positions_BxLxP: jax.Array


def rotary_positions(config: ModelConfig, positions_BxLxP):
  """The positions that rotary encoding uses; None when positions are absolute."""
  return positions_BxLxP[..., 0] if config.position_encoding == "rotary" else None


class CrossAttend(nn.Module):
  """Pre-norm attention from the latents to all inputs and a pre-norm MLP, each with dropout and a residual."""

  config: ModelConfig

  def setup(self):
    config = self.config
    self.norm_query, self.norm_inputs, self.norm_mlp = layer_norm(None), layer_norm(None), layer_norm(None)
    self.keys_values = KeysValues(config, config.num_cross_heads, config.cross_width)
    self.attention = Attention(config, config.num_cross_heads, config.cross_width)
    self.mlp = MLP(config)

  def __call__(
    self,
    latents_BxMxD,
    keys: attention_kernels.Keys | attention_kernels.Cached,
    rotary_BxM,
    valid_BxL,
    deterministic: bool = True,
  ):
    """`keys` of all inputs, from the method; the latents' rotary positions or None; the inputs to see."""
    dropout = functools.partial(drop, self, 0.0 if deterministic else self.config.dropout)
    attended_BxMxD = self.attention(self.norm_query(latents_BxMxD), keys, rotary_BxM, valid_BxL)
    latents_BxMxD = constrain(latents_BxMxD + dropout(attended_BxMxD), "batch", None, None)
    hidden_BxMxD = self.mlp(self.norm_mlp(latents_BxMxD))
    return constrain(latents_BxMxD + dropout(hidden_BxMxD), "batch", None, None)

  def keys(self, context: Context) -> attention_kernels.Keys:
    """Keys and values of the context, from ids to rotated heads as one pure function, for kernels that stream it."""
    config = self.config
    norm, norm_weights = functional(self.norm_inputs, jnp.zeros((1, 1, config.input_width)))
    project, project_weights = functional(self.keys_values, jnp.zeros((1, 1, config.input_width)))

    def from_ids(weights, tokens_BxC, positions_BxCxP):
      embed_weights, norm_weights, project_weights = weights
      x_BxCxE = norm(norm_weights, context.embed(embed_weights, tokens_BxC, positions_BxCxP))
      return project(project_weights, x_BxCxE)

    def from_table(tables, tokens_BxC, positions_BxCxP):
      del positions_BxCxP
      return tuple(table_VxHxK[tokens_BxC].astype(config.dtype) for table_VxHxK in tables)

    # Weights travel once, whole: used where they lie, what they make would travel instead, as long as the context.
    weights = (context.weights, norm_weights, project_weights)
    weights, make = jax.tree.map(lambda weight: constrain(weight, *(None,) * weight.ndim), weights), from_ids
    # Without absolute positions, inputs of equal id have equal keys and values up to the rotation: where there are
    # more inputs than ids, project each id once and look the inputs up (in float32: many inputs add up in a gradient).
    if config.position_encoding == "rotary" and config.vocab_size <= context.tokens_BxL.shape[1]:
      ids_1xV = jnp.arange(config.vocab_size)[None]
      projected = from_ids(weights, ids_1xV, ids_1xV[..., None])
      weights, make = tuple(part_1xVxHxK[0].astype(jnp.float32) for part_1xVxHxK in projected), from_table

    def turned(weights, source):
      tokens_BxC, positions_BxCxP = source
      k_BxCxHxK, v_BxCxHxK = make(weights, tokens_BxC, positions_BxCxP)
      return turn(config, k_BxCxHxK, rotary_positions(config, positions_BxCxP)), v_BxCxHxK

    shared = config.attention in attention_kernels.SPREADING
    slots = "slots" if shared else None
    source = constrain(context.tokens_BxL, "batch", slots), constrain(context.positions_BxLxP, "batch", slots, None)
    return attention_kernels.Keys(turned, weights, source, shared)


def functional(module: nn.Module, *example) -> tuple[Callable, Any]:
  """(pure function of its variables and inputs, its variables) of a submodule, which `example` initialises."""
  if module.is_initializing():
    module(*example)
  unbound, variables = module.unbind()
  return unbound.apply, variables


class SelfAttentionLayer(nn.Module):
  """One causal pre-norm Transformer layer over the latents, in the (carry, output) form that nn.scan wants."""

  config: ModelConfig

  @nn.compact
  def __call__(
    self,
    latents_BxMxD,
    rotary_BxM,
    valid_BxM,
    keep_own: bool = False,
    deterministic: bool = True,
    cached: attention_kernels.Cached | None = None,
    slot=None,
  ):
    """Returns the latents and, for generation, their keys and values as `Cached`.

    Args:
      latents_BxMxD: all latents, or in generation one new latent, M = 1.
      rotary_BxM: rotary positions of the latents, or None.
      valid_BxM: which latents may be seen; [B, S] with `cached`.
      keep_own: a latent sees itself, valid or not.
      deterministic: no dropout.
      cached: None, or those of S latents, to which the new one's are added.
      slot: int32[], the new latent's place in `cached`.
    """
    config = self.config
    dropout = functools.partial(drop, self, 0.0 if deterministic else config.dropout)
    normed_BxMxD = layer_norm("norm_attention")(latents_BxMxD)
    heads, width = config.num_self_heads, config.latent_width
    k_BxMxHxK, v_BxMxHxK = KeysValues(config, heads, width, name="keys_values")(normed_BxMxD)
    made = turn(config, k_BxMxHxK, rotary_BxM), v_BxMxHxK
    new = attention_kernels.Cached.of(*made)
    if cached is not None:
      new = cached.put(new, slot)
    keys = attention_kernels.Keys.of(*made) if cached is None else new
    attend = Attention(config, heads, width, name="attention")
    attended_BxMxD = attend(normed_BxMxD, keys, rotary_BxM, valid_BxM, keep_own)
    latents_BxMxD = constrain(latents_BxMxD + dropout(attended_BxMxD), "batch", None, None)
    hidden_BxMxD = MLP(config, name="mlp")(layer_norm("norm_mlp")(latents_BxMxD))
    return constrain(latents_BxMxD + dropout(hidden_BxMxD), "batch", None, None), new
