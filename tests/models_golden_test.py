"""The model against the original release: logits, losses and gradients of converted parameters."""

import contextlib
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from perceiver_ar_jax import PerceiverAR
from perceiver_ar_jax.interop import haiku
from perceiver_ar_jax.models import keys as keys_lib
from perceiver_ar_jax.models import layers, positions
from perceiver_ar_jax.training import loss as loss_lib
from tests import golden

MODELS = [
  "a_abs_sinusoidal",
  "b_rotary_half",
  "d_abs_random_image_idxs",
  "f_additional_cross_attend",
  "m_chunked",
  "n_shape_q_embed_ne_z",
  "p_gelu",
]


def _inputs(case):
  """Right-aligned tokens and positions, and where each latent exists, of a golden case."""
  lengths = (case["inputs"] > 0).sum(axis=1)
  tokens = golden.right_align(case["inputs"], lengths)
  positions = golden.right_align(case["input_idxs"], lengths)
  return tokens, positions, case["latent_last_steps"] >= 0


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_logits_of_a_single_latent_match_the_reference(name):
  case = golden.Case(name)
  config, params = haiku.convert(case.tree("params"), case.kwargs)
  tokens, positions, _ = _inputs(case)
  apply = jax.jit(PerceiverAR(config).apply, static_argnames="num_latents")
  last = apply({"params": params}, tokens, positions, num_latents=1)
  # With one latent the reference masks nothing, padding included; the full row is common ground.
  np.testing.assert_allclose(last[0], case["logits_z1"][0], atol=2e-5, rtol=0)


def _with_drawn_masks(case):
  """Puts the dropped inputs and latents that the reference drew in the place of our own draw."""
  if "latent_keep" not in case.arrays:
    return contextlib.nullcontext()
  lengths = (case["inputs"] > 0).sum(axis=1)
  # Shifted like the inputs; the reference's latents stand right-aligned already.
  sees_input = jnp.asarray(golden.right_align(case["encoder_keep"], lengths))
  sees_latent = jnp.asarray(case["latent_keep"])

  def replace(next_function, args, kwargs, context):
    if context.method_name != "__call__":
      return next_function(*args, **kwargs)
    if isinstance(context.module, layers.CrossAttention):
      latents, keys, rotary, valid, deterministic = args
      args = latents, keys, rotary, valid & sees_input, deterministic
    elif isinstance(context.module, layers.SelfAttentionLayer):
      latents, rotary, valid, _, deterministic = args
      args = latents, rotary, valid & sees_latent, True, deterministic
    return next_function(*args, **kwargs)

  return nn.intercept_methods(replace)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("name", "kernel"),
  [
    *((name, "reference") for name in [*MODELS, "r_train_mask_dropout"]),
    *((name, "chunked") for name in ("a_abs_sinusoidal", "n_shape_q_embed_ne_z", "r_train_mask_dropout")),
    *((name, "streamed") for name in ("b_rotary_half", "d_abs_random_image_idxs", "f_additional_cross_attend")),
    ("r_train_mask_dropout", "streamed"),
  ],
)
def test_logits_losses_and_gradients_match_the_reference(name, kernel):
  case = golden.Case(name)
  config, params = haiku.convert(case.tree("params"), case.kwargs)
  config = dataclasses.replace(config, attention=kernel, attention_chunk=7)
  tokens, positions, exists = _inputs(case)
  weights = (case["loss_mask"] * exists).astype(np.float32)

  def total_loss(params):
    with _with_drawn_masks(case):
      logits = PerceiverAR(config).apply({"params": params}, tokens, positions)
    parts = loss_lib.token_losses(logits, case["labels"] * exists, z_loss=1e-4, label_smoothing=0.0)
    return ((parts.cross_entropy + parts.z_loss) * weights).sum(), (parts, logits)

  (total, (parts, logits)), gradients = jax.jit(jax.value_and_grad(total_loss, has_aux=True))(params)
  scored = weights > 0
  np.testing.assert_allclose(logits[exists], case["logits"][exists], atol=2e-5, rtol=0)
  np.testing.assert_allclose(
    (parts.cross_entropy + parts.z_loss)[scored], case["loss_per_position"][scored], atol=2e-5, rtol=0
  )
  np.testing.assert_allclose(parts.z_loss[scored], case["z_loss_per_position"][scored], atol=2e-5, rtol=0)
  np.testing.assert_allclose(total, case["loss_sum"], rtol=1e-5)
  _, expected = haiku.convert(case.tree("grads"), case.kwargs)
  for (path, ours), theirs in zip(jax.tree.leaves_with_path(gradients), jax.tree.leaves(expected), strict=True):
    scale = np.abs(theirs).max()
    np.testing.assert_allclose(
      ours, theirs, rtol=1e-4, atol=max(1e-6, 1e-5 * scale), err_msg=f"gradient of {jax.tree_util.keystr(path)}"
    )


@pytest.mark.slow
def test_fresh_parameters_have_the_reference_distribution():
  stats = json.loads((golden.FOLDER / "init_stats.json").read_text())
  # These two options only add parameters that no published config uses; the rest of the statistics stands.
  kwargs = {**stats["config"], "num_latents_per_position": 1, "initial_query_embed_style": "none"}

  def filled(statistic):
    """The converted tree in which every parameter is filled with its `statistic`."""
    tree = {}
    for path, entry in stats["stats"].items():
      module, name = path.rsplit("/", 1)
      tree.setdefault(module, {})[name] = np.full(entry["shape"], entry[statistic])
    return haiku.convert(tree, kwargs)

  config, expected_std = filled("std")
  tokens = np.ones((1, config.max_context), np.int32)
  params = nn.meta.unbox(jax.jit(PerceiverAR(config).init)(jax.random.key(0), tokens, tokens[..., None])["params"])
  trees = [expected_std, filled("mean")[1], filled("absmax")[1]]
  for (path, ours), *theirs in zip(jax.tree.leaves_with_path(params), *map(jax.tree.leaves, trees), strict=True):
    name = jax.tree_util.keystr(path)
    std, mean, largest = (leaf.flat[0] for leaf in theirs)
    assert ours.shape == theirs[0].shape, name
    np.testing.assert_allclose(np.std(ours), std, rtol=0.03, atol=1e-7, err_msg=f"stddev of {name}")
    np.testing.assert_allclose(np.mean(ours), mean, atol=0.02, err_msg=f"mean of {name}")
    np.testing.assert_allclose(np.abs(ours).max(), largest, rtol=0.03, atol=1e-7, err_msg=f"range of {name}")


def test_what_latents_see_matches_the_reference():
  case = golden.Case("masks_and_primitives")
  tokens, lengths = case["inputs"], case["lengths"]
  for num_latents in (6, 12):
    theirs = case[f"encoder_z{num_latents}_lpp1_train0"][:, 0].astype(bool)
    exists = case[f"last_steps_z{num_latents}_lpp1_train0"] >= 0
    valid = golden.right_align(tokens, lengths) > 0
    ours = keys_lib.visible(np.arange(12), num_latents, 12, valid, keep_own=False)[:, 0]
    for row, length in enumerate(lengths):
      if length:
        shifted = np.roll(theirs[row], 12 - length, axis=1)
        np.testing.assert_array_equal(ours[row][exists[row]], shifted[exists[row]], err_msg=f"row {row}")


def test_latent_dropout_hides_what_the_reference_hides():
  case = golden.Case("masks_and_primitives")
  keep = case["dropout_latent_keep"]
  exists = case["last_steps_z6_lpp1_train0"] >= 0
  ours = keys_lib.visible(np.arange(6), 6, 6, keep & exists, keep_own=True)[:, 0]
  theirs = case["dropout_processor"][:, 0].astype(bool)
  for row, latents in enumerate(exists):
    np.testing.assert_array_equal(ours[row][latents], theirs[row][latents], err_msg=f"row {row}")


def test_position_primitives_match_the_reference():
  case = golden.Case("masks_and_primitives")
  for name in ("sinusoidal", "fourier"):
    encode = positions.ENCODINGS[name].table
    for width, size in ((32, 50), (7, 10)):
      if f"{name}_{width}_{size}" in case.arrays:
        ours = encode(jnp.arange(size)[None], size=size, width=width)[0]
        np.testing.assert_allclose(ours, case[f"{name}_{width}_{size}"], atol=2e-5, err_msg=name)
  for settings in ("f1.0_h1.0_w48", "f0.5_h1.0_w48", "f0.75_h1.0_w49"):
    fraction, _, wavelength = (float(part[1:]) for part in settings.split("_"))
    ours = positions.rotate(
      jnp.asarray(case["rot_x"]), jnp.asarray(case["rot_positions"]), fraction=fraction, max_wavelength=wavelength
    )
    np.testing.assert_allclose(ours, case[f"rot_{settings}"], atol=2e-5, err_msg=settings)
  lengths = case["lengths"]
  ours = positions.terminal_relative(golden.right_align(case["inputs"], lengths))[..., 0]
  theirs = golden.right_align(case["terminal_relative_positions"], lengths)
  np.testing.assert_array_equal(ours, theirs)


def test_sinusoids_are_exact_at_a_million_positions():
  """float32 angles are off by hundredths there; compare with float64."""
  where = np.array([[1, 1_000_000, 1_048_575]])
  ours = positions.sinusoidal(jnp.asarray(where), size=1_048_576, width=32)
  angles = where[..., None] * np.exp(np.arange(16) * -np.log(10_000.0) / 15)
  np.testing.assert_allclose(ours, np.concatenate([np.sin(angles), np.cos(angles)], axis=-1), atol=1e-6)
