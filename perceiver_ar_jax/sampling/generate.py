"""Tokens out of a model, a block at a time: pure functions, to be jitted. sampler.py drives them.

With a cache (models/decode_cache.py), tokens come in blocks of M - kept + 1: the first from a pass of the newest `kept`
latents through all layers, the others from one more latent each, until there is no room for another. Without one, every
token takes a whole pass over all latents: slow, and the truth that the cache is tested against.

One compiled block serves any length of prompt and of output. Shape letters: perceiver_ar.py; T tokens of a block, G
groups of places.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from perceiver_ar_jax.config import ModelConfig
from perceiver_ar_jax.data import EOS, PAD
from perceiver_ar_jax.models import decode_cache
from perceiver_ar_jax.models.architectures import make_model


class Settings(NamedTuple):
  """How a token is drawn from its logits; config.SampleConfig tells of each. They may change without compiling anew."""

  temperature: ArrayLike = 1.0
  top_k: ArrayLike = 0
  top_p: ArrayLike = 1.0


class Window(NamedTuple):
  """All that is known of the sequences without a cache: the newest L tokens, right-aligned."""

  tokens_BxL: jax.Array
  positions_BxLxP: jax.Array


class State(NamedTuple):
  """A batch of sequences in the making."""

  context: decode_cache.ContextCache | Window
  ended_B: jax.Array
  """Rows that have had EOS; they go on with PAD."""
  step: jax.Array
  """int32[]: tokens generated so far."""


class Plan(NamedTuple):
  """What the T tokens of one block may be, and where they stand."""

  positions_BxTxP: jax.Array | np.ndarray
  group_BxT: jax.Array | np.ndarray
  """Which row of `allowed_GxV` holds for each token."""
  allowed_GxV: jax.Array | np.ndarray
  """bool: ids that can be drawn; PAD never is."""


def begin(config: ModelConfig, params, tokens_BxL, positions_BxLxP, ended_B, step, *, cached: bool) -> State:
  """The state after right-aligned prompts; `ended_B` and `step` as in State."""
  context = Window(tokens_BxL, positions_BxLxP)
  if cached:
    context = decode_cache.prefill(
      config, decode_cache.UnstackedParams.from_params(config, params), tokens_BxL, positions_BxLxP
    )
  return State(context, ended_B, step)


def cached_block(config: ModelConfig, kept: int, params, state: State, plan: Plan, settings: Settings, keys_B):
  """(the state after T tokens, tokens_BxT, the logits_BxTxV that they were drawn from).

  Args:
    config: of the model.
    kept: latents that go through the layers at the start; T - 1 more find room, so T is at most M - kept + 1.
    params: of the model.
    state: to be donated, so that its caches are updated in place.
    plan: of the T tokens. There must be room for T - 1 of them in the context.
    settings: see there.
    keys_B: a random key for each row, the same in all blocks.
  """
  weights = decode_cache.UnstackedParams.from_params(config, params)
  latents_Bx1xD, context, layers = decode_cache.refill(config, weights, state.context, kept)
  state = state._replace(context=context)

  def add(state, latents_Bx1xD, index):
    """The state with the token that the newest latent predicts, the token, and its logits."""
    logits_BxV = decode_cache.logits(config, weights, latents_Bx1xD)
    token_B, state = _draw(logits_BxV, plan, index, settings, keys_B, state)
    context = decode_cache.append(config, weights, state.context, token_B, plan.positions_BxTxP[:, index])
    return state._replace(context=context), (token_B, logits_BxV)

  def step(carry, index):
    state, layers, latents_Bx1xD = carry
    state, drawn = add(state, latents_Bx1xD, index)
    latents_Bx1xD, layers = decode_cache.decode(config, weights, state.context, layers)
    return (state, layers, latents_Bx1xD), drawn

  last = plan.group_BxT.shape[1] - 1
  (state, _, latents_Bx1xD), (tokens_TxB, logits_TxBxV) = jax.lax.scan(
    step, (state, layers, latents_Bx1xD), jnp.arange(last)
  )
  state, (token_B, logits_BxV) = add(state, latents_Bx1xD, last)
  tokens_BxT = jnp.concatenate([tokens_TxB, token_B[None]]).T
  return state, tokens_BxT, jnp.moveaxis(jnp.concatenate([logits_TxBxV, logits_BxV[None]]), 0, 1)


def exact_block(config: ModelConfig, params, state: State, plan: Plan, settings: Settings, keys_B):
  """As `cached_block` with any T, but a whole pass over all latents for each token."""
  model = make_model(config)

  def step(state, index):
    tokens_BxL, positions_BxLxP = state.context
    latents_BxMxD = model.apply({"params": params}, tokens_BxL, positions_BxLxP, method="latents")
    logits_BxV = model.apply({"params": params}, latents_BxMxD[:, -1:], method="logits")[:, 0]
    token_B, state = _draw(logits_BxV, plan, index, settings, keys_B, state)
    position_BxP = plan.positions_BxTxP[:, index]
    context = Window(
      jnp.concatenate([tokens_BxL[:, 1:], token_B[:, None]], axis=1),
      jnp.concatenate([positions_BxLxP[:, 1:], position_BxP[:, None]], axis=1),
    )
    return state._replace(context=context), (token_B, logits_BxV)

  state, (tokens_TxB, logits_TxBxV) = jax.lax.scan(step, state, jnp.arange(plan.group_BxT.shape[1]))
  return state, tokens_TxB.T, jnp.moveaxis(logits_TxBxV, 0, 1)


def row_keys(seed, numbers_B) -> jax.Array:
  """Random keys of the samples with these numbers: a sample's does not depend on who is made beside it."""
  return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(seed), numbers_B)


def _draw(logits_BxV, plan: Plan, index, settings: Settings, keys_B, state: State):
  """(the next token of each row: int32[B], the state that knows of it); PAD for rows that have ended, no others."""
  allowed_BxV = plan.allowed_GxV[plan.group_BxT[:, index]].at[:, PAD].set(False)
  logits_BxV = jnp.where(allowed_BxV, logits_BxV, -jnp.inf)
  step_keys_B = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys_B, state.step)
  drawn_B = jax.vmap(jax.random.categorical)(step_keys_B, _shaped(logits_BxV, settings))
  token_B = jnp.where(settings.temperature == 0, logits_BxV.argmax(axis=-1), drawn_B)
  token_B = jnp.where(state.ended_B, PAD, token_B).astype(jnp.int32)
  return token_B, state._replace(ended_B=state.ended_B | (token_B == EOS), step=state.step + 1)


def _shaped(logits_BxV, settings: Settings):
  """Logits after temperature, top-k and then top-p: -inf for tokens that are not to be drawn."""
  scaled_BxV = logits_BxV / jnp.maximum(settings.temperature, 1e-6)
  ranked_BxV = -jnp.sort(-scaled_BxV, axis=-1)
  size = scaled_BxV.shape[-1]
  top_k = jnp.where(settings.top_k > 0, jnp.minimum(settings.top_k, size), size)
  ranked_BxV = jnp.where(jnp.arange(size) < top_k, ranked_BxV, -jnp.inf)
  probabilities_BxV = jax.nn.softmax(ranked_BxV, axis=-1)
  before_BxV = jnp.cumsum(probabilities_BxV, axis=-1) - probabilities_BxV
  drawable_BxV = (before_BxV < settings.top_p) & jnp.isfinite(ranked_BxV)
  least_B = ranked_BxV.min(axis=-1, where=drawable_BxV, initial=jnp.inf)
  return jnp.where(scaled_BxV >= least_B[:, None], scaled_BxV, -jnp.inf)
