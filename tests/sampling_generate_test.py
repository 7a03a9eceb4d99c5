"""Generation: cached against whole passes and against the reference, rings that wrap, rows that do not mix."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from perceiver_ar_jax.config import InputError, ModelConfig
from perceiver_ar_jax.interop import haiku
from perceiver_ar_jax.models.perceiver_ar import PerceiverAR
from perceiver_ar_jax.sampling import generate
from tests import golden

GREEDY = generate.Settings(temperature=0.0)
VOCAB = 24


def model(**more):
  """(config, params with logits that are not zero) of a small model."""
  settings = dict(
    vocab_size=VOCAB,
    max_context=20,
    num_latents=8,
    num_layers=2,
    latent_width=16,
    num_cross_heads=2,
    num_self_heads=4,
    position_encoding="rotary",
  )
  config = ModelConfig(**{**settings, **more})
  dims = len(config.position_sizes) or 1
  tokens = jnp.ones((1, config.max_context), jnp.int32)
  positions = jnp.ones((1, config.max_context, dims), jnp.int32)
  params = jax.jit(PerceiverAR(config).init)(jax.random.key(0), tokens, positions)["params"]
  params = jax.tree.map(np.asarray, nn.unbox(params))
  params["to_logits"]["kernel"] = np.random.default_rng(1).normal(size=params["to_logits"]["kernel"].shape) * 0.7
  return config, params


def right_aligned(prompts, length, first_position=1):
  tokens = np.zeros((len(prompts), length), np.int32)
  positions = np.zeros((len(prompts), length, 1), np.int32)
  for row, prompt in enumerate(prompts):
    tokens[row, length - len(prompt) :] = prompt
    positions[row, length - len(prompt) :, 0] = np.arange(first_position, first_position + len(prompt))
  return tokens, positions


def run(config, params, prompts, num_tokens, *, kept=6, settings=GREEDY, seed=0, exact=False, allowed=None):
  """(tokens_BxN, logits_BxNxV) after the prompts."""
  tokens, positions = right_aligned(prompts, config.max_context)
  length = generate.block_size(config, kept)
  context = generate.begin(config, params, tokens, positions, cached=not exact)
  block = (
    functools.partial(generate.exact_block, config) if exact else functools.partial(generate.cached_block, config, kept)
  )
  block = jax.jit(block)
  allowed = np.ones((length, config.vocab_size), bool) if allowed is None else allowed
  ends = np.array([len(prompt) for prompt in prompts])
  found = []
  for start in range(0, num_tokens, length):
    places = (ends[:, None] + 1 + start + np.arange(length))[..., None].astype(np.int32)
    keys = generate.row_keys(seed, len(prompts))
    context, *new = block(params, context, generate.Plan(places, allowed), settings, keys)
    found.append(jax.tree.map(np.asarray, new))
  return tuple(np.concatenate(parts, axis=1)[:, :num_tokens] for parts in zip(*found))


PROMPTS = [[2, 5, 6, 7, 8, 9, 10, 11, 12, 13], [2, 9, 4]]


def test_with_all_latents_computed_anew_for_each_token_the_cache_changes_nothing():
  config, params = model()
  cached = run(config, params, PROMPTS, 40, kept=8)
  exact = run(config, params, PROMPTS, 40, kept=8, exact=True)
  np.testing.assert_array_equal(cached[0], exact[0])
  np.testing.assert_allclose(cached[1], exact[1], atol=2e-5, rtol=0)


def test_until_the_first_refill_the_cache_changes_nothing():
  # A whole pass over all tokens so far as latents is what a growing cache of latents stands for.
  config, params = model(max_context=16, num_latents=8)
  prompt = [[2, 5, 6]]
  tokens, logits = run(config, params, prompt, 6, kept=3)
  sequence = prompt[0] + tokens[0].tolist()
  for count in range(6):
    inputs, positions = right_aligned([sequence[: 3 + count]], 16)
    whole = PerceiverAR(config).apply({"params": params}, inputs, positions, num_latents=3 + count)
    np.testing.assert_allclose(logits[0, count], whole[0, -1], atol=2e-5, rtol=0, err_msg=f"token {count}")


def test_rows_do_not_depend_on_their_neighbours():
  config, params = model()
  kept = 5
  drawn = generate.Settings(temperature=1.0, top_k=10, top_p=0.9)
  together, _ = run(config, params, PROMPTS, 50, kept=kept, settings=drawn)
  alone, _ = run(config, params, PROMPTS[:1], 50, kept=kept, settings=drawn)
  np.testing.assert_array_equal(together[:1], alone)
  again, _ = run(config, params, PROMPTS, 50, kept=kept, settings=drawn)
  np.testing.assert_array_equal(together, again)
  other, _ = run(config, params, PROMPTS, 50, kept=kept, settings=drawn, seed=1)
  assert not np.array_equal(together, other)


@pytest.mark.parametrize("encoding", ["rotary", "learned"])
def test_a_refill_is_a_whole_pass_over_the_newest_inputs_also_when_the_ring_has_wrapped(encoding):
  sizes = {} if encoding == "rotary" else {"position_sizes": (100,)}
  config, params = model(position_encoding=encoding, cross_attend_after=(0,), **sizes)
  kept = 6
  tokens, logits = run(config, params, PROMPTS[:1], 60, kept=kept)
  sequence = PROMPTS[0] + tokens[0].tolist()
  for start in range(0, 60, generate.block_size(config, kept)):
    seen = sequence[: 10 + start]
    window = seen[-config.max_context :]
    inputs, positions = right_aligned([window], config.max_context, first_position=1 + len(seen) - len(window))
    whole = PerceiverAR(config).apply({"params": params}, inputs, positions, num_latents=kept)
    np.testing.assert_allclose(logits[0, start], whole[0, -1], atol=2e-5, rtol=0, err_msg=f"token {start}")


def test_positions_that_count_from_the_last_token_are_cached_where_only_differences_matter():
  config, params = model()
  relative = dataclasses.replace(config, positions_from_data=False)
  cached = run(relative, params, PROMPTS, 30, kept=8)
  exact = run(relative, params, PROMPTS, 30, kept=8, exact=True)
  np.testing.assert_array_equal(cached[0], exact[0])
  np.testing.assert_allclose(cached[1], exact[1], atol=2e-5, rtol=0)
  sinusoidal = dataclasses.replace(relative, position_encoding="sinusoidal", position_sizes=(20,))
  with pytest.raises(InputError, match="nothing can be cached"):
    generate.begin(sinusoidal, params, *right_aligned(PROMPTS, 20))


def test_only_allowed_tokens_are_drawn_and_never_padding():
  config, params = model()
  allowed = np.zeros((3, VOCAB), bool)
  for place, ids in enumerate(([0, 7], [0, 8, 9], [0, 10])):
    allowed[place, ids] = True
  tokens, _ = run(config, params, PROMPTS, 30, kept=6, settings=generate.Settings(), allowed=allowed)
  assert set(tokens[:, 0::3].ravel()) == {7} and set(tokens[:, 2::3].ravel()) == {10}
  assert set(tokens[:, 1::3].ravel()) == {8, 9}


def test_after_its_end_a_row_is_padding_and_its_neighbour_goes_on():
  config, params = model()
  tokens, _ = run(config, params, PROMPTS, 60, settings=generate.Settings(temperature=1.5))
  ends = [row.tolist().index(1) if 1 in row else None for row in tokens]
  assert any(end is not None for end in ends), "no row ends: choose another seed"
  for row, end in zip(tokens, ends):
    assert (row[: end if end is not None else None] > 0).all()
    assert end is None or not row[end + 1 :].any()


def draws(logits, count=4000, **settings):
  """How often each token is drawn."""
  context = generate.Context(None, None, None, None, np.zeros(count, bool), jnp.int32(0))
  rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (count, len(logits)))
  keys = generate.row_keys(0, count)
  drawn = generate._draw(rows, jnp.ones(len(logits), bool), generate.Settings(**settings), keys, context)
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


@pytest.mark.parametrize(
  "settings, message",
  [
    ({"temperature": -0.1}, "temperature=-0.1"),
    ({"temperature": float("nan")}, "temperature=nan"),
    ({"top_k": -1}, "top_k=-1"),
    ({"top_p": 0.0}, "top_p=0.0"),
    ({"top_p": 1.2}, "top_p=1.2"),
  ],
)
def test_settings_out_of_range_are_named(settings, message):
  with pytest.raises(InputError, match=message):
    generate.Settings(**settings).check()


def test_without_a_cache_the_reference_draws_the_same():
  case = golden.Case("sample_rotary_z16")
  config, params = haiku.convert(case.tree("params"), case.kwargs)
  start, steps = int(case["start_step"]), int(case["num_steps"])
  tokens, logits = run(config, params, case["prompt"].tolist(), steps, kept=9, exact=True)
  np.testing.assert_array_equal(tokens, case["events_uncached"][:, start : start + steps])
  np.testing.assert_allclose(logits, case["logits_uncached"], atol=2e-5, rtol=0)


def test_with_a_cache_the_reference_draws_the_same():
  # It starts with a single latent at the prompt's end, fills its cache of 16, and then keeps 8 of them.
  case = golden.Case("sample_rotary_z16")
  config, params = haiku.convert(case.tree("params"), case.kwargs)
  start, steps = int(case["start_step"]), int(case["num_steps"])
  context = generate.begin(config, params, *right_aligned(case["prompt"].tolist(), config.max_context))
  tokens, logits = [], []
  while sum(map(len, tokens)) < steps:
    kept = 8 if tokens else 1
    places = start + 1 + sum(map(len, tokens)) + np.arange(generate.block_size(config, kept), dtype=np.int32)
    plan = generate.Plan(
      np.broadcast_to(places[None, :, None], (2, len(places), 1)), np.ones((len(places), config.vocab_size), bool)
    )
    block = jax.jit(functools.partial(generate.cached_block, config, kept))
    context, new, new_logits = block(params, context, plan, GREEDY, generate.row_keys(0, 2))
    tokens.append(np.asarray(new).T)
    logits.append(np.asarray(new_logits).swapaxes(0, 1))
  tokens, logits = np.concatenate(tokens)[:steps].T, np.concatenate(logits)[:steps].swapaxes(0, 1)
  np.testing.assert_array_equal(tokens, case["events_cached"][:, start : start + steps])
  np.testing.assert_allclose(logits, case["logits_cached"], atol=2e-5, rtol=0)
