"""Attention between the last slots of a sequence and the whole of it, and the blocks made of it.

One attention serves cross-attend and self-attention alike: queries always stand on the last M of L slots,
so causality is a static offset (design: sequences are right-aligned). Shape letters: perceiver_ar.py.
"""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn

from perceiver_ar_jax.config import ModelConfig
from perceiver_ar_jax.models import positions as positions_lib
from perceiver_ar_jax.models.attention_kernels import KERNELS
from perceiver_ar_jax.parallel.sharding import constrain

kernel_init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")
ACTIVATION_FNS = {
  "squared_relu": lambda x: jnp.square(jax.nn.relu(x)),
  "gelu": functools.partial(jax.nn.gelu, approximate=True),
}


def dense(config: ModelConfig, features: int, name: str, axes: tuple[str, str], init=kernel_init, **kwargs) -> nn.Dense:
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


def layer_norm(name: str) -> nn.LayerNorm:
  """LayerNorm with scale and offset over the last axis, in float32; the Dense after it casts."""
  return nn.LayerNorm(
    epsilon=1e-5,
    name=name,
    dtype=jnp.float32,
    use_fast_variance=False,
    scale_init=nn.with_logical_partitioning(nn.initializers.ones_init(), ("norm",)),
    bias_init=nn.with_logical_partitioning(nn.initializers.zeros_init(), ("norm",)),
  )


class Attention(nn.Module):
  """Multi-head attention from normalised latents to normalised inputs, projected back to the latents' width."""

  config: ModelConfig
  num_heads: int

  @nn.compact
  def __call__(self, query_BxMxD, inputs_BxLxE, positions_BxL, valid_BxL):
    """`positions_BxL`: rotary positions, or None when positions are absolute."""
    config, width = self.config, self.config.latent_width

    def heads(x, name):
      projected = dense(config, width, name, ("width", "heads"))(x)
      return projected.reshape(*x.shape[:2], self.num_heads, width // self.num_heads)

    q_BxMxHxK, k_BxLxHxK = heads(query_BxMxD, "query"), heads(inputs_BxLxE, "key")
    v_BxLxHxK = heads(inputs_BxLxE, "value")
    if positions_BxL is not None:
      turn = functools.partial(
        positions_lib.rotate,
        fraction=config.rotary_fraction,
        max_wavelength=config.rotary_max_wavelength or config.max_context,
      )
      q_BxMxHxK = turn(q_BxMxHxK, positions_BxL[:, -query_BxMxD.shape[1] :])
      k_BxLxHxK = turn(k_BxLxHxK, positions_BxL)
    attended_BxMxHxK = KERNELS[config.attention](q_BxMxHxK, k_BxLxHxK, v_BxLxHxK, valid_BxL)
    merged_BxMxD = attended_BxMxHxK.reshape(query_BxMxD.shape[:2] + (width,))
    return dense(config, width, "out", ("heads", "width"))(merged_BxMxD)


class MLP(nn.Module):
  """Two Dense layers with the config's activation between them."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x_BxMxD):
    config = self.config
    hidden_BxMxF = dense(config, config.mlp_widening * config.latent_width, "up", ("width", "mlp"))(x_BxMxD)
    hidden_BxMxF = ACTIVATION_FNS[config.activation](hidden_BxMxF)
    return dense(config, config.latent_width, "down", ("mlp", "width"))(hidden_BxMxF)


class CrossAttend(nn.Module):
  """Pre-norm attention from the latents to all inputs and a pre-norm MLP, each with dropout and a residual."""

  config: ModelConfig
  deterministic: bool

  @nn.compact
  def __call__(self, latents_BxMxD, inputs_BxLxE, positions_BxL, valid_BxL):
    config = self.config
    dropout = nn.Dropout(config.dropout, deterministic=self.deterministic)
    query_BxMxD = layer_norm("norm_query")(latents_BxMxD)
    inputs_BxLxE = layer_norm("norm_inputs")(inputs_BxLxE)
    attended_BxMxD = Attention(config, config.num_cross_heads, name="attention")(
      query_BxMxD, inputs_BxLxE, positions_BxL, valid_BxL
    )
    latents_BxMxD = constrain(latents_BxMxD + dropout(attended_BxMxD), "batch", None, None)
    hidden_BxMxD = MLP(config, name="mlp")(layer_norm("norm_mlp")(latents_BxMxD))
    return constrain(latents_BxMxD + dropout(hidden_BxMxD), "batch", None, None)


class SelfAttentionLayer(nn.Module):
  """One causal pre-norm Transformer layer over the latents, in the (carry, output) form that nn.scan wants."""

  config: ModelConfig
  deterministic: bool

  @nn.compact
  def __call__(self, latents_BxMxD, positions_BxM, valid_BxM):
    config = self.config
    dropout = nn.Dropout(config.dropout, deterministic=self.deterministic)
    normed_BxMxD = layer_norm("norm_attention")(latents_BxMxD)
    attended_BxMxD = Attention(config, config.num_self_heads, name="attention")(
      normed_BxMxD, normed_BxMxD, positions_BxM, valid_BxM
    )
    latents_BxMxD = constrain(latents_BxMxD + dropout(attended_BxMxD), "batch", None, None)
    hidden_BxMxD = MLP(config, name="mlp")(layer_norm("norm_mlp")(latents_BxMxD))
    return constrain(latents_BxMxD + dropout(hidden_BxMxD), "batch", None, None), None
