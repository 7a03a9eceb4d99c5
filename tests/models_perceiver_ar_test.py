"""Properties of the model: causality, padding, the plain Transformer, precision, rematerialisation, depth."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from perceiver_ar_jax import ModelConfig, PerceiverAR

CONFIG = ModelConfig(
  vocab_size=20,
  max_context=12,
  num_latents=5,
  num_layers=2,
  latent_width=16,
  num_cross_heads=2,
  num_self_heads=4,
  position_encoding="learned",
  position_sizes=(20,),
)
ROTARY = dataclasses.replace(CONFIG, position_encoding="rotary", position_sizes=())


def _positions(tokens):
  """1-based positions of right-aligned tokens, 0 on padding."""
  return np.where(tokens > 0, np.cumsum(tokens > 0, axis=1), 0)[..., None].astype(np.int32)


def _params(config, seed=0):
  """Weights in which every path carries signal: the logits' kernel starts at zero, so it is filled."""
  tokens = np.ones((1, config.max_context), np.int32)
  params = nn.meta.unbox(jax.jit(PerceiverAR(config).init)(jax.random.key(seed), tokens, _positions(tokens))["params"])
  kernel = jax.random.normal(jax.random.key(seed + 1), params["logits"]["kernel"].shape)
  return params | {"logits": params["logits"] | {"kernel": kernel}}


def _logits(config, params, tokens, **kwargs):
  apply = jax.jit(PerceiverAR(config).apply, static_argnames=("num_latents", "deterministic"))
  return np.asarray(apply({"params": params}, tokens, _positions(tokens), **kwargs))


def _tokens(shape=(2, 12)):
  return np.random.default_rng(0).integers(3, 20, shape).astype(np.int32)


@pytest.mark.parametrize("config", [CONFIG, ROTARY, dataclasses.replace(ROTARY, cross_attend_after=(0, 1))])
def test_a_latent_depends_on_its_own_and_earlier_inputs_only(config):
  params, tokens = _params(config), _tokens()
  before = _logits(config, params, tokens)
  for slot in range(12):
    changed = tokens.copy()
    changed[:, slot] = (changed[:, slot] - 3 + 7) % 17 + 3
    moved = np.abs(_logits(config, params, changed) - before).max(axis=(0, 2)) > 1e-6
    sees = np.arange(5) + 7 >= slot  # latent m stands on slot 7 + m
    np.testing.assert_array_equal(moved, sees, err_msg=f"input {slot}")


def test_padding_on_the_left_changes_nothing():
  params, tokens = _params(CONFIG), _tokens()
  shorter = _logits(CONFIG, params, tokens[:, 4:])
  padded = np.concatenate([np.zeros((2, 4), np.int32), tokens[:, 4:]], axis=1)
  np.testing.assert_allclose(_logits(CONFIG, params, padded), shorter, atol=1e-5)


def test_latents_on_padding_are_finite():
  tokens = np.zeros((1, 12), np.int32)
  tokens[0, -2:] = 5
  assert np.isfinite(_logits(CONFIG, _params(CONFIG), tokens)).all()


def test_with_as_many_latents_as_inputs_it_is_a_causal_transformer():
  config = dataclasses.replace(CONFIG, num_latents=12)
  params, tokens = _params(config), _tokens()
  whole = _logits(config, params, tokens)
  for length in (1, 6, 11):  # a prefix predicts the same, since nothing looks ahead
    np.testing.assert_allclose(
      _logits(config, params, tokens[:, :length], num_latents=length), whole[:, :length], atol=1e-5
    )


def test_positions_from_the_end_are_those_of_no_positions():
  config = dataclasses.replace(CONFIG, positions_from_data=False)
  params, tokens = _params(config), _tokens()
  ours = _logits(config, params, tokens)
  none = PerceiverAR(CONFIG).apply({"params": params}, tokens, None)
  np.testing.assert_allclose(ours, none, atol=1e-5)
  assert np.abs(ours - _logits(CONFIG, params, tokens)).max() > 0.01


def test_bfloat16_stays_close_and_gives_float32_logits():
  params, tokens = _params(CONFIG), _tokens()
  half = _logits(dataclasses.replace(CONFIG, dtype="bfloat16"), params, tokens)
  full = _logits(CONFIG, params, tokens)
  assert half.dtype == np.float32
  assert 0 < np.abs(half - full).max() < 0.05 * np.abs(full).max()


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_rematerialisation_changes_no_gradient(remat):
  params, tokens = _params(CONFIG), _tokens()

  def gradients(config):
    def loss(params):
      logits = PerceiverAR(config).apply(
        {"params": params}, tokens, _positions(tokens), deterministic=False, rngs={"dropout": jax.random.key(3)}
      )
      return jnp.square(logits).sum()

    return jax.jit(jax.grad(loss))(params)

  plain = dataclasses.replace(CONFIG, dropout=0.5)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3),
    gradients(plain),
    gradients(dataclasses.replace(plain, remat=remat)),
  )


def test_dropout_acts_in_training_only():
  config, tokens = dataclasses.replace(CONFIG, dropout=0.5), _tokens()
  params = _params(config)
  keys = [{"dropout": jax.random.key(seed)} for seed in (0, 0, 1)]
  first, again, other = (_logits(config, params, tokens, deterministic=False, rngs=rngs) for rngs in keys)
  np.testing.assert_array_equal(first, again)
  assert np.abs(first - other).max() > 0.01
  np.testing.assert_array_equal(_logits(config, params, tokens), _logits(CONFIG, params, tokens))


def test_depth_does_not_grow_the_program():
  """Layers are scanned, so that 60 of them compile in the time of a few."""

  def program_size(layers):
    config = dataclasses.replace(CONFIG, num_layers=layers)
    params, tokens = jax.eval_shape(lambda: _params(config)), _tokens()

    def loss(params):
      return PerceiverAR(config).apply({"params": params}, tokens, _positions(tokens)).sum()

    return len(jax.jit(jax.grad(loss)).lower(params).as_text())

  assert program_size(60) < 1.05 * program_size(6)


def test_more_latents_than_inputs_are_refused():
  with pytest.raises(ValueError, match="num_latents=13 exceeds the 12 inputs"):
    PerceiverAR(CONFIG).apply({"params": {}}, _tokens(), num_latents=13)
