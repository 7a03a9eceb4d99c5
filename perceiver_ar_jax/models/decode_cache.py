"""The KV cache of generation, with which a new token costs one latent: pure functions over PerceiverAR's own layers.

Latents slide as a sequence grows, so no cache stays exact (paper, appendix on generation). What stays exact is kept:
keys and values of the context, and each latent after the first cross-attention, since that depends on its own and
earlier inputs only. Self-attention is different: a latent attends to the latents before it, and those drop out. So the
KV caches of the layers are valid until there is no slot for another latent; then the newest latents go through the
layers again (`refill`), as in one pass over them, but without reading the context again.

Shape letters: perceiver_ar.py; S slots of a cache.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from perceiver_ar_jax.config import InputError, ModelConfig
from perceiver_ar_jax.models import layers
from perceiver_ar_jax.models.architectures import architecture_of
from perceiver_ar_jax.models.keys import CachedKeys, Keys
from perceiver_ar_jax.models.perceiver_ar import PerceiverAR, group_depths
from perceiver_ar_jax.models.positions import encoding_of
from perceiver_ar_jax.parallel.sharding import constrain


def check(config: ModelConfig) -> None:
  """Raises InputError if generation with the model does not support a KV cache."""
  if not architecture_of(config).has_cross_attention:
    raise InputError(
      f"model.architecture={config.architecture} has no KV cache for sampling: set --config.sample.cache=False, which"
      " takes a full pass for every token, or in training --config.eval.num_samples=0 for no samples."
    )
  if not config.positions_from_data and encoding_of(config).is_added:
    raise InputError(
      f"model.position_encoding={config.position_encoding} with model.positions_from_data=False changes all positions"
      " with each token, so nothing can be cached: set --config.sample.cache=False."
    )


class UnstackedParams(NamedTuple):
  """A model's parameters, unstacked by layer: stacked ones would be copied for every token."""

  params: Any
  layers: list[list[Any]]
  """By group of layers between cross-attentions."""

  @classmethod
  def from_params(cls, config: ModelConfig, params) -> "UnstackedParams":
    """Converts from the layout of training."""

    def layer(group, index):
      return jax.tree.map(lambda stacked: stacked[index], params[f"layers_{group}"])

    depths = group_depths(config)
    return cls(params, [[layer(group, index) for index in range(depth)] for group, depth in enumerate(depths)])


class ContextCache(NamedTuple):
  """Sequences in L slots from the first on, all rows ending at the same slot; and their newest M + 1 latents."""

  cross: tuple[CachedKeys, ...]
  """Keys and values of the inputs for each cross-attention, L slots."""
  valid_BxL: jax.Array
  used: jax.Array
  """int32[]: slots in use."""
  crossed_BxSxD: jax.Array
  """The newest latents after the first cross-attention, from slot 0 on: S = M + 1."""
  positions_BxSxP: jax.Array
  """Their positions."""
  valid_BxS: jax.Array
  """Which of them are not padding."""
  num_latents: jax.Array
  """int32[]: latents in use, at least M after a prefill."""
  recent: tuple[jax.Array, jax.Array]
  """Tokens [B, T] and positions [B, T, P] of the newest T = conv_taps inputs."""


class LatentCache(NamedTuple):
  """Keys and values of the newest latents in every self-attention layer, M slots each; groups as in UnstackedParams."""

  layers: list[list[CachedKeys]]
  valid_BxM: jax.Array
  used: jax.Array
  """int32[]: slots in use."""


def prefill(config: ModelConfig, weights: UnstackedParams, tokens_BxL, positions_BxLxP) -> ContextCache:
  """The context cache of right-aligned prompts of up to L tokens; shorter rows are padded with PAD, as in training."""
  num_latents, valid_BxL = config.num_latents, tokens_BxL > 0
  keys_values = _apply(config, weights, "cross_keys_values", tokens_BxL, positions_BxLxP)
  positions_BxMxP = positions_BxLxP[:, -num_latents:]
  latents_BxMxD = _apply(config, weights, "initial_latents", tokens_BxL[:, -num_latents:], positions_BxMxP)
  first_keys = Keys.from_arrays(*keys_values[0])
  crossed_BxMxD = _apply(config, weights, "attend_to_context", 0, latents_BxMxD, first_keys, positions_BxMxP, valid_BxL)
  unused = jnp.argmax(valid_BxL.any(axis=0)).astype(jnp.int32)
  cross = tuple(
    _shard(CachedKeys(*(jnp.roll(x, -unused, axis=1) for x in CachedKeys.from_arrays(*arrays))))
    for arrays in keys_values
  )
  crossed_BxSxD, positions_BxSxP, valid_BxS = (
    jnp.pad(x, ((0, 0), (0, 1)) + ((0, 0),) * (x.ndim - 2))
    for x in (crossed_BxMxD, positions_BxMxP, valid_BxL[:, -num_latents:])
  )
  return ContextCache(
    cross=cross,
    valid_BxL=jnp.roll(valid_BxL, -unused, axis=1),
    used=valid_BxL.shape[1] - unused,
    crossed_BxSxD=crossed_BxSxD,
    positions_BxSxP=positions_BxSxP,
    valid_BxS=valid_BxS,
    num_latents=jnp.int32(num_latents),
    recent=_newest((tokens_BxL, positions_BxLxP), config.conv_taps),
  )


def refill(
  config: ModelConfig, weights: UnstackedParams, context: ContextCache, kept: int
) -> tuple[Any, ContextCache, LatentCache]:
  """Passes the newest `kept` latents through all layers.

  Returns:
    latents_Bx1xD of the newest input, as PerceiverAR.latents computes it; the context with these latents only; the KV
    caches of the layers, with free slots for M - kept more.
  """
  first = context.num_latents - kept

  def newest(x_BxSx):
    x_BxSx = jnp.roll(x_BxSx, -first, axis=1)
    used = (jnp.arange(x_BxSx.shape[1]) < kept).reshape(1, -1, *(1,) * (x_BxSx.ndim - 2))
    return jnp.where(used, x_BxSx, jnp.zeros((), x_BxSx.dtype))

  context = context._replace(
    crossed_BxSxD=newest(context.crossed_BxSxD),
    positions_BxSxP=newest(context.positions_BxSxP),
    valid_BxS=newest(context.valid_BxS),
    num_latents=jnp.int32(kept),
  )
  latents_BxMxD, valid_BxM = context.crossed_BxSxD[:, :kept], context.valid_BxS[:, :kept]
  positions_BxMxP = context.positions_BxSxP[:, :kept]
  free = config.num_latents - kept
  caches: list[list[CachedKeys]] = []
  for group, params_of_layers in enumerate(weights.layers):
    if group:  # the cross-attention's causal offset needs the newest input in the last slot
      unused = context.valid_BxL.shape[1] - context.used
      in_order = CachedKeys(*(jnp.roll(x, unused, axis=1) for x in context.cross[group]))
      keys, valid_BxL = in_order.to_keys(len(valid_BxM)), jnp.roll(context.valid_BxL, unused, axis=1)
      latents_BxMxD = _apply(
        config, weights, "attend_to_context", group, latents_BxMxD, keys, positions_BxMxP, valid_BxL
      )
    caches.append([])
    for params in params_of_layers:
      latents_BxMxD, cache = _layer(config, params, latents_BxMxD, positions_BxMxP, valid_BxM)
      caches[-1].append(CachedKeys(*(jnp.pad(x, ((0, 0), (0, free), (0, 0))) for x in cache)))
  latents_Bx1xD = _apply(config, weights, "normalise", latents_BxMxD[:, -1:])
  return latents_Bx1xD, context, LatentCache(caches, jnp.pad(valid_BxM, ((0, 0), (0, free))), jnp.int32(kept))


def append(config: ModelConfig, weights: UnstackedParams, context: ContextCache, token_B, position_BxP) -> ContextCache:
  """The context with one more input in each row (PAD: an empty slot) and its latent; updated in place if donated."""
  token_Bx1, position_Bx1xP, valid_Bx1 = token_B[:, None], position_BxP[:, None], token_B[:, None] > 0
  inputs = tuple(jnp.concatenate(pair, axis=1) for pair in zip(context.recent, (token_Bx1, position_Bx1xP)))
  keys_values = _apply(config, weights, "cross_keys_values", *inputs, config.conv_taps)
  cross = tuple(
    _shard(old.write(CachedKeys.from_arrays(*arrays), context.used)) for old, arrays in zip(context.cross, keys_values)
  )
  valid_BxL = _write(context.valid_BxL, valid_Bx1, context.used)
  latents_Bx1xD = _apply(config, weights, "initial_latents", token_Bx1, position_Bx1xP)
  latents_Bx1xD = _apply(config, weights, "attend_to_context", 0, latents_Bx1xD, cross[0], position_Bx1xP, valid_BxL)
  return ContextCache(
    cross=cross,
    valid_BxL=valid_BxL,
    used=context.used + 1,
    crossed_BxSxD=_write(context.crossed_BxSxD, latents_Bx1xD, context.num_latents),
    positions_BxSxP=_write(context.positions_BxSxP, position_Bx1xP, context.num_latents),
    valid_BxS=_write(context.valid_BxS, valid_Bx1, context.num_latents),
    num_latents=context.num_latents + 1,
    recent=_newest(inputs, config.conv_taps),
  )


def decode(
  config: ModelConfig, weights: UnstackedParams, context: ContextCache, latents: LatentCache
) -> tuple[Any, LatentCache]:
  """(latents_Bx1xD of the newest input, attending to the cached latents before it; the latent cache with it)."""

  def newest(x_BxSx):
    return jax.lax.dynamic_slice_in_dim(x_BxSx, context.num_latents - 1, 1, axis=1)

  latents_Bx1xD, positions_Bx1xP = newest(context.crossed_BxSxD), newest(context.positions_BxSxP)
  valid_BxM = _write(latents.valid_BxM, newest(context.valid_BxS), latents.used)
  caches: list[list[CachedKeys]] = []
  for group, (params_of_layers, old_caches) in enumerate(zip(weights.layers, latents.layers, strict=True)):
    if group:
      latents_Bx1xD = _apply(
        config,
        weights,
        "attend_to_context",
        group,
        latents_Bx1xD,
        context.cross[group],
        positions_Bx1xP,
        context.valid_BxL,
      )
    caches.append([])
    for params, old in zip(params_of_layers, old_caches, strict=True):
      latents_Bx1xD, cache = _layer(
        config, params, latents_Bx1xD, positions_Bx1xP, valid_BxM, cache=old, slot=latents.used
      )
      caches[-1].append(cache)
  return _apply(config, weights, "normalise", latents_Bx1xD), LatentCache(caches, valid_BxM, latents.used + 1)


def logits(config: ModelConfig, weights: UnstackedParams, latents_Bx1xD):
  """float32 logits_BxV of the token after the newest input."""
  return _apply(config, weights, "logits", latents_Bx1xD)[:, 0]


def _apply(config: ModelConfig, weights: UnstackedParams, method: str, *arguments):
  return PerceiverAR(config).apply({"params": weights.params}, *arguments, method=method)


def _layer(config: ModelConfig, params, *arguments, **cache):
  return layers.SelfAttentionLayer(config).apply({"params": params}, *arguments, **cache)


def _newest(inputs, count: int):
  """The last `count` slots of tokens and positions."""
  return tuple(x[:, x.shape[1] - count :] for x in inputs)


def _write(x_BxSx, update_Bx1x, slot):
  return jax.lax.dynamic_update_slice_in_dim(x_BxSx, update_Bx1x.astype(x_BxSx.dtype), slot, axis=1)


def _shard(cache: CachedKeys) -> CachedKeys:
  """Shards the cache of a long context over the mesh axis `context`."""
  return CachedKeys(*(constrain(x, "batch_heads", "context", None) for x in cache))
