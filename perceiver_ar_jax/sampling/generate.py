"""Generation: a token at a time, from caches that are updated in place.

Latents slide as a sequence grows, so no cache is exact for ever (paper, appendix on generation). The published way,
and this one: keys and values of the context and of the latents are kept; each new token adds one latent that sees all
the cached ones; when there is no room for another latent, the newest `kept` of them are computed anew in one whole
pass, and it goes on. So tokens come in *blocks* of M - kept + 1: one from that pass, the others from one step each.

The context is a ring of L slots, of which the newest token overwrites the oldest; keys carry their own positions, so
their order in the ring does not matter to a step. One compiled block serves any length of prompt and of output.

Shape letters: perceiver_ar.py; T tokens of a block.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from perceiver_ar_jax.config import InputError, ModelConfig
from perceiver_ar_jax.data import EOS, PAD
from perceiver_ar_jax.models.perceiver_ar import PerceiverAR


class Settings(NamedTuple):
  """How a token is drawn from its logits; all may change without compiling anew."""

  temperature: float = 1.0
  """0: always the likeliest token."""
  top_k: int = 0
  """Draw from the so many likeliest tokens only; 0: from all."""
  top_p: float = 1.0
  """Draw from the likeliest tokens that together have this probability."""

  def check(self) -> "Settings":
    """Itself; raises InputError for values out of range."""
    if not 0 <= self.temperature < float("inf"):
      raise InputError(f"temperature={self.temperature} must be 0 (always the likeliest token) or more.")
    if self.top_k < 0:
      raise InputError(f"top_k={self.top_k} must be at least 1, or 0 to draw from all tokens.")
    if not 0 < self.top_p <= 1:
      raise InputError(f"top_p={self.top_p} must lie in (0, 1]; 1 draws from all tokens.")
    return self


class Context(NamedTuple):
  """A batch of sequences in the making."""

  tokens_BxL: jax.Array
  """A ring: PAD, then the prompt and what was generated."""
  positions_BxLxP: jax.Array
  cross: Any
  """(k_BxLxHxK, v_BxLxHxK) of each cross-attend; (): not cached."""
  newest: jax.Array
  """int32[]: the slot of the newest token."""
  ended_B: jax.Array
  """Rows that have had EOS; they go on with PAD."""
  step: jax.Array
  """int32[]: tokens generated so far."""


class Plan(NamedTuple):
  """What the tokens of one block may be, and where they stand."""

  positions_BxTxP: jax.Array
  allowed_TxV: jax.Array
  """bool: ids that can be drawn for each token."""


def block_size(config: ModelConfig, kept: int) -> int:
  """T: tokens of a block after which `kept` latents remain; raises InputError for a `kept` outside 1..M."""
  if not 1 <= kept <= config.num_latents:
    raise InputError(f"{kept} latents cannot be kept of model.num_latents={config.num_latents}: keep 1 to all of them.")
  return config.num_latents - kept + 1


def begin(config: ModelConfig, params, tokens_BxL, positions_BxLxP, cached: bool = True) -> Context:
  """The context of a batch of prompts, right-aligned as for training; pure, to be jitted.

  Raises:
    InputError: positions are absolute and count from the last token, so that all of them change with each token and
      nothing can be cached.
  """
  if not config.positions_from_data:
    if cached and config.position_encoding != "rotary":
      raise InputError(
        f"model.position_encoding={config.position_encoding} with model.positions_from_data=False changes all positions"
        " with each token, so nothing can be cached: generate without the cache."
      )
    # Rotary attention sees differences only, so any origin does: here the prompt's last token is 0.
    positions_BxLxP = jnp.arange(tokens_BxL.shape[1] - 1, -1, -1, dtype=jnp.int32)[None, :, None]
    positions_BxLxP = jnp.broadcast_to(positions_BxLxP, (*tokens_BxL.shape, 1))
  cross = ()
  if cached:
    cross = PerceiverAR(config).apply({"params": params}, tokens_BxL, positions_BxLxP, method="keys_values")
  rows, length = tokens_BxL.shape
  return Context(
    tokens_BxL, positions_BxLxP, cross, jnp.int32(length - 1), jnp.zeros(rows, bool), jnp.zeros((), jnp.int32)
  )


def cached_block(config: ModelConfig, kept: int, params, context: Context, plan: Plan, settings: Settings, keys_B):
  """(the context after T more tokens, tokens_BxT, the logits_BxTxV they were drawn from); pure, to be jitted.

  Args:
    config: of the model.
    kept: latents that are computed at the start.
    params: of the model.
    context: donate it, and the caches are updated in place.
    plan: of the T = `block_size` tokens.
    settings: see there.
    keys_B: a random key for each row, the same in all blocks.
  """
  apply = functools.partial(PerceiverAR(config).apply, {"params": params})
  room, positions_BxTxP = config.num_latents, _positions(config, context, plan)
  ordered = jax.tree.map(lambda ring: jnp.roll(ring, -1 - context.newest, axis=1), (*context[:2], context.cross))
  tokens_BxL, positions_BxLxP, cross = ordered
  tokens_BxM = tokens_BxL[:, -kept:]
  latents_BxMxD, cached = apply(
    tokens_BxM, positions_BxLxP[:, -kept:], cross, tokens_BxL > 0, tokens_BxM > 0, method="latents_over"
  )
  padding = ((0, 0), (0, 0), (0, room - kept), (0, 0), (0, 0))
  cached = jax.tree.map(lambda made_NxBxMxHxK: jnp.pad(made_NxBxMxHxK, padding), cached)
  seen_BxS = jnp.pad(tokens_BxM > 0, ((0, 0), (0, room - kept)))

  def add(context, latents_BxMxD, index):
    """The context with the token that the last latent predicts, the token, and its logits."""
    logits_BxV = apply(latents_BxMxD[:, -1:], method="logits")[:, 0]
    position_BxP = positions_BxTxP[:, index]
    token_B = _draw(logits_BxV, plan.allowed_TxV[index], settings, keys_B, context)
    slot = (context.newest + 1) % context.tokens_BxL.shape[1]
    made = apply(token_B[:, None], position_BxP[:, None], method="keys_values")
    tokens_BxL, positions_BxLxP, cross = jax.tree.map(
      lambda ring, new: jax.lax.dynamic_update_slice_in_dim(ring, new.astype(ring.dtype), slot, axis=1),
      (*context[:2], context.cross),
      (token_B[:, None], position_BxP[:, None], made),
    )
    ended_B = context.ended_B | (token_B == EOS)
    return Context(tokens_BxL, positions_BxLxP, cross, slot, ended_B, context.step + 1), token_B, logits_BxV

  def step(carry, index):
    context, cached, seen_BxS, latents_BxMxD = carry
    context, token_B, logits_BxV = add(context, latents_BxMxD, index)
    slot = kept + index
    seen_BxS = jax.lax.dynamic_update_slice_in_dim(seen_BxS, token_B[:, None] > 0, slot, axis=1)
    latents_BxMxD, cached = apply(
      token_B[:, None],
      positions_BxTxP[:, index][:, None],
      context.cross,
      context.tokens_BxL > 0,
      seen_BxS,
      cached,
      slot,
      method="latents_over",
    )
    return (context, cached, seen_BxS, latents_BxMxD), (token_B, logits_BxV)

  length = block_size(config, kept)
  carry = (context, cached, seen_BxS, latents_BxMxD[:, -1:])
  (context, _, _, latents_BxMxD), (tokens_TxB, logits_TxBxV) = jax.lax.scan(step, carry, jnp.arange(length - 1))
  context, token_B, logits_BxV = add(context, latents_BxMxD, length - 1)
  tokens_BxT = jnp.concatenate([tokens_TxB, token_B[None]]).T
  return context, tokens_BxT, jnp.moveaxis(jnp.concatenate([logits_TxBxV, logits_BxV[None]]), 0, 1)


def exact_block(config: ModelConfig, params, context: Context, plan: Plan, settings: Settings, keys_B):
  """As `cached_block` with any T, but a whole pass over all latents for each token: slow, and the truth."""
  positions_BxTxP = _positions(config, context, plan)
  model = PerceiverAR(config)

  def step(context, index):
    tokens_BxL, positions_BxLxP = context[:2]  # here always in order, the newest last
    positions = positions_BxLxP if config.positions_from_data else None
    latents_BxMxD = model.apply({"params": params}, tokens_BxL, positions, method="latents")
    logits_BxV = model.apply({"params": params}, latents_BxMxD[:, -1:], method="logits")[:, 0]
    token_B = _draw(logits_BxV, plan.allowed_TxV[index], settings, keys_B, context)
    context = context._replace(
      tokens_BxL=jnp.concatenate([tokens_BxL[:, 1:], token_B[:, None]], axis=1),
      positions_BxLxP=jnp.concatenate([positions_BxLxP[:, 1:], positions_BxTxP[:, index][:, None]], axis=1),
      ended_B=context.ended_B | (token_B == EOS),
      step=context.step + 1,
    )
    return context, (token_B, logits_BxV)

  context, (tokens_TxB, logits_TxBxV) = jax.lax.scan(step, context, jnp.arange(plan.positions_BxTxP.shape[1]))
  return context, tokens_TxB.T, jnp.moveaxis(logits_TxBxV, 0, 1)


def _positions(config: ModelConfig, context: Context, plan: Plan):
  """Positions of the block's tokens; see `begin` for those that count from the last token."""
  if config.positions_from_data:
    return plan.positions_BxTxP
  rows, length = plan.positions_BxTxP.shape[:2]
  counted_T = -1 - context.step - jnp.arange(length, dtype=jnp.int32)
  return jnp.broadcast_to(counted_T[None, :, None], (rows, length, 1))


def _draw(logits_BxV, allowed_V, settings: Settings, keys_B, context: Context):
  """The next token of each row: int32[B]; PAD for rows that have ended, and never otherwise."""
  allowed_V = allowed_V.at[PAD].set(False)
  logits_BxV = jnp.where(allowed_V, logits_BxV, -jnp.inf)
  scaled_BxV = logits_BxV / jnp.maximum(settings.temperature, 1e-6)
  ranked_BxV = -jnp.sort(-scaled_BxV, axis=-1)
  size = logits_BxV.shape[-1]
  top_k = jnp.where(settings.top_k > 0, jnp.minimum(settings.top_k, size), size)
  ranked_BxV = jnp.where(jnp.arange(size) < top_k, ranked_BxV, -jnp.inf)
  probabilities_BxV = jax.nn.softmax(ranked_BxV, axis=-1)
  before_BxV = jnp.cumsum(probabilities_BxV, axis=-1) - probabilities_BxV
  ranked_BxV = jnp.where(before_BxV < settings.top_p, ranked_BxV, jnp.inf)
  least_B = ranked_BxV.min(axis=-1, where=jnp.isfinite(ranked_BxV), initial=jnp.inf)
  kept_BxV = jnp.where(scaled_BxV >= least_B[:, None], scaled_BxV, -jnp.inf)
  step_keys_B = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys_B, context.step)
  drawn_B = jax.vmap(jax.random.categorical)(step_keys_B, kept_BxV)
  token_B = jnp.where(settings.temperature == 0, logits_BxV.argmax(axis=-1), drawn_B)
  return jnp.where(context.ended_B, PAD, token_B).astype(jnp.int32)


def row_keys(seed: int, rows: int) -> jax.Array:
  """A random key for each row, the same for a row whatever the number of rows."""
  return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(seed), np.arange(rows))
