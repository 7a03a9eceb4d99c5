"""Generation with a cache against full passes and the original release; rows do not influence each other."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from perceiver_ar_jax.config import ModelConfig
from perceiver_ar_jax.interop import haiku
from perceiver_ar_jax.models.perceiver_ar import PerceiverAR
from perceiver_ar_jax.sampling import generate
from tests import golden, tiny

GREEDY = generate.SamplingSettings(temperature=0.0)
VOCAB = 24


@functools.cache
def model(**more):
  """Returns (config, random params) of a small model."""
  settings = dict(
    vocab_size=VOCAB,
    max_context=40,
    num_latents=8,
    num_layers=2,
    latent_width=16,
    num_cross_heads=2,
    num_self_heads=4,
    position_encoding="rotary",
  )
  config = ModelConfig(**{**settings, **more})
  return config, jax.tree.map(np.asarray, tiny.random_params(config))


@functools.cache
def compiled(function, *arguments, **named):
  """The compiled function of the arguments that are left out."""
  return jax.jit(functools.partial(function, *arguments, **named))


def right_aligned(prompts, length, first_position=1):
  tokens = np.zeros((len(prompts), length), np.int32)
  positions = np.zeros((len(prompts), length, 1), np.int32)
  for row, prompt in enumerate(prompts):
    tokens[row, length - len(prompt) :] = prompt
    positions[row, length - len(prompt) :, 0] = np.arange(first_position, first_position + len(prompt))
  return tokens, positions


def blocks(config, params, prompts, kepts, *, settings=GREEDY, seed=0, exact=False, allowed=None):
  """Returns (tokens_BxN, logits_BxNxV) after the prompts, from one block for each number of kept latents."""
  tokens, positions = right_aligned(prompts, config.max_context)
  begin = compiled(generate.begin, config, cached=not exact)
  state = begin(params, tokens, positions, np.zeros(len(prompts), bool), np.int32(0))
  allowed = np.ones((1, config.vocab_size), bool) if allowed is None else allowed
  ends = np.array([len(prompt) for prompt in prompts])
  results, done = [], 0
  for kept in kepts:
    length = config.num_latents - kept + 1
    block = compiled(generate.exact_block, config) if exact else compiled(generate.cached_block, config, kept)
    places = (ends[:, None] + 1 + done + np.arange(length)).astype(np.int32)
    group = (done + np.arange(length)) % len(allowed)
    plan = generate.BlockPlan(places[..., None], np.broadcast_to(group.astype(np.int32), places.shape), allowed)
    keys = generate.row_keys(seed, np.arange(len(prompts)))
    state, *new = block(params=params, state=state, plan=plan, settings=settings, keys_B=keys)
    results.append(jax.tree.map(np.asarray, new))
    done += length
  return tuple(np.concatenate(parts, axis=1) for parts in zip(*results))


PROMPTS = [[2, 5, 6, 7, 8, 9, 10, 11, 12, 13], [2, 9, 4]]


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"conv_taps": 3, "qk_norm": True}])
def test_the_cache_is_exact_if_all_latents_are_recomputed_for_each_token(settings):
  config, params = model(**settings)
  cached = blocks(config, params, PROMPTS, [8] * 30)
  exact = blocks(config, params, PROMPTS, [8] * 30, exact=True)
  np.testing.assert_array_equal(cached[0], exact[0])
  np.testing.assert_allclose(cached[1], exact[1], atol=2e-5, rtol=0)


@pytest.mark.slow
def test_cached_logits_equal_a_full_pass_over_the_latents_in_the_cache():
  # After a refill of 6, the first token is predicted by 6 latents, the next by 7, and so on. Cached logits are those of
  # a full pass over as many latents, also after refills and with a second cross-attention between layers.
  keys = {"conv_taps": 2, "qk_norm": True, "value_features": 4}
  config, params = model(position_encoding="learned+rotary", position_sizes=(60,), cross_attend_after=(0,), **keys)
  kept = 6
  tokens, logits = blocks(config, params, PROMPTS[:1], [kept] * 6)
  sequence = PROMPTS[0] + tokens[0].tolist()
  length = config.num_latents - kept + 1
  whole = jax.jit(PerceiverAR(config).apply, static_argnames="num_latents")
  for count in range(tokens.shape[1]):
    inputs, positions = right_aligned([sequence[: len(PROMPTS[0]) + count]], config.max_context)
    expected = whole({"params": params}, inputs, positions, num_latents=kept + count % length)
    np.testing.assert_allclose(logits[0, count], expected[0, -1], atol=2e-5, rtol=0, err_msg=f"token {count}")


@pytest.mark.slow
def test_rows_do_not_depend_on_their_neighbors():
  config, params = model()
  drawn = generate.SamplingSettings(temperature=1.0, top_k=10, top_p=0.9)
  run = functools.partial(blocks, config, params, kepts=[5] * 6, settings=drawn)
  together, _ = run(PROMPTS)
  alone, _ = run(PROMPTS[:1])
  np.testing.assert_array_equal(together[:1], alone)
  again, _ = run(PROMPTS)
  np.testing.assert_array_equal(together, again)
  with_another_seed, _ = run(PROMPTS, seed=1)
  assert not np.array_equal(together, with_another_seed)


@pytest.mark.slow
def test_positions_that_count_from_the_last_token_are_cached_where_only_differences_matter():
  config, params = model()
  relative = dataclasses.replace(config, positions_from_data=False)
  tokens, positions = right_aligned(PROMPTS[:1], config.max_context)
  begin = jax.jit(functools.partial(generate.begin, relative, cached=True))
  state = begin(params, tokens, -positions, np.zeros(1, bool), np.int32(0))
  count = len(PROMPTS[0])
  places = -np.arange(count + 1, count + 5, dtype=np.int32)[None, :, None]
  plan = generate.BlockPlan(jnp.asarray(places), jnp.zeros((1, 4), jnp.int32), jnp.ones((1, VOCAB), bool))
  block = jax.jit(functools.partial(generate.cached_block, relative, 5))
  _, tokens, logits = block(params, state, plan, GREEDY, generate.row_keys(0, np.arange(1)))
  sequence = PROMPTS[0] + np.asarray(tokens)[0].tolist()
  whole = jax.jit(PerceiverAR(relative).apply, static_argnames="num_latents")
  for index in range(4):
    inputs, _ = right_aligned([sequence[: count + index]], config.max_context)
    expected = whole({"params": params}, inputs, num_latents=5 + index)
    np.testing.assert_allclose(logits[0, index], expected[0, -1], atol=2e-5, rtol=0)


def test_only_allowed_tokens_are_drawn_and_never_padding():
  config, params = model()
  allowed = np.zeros((3, VOCAB), bool)
  for place, ids in enumerate(([0, 7], [0, 8, 9], [0, 10])):
    allowed[place, ids] = True
  tokens, _ = blocks(config, params, PROMPTS, [6] * 8, settings=generate.SamplingSettings(), allowed=allowed)
  assert set(tokens[:, 0::3].ravel()) == {7} and set(tokens[:, 2::3].ravel()) == {10}
  assert set(tokens[:, 1::3].ravel()) == {8, 9}


def test_after_its_end_a_row_is_padding_and_other_rows_continue():
  config, params = model()
  tokens, _ = blocks(config, params, PROMPTS, [6] * 10, settings=generate.SamplingSettings(temperature=1.5))
  ends = [row.tolist().index(1) if 1 in row else None for row in tokens]
  assert any(end is not None for end in ends), "no row ends: choose another seed"
  for row, end in zip(tokens, ends):
    assert (row[: end if end is not None else None] > 0).all()
    assert end is None or not row[end + 1 :].any()


def draws(logits, count=4000, **settings):
  """Returns the share of draws of each token."""
  state = generate.DecodeState(None, np.zeros(count, bool), jnp.int32(0))
  rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (count, len(logits)))
  plan = generate.BlockPlan(None, np.zeros((count, 1), np.int32), jnp.ones((1, len(logits)), bool))
  keys = generate.row_keys(0, np.arange(count))
  drawn, _ = generate._draw(rows, plan, 0, generate.SamplingSettings(**settings), keys, state)
  return np.bincount(drawn, minlength=len(logits)) / count


def test_temperature_top_k_and_top_p_shape_the_draws():
  logits = np.log([1e-9, 0.5, 0.3, 0.15, 0.05])  # token 0 is PAD
  np.testing.assert_allclose(draws(logits), [0, 0.5, 0.3, 0.15, 0.05], atol=0.03)
  np.testing.assert_allclose(draws(logits, top_k=2), [0, 0.625, 0.375, 0, 0], atol=0.03)
  np.testing.assert_allclose(draws(logits, top_p=0.79), [0, 0.625, 0.375, 0, 0], atol=0.03)
  np.testing.assert_allclose(draws(logits, top_p=0.81), [0, 0.526, 0.316, 0.158, 0], atol=0.03)
  assert draws(logits, temperature=0.0)[1] == 1 and draws(logits, temperature=0.01)[1] > 0.999
  squared = np.array([0, 0.25, 0.09, 0.0225, 0.0025]) / 0.365
  np.testing.assert_allclose(draws(logits, temperature=0.5), squared, atol=0.03)


@pytest.mark.parametrize("mode", ["uncached", "cached"])
def test_tokens_equal_those_of_the_published_implementation(mode):
  # With its cache, it starts from one latent at the end of the prompt, fills a cache of 16, and then keeps 8 of them.
  case = golden.Case("sample_rotary_z16")
  config, params = haiku.convert(case.tree("params"), case.kwargs)
  start, steps = int(case["start_step"]), int(case["num_steps"])
  kepts = [9] * 5 if mode == "uncached" else [1, 8, 8, 8]
  tokens, logits = blocks(config, params, case["prompt"].tolist(), kepts, exact=mode == "uncached")
  np.testing.assert_array_equal(tokens[:, :steps], case[f"events_{mode}"][:, start : start + steps])
  np.testing.assert_allclose(logits[:, :steps], case[f"logits_{mode}"], atol=2e-5, rtol=0)
