"""Generates tokens with a model, in blocks: pure functions, to be jitted. sampler.py is the loop that calls them.

With a cache (models/decode_cache.py), a block has M - kept + 1 tokens: the first is predicted by a pass of the newest
`kept` latents through all layers, the others by one additional latent each, until the cache has M latents. Without a
cache, every token takes a pass over all latents: slow, and the reference implementation that the cache is tested with.
Shape letters: perceiver_ar.py; T tokens of a block, G groups of allowed tokens.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from perceiver_ar_jax.config import ModelConfig
from perceiver_ar_jax.data import EOS, PAD
from perceiver_ar_jax.models import architectures, decode_cache, keys
from perceiver_ar_jax.parallel import sharding


class SamplingSettings(NamedTuple):
  """How a token is drawn from its logits, as in config.SampleConfig. Other values do not recompile."""

  temperature: ArrayLike = 1.0
  top_k: ArrayLike = 0
  top_p: ArrayLike = 1.0


class UncachedContext(NamedTuple):
  """The newest L tokens of each sequence, right-aligned."""

  tokens_BxL: jax.Array
  positions_BxLxP: jax.Array


class DecodeState(NamedTuple):
  """A batch of unfinished sequences."""

  context: decode_cache.ContextCache | UncachedContext
  ended_B: jax.Array  # rows that contain EOS; PAD follows it
  step: jax.Array  # int32[]: tokens generated so far


class BlockPlan(NamedTuple):
  """Positions and allowed values of the T tokens of one block."""

  positions_BxTxP: jax.Array | np.ndarray
  group_BxT: jax.Array | np.ndarray  # the row of `allowed_GxV` that applies to each token
  allowed_GxV: jax.Array | np.ndarray  # bool: ids that can be drawn; PAD never is


def begin(config: ModelConfig, params, tokens_BxL, positions_BxLxP, ended_B, step, *, cached: bool) -> DecodeState:
  """Returns the state after right-aligned prompts; `ended_B` and `step` as in DecodeState."""
  context = UncachedContext(tokens_BxL, positions_BxLxP)
  if cached:
    context = decode_cache.CachedModel(config, params).prefill(tokens_BxL, positions_BxLxP)
  return _sharded(DecodeState(context, ended_B, step))


def cached_block(
  config: ModelConfig, kept: int, params, state: DecodeState, plan: BlockPlan, settings: SamplingSettings, keys_B
):
  """Returns (the state after T tokens, tokens_BxT, the logits_BxTxV that they were drawn from).

  `kept` latents pass through the layers at the start and T - 1 are added, so T is at most M - kept + 1; the context
  must have T - 1 unused slots. `state` is to be donated, so that its caches are updated in place. `keys_B` are random
  keys of the rows, the same in all blocks.
  """
  model = decode_cache.CachedModel(config, params)
  latents_Bx1xD, context, caches = model.refill(state.context, kept)

  def add(state, latents_Bx1xD, index):
    """Returns (the state with the token that the newest latent predicts, (the token, its logits))."""
    logits_BxV = model.logits(latents_Bx1xD)
    token_B, state = _draw(logits_BxV, plan, index, settings, keys_B, state)
    context = model.append(state.context, token_B, plan.positions_BxTxP[:, index])
    return state._replace(context=context), (token_B, logits_BxV)

  def step(carry, index):
    state, caches = carry
    latents_Bx1xD, caches = model.decode(state.context, caches)
    state, drawn = add(state, latents_Bx1xD, index)
    return (state, caches), drawn

  state, first = add(state._replace(context=context), latents_Bx1xD, 0)
  (state, _), others = jax.lax.scan(step, (state, caches), jnp.arange(1, plan.group_BxT.shape[1]))
  tokens_TxB, logits_TxBxV = jax.tree.map(lambda x, xs: jnp.concatenate([x[None], xs]), first, others)
  return _sharded(state), tokens_TxB.T, jnp.moveaxis(logits_TxBxV, 0, 1)


def exact_block(config: ModelConfig, params, state: DecodeState, plan: BlockPlan, settings: SamplingSettings, keys_B):
  """Generates like `cached_block`, for any T, with a pass over all latents for each token."""
  model = architectures.make_model(config)

  def step(state, index):
    latents_BxMxD = model.apply({"params": params}, *state.context, method="latents")
    logits_BxV = model.apply({"params": params}, latents_BxMxD[:, -1:], method="logits")[:, 0]
    token_B, state = _draw(logits_BxV, plan, index, settings, keys_B, state)
    newest = UncachedContext(token_B, plan.positions_BxTxP[:, index])
    context = jax.tree.map(lambda x, new: jnp.concatenate([x[:, 1:], new[:, None]], axis=1), state.context, newest)
    return state._replace(context=context), (token_B, logits_BxV)

  state, (tokens_TxB, logits_TxBxV) = jax.lax.scan(step, state, jnp.arange(plan.group_BxT.shape[1]))
  return _sharded(state), tokens_TxB.T, jnp.moveaxis(logits_TxBxV, 0, 1)


def _sharded(state: DecodeState) -> DecodeState:
  """Returns the state, sharded over the mesh in use: cached keys and values as in the models, all others by row."""

  def constrain(leaf):
    if isinstance(leaf, keys.CachedKeys):
      return leaf.sharded()
    return sharding.constrain(leaf, *("batch", *(None,) * leaf.ndim)[: leaf.ndim])

  return jax.tree.map(constrain, state, is_leaf=lambda leaf: isinstance(leaf, keys.CachedKeys))


def row_keys(seed, numbers_B) -> jax.Array:
  """Returns random keys of the samples with these numbers, independent of other samples of the batch."""
  return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(seed), numbers_B)


def _draw(logits_BxV, plan: BlockPlan, index, settings: SamplingSettings, keys_B, state: DecodeState):
  """Returns (int32[B], the next token of each row: PAD only after its end; the state, updated but for its context)."""
  allowed_BxV = plan.allowed_GxV[plan.group_BxT[:, index]].at[:, PAD].set(False)
  logits_BxV = jnp.where(allowed_BxV, logits_BxV, -jnp.inf)
  step_keys_B = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys_B, state.step)
  drawn_B = jax.vmap(jax.random.categorical)(step_keys_B, _shaped(logits_BxV, settings))
  token_B = jnp.where(settings.temperature == 0, logits_BxV.argmax(axis=-1), drawn_B)
  token_B = jnp.where(state.ended_B, PAD, token_B).astype(jnp.int32)
  return token_B, state._replace(ended_B=state.ended_B | (token_B == EOS), step=state.step + 1)


def _shaped(logits_BxV, settings: SamplingSettings):
  """Returns logits after temperature, top-k and then top-p: -inf for tokens that cannot be drawn."""
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
