"""What generation keeps of a sequence, so that a token costs one latent: pure functions over PerceiverAR's own layers.

Latents slide as a sequence grows, so no cache is exact for ever (paper, appendix on generation). What stays true is
kept: keys and values of the context, and each latent as it leaves the first cross-attend, since that depends on the
inputs up to its own alone. Self-attention is different: a latent sees the latents before it, and those fall away. So
keys and values of the layers are good until there is no room for another latent; then the newest latents go through the
layers once more (`refill`), as one whole pass over them would have it, only that it need not read the context again.

Shape letters: perceiver_ar.py; S slots of a cache.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from perceiver_ar_jax.config import ModelConfig
from perceiver_ar_jax.models import attention
from perceiver_ar_jax.models.attention_kernels import Cached, Keys
from perceiver_ar_jax.models.perceiver_ar import PerceiverAR, runs
from perceiver_ar_jax.parallel.sharding import constrain


class Weights(NamedTuple):
  """A model's weights, those of its layers apart: stacked ones would be copied again for every token."""

  params: Any
  layers: list[list[Any]]
  """By run of layers between cross-attends."""

  @classmethod
  def of(cls, config: ModelConfig, params) -> "Weights":
    """From the parameters as training has them."""

    def layer(run, index):
      return jax.tree.map(lambda stacked: stacked[index], params[f"layers_{run}"])

    return cls(params, [[layer(run, index) for index in range(length)] for run, length in enumerate(runs(config))])


class Context(NamedTuple):
  """Sequences in L slots from the first on, all rows ending at the same one; and their newest M + 1 latents at most."""

  cross: tuple[Cached, ...]
  """Keys and values of the inputs for each cross-attend, L slots."""
  valid_BxL: jax.Array
  used: jax.Array
  """int32[]: slots in use."""
  crossed_BxSxD: jax.Array
  """The newest latents after the first cross-attend, in slots from the first on: S = M + 1."""
  positions_BxSxP: jax.Array
  """Theirs."""
  valid_BxS: jax.Array
  """Which of them are there."""
  num_latents: jax.Array
  """int32[]: how many these are, at least M."""


class Layers(NamedTuple):
  """Keys and values of the newest latents in every self-attention layer, M slots each; by run, as `Weights`."""

  layers: list[list[Cached]]
  valid_BxM: jax.Array
  used: jax.Array
  """int32[]: slots in use."""


def prefill(config: ModelConfig, weights: Weights, tokens_BxL, positions_BxLxP) -> Context:
  """The context of right-aligned prompts of up to L tokens, as for training; rows that are shorter hold PAD."""
  room, valid_BxL = config.num_latents, tokens_BxL > 0
  made = _apply(config, weights, "keys_values", tokens_BxL, positions_BxLxP)
  positions_BxMxP = positions_BxLxP[:, -room:]
  latents_BxMxD, rotary_BxM = _apply(config, weights, "start", tokens_BxL[:, -room:], positions_BxMxP)
  crossed_BxMxD = _apply(
    config, weights, "attend_to_context", 0, latents_BxMxD, Keys.of(*made[0]), rotary_BxM, valid_BxL
  )
  unused = jnp.argmax(valid_BxL.any(axis=0)).astype(jnp.int32)
  cross = tuple(_spread(Cached(*(jnp.roll(x, -unused, axis=1) for x in Cached.of(*one)))) for one in made)
  crossed_BxSxD, positions_BxSxP, valid_BxS = (
    jnp.pad(x, ((0, 0), (0, 1)) + ((0, 0),) * (x.ndim - 2))
    for x in (crossed_BxMxD, positions_BxMxP, valid_BxL[:, -room:])
  )
  return Context(
    cross=cross,
    valid_BxL=jnp.roll(valid_BxL, -unused, axis=1),
    used=valid_BxL.shape[1] - unused,
    crossed_BxSxD=crossed_BxSxD,
    positions_BxSxP=positions_BxSxP,
    valid_BxS=valid_BxS,
    num_latents=jnp.int32(room),
  )


def refill(config: ModelConfig, weights: Weights, context: Context, kept: int) -> tuple[Any, Context, Layers]:
  """The newest `kept` latents through all layers.

  Returns:
    latents_Bx1xD of the newest input, as PerceiverAR.latents has it; the context with these latents alone; the cache of
    the layers, with room for M - kept more.
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
  rotary_BxM = attention.rotary_positions(config, context.positions_BxSxP[:, :kept])
  room = config.num_latents - kept
  layers: list[list[Cached]] = []
  for run, own_layers in enumerate(weights.layers):
    if run:  # a whole pass wants the newest input in the last slot
      unused = context.valid_BxL.shape[1] - context.used
      in_order = Cached(*(jnp.roll(x, unused, axis=1) for x in context.cross[run]))
      keys, valid_BxL = in_order.keys(len(valid_BxM)), jnp.roll(context.valid_BxL, unused, axis=1)
      latents_BxMxD = _apply(config, weights, "attend_to_context", run, latents_BxMxD, keys, rotary_BxM, valid_BxL)
    layers.append([])
    for own in own_layers:
      latents_BxMxD, made = _layer(config, own, latents_BxMxD, rotary_BxM, valid_BxM)
      layers[-1].append(Cached(*(jnp.pad(x, ((0, 0), (0, room), (0, 0))) for x in made)))
  latents_Bx1xD = _apply(config, weights, "finish", latents_BxMxD[:, -1:])
  return latents_Bx1xD, context, Layers(layers, jnp.pad(valid_BxM, ((0, 0), (0, room))), jnp.int32(kept))


def add_input(config: ModelConfig, weights: Weights, context: Context, token_B, position_BxP) -> Context:
  """The context with one more input in each row (PAD: a hole) and its latent; in place where it can be."""
  token_Bx1, position_Bx1xP, valid_Bx1 = token_B[:, None], position_BxP[:, None], token_B[:, None] > 0
  made = _apply(config, weights, "keys_values", token_Bx1, position_Bx1xP)
  cross = tuple(_spread(old.put(Cached.of(*new), context.used)) for old, new in zip(context.cross, made))
  valid_BxL = _put(context.valid_BxL, valid_Bx1, context.used)
  latents_Bx1xD, rotary_Bx1 = _apply(config, weights, "start", token_Bx1, position_Bx1xP)
  latents_Bx1xD = _apply(config, weights, "attend_to_context", 0, latents_Bx1xD, cross[0], rotary_Bx1, valid_BxL)
  return Context(
    cross=cross,
    valid_BxL=valid_BxL,
    used=context.used + 1,
    crossed_BxSxD=_put(context.crossed_BxSxD, latents_Bx1xD, context.num_latents),
    positions_BxSxP=_put(context.positions_BxSxP, position_Bx1xP, context.num_latents),
    valid_BxS=_put(context.valid_BxS, valid_Bx1, context.num_latents),
    num_latents=context.num_latents + 1,
  )


def newest_latent(config: ModelConfig, weights: Weights, context: Context, cached: Layers) -> tuple[Any, Layers]:
  """(latents_Bx1xD of the newest input over what the layers hold of those before it, the cache with it)."""

  def newest(x_BxSx):
    return jax.lax.dynamic_slice_in_dim(x_BxSx, context.num_latents - 1, 1, axis=1)

  latents_Bx1xD = newest(context.crossed_BxSxD)
  rotary_Bx1 = attention.rotary_positions(config, newest(context.positions_BxSxP))
  valid_BxM = _put(cached.valid_BxM, newest(context.valid_BxS), cached.used)
  layers: list[list[Cached]] = []
  for run, (own_layers, old_layers) in enumerate(zip(weights.layers, cached.layers, strict=True)):
    if run:
      latents_Bx1xD = _apply(
        config, weights, "attend_to_context", run, latents_Bx1xD, context.cross[run], rotary_Bx1, context.valid_BxL
      )
    layers.append([])
    for own, old in zip(own_layers, old_layers, strict=True):
      latents_Bx1xD, made = _layer(config, own, latents_Bx1xD, rotary_Bx1, valid_BxM, cached=old, slot=cached.used)
      layers[-1].append(made)
  return _apply(config, weights, "finish", latents_Bx1xD), Layers(layers, valid_BxM, cached.used + 1)


def logits(config: ModelConfig, weights: Weights, latents_Bx1xD):
  """float32 logits_BxV of the token after the newest input."""
  return _apply(config, weights, "logits", latents_Bx1xD)[:, 0]


def _apply(config: ModelConfig, weights: Weights, method: str, *arguments):
  return PerceiverAR(config).apply({"params": weights.params}, *arguments, method=method)


def _layer(config: ModelConfig, own, *arguments, **cached):
  return attention.SelfAttentionLayer(config).apply({"params": own}, *arguments, **cached)


def _put(x_BxSx, one_Bx1x, slot):
  return jax.lax.dynamic_update_slice_in_dim(x_BxSx, one_Bx1x.astype(x_BxSx.dtype), slot, axis=1)


def _spread(cached: Cached) -> Cached:
  """Laid out over the mesh: long contexts are split over `context`."""
  return Cached(*(constrain(x, "batch_heads", "context", None) for x in cached))
