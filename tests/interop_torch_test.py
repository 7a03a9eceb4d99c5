"""perceiver_ar_torch.py computes the logits of the JAX model for every option; its cache changes no token."""

import dataclasses
import importlib.util
import json
import pathlib
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from perceiver_ar_jax import ModelConfig, PerceiverAR, Sampler
from tests import tiny

torch = pytest.importorskip("torch")

_SPEC = importlib.util.spec_from_file_location("perceiver_ar_torch", tiny.ROOT / "examples" / "perceiver_ar_torch.py")
perceiver_ar_torch = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(perceiver_ar_torch)

torch.set_num_threads(1)  # more threads only wait for each other in models of this size

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
ROTARY = {"position_encoding": "rotary", "position_sizes": ()}
AXES = {"rotary_axes": ((0.5, 3.0, 30.0), (0.25, 2.0, 9.0), (0.25, 2.0, 2.0))}
OPTIONS = {
  "learned": {},
  "sinusoidal": {"position_encoding": "sinusoidal"},
  "sinusoidal, odd width": {"position_encoding": "sinusoidal", "embed_width": 13},
  "sinusoidal, three dimensions": {"position_encoding": "sinusoidal", "position_sizes": (20, 9, 7)},
  "fourier": {"position_encoding": "fourier"},
  "fourier, two dimensions": {"position_encoding": "fourier", "position_sizes": (20, 1)},
  "learned, two dimensions": {"position_sizes": (20, 9)},
  "rotary": ROTARY,
  "rotary, no rotation": ROTARY | {"rotary_fraction": 0.0},
  "rotary, one band": ROTARY | {"rotary_fraction": 0.25, "rotary_max_wavelength": 100},
  "rotary, whole heads": ROTARY | {"rotary_fraction": 1.0, "rotary_max_wavelength": 1000},
  "rotary, from the last token": ROTARY | {"positions_from_data": False},
  "rotary axes": ROTARY | AXES,
  "rotary axes, narrow": ROTARY | {"rotary_axes": ((0.1, 3.0, 30.0), (0.5, 2.0, 9.0))},
  "learned+rotary": {"position_encoding": "learned+rotary"},
  "rotary+sinusoidal": {"position_encoding": "rotary+sinusoidal", "position_sizes": (20, 9, 7)} | AXES,
  "fourier+rotary, from the last token": {"position_encoding": "fourier+rotary", "positions_from_data": False},
  "learned, from the last token": {"positions_from_data": False},
  "sinusoidal, from the last token": {"position_encoding": "sinusoidal", "positions_from_data": False},
  "gelu": {"activation": "gelu", "mlp_widening": 3},
  "further cross-attentions": {"num_layers": 4, "cross_attend_after": (0, 2)},
  "cross-attention last": {"cross_attend_after": (1,)},
  "cross-attentions everywhere": {"cross_attend_after": (1, 0, 1), "conv_taps": 1},
  "no layers": {"num_layers": 0},
  "widths": {"embed_width": 6, "cross_attend_width": 24},
  "convolution": {"conv_taps": 3, "cross_attend_width": 8},
  "convolution, longer than the context": ROTARY | {"conv_taps": 14},
  "qk_norm": {"qk_norm": True},
  "value features": {"value_features": 4, "embed_width": 6},
  "one value feature": ROTARY | {"value_features": 2},
  "all latents": {"num_latents": 12},
  "one latent": {"num_latents": 1},
  "everything": {
    "position_encoding": "learned+rotary",
    "conv_taps": 2,
    "qk_norm": True,
    "zero_init": True,
    "cross_attend_after": (0,),
    "embed_width": 10,
    "cross_attend_width": 12,
    "activation": "gelu",
    "num_cross_heads": 3,
  },
}


def _config(name: str) -> ModelConfig:
  return dataclasses.replace(CONFIG, **OPTIONS[name])


def _params(config: ModelConfig, seed: int = 0) -> dict:
  """Random values for every parameter, those that start at 0 or 1 included."""
  dimensions = len(config.position_sizes) or len(config.rotary_axes) or 1
  tokens, positions = np.ones((1, 12), np.int32), np.ones((1, 12, dimensions), np.int32)
  shapes = nn.meta.unbox(jax.eval_shape(PerceiverAR(config).init, jax.random.key(0), tokens, positions)["params"])
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda leaf: jnp.array(rng.normal(scale=0.3, size=leaf.shape), jnp.float32), shapes)


def _batch(config: ModelConfig, length: int = 12) -> tuple[np.ndarray, np.ndarray]:
  rng = np.random.default_rng(1)
  tokens = rng.integers(3, 20, (3, length))
  tokens[1, : length - 9], tokens[2, : length - 2] = 0, 0
  sizes = config.position_sizes or (30,) * (len(config.rotary_axes) or 1)
  positions = np.stack([rng.integers(0, size, tokens.shape) for size in sizes], axis=-1)
  return tokens, np.where(tokens[..., None] > 0, positions, 0)


def _both(folder: pathlib.Path, config: ModelConfig):
  params = _params(config)
  tiny.export_model(config, params, folder / "export")
  return params, perceiver_ar_torch.load(folder / "export")


def _compare(config, params, model, tokens, positions, num_latents=None):
  ours = model(torch.tensor(tokens), None if positions is None else torch.tensor(positions), num_latents=num_latents)
  arguments = [None if x is None else jnp.array(x, jnp.int32) for x in (tokens, positions)]
  apply = jax.jit(PerceiverAR(config).apply, static_argnames="num_latents")
  expected = np.asarray(apply({"params": params}, *arguments, num_latents=num_latents))
  assert ours.dtype == torch.float32 and ours.shape == expected.shape
  scored = tokens[:, -expected.shape[1] :] > 0  # logits of padding have no meaning
  assert expected.std() > 0.1
  np.testing.assert_allclose(ours.numpy()[scored], expected[scored], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", OPTIONS)
def test_logits_are_those_of_the_jax_model(name, tmp_path):
  config = _config(name)
  _compare(config, *_both(tmp_path, config), *_batch(config))


@pytest.mark.parametrize("name", ["learned", "rotary", "everything"])
def test_logits_without_positions_and_with_fewer_latents(name, tmp_path):
  config = _config(name)
  _compare(config, *_both(tmp_path, config), _batch(config, 9)[0], None, num_latents=3)


def _generate(model, tokens, number, **options):
  """(the tokens, and the logits that each new one is drawn from)."""
  drawn, draw = [], perceiver_ar_torch._draw

  def record(logits, *arguments):
    drawn.append(logits.clone())
    return draw(logits, *arguments)

  with mock.patch.object(perceiver_ar_torch, "_draw", record):
    result = model.generate(torch.tensor(tokens), number, **options)
  return result, torch.stack(drawn)


CACHED = [name for name in OPTIONS if "dimensions" not in name and "axes" not in name and "rotary+" not in name]


@pytest.mark.parametrize("name", [*CACHED, "rotary axes", "rotary+sinusoidal"])
def test_the_cache_changes_no_token(name, tmp_path):
  """Through several blocks of latents, and contexts that start over."""
  config = _config(name)
  _, model = _both(tmp_path, config)
  tokens, positions = _batch(config, 7)
  more = _batch(config, 30)[1][:, :23]
  positions = torch.tensor(np.concatenate([positions, np.maximum(more, 1)], axis=1))
  for options in ({"positions": positions}, {}) if name in CACHED else ({"positions": positions},):
    (cached, logits), (uncached, expected) = (
      _generate(model, tokens, 23, temperature=0.0, cache=cache, **options) for cache in (True, False)
    )
    assert (cached == uncached).all() and cached.shape[1] > 12
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-5)
    assert (cached[:, :7] == torch.tensor(tokens)).all() and not (cached[:, 7:] == 2).any()


def test_a_pass_over_all_latents_for_each_token_is_exact(tmp_path):
  config = _config("rotary")
  _, model = _both(tmp_path, config)
  tokens = _batch(config, 7)[0]
  result, logits = _generate(model, tokens, 5, temperature=0.0, kept_latents=5)
  for index in range(5):
    window = result[:, : 7 + index]
    positions = ((window > 0).cumsum(1) * (window > 0))[..., None]
    torch.testing.assert_close(logits[index], model(window, positions)[:, -1], atol=1e-5, rtol=1e-5)


def test_greedy_tokens_are_those_of_the_jax_sampler(tmp_path):
  config = dataclasses.replace(_config("everything"), max_context=32, vocab_size=259, position_sizes=(34,))
  params, model = _both(tmp_path, config)
  settings = {f"model__{field.name}": getattr(config, field.name) for field in dataclasses.fields(config)}
  sampler = Sampler(tiny.config(**settings, sample__kept_latents=5), params)
  prompt = np.array([2, 30, 31, 32, 33, 34, 35], np.int32)
  ours = model.generate(torch.tensor(prompt[None], dtype=torch.int64), 12, temperature=0.0, kept_latents=5)
  expected = sampler(prompt, num_samples=1, length=12, temperature=0.0)[0].events
  np.testing.assert_array_equal(ours[0].numpy(), expected)


def test_drawn_tokens_follow_the_settings():
  logits = torch.log(torch.tensor([[0.1, 0.1, 0.1, 0.4, 0.2, 0.1]])).repeat(4000, 1)
  for arguments, expected in (
    ((1.0, 0, 1.0), [0, 0.125, 0, 0.5, 0.25, 0.125]),
    ((0.5, 0, 1.0), [0, 1 / 22, 0, 16 / 22, 4 / 22, 1 / 22]),
    ((1.0, 2, 1.0), [0, 0, 0, 2 / 3, 1 / 3, 0]),
    ((1.0, 0, 0.5), [0, 0, 0, 1, 0, 0]),
    ((1.0, 100, 0.6), [0, 0, 0, 2 / 3, 1 / 3, 0]),
    ((0.0, 0, 1.0), [0, 0, 0, 1, 0, 0]),
  ):
    torch.manual_seed(0)
    shares = np.bincount(perceiver_ar_torch._draw(logits.clone(), *arguments).numpy(), minlength=6) / 4000
    np.testing.assert_allclose(shares, expected, atol=0.03)


def test_sequences_end(tmp_path):
  config = _config("rotary")
  _, model = _both(tmp_path, config)
  ends = {1, 3}

  def draw(logits, *_):
    return torch.tensor([1 if index in ends else 5 for index in range(len(logits))])

  with mock.patch.object(perceiver_ar_torch, "_draw", draw):
    result = model.generate(torch.full((4, 3), 7), 3)
    assert result[:, 3:].tolist() == [[5, 5, 5], [1, 0, 0], [5, 5, 5], [1, 0, 0]]
    ends |= {0, 2}
    assert model.generate(torch.full((4, 3), 7), 3).shape == (4, 4)


def test_other_models_and_damaged_files_are_refused(tmp_path):
  config = _config("rotary")
  _both(tmp_path, config)
  path = tmp_path / "export" / "config.json"
  settings = json.loads(path.read_text())
  for change, words in (
    ({"architecture": "transformer_xl"}, "transformer_xl"),
    ({"mixture": 2}, "mixture"),
    ({"position_encoding": "alibi"}, "alibi"),
    ({"latent_width": 32}, "size mismatch"),
    ({"num_layers": 3}, "Missing key"),
    ({"num_layers": 1}, "Unexpected key"),
  ):
    path.write_text(json.dumps({"model": settings["model"] | change}))
    with pytest.raises((ValueError, RuntimeError), match=words):
      perceiver_ar_torch.load(tmp_path / "export")
  path.write_text(json.dumps({"model": settings["model"] | {"added_later": None}}))
  model = perceiver_ar_torch.load(tmp_path / "export")
  with pytest.raises(ValueError, match="exceeds the 3 inputs"):
    model(torch.full((1, 3), 7))
  with pytest.raises(ValueError, match="2 dimensions"):
    model(torch.full((1, 6), 7), torch.ones((1, 6, 2), dtype=torch.int64))


def test_half_precision_weights_are_read(tmp_path):
  config = _config("everything")
  params = _params(config)
  tiny.export_model(config, params, tmp_path / "half", dtype="bfloat16")
  rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), params)
  _compare(config, rounded, perceiver_ar_torch.load(tmp_path / "half"), *_batch(config))


def test_the_file_needs_neither_this_project_nor_jax():
  source = pathlib.Path(perceiver_ar_torch.__file__).read_text()
  assert len(source.splitlines()) <= 300
  imported = set(re.findall(r"^(?:import|from) ([a-z_]+)", source, re.MULTILINE))
  assert imported == {"json", "math", "safetensors", "torch"}


def test_all_settings_are_known():
  assert set(perceiver_ar_torch._SETTINGS) == {field.name for field in dataclasses.fields(ModelConfig)}
