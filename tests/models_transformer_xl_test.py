"""Transformer-XL: the paper's equations written out, causality, reach, cuts, padding, and that it learns."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from perceiver_ar_jax import ModelConfig
from perceiver_ar_jax.models import positions, transformer_xl
from perceiver_ar_jax.models.architectures import make_model
from perceiver_ar_jax.parallel.mesh import make_mesh
from perceiver_ar_jax.training import optimizer as optimizer_lib
from perceiver_ar_jax.training.step import init_state, make_train_step
from tests import tiny

CONFIG = ModelConfig(
  architecture="transformer_xl",
  vocab_size=20,
  max_context=12,
  num_latents=12,
  num_layers=2,
  latent_width=8,
  num_cross_heads=1,
  num_self_heads=2,
  position_encoding="relative",
  segment=3,
  memory=4,
)


_params = functools.cache(tiny.random_params)


@functools.cache
def _apply(config):
  return jax.jit(make_model(config).apply, static_argnames="num_latents")


def _logits(config, params, tokens, **kwargs):
  return np.asarray(_apply(config)({"params": params}, tokens, **kwargs))


def _tokens(shape=(2, 12)):
  return np.random.default_rng(0).integers(3, 20, shape).astype(np.int32)


# The equations of section 3.3, one token, one head and one pair at a time.


def _dense(x, weights):
  return x @ weights["kernel"] + weights.get("bias", 0)


def _norm(x, weights):
  x = x - x.mean(-1, keepdims=True)
  return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * weights["scale"] + weights["bias"]


def _written_out(config, params, tokens_L, segment_ends):
  """Logits [L, V] of one row whose segments end before these slots, all states of all layers kept."""
  width, heads = config.latent_width, config.num_self_heads
  size = width // heads
  states = [_dense(params["embed"]["tokens"][tokens_L], params["to_latents"])]  # of each layer [L, D]
  waves = np.asarray(positions.sinusoidal(np.arange(len(tokens_L))[None], size=100, width=width)[0], np.float64)
  for layer in range(config.num_layers):
    weights = jax.tree.map(lambda x, layer=layer: x[layer], params["segments"]["layers"])
    attention, below, above = weights["attention"], states[-1], np.zeros((len(tokens_L), width))
    normed = _norm(below, weights["norm_attention"])
    query = _dense(normed, attention["query"])
    key, value = (_dense(normed, attention["keys_values"][name]) for name in ("key", "value"))
    for i in range(len(tokens_L)):
      start = max([end for end in segment_ends if end <= i], default=0)
      seen = range(max(start - config.memory, 0), i + 1)
      attended = np.zeros(width)
      for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        scores = []
        for j in seen:
          distance = _dense(waves[i - j], attention["distance"])
          a_c = (query[i, part] + attention["u"][part]) @ key[j, part]
          b_d = (query[i, part] + attention["v"][part]) @ distance[part]
          scores.append((a_c + b_d) / np.sqrt(size))
        exponentials = np.exp(np.array(scores))
        attended[part] = exponentials / exponentials.sum() @ value[list(seen), part]
      above[i] = below[i] + _dense(attended, attention["out"])
      hidden = np.maximum(_dense(_norm(above[i], weights["norm_mlp"]), weights["mlp"]["up"]), 0) ** 2
      above[i] += _dense(hidden, weights["mlp"]["down"])
    states.append(above)
  return _dense(_norm(states[-1], params["final_norm"]), params["to_logits"])


@pytest.mark.parametrize(
  ("segment", "memory", "ends"),
  [(3, 4, (3, 6, 9)), (5, 5, (2, 7)), (4, 0, (4, 8))],
  ids=lambda value: str(value),
)
def test_it_is_the_equations_of_the_paper(segment, memory, ends):
  config = dataclasses.replace(CONFIG, segment=segment, memory=memory)
  params, tokens = _params(config), _tokens()
  ours = _logits(config, params, tokens)
  exact = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  for row in range(2):
    expected = _written_out(config, exact, tokens[row], ends)
    np.testing.assert_allclose(ours[row], expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_scores_by_distance_move_to_their_slots():
  """Two queries at the last of three slots: scores of the distances 2, 1, 0 move to the slots at these distances."""
  scores = jnp.array([[20.0, 21.0, 22.0], [30.0, 31.0, 32.0]])[None, None]
  shifted = transformer_xl.shift(scores)[0, 0]
  np.testing.assert_array_equal(shifted[0, :2], [21, 22])
  np.testing.assert_array_equal(shifted[1], [30, 31, 32])


@pytest.mark.parametrize(("num_latents", "layers"), [(12, 2), (2, 1)])
def test_a_token_sees_back_by_the_memory_of_each_layer_and_not_ahead(num_latents, layers):
  """Segments of 3 from the end, memory 3: queries of the last one reach the segment before by each layer."""
  config = dataclasses.replace(CONFIG, num_layers=layers, memory=3)
  params, tokens = _params(config), _tokens()
  before = _logits(config, params, tokens, num_latents=num_latents)
  for slot in range(12):
    changed = tokens.copy()
    changed[:, slot] = (changed[:, slot] - 3 + 7) % 17 + 3
    moved = np.abs(_logits(config, params, changed, num_latents=num_latents) - before).max(axis=(0, 2)) > 1e-6
    query = np.arange(12 - num_latents, 12)
    sees = (slot <= query) & (slot >= query // 3 * 3 - 3 * layers)
    np.testing.assert_array_equal(moved, sees, err_msg=f"input {slot}")


@pytest.mark.slow
def test_fewer_latents_are_the_last_ones():
  tokens = _tokens((2, 40))
  config = dataclasses.replace(CONFIG, max_context=40, num_latents=40, memory=2)
  params = _params(config)
  whole = _logits(config, params, tokens)
  for num_latents in (1, 4, 39):
    np.testing.assert_allclose(
      _logits(config, params, tokens, num_latents=num_latents), whole[:, -num_latents:], atol=1e-5 * np.abs(whole).max()
    )
  with pytest.raises(ValueError, match="num_latents=41 exceeds"):
    make_model(config).apply({"params": params}, tokens, num_latents=41)


@pytest.mark.parametrize("segment", [1, 5])
def test_with_one_layer_and_memory_for_all_the_cuts_do_not_matter(segment):
  config = dataclasses.replace(CONFIG, num_layers=1, segment=12, memory=0)
  params, tokens = _params(config), _tokens()
  whole = _logits(config, params, tokens)
  cut = _logits(dataclasses.replace(config, segment=segment, memory=11), params, tokens)
  np.testing.assert_allclose(cut, whole, atol=1e-5 * np.abs(whole).max())


def test_padding_on_the_left_changes_nothing():
  params, tokens = _params(CONFIG), _tokens()
  shorter = _logits(CONFIG, params, tokens[:, 5:], num_latents=7)
  padded = np.concatenate([np.zeros((2, 5), np.int32), tokens[:, 5:]], axis=1)
  whole = _logits(CONFIG, params, padded)
  np.testing.assert_allclose(whole[:, 5:], shorter, atol=1e-5 * np.abs(shorter).max())
  assert np.isfinite(whole).all()


@pytest.mark.slow
def test_memory_passes_no_gradients():
  """Those of the last segment alone reach weights and its own inputs, not the states that it looks back at."""
  params, tokens = _params(CONFIG), _tokens()[:, -6:]

  def loss(table_VxE):
    changed = params | {"embed": {"tokens": table_VxE}}
    return jnp.square(make_model(CONFIG).apply({"params": changed}, tokens, num_latents=3)).sum()

  gradients = np.abs(jax.jit(jax.grad(loss))(params["embed"]["tokens"])).max(axis=1)
  np.testing.assert_array_equal(gradients > 0, np.isin(np.arange(20), tokens[:, -3:]))


@pytest.mark.slow
def test_rematerialization_changes_no_gradient():
  params, tokens = _params(CONFIG), _tokens()

  def gradients(config):
    rngs = {"dropout": jax.random.key(3)}
    apply = functools.partial(make_model(config).apply, deterministic=False, rngs=rngs)
    return jax.jit(jax.grad(lambda params: jnp.square(apply({"params": params}, tokens)).mean()))(params)

  plain, recomputed = (gradients(dataclasses.replace(CONFIG, dropout=0.5, remat=remat)) for remat in ("none", "full"))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), plain, recomputed)


@pytest.mark.slow
def test_the_train_step_teaches_it_to_look_back_through_its_memory():
  """Every second half is the first one again: the segment that is scored finds it in memory alone."""
  xl = {"architecture": "transformer_xl", "position_encoding": "relative", "segment": 8, "dropout": 0.0}
  config = tiny.config(
    **{f"model__{name}": value for name, value in xl.items()},
    model__num_latents=8,
    model__max_context=16,
    model__vocab_size=8,
    train__steps=150,
    train__batch_size=32,
  )
  optimizer = optimizer_lib.make_optimizer(config.train.optimizer, config.train.steps)
  state = init_state(config, optimizer, make_mesh(config.mesh))
  step, rng, losses = jax.jit(make_train_step(config, optimizer)), np.random.default_rng(0), []
  for index in range(config.train.steps):
    half = rng.integers(3, 8, (32, 8))
    inputs = np.concatenate([half, half], axis=1).astype(np.int32)
    batch = {
      "inputs": inputs,
      "positions": np.zeros((32, 16, 1), np.int32),
      "targets": np.concatenate([inputs[:, 9:], inputs[:, :1]], axis=1),
      "weights": np.broadcast_to(np.arange(8) < 7, (32, 8)).astype(np.float32),
    }
    state, metrics = step(state, batch, jax.random.key(index))
    losses.append(float(metrics["loss"]))
  assert losses[0] == pytest.approx(np.log(8), rel=0.01)
  assert losses[-1] < 0.5 * np.log(5), f"{losses[-1]:.3f} nats, and without a memory log(5) = 1.609"
