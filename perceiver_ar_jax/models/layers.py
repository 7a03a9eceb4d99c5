"""The layers of the model: embedding, cross-attention block and self-attention layer, and their parts.

Attention has one form in both blocks: queries are always at the last M of L slots, so causality is a static offset.
The kernels that compute it are in attention.py. Shape letters: perceiver_ar.py.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from perceiver_ar_jax.config import ModelConfig, require
from perceiver_ar_jax.models import attention, positions, streamed
from perceiver_ar_jax.models.keys import CachedKeys, Keys, write
from perceiver_ar_jax.parallel.sharding import constrain

kernel_init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")
# Any: the value is boxed with the names of its axes, and self.param unboxes it.
_table_init: Callable[..., Any] = nn.with_logical_partitioning(
  nn.initializers.truncated_normal(1.0), ("vocab", "width")
)
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
  "squared_relu": lambda x: jnp.square(jax.nn.relu(x)),
  "gelu": functools.partial(jax.nn.gelu, approximate=True),
}

REMAT_POLICIES = {
  "none": None,
  "dots": jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    jax.checkpoint_policies.save_only_these_names(streamed.SAVED),
  ),
  "full": jax.checkpoint_policies.nothing_saveable,
}
"""`model.remat` -> what a layer keeps for its backward pass; None: everything."""

MAPS = "intermediates"
"""The collection to which attention writes the newest query's attention weights, if the caller makes it mutable
(initialization never does, and layers under a scan write nothing)."""


def dense(
  config: ModelConfig, features: int, name: str | None, axes: tuple[str | None, str | None], zero=False, **kwargs
) -> nn.Dense:
  """A Dense with bias whose kernel [in, out] has the logical `axes`, and is 0 at first with `zero`."""
  init = nn.initializers.zeros_init() if zero else kernel_init
  return nn.Dense(
    features,
    name=name,
    dtype=config.dtype,
    param_dtype=jnp.float32,
    kernel_init=nn.with_logical_partitioning(init, axes),
    bias_init=nn.with_logical_partitioning(nn.initializers.zeros_init(), axes[1:]),
    **kwargs,
  )


def logits_dense(config: ModelConfig) -> nn.Dense:
  """The last layer: float32 logits of each token id, initially zero."""
  dot_general = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
  return dense(config, config.vocab_size, None, ("width", "vocab"), zero=True, dot_general=dot_general)


class ValueLogits(nn.Module):
  """Logits of each id from the Fourier features of its value: a projection of the latents, initially zero."""

  config: ModelConfig

  @nn.compact
  def __call__(self, latents_BxMxD):
    """Returns float32 logits_BxMxV."""
    features = self.config.value_features
    project = dense(self.config, features, "project", ("width", None), zero=True)
    features_VxF = positions.value_features(self.config.vocab_size, features)
    return project(latents_BxMxD).astype(jnp.float32) @ features_VxF.T


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
  """Dropout: `x` with a fraction `rate` of its elements set to 0 and the others scaled up."""
  if not rate:
    return x
  kept = jax.random.bernoulli(module.make_rng("dropout"), 1 - rate, x.shape)
  kept = checkpoint_name(kept, streamed.SAVED)  # one byte per element, and more expensive to draw again than to keep
  return jnp.where(kept, x / (1 - rate), 0)


def head_norm(name: str | None) -> nn.RMSNorm:
  """RMS normalization of each head's queries or keys, in float32."""
  scale_init = nn.with_logical_partitioning(nn.initializers.ones_init(), ("norm",))
  return nn.RMSNorm(epsilon=1e-6, name=name, dtype=jnp.float32, scale_init=scale_init)


def rotate(config: ModelConfig, x_BxLxHxK, positions_BxLxP):
  """Queries or keys rotated by their positions, where the config's encoding does that; otherwise unchanged."""
  encoding = positions.encoding_of(config)
  return x_BxLxHxK if encoding.rotate is None else encoding.rotate(config, x_BxLxHxK, positions_BxLxP)


class Embed(nn.Module):
  """x_BxLxE in the compute dtype: token embedding plus the encoding of each position dimension, if it is added."""

  config: ModelConfig

  @nn.compact
  def __call__(self, tokens_BxL, positions_BxLxP):
    config, encoding = self.config, positions.encoding_of(self.config)
    width, dtype = config.input_width, jnp.dtype(config.dtype)
    table_VxE = self.param("tokens", _table_init, (config.vocab_size, width), jnp.float32)
    if config.value_features:
      to_width = dense(config, width, "values", (None, "width"), use_bias=False)
      table_VxE += to_width(positions.value_features(config.vocab_size, config.value_features)).astype(jnp.float32)
    x_BxLxE = table_VxE[tokens_BxL].astype(dtype)  # cast last: the gradients of a row are accumulated in float32
    if not encoding.is_added:
      return x_BxLxE
    dimensions, sizes = positions_BxLxP.shape[-1], config.position_sizes
    problem = f"Positions of this task have {dimensions} dimensions, but model.position_sizes={sizes} has {len(sizes)}"
    require(dimensions == len(sizes), f"{problem}: give a size for each.")
    for dimension, size in enumerate(sizes):
      positions_BxL = positions_BxLxP[..., dimension]
      if encoding.table is not None:
        x_BxLxE += encoding.table(positions_BxL, size=size, width=width).astype(dtype)
      else:
        table = self.param(f"position_{dimension}", _table_init, (size, width), jnp.float32)
        x_BxLxE += table[positions_BxL].astype(dtype)
    return x_BxLxE


class KeysValues(nn.Module):
  """Projects normalized inputs to keys and values, not yet rotated; `width` is that of all heads together."""

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


class CausalConv(nn.Module):
  """Adds to each slot's keys and values those of the slots before it: one weight per tap and head channel.

  The weights of the newest tap are 1 at first and all others 0.
  """

  config: ModelConfig

  @nn.compact
  def __call__(self, k_BxCxHxK, v_BxCxHxK, valid_BxC):
    """Returns keys and values without the first `conv_taps` slots, the halo; invalid slots contribute nothing.

    With the numbers of documents as `valid_BxC` (see keys.py), those of other documents contribute nothing either.
    """
    taps, (_, slots, heads, width) = self.config.conv_taps, k_BxCxHxK.shape

    def before(x_BxCxHxK, tap):
      earlier = slice(taps - tap, slots - tap)
      if valid_BxC.dtype == bool:
        return x_BxCxHxK[:, earlier]
      is_same_BxC = valid_BxC[:, earlier] == valid_BxC[:, taps:]
      return jnp.where(is_same_BxC[..., None, None], x_BxCxHxK[:, earlier], 0)

    def convolve(name, x_BxCxHxK):
      newest_is_one = lambda *_: jnp.zeros((taps, heads, width)).at[0].set(1.0)  # noqa: E731
      init: Callable[..., Any] = nn.with_logical_partitioning(newest_is_one, (None, "norm", "norm"))
      weights = self.param(name, init)
      x_BxCxHxK = jnp.where(valid_BxC[..., None, None], x_BxCxHxK, 0)
      shifted = (before(x_BxCxHxK, tap) for tap in range(1, taps + 1))
      return sum((x * w[None, None].astype(x.dtype) for x, w in zip(shifted, weights)), start=x_BxCxHxK[:, taps:])

    return convolve("key", k_BxCxHxK), convolve("value", v_BxCxHxK)


class Attention(nn.Module):
  """Multi-head attention from normalized latents to keys and values, projected back to the latents' width."""

  config: ModelConfig
  num_heads: int
  width: int

  @nn.compact
  def __call__(self, normed_BxMxD, keys: Keys | CachedKeys, positions_BxMxP, valid_BxL, keep_own: bool = False):
    """Returns attended_BxMxD; `positions_BxMxP` are those of the latents, and `CachedKeys` need M = 1."""
    config = self.config
    query = dense(config, self.width, "query", ("width", "heads"))(normed_BxMxD)
    q_BxMxHxK = query.reshape(*normed_BxMxD.shape[:2], self.num_heads, -1)
    if config.qk_norm:
      q_BxMxHxK = head_norm("norm_query")(q_BxMxHxK).astype(config.dtype)
    q_BxMxHxK = rotate(config, q_BxMxHxK, positions_BxMxP)
    if self.is_mutable_collection(MAPS) and isinstance(keys, Keys):
      weights_BxHx1xL = attention.probabilities(q_BxMxHxK[:, -1:], keys.to_arrays()[0], valid_BxL, keep_own)
      self.sow(MAPS, "weights_BxHxL", weights_BxHx1xL[:, :, 0])
    if isinstance(keys, CachedKeys):
      attended_BxMxHxK = keys.attend(q_BxMxHxK, valid_BxL)
    else:
      attend = attention.kernel_of(config).attend
      attended_BxMxHxK = attend(q_BxMxHxK, keys, valid_BxL, keep_own, config.attention_chunk)
    out = dense(config, config.latent_width, "out", ("heads", "width"), zero=config.zero_init)
    return out(attended_BxMxHxK.reshape(query.shape))


class MLP(nn.Module):
  """Two Dense layers with the config's activation between them."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x_BxMxD):
    config = self.config
    hidden_BxMxF = dense(config, config.mlp_widening * config.latent_width, "up", ("width", "mlp"))(x_BxMxD)
    hidden_BxMxF = ACTIVATIONS[config.activation](hidden_BxMxF)
    return dense(config, config.latent_width, "down", ("mlp", "width"), zero=config.zero_init)(hidden_BxMxF)


class CrossAttention(nn.Module):
  """Pre-norm attention from the latents to all inputs and a pre-norm MLP, each with dropout and a residual."""

  config: ModelConfig

  def setup(self):
    config = self.config
    self.norm_query, self.norm_inputs, self.norm_mlp = layer_norm(None), layer_norm(None), layer_norm(None)
    self.keys_values = KeysValues(config, config.num_cross_heads, config.cross_width)
    self.attention = Attention(config, config.num_cross_heads, config.cross_width)
    self.mlp = MLP(config)
    self.conv = CausalConv(config) if config.conv_taps else None
    self.norm_key = head_norm(None) if config.qk_norm else None

  def __call__(self, latents_BxMxD, keys: Keys | CachedKeys, positions_BxMxP, valid_BxL, deterministic: bool = True):
    """Returns latents_BxMxD, given the keys of all inputs (see `keys`) and which inputs are valid."""
    dropout = functools.partial(drop, self, 0.0 if deterministic else self.config.dropout)
    attended_BxMxD = self.attention(self.norm_query(latents_BxMxD), keys, positions_BxMxP, valid_BxL)
    latents_BxMxD = constrain(latents_BxMxD + dropout(attended_BxMxD), "batch", None, None)
    hidden_BxMxD = self.mlp(self.norm_mlp(latents_BxMxD))
    return constrain(latents_BxMxD + dropout(hidden_BxMxD), "batch", None, None)

  def project(self, x_BxCxE):
    """Keys and values of embedded inputs, before the steps of `mix`."""
    return self.keys_values(self.norm_inputs(x_BxCxE))

  def mix(self, keys_values, tokens_BxC, positions_BxCxP, segments_BxC=None):
    """Convolved, normalized and rotated keys, and convolved values, without the halo of the first `conv_taps` slots."""
    k_BxCxHxK, v_BxCxHxK = keys_values
    if self.conv:
      valid_BxC = tokens_BxC > 0 if segments_BxC is None else segments_BxC
      k_BxCxHxK, v_BxCxHxK = self.conv(k_BxCxHxK, v_BxCxHxK, valid_BxC)
    if self.norm_key:
      k_BxCxHxK = self.norm_key(k_BxCxHxK).astype(self.config.dtype)
    return rotate(self.config, k_BxCxHxK, positions_BxCxP[:, self.config.conv_taps :]), v_BxCxHxK

  def keys(self, embed: Embed, tokens_BxL, positions_BxLxP, segments_BxL=None) -> Keys:
    """Keys and values of the inputs: one pure function from token ids to rotated heads, for kernels that stream it."""
    config = self.config
    if self.is_initializing():
      ids_1xC = jnp.ones((1, config.conv_taps + 1), jnp.int32)
      positions_1xCxP = jnp.ones((*ids_1xC.shape, positions_BxLxP.shape[-1]), jnp.int32)
      self.mix(self.project(embed(ids_1xC, positions_1xCxP)), ids_1xC, positions_1xCxP)
    (embed, embed_weights), (unbound, variables) = embed.unbind(), self.unbind()

    def subset(*names):
      return {"params": {name: variables["params"][name] for name in names if name in variables["params"]}}

    def from_ids(weights, tokens_BxC, positions_BxCxP):
      x_BxCxE = embed.apply(weights[0], tokens_BxC, positions_BxCxP)
      return unbound.apply(weights[1], x_BxCxE, method="project")

    def from_table(tables, tokens_BxC, unused_positions_BxCxP):
      return tuple(table_VxHxK[tokens_BxC].astype(config.dtype) for table_VxHxK in tables)

    # Weights are gathered once, whole: sharded weights would make the results, as long as the context, be exchanged.
    weights, unmixed = (embed_weights, subset("norm_inputs", "keys_values")), from_ids
    weights = jax.tree.map(lambda weight: constrain(weight, *(None,) * weight.ndim), weights)
    # In float32, since gradients of many inputs are accumulated in each row of the tables.
    if projects_by_id(config, tokens_BxL.shape[1]):
      ids_1xV = jnp.arange(config.vocab_size)[None]
      projected = from_ids(weights, ids_1xV, ids_1xV[..., None])
      weights, unmixed = tuple(part_1xVxHxK[0].astype(jnp.float32) for part_1xVxHxK in projected), from_table

    def project(weights, inputs):
      return unbound.apply(weights[1], unmixed(weights[0], *inputs[:2]), *inputs, method="mix")

    sharded = attention.kernel_of(config).shards_context
    slots = "slots" if sharded else None
    ids = tokens_BxL, positions_BxLxP, segments_BxL if config.conv_taps else None
    inputs = tuple(constrain(x, *("batch", slots, None)[: x.ndim]) for x in ids if x is not None)
    return Keys(project, (weights, subset("conv", "norm_key")), inputs, config.conv_taps, sharded)


def projects_by_id(config: ModelConfig, num_inputs: int) -> bool:
  """Whether the cross-attention projects each token id once and looks the inputs up, instead of projecting each input.

  Without added positions, inputs with the same id have the same keys and values up to the rotation, so this pays
  where there are more inputs than ids.
  """
  return not positions.encoding_of(config).is_added and config.vocab_size <= num_inputs


class SelfAttentionLayer(nn.Module):
  """One causal pre-norm Transformer layer over the latents, in the (carry, output) form that nn.scan needs."""

  config: ModelConfig

  @nn.compact
  def __call__(
    self,
    latents_BxMxD,
    positions_BxMxP,
    valid_BxM,
    keep_own: bool = False,
    deterministic: bool = True,
    cache: CachedKeys | None = None,
    slot=None,
  ):
    """Returns the latents and, for generation, their keys and values as `CachedKeys`.

    `valid_BxM`: which latents others may attend to. `keep_own`: a latent attends to itself, valid or not. With the KV
    `cache` of S latents, M = 1: the newest latent is written to its `slot`, int32[], and `valid_BxM` is [B, S].
    """
    config = self.config
    dropout = functools.partial(drop, self, 0.0 if deterministic else config.dropout)
    normed_BxMxD = layer_norm("norm_attention")(latents_BxMxD)
    heads, width = config.num_self_heads, config.latent_width
    k_BxMxHxK, v_BxMxHxK = KeysValues(config, heads, width, name="keys_values")(normed_BxMxD)
    if config.qk_norm:
      k_BxMxHxK = head_norm("norm_key")(k_BxMxHxK).astype(config.dtype)
    k_BxMxHxK = rotate(config, k_BxMxHxK, positions_BxMxP)
    new_cache = CachedKeys.from_arrays(k_BxMxHxK, v_BxMxHxK)
    if cache is not None:
      new_cache = write(cache, new_cache, slot)
    keys = Keys.from_arrays(k_BxMxHxK, v_BxMxHxK) if cache is None else new_cache
    attend = Attention(config, heads, width, name="attention")
    attended_BxMxD = attend(normed_BxMxD, keys, positions_BxMxP, valid_BxM, keep_own)
    latents_BxMxD = constrain(latents_BxMxD + dropout(attended_BxMxD), "batch", None, None)
    hidden_BxMxD = MLP(config, name="mlp")(layer_norm("norm_mlp")(latents_BxMxD))
    return constrain(latents_BxMxD + dropout(hidden_BxMxD), "batch", None, None), new_cache


def scan(layer: type[nn.Module], config: ModelConfig, depth: int, in_axes: tuple, static: tuple[int, ...], name=None):
  """`depth` layers, traced and compiled once, with rematerialization; their weights are stacked on axis 0.

  `in_axes` is that of nn.scan, and `static` has the numbers of arguments, counted from 1, that are not arrays.
  """
  policy = REMAT_POLICIES[config.remat]
  if policy is not None:
    layer = nn.remat(layer, policy=policy, prevent_cse=False, static_argnums=static)
  scanned = nn.scan(
    layer,
    variable_axes={"params": 0},
    split_rngs={"params": True, "dropout": True},
    in_axes=in_axes,
    length=depth,
    metadata_params={nn.PARTITION_NAME: "layers"},
  )
  return scanned(config, name=name)
