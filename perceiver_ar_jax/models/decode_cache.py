"""The KV cache of generation, with which a new token costs one latent; it applies PerceiverAR's own layers.

Latents slide as a sequence grows, so no cache stays exact (paper, appendix on generation). What stays exact is kept:
keys and values of the context, and each latent after the first cross-attention. In self-attention, the latents that a
latent attends to drop out. So the KV caches of the layers are valid until there is no slot for another latent; then the
newest latents go through the layers again (`refill`), without reading the context again.

Shape letters: perceiver_ar.py; S slots of a cache.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from perceiver_ar_jax.config import ModelConfig, require
from perceiver_ar_jax.models import architectures, layers, perceiver_ar, positions
from perceiver_ar_jax.models.keys import CachedKeys, Keys, write


def check(config: ModelConfig) -> None:
  """Raises InputError if generation with the model does not support a KV cache."""
  fix = "set --config.sample.cache=False, which is slow, or in training --config.eval.num_samples=0."
  has_cache = architectures.architecture_of(config).has_cross_attention
  require(has_cache, f"model.architecture={config.architecture} has no KV cache for sampling: {fix}")
  is_fixed = config.positions_from_data or not positions.encoding_of(config).is_added
  problem = f"model.positions_from_data=False changes all {config.position_encoding} positions with each token"
  require(is_fixed, f"{problem}, so nothing can be cached: {fix}")


class Latents(NamedTuple):
  """Latents after the first cross-attention, in S slots from slot 0 on."""

  crossed_BxSxD: jax.Array
  positions_BxSxP: jax.Array
  valid_BxS: jax.Array  # which of them are not padding


class ContextCache(NamedTuple):
  """Sequences in L slots from the first on, all rows ending at the same slot; and their newest M + 1 latents."""

  cross: tuple[CachedKeys, ...]  # keys and values of the inputs for each cross-attention, L slots
  valid_BxL: jax.Array
  used: jax.Array  # int32[]: slots in use
  latents: Latents  # S = M + 1
  num_latents: jax.Array  # int32[]: latents in use, at least M after a prefill
  recent: tuple[jax.Array, jax.Array]  # tokens [B, T] and positions [B, T, P] of the newest T = conv_taps inputs


LatentCaches = list[list[CachedKeys]]
"""Keys and values of the latents in each self-attention layer, by group of layers between cross-attentions.

Their M slots are the first M of ContextCache.latents.
"""


class CachedModel:
  """A PerceiverAR with its parameters, and the steps of generation."""

  def __init__(self, config: ModelConfig, params):
    self._config, self._params = config, params
    # By group of layers, and unstacked: stacked parameters would be copied for every token.
    self._layers = [
      [jax.tree.map(lambda stacked, index=index: stacked[index], params[f"layers_{group}"]) for index in range(depth)]
      for group, depth in enumerate(perceiver_ar.group_depths(config))
    ]

  def prefill(self, tokens_BxL, positions_BxLxP) -> ContextCache:
    """The context cache of right-aligned prompts of up to L tokens, padded with PAD on the left as in training."""
    num_latents, valid_BxL, model = self._config.num_latents, tokens_BxL > 0, self._bind()
    keys_values = model.cross_keys_values(tokens_BxL, positions_BxLxP)
    positions_BxMxP, valid_BxM = positions_BxLxP[:, -num_latents:], valid_BxL[:, -num_latents:]
    latents_BxMxD = model.initial_latents(tokens_BxL[:, -num_latents:], positions_BxMxP)
    crossed_BxMxD = model.cross_attend[0](latents_BxMxD, Keys.from_arrays(*keys_values[0]), positions_BxMxP, valid_BxL)
    unused, first = jnp.argmax(valid_BxL.any(axis=0)).astype(jnp.int32), valid_BxL.shape[1] - self._config.conv_taps
    return ContextCache(
      cross=tuple(_roll(CachedKeys.from_arrays(*arrays), -unused).sharded() for arrays in keys_values),
      valid_BxL=_roll(valid_BxL, -unused),
      used=valid_BxL.shape[1] - unused,
      latents=_pad(Latents(crossed_BxMxD, positions_BxMxP, valid_BxM), 1),
      num_latents=jnp.int32(num_latents),
      recent=(tokens_BxL[:, first:], positions_BxLxP[:, first:]),
    )

  def refill(self, context: ContextCache, kept: int) -> tuple[Any, ContextCache, LatentCaches]:
    """Passes the newest `kept` latents through all layers.

    Returns (latents_Bx1xD of the newest input, as PerceiverAR.latents computes it; the context with these latents only;
    the KV caches of the layers, with free slots for M - kept more).
    """
    newest = _roll(context.latents, kept - context.num_latents)
    latents = Latents(*(x[:, :kept] for x in newest))
    context = context._replace(latents=_pad(latents, newest.valid_BxS.shape[1] - kept), num_latents=jnp.int32(kept))
    # The cross-attention's causal offset needs the newest input in the last slot.
    unused, rows = context.valid_BxL.shape[1] - context.used, len(context.valid_BxL)
    keys = [_roll(cross, unused).to_keys(rows) for cross in context.cross]
    latents_Bx1xD, caches = self._apply_layers(latents, keys, _roll(context.valid_BxL, unused))
    return latents_Bx1xD, context, _pad(caches, self._config.num_latents - kept)

  def append(self, context: ContextCache, token_B, position_BxP) -> ContextCache:
    """The context with one more input in each row (PAD: an empty slot) and its latent; updated in place if donated."""
    token_Bx1, position_Bx1xP, valid_Bx1 = token_B[:, None], position_BxP[:, None], token_B[:, None] > 0
    pairs = zip(context.recent, (token_Bx1, position_Bx1xP))
    tokens_BxT, positions_BxTxP = (jnp.concatenate(pair, axis=1) for pair in pairs)
    model = self._bind()
    keys_values = model.cross_keys_values(tokens_BxT, positions_BxTxP, halo=self._config.conv_taps)
    new = tuple(CachedKeys.from_arrays(*arrays) for arrays in keys_values)
    cross = tuple(cache.sharded() for cache in write(context.cross, new, context.used))
    valid_BxL = write(context.valid_BxL, valid_Bx1, context.used)
    latents_Bx1xD = model.initial_latents(token_Bx1, position_Bx1xP)
    latents_Bx1xD = model.cross_attend[0](latents_Bx1xD, cross[0], position_Bx1xP, valid_BxL)
    return ContextCache(
      cross=cross,
      valid_BxL=valid_BxL,
      used=context.used + 1,
      latents=write(context.latents, Latents(latents_Bx1xD, position_Bx1xP, valid_Bx1), context.num_latents),
      num_latents=context.num_latents + 1,
      recent=(tokens_BxT[:, 1:], positions_BxTxP[:, 1:]),
    )

  def decode(self, context: ContextCache, caches: LatentCaches) -> tuple[Any, LatentCaches]:
    """(latents_Bx1xD of the newest input, attending to the cached latents before it; the KV caches with it)."""
    slot, latents = context.num_latents - 1, context.latents
    newest = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, slot, 1, axis=1), latents)
    newest = newest._replace(valid_BxS=latents.valid_BxS[:, : self._config.num_latents])
    return self._apply_layers(newest, context.cross, context.valid_BxL, caches, slot)

  def logits(self, latents_Bx1xD):
    """float32 logits_BxV of the token after the newest input."""
    return self._bind().logits(latents_Bx1xD)[:, 0]

  def _bind(self) -> perceiver_ar.PerceiverAR:
    return perceiver_ar.PerceiverAR(self._config).bind({"params": self._params})

  def _apply_layers(self, latents: Latents, cross, valid_BxL, caches: LatentCaches | None = None, slot=None):
    """(latents_Bx1xD of the last latent after all layers and the final norm, KV caches of the layers).

    With `caches`, one latent is written to their `slot`, and `latents.valid_BxS` is about the slots of the caches.
    """
    model, (latents_BxSxD, positions_BxSxP, valid_BxS) = self._bind(), latents
    new_caches: list[list[Any]] = []
    for group, params_of_layers in enumerate(self._layers):
      if group:
        latents_BxSxD = model.cross_attend[group](latents_BxSxD, cross[group], positions_BxSxP, valid_BxL)
      new_caches.append([])
      for index, params in enumerate(params_of_layers):
        layer, inputs = layers.SelfAttentionLayer(self._config), (latents_BxSxD, positions_BxSxP, valid_BxS)
        old = caches[group][index] if caches else None
        latents_BxSxD, new = layer.apply({"params": params}, *inputs, cache=old, slot=slot)
        new_caches[-1].append(new)
    return model.final_norm(latents_BxSxD[:, -1:]), new_caches


def _roll(tree, shift):
  return jax.tree.map(lambda x: jnp.roll(x, shift, axis=1), tree)


def _pad(tree, count: int):
  """A tree of [B, S, ...] with `count` more slots of zeros."""
  return jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, count)) + ((0, 0),) * (x.ndim - 2)), tree)
