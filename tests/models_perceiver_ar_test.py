"""Properties of the model: causality, padding, the plain Transformer, precision, rematerialization, depth."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from perceiver_ar_jax import ModelConfig, PerceiverAR
from perceiver_ar_jax.config import InputError
from perceiver_ar_jax.models import architectures
from perceiver_ar_jax.models import positions as positions_lib
from perceiver_ar_jax.models.layers import CausalConv, Embed
from perceiver_ar_jax.models.perceiver_ar import drop_context
from tests import tiny

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
CONVOLVED = dataclasses.replace(
  CONFIG, position_encoding="learned+rotary", rotary_axes=((0.75, 4, 64),), conv_taps=2, qk_norm=True, value_features=6
)


def _positions(tokens):
  """1-based positions of right-aligned tokens, 0 on padding."""
  return np.where(tokens > 0, np.cumsum(tokens > 0, axis=1), 0)[..., None].astype(np.int32)


_params = functools.cache(tiny.random_params)


def _shapes(config):
  """Weights without values."""
  return nn.meta.unbox(architectures.abstract_params(config))


@functools.cache
def _apply(config):
  return jax.jit(PerceiverAR(config).apply, static_argnames=("num_latents", "deterministic"))


def _logits(config, params, tokens, **kwargs):
  return np.asarray(_apply(config)({"params": params}, tokens, _positions(tokens), **kwargs))


def _tokens(shape=(2, 12)):
  return np.random.default_rng(0).integers(3, 20, shape).astype(np.int32)


@pytest.mark.parametrize("config", [CONFIG, ROTARY, dataclasses.replace(ROTARY, cross_attend_after=(0, 1)), CONVOLVED])
def test_a_latent_depends_on_its_own_and_earlier_inputs_only(config):
  params, tokens = _params(config), _tokens()
  before = _logits(config, params, tokens)
  for slot in range(12):
    changed = tokens.copy()
    changed[:, slot] = (changed[:, slot] - 3 + 7) % 17 + 3
    moved = np.abs(_logits(config, params, changed) - before).max(axis=(0, 2)) > 1e-6
    sees = np.arange(5) + 7 >= slot  # latent m is at slot 7 + m
    np.testing.assert_array_equal(moved, sees, err_msg=f"input {slot}")


@pytest.mark.parametrize("config", [CONFIG, CONVOLVED])
def test_padding_on_the_left_changes_nothing(config):
  params, tokens = _params(config), _tokens()
  shorter = _logits(config, params, tokens[:, 4:])
  padded = np.concatenate([np.zeros((2, 4), np.int32), tokens[:, 4:]], axis=1)
  np.testing.assert_allclose(_logits(config, params, padded), shorter, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["rotary", "learned+rotary"])  # with rotary, ids are projected once
def test_convolved_keys_are_the_same_in_every_kernel_and_chunk(encoding):
  """Every kernel with every chunk, and both with every encoding; no layers, which keys do not reach."""
  sizes = CONFIG.position_sizes if "learned" in encoding else ()
  config = dataclasses.replace(CONVOLVED, position_encoding=encoding, position_sizes=sizes, vocab_size=11, num_layers=0)
  tokens = _tokens() % 8 + 3
  tokens[0, :4] = 0

  def loss(params, **settings):
    model = PerceiverAR(dataclasses.replace(config, **settings))
    return jnp.sin(model.apply({"params": params}, tokens, _positions(tokens))).sum()

  params = _params(config)
  expected = jax.jit(jax.value_and_grad(functools.partial(loss, attention="reference")))(params)
  for kernel, chunk in zip(("chunked", "streamed"), (1, 5) if encoding == "rotary" else (5, 1)):
    ours = jax.jit(jax.value_and_grad(functools.partial(loss, attention=kernel, attention_chunk=chunk)))(params)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), ours, expected)


def test_convolved_keys_are_those_of_the_definition():
  config = dataclasses.replace(CONVOLVED, qk_norm=False, position_encoding="learned", rotary_axes=())
  rng = np.random.default_rng(0)
  k, v = rng.normal(size=(2, 1, 7, 2, 8)).astype(np.float32)
  weights = {name: rng.normal(size=(2, 2, 8)).astype(np.float32) for name in ("key", "value")}
  valid = np.array([[False, True, True, True, True, True, True]])
  ours = CausalConv(config).apply({"params": weights}, k, v, valid)
  for x, ours_of_x, name in ((k, ours[0], "key"), (v, ours[1], "value")):
    x = np.where(valid[..., None, None], x, 0)
    expected = x[:, 2:] + weights[name][0] * x[:, 1:-1] + weights[name][1] * x[:, :-2]
    np.testing.assert_allclose(ours_of_x, expected, atol=1e-5)


def test_logits_of_values_change_smoothly_with_the_value():
  features = np.asarray(positions_lib.value_features(259, 32))
  assert features.shape == (259, 32) and not features[:3].any()
  similar = features[3:] @ features[3:].T / 32
  np.testing.assert_allclose(np.diagonal(similar), 1, atol=1e-5)
  assert similar[100, 101] > 0.8 > 0.5 > similar[100, 110] > similar[100, 200]
  config = dataclasses.replace(CONFIG, value_features=8)
  params, tokens = _params(config), _tokens()
  before = _logits(config, params, tokens)
  kernel = jax.random.normal(jax.random.key(5), params["value_logits"]["project"]["kernel"].shape)
  params = params | {"value_logits": {"project": params["value_logits"]["project"] | {"kernel": kernel}}}
  change = _logits(config, params, tokens) - before
  assert not change[..., :3].any(), "PAD, EOS and SOS are not values"
  assert np.linalg.matrix_rank(change.reshape(-1, 20)) == 8


def test_rotary_axes_depend_on_differences_in_every_dimension_only():
  config = dataclasses.replace(ROTARY, rotary_axes=((0.5, 3, 30), (0.25, 3, 30), (0.25, 2, 2)))
  rng = np.random.default_rng(0)
  x = rng.normal(size=(1, 6, 1, 16)).astype(np.float32)
  places = rng.integers(1, 9, (1, 6, 3))

  def scores(places):
    rotated = np.asarray(positions_lib.rotary(config, x, places))[0, :, 0]
    return rotated @ rotated.T

  np.testing.assert_allclose(scores(places + np.array([5, 2, 9])), scores(places), atol=1e-4)
  for dimension, (start, end) in enumerate(((0, 8), (8, 12), (12, 16))):  # each dimension rotates its own channels
    moved = places + (np.arange(6)[:, None] * np.eye(3, dtype=int)[dimension])
    changed = (
      np.abs(positions_lib.rotary(config, x, moved) - positions_lib.rotary(config, x, places)).max((0, 1, 2)) > 1e-3
    )
    np.testing.assert_array_equal(changed, (np.arange(16) >= start) & (np.arange(16) < end))


def test_with_zero_init_every_block_is_the_identity_at_first():
  config, tokens = dataclasses.replace(CONVOLVED, zero_init=True), _tokens()
  shallow = dataclasses.replace(config, num_layers=0)
  params = nn.meta.unbox(jax.jit(lambda: architectures.init_params(config, jax.random.key(0)))())
  params["to_logits"]["kernel"] = _params(config)["to_logits"]["kernel"]  # which starts at zero
  of_shallow = {name: value for name, value in params.items() if not name.startswith("layers")}
  np.testing.assert_array_equal(_logits(config, params, tokens), _logits(shallow, of_shallow, tokens))


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"position_encoding": "learned+fourier"}, "learned+fourier must be one encoding"),
    ({"position_encoding": "learned+spiral"}, "spiral"),
    ({"rotary_axes": ((0.5, 4, 64),)}, "needs rotary positions"),
    ({"rotary_axes": ((0.5, 4),)}, "rotary_axes"),
    ({"rotary_axes": ((0.7, 4, 8), (0.7, 4, 8))}, "sum to at most 1"),
    ({"conv_taps": 1, "cross_attend_dropout": 0.5}, "conv_taps=1"),
  ],
)
def test_settings_that_do_not_fit_together_are_refused(settings, message):
  with pytest.raises(InputError, match=re.escape(message)):
    architectures.check(dataclasses.replace(CONFIG, **settings))


def test_rotary_positions_of_another_number_of_dimensions_are_refused():
  config = dataclasses.replace(ROTARY, rotary_axes=((0.5, 4, 64), (0.25, 4, 64)))
  with pytest.raises(InputError, match="have 1 dimensions, and rotary positions use 2"):
    PerceiverAR(config).init(jax.random.key(0), _tokens(), _positions(_tokens()))


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
  none = _apply(CONFIG)({"params": params}, tokens, None)
  np.testing.assert_allclose(ours, none, atol=1e-5)
  assert np.abs(ours - _logits(CONFIG, params, tokens)).max() > 0.01


def test_bfloat16_stays_close_and_gives_float32_logits():
  params, tokens = _params(CONFIG), _tokens()
  half = _logits(dataclasses.replace(CONFIG, dtype="bfloat16"), params, tokens)
  full = _logits(CONFIG, params, tokens)
  assert half.dtype == np.float32
  assert 0 < np.abs(half - full).max() < 0.05 * np.abs(full).max()


def test_embedding_gradients_add_up_in_float32():
  """In bfloat16 a sum of ones stops at 256."""
  config = dataclasses.replace(CONFIG, dtype="bfloat16", position_sizes=(5000,))
  ids = jnp.full((1, 4096), 7)
  embed = Embed(config)
  params = nn.meta.unbox(embed.init(jax.random.key(0), ids, ids[..., None]))
  total = jax.grad(lambda params: embed.apply(params, ids, ids[..., None]).astype(jnp.float32).sum())(params)
  np.testing.assert_array_equal(total["params"]["tokens"][7], 4096)
  np.testing.assert_array_equal(total["params"]["position_0"][7], 4096)


@pytest.mark.slow
def test_rematerialization_changes_no_gradient():
  params, tokens = _params(CONFIG), _tokens()

  def gradients(config):
    def loss(params):
      logits = PerceiverAR(config).apply(
        {"params": params}, tokens, _positions(tokens), deterministic=False, rngs={"dropout": jax.random.key(3)}
      )
      return jnp.square(logits).sum()

    return jax.jit(jax.grad(loss))(params)

  plain, *rematerialized = (
    gradients(dataclasses.replace(CONFIG, dropout=0.5, remat=remat)) for remat in ("none", "dots", "full")
  )
  for recomputed in rematerialized:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3), plain, recomputed)


def test_dropout_acts_in_training_only():
  config, tokens = dataclasses.replace(CONFIG, dropout=0.5), _tokens()
  params = _params(config)
  keys = [{"dropout": jax.random.key(seed)} for seed in (0, 0, 1)]
  first, again, of_other_key = (_logits(config, params, tokens, deterministic=False, rngs=rngs) for rngs in keys)
  np.testing.assert_array_equal(first, again)
  assert np.abs(first - of_other_key).max() > 0.01
  np.testing.assert_array_equal(_logits(config, params, tokens), _logits(CONFIG, params, tokens))


def test_context_dropout_keeps_a_random_part_of_the_inputs_in_order_and_all_latents():
  tokens = np.arange(1, 41).reshape(2, 20).astype(np.int32)
  positions = 100 * tokens[..., None]
  kept, where = drop_context(jax.random.key(0), (tokens, positions), num_latents=4, keep=6)
  np.testing.assert_array_equal(kept[:, 6:], tokens[:, 16:])
  np.testing.assert_array_equal(where, 100 * kept[..., None])
  for row, inputs in enumerate(np.asarray(kept)):
    assert (np.diff(inputs) > 0).all() and set(inputs) <= set(tokens[row])
  assert (np.asarray(kept[0]) + 20 != np.asarray(kept[1])).any(), "every row draws its own"
  drawn = [drop_context(jax.random.key(seed), (tokens, positions), 4, 6)[0][:, :6] for seed in range(200)]
  counts = np.bincount(np.concatenate(drawn, axis=None), minlength=41)
  np.testing.assert_allclose(counts[1:17], 200 * 6 / 16, atol=35)  # 4 standard deviations
  with pytest.raises(ValueError, match="keep=17 must be in 0..16"):
    drop_context(jax.random.key(0), (tokens, positions), num_latents=4, keep=17)


def test_cross_attend_dropout_is_the_model_on_the_inputs_that_stay():
  config = dataclasses.replace(CONFIG, cross_attend_dropout=0.5, attention="reference")
  params, tokens = _params(config), _tokens()

  def training(tokens):
    return _logits(config, params, tokens, deterministic=False, rngs={"dropout": jax.random.key(0)})

  whole = _logits(config, params, tokens)
  assert np.abs(training(tokens) - whole).max() > 1e-3
  sees = []
  for slot in range(12):
    changed = tokens.copy()
    changed[:, slot] = (changed[:, slot] - 3 + 7) % 17 + 3
    sees.append(np.abs(training(changed) - training(tokens)).max(axis=(1, 2)) > 1e-6)
  # Of the 7 inputs before the latents, round(3.5) = 4 stay in each row; the latents all do.
  np.testing.assert_array_equal(np.sum(sees[:7], axis=0), [4, 4])
  assert np.all(sees[7:])


def test_a_dropped_latent_is_hidden_from_later_ones_and_not_from_itself():
  # One layer and no inputs before the latents, so that latents meet in self-attention only (beside their own input).
  config = dataclasses.replace(CONFIG, num_latents=12, num_layers=1, latent_dropout=0.5)
  params, tokens = _params(config), _tokens((1, 12))

  whole = _logits(config, params, tokens)
  for seed in range(3):
    dropped = _logits(config, params, tokens, deterministic=False, rngs={"dropout": jax.random.key(seed)})
    np.testing.assert_allclose(dropped[0, 0], whole[0, 0], atol=1e-5)  # the first latent sees only itself anyway
    assert np.abs(dropped - whole).max() > 1e-3


@pytest.mark.slow
def test_streamed_memory_does_not_grow_with_the_context():
  """Of the cross-attention; layers do not know the context."""

  def temp_bytes(length, encoding):
    sizes = {} if encoding == "rotary" else {"position_sizes": (length,)}
    config = dataclasses.replace(
      ROTARY,
      max_context=length,
      num_latents=64,
      num_layers=0,
      position_encoding=encoding,
      attention="streamed",
      **sizes,
    )
    tokens = jax.ShapeDtypeStruct((2, length), "int32")
    positions = jax.ShapeDtypeStruct((2, length, 1), "int32")
    params = _shapes(config)

    def loss(params, tokens, positions):
      return PerceiverAR(config).apply({"params": params}, tokens, positions).sum()

    compiled = jax.jit(jax.grad(loss)).lower(params, tokens, positions).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  for encoding in ("rotary", "sinusoidal"):
    grown = temp_bytes(2**18, encoding) - temp_bytes(2**13, encoding)
    assert grown <= 2 * 2 * 2**18, encoding  # two flags an input at most: what is padding


@pytest.mark.slow
def test_ids_projected_once_are_the_same_model():
  """A rotary context longer than the vocabulary looks its keys up in a table of all ids; a shorter one does not."""
  config = dataclasses.replace(ROTARY, max_context=40, num_layers=0, attention="streamed", attention_chunk=7)
  tokens = _tokens((2, 40))
  tokens[1, :9] = 0
  params = _params(config)

  def run(config, params):
    def loss(params):
      logits = PerceiverAR(config).apply({"params": params}, tokens, _positions(tokens))[..., :20]
      return jnp.square(logits).sum(), logits

    gradients, logits = jax.jit(jax.grad(loss, has_aux=True))(params)
    return logits, gradients["embed"]["tokens"][:20]

  def add_ids(x, axis):  # ids that do not occur, so that there are more of them than inputs
    return jnp.pad(x, [(0, 21 * (dimension == axis % x.ndim)) for dimension in range(x.ndim)])

  grown = params | {
    "embed": {"tokens": add_ids(params["embed"]["tokens"], 0)},
    "to_logits": jax.tree.map(lambda x: add_ids(x, -1), params["to_logits"]),
  }
  for ours, theirs in zip(run(config, params), run(dataclasses.replace(config, vocab_size=41), grown), strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_more_latents_at_evaluation_than_in_training():
  params, tokens = _params(CONFIG), _tokens()
  more = _logits(CONFIG, params, tokens, num_latents=9)
  assert more.shape == (2, 9, 20) and np.isfinite(more).all()


def test_depth_does_not_grow_the_program():
  """Layers are scanned, so that 60 of them compile in the time of a few."""

  def program_size(layers):
    config = dataclasses.replace(CONFIG, num_layers=layers)
    params, tokens = _shapes(config), _tokens()

    def loss(params):
      return PerceiverAR(config).apply({"params": params}, tokens, _positions(tokens)).sum()

    return len(jax.jit(jax.grad(loss)).lower(params).as_text())

  assert program_size(60) < 1.05 * program_size(6)


def test_more_latents_than_inputs_are_refused():
  with pytest.raises(ValueError, match="num_latents=13 exceeds the 12 inputs"):
    PerceiverAR(CONFIG).apply({"params": {}}, _tokens(), num_latents=13)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"position_encoding": "learned", "position_sizes": (34,)}, r"3 dimensions, but .*position_sizes=\(34,\) has 1"),
    ({"position_encoding": "rotary", "position_sizes": ()}, "3 dimensions, and rotary positions use 1"),
  ],
)
def test_positions_with_other_dimensions_are_refused(changes, message):
  config = tiny.config(**{f"model__{name}": value for name, value in changes.items()}).model
  tokens, positions = jnp.ones((1, 32), jnp.int32), jnp.ones((1, 32, 3), jnp.int32)
  with pytest.raises(InputError, match=message):
    PerceiverAR(config).init(jax.random.key(0), tokens, positions)
