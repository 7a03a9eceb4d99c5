"""The model against the reference implementation: logits, losses and gradients of converted parameters."""

import json

import jax
import numpy as np
import pytest
from flax import linen as nn

from perceiver_ar_jax import PerceiverAR
from perceiver_ar_jax.interop import haiku
from perceiver_ar_jax.training import loss as loss_lib
from tests import golden

MODELS = [
  "a_abs_sinusoidal",
  "b_rotary_half",
  "d_abs_random_image_idxs",
  "f_additional_cross_attend",
  "n_shape_q_embed_ne_z",
  "p_gelu",
]


def _inputs(case):
  """Right-aligned tokens and positions, and where each latent exists, of a golden case."""
  lengths = (case["inputs"] > 0).sum(axis=1)
  tokens = golden.right_align(case["inputs"], lengths)
  positions = golden.right_align(case["input_idxs"], lengths)
  return tokens, positions, case["latent_last_steps"] >= 0


@pytest.mark.parametrize("name", MODELS)
def test_logits_match_the_reference(name):
  case = golden.Case(name)
  config, params = haiku.convert(case.tree("params"), case.kwargs)
  tokens, positions, exists = _inputs(case)
  apply = jax.jit(PerceiverAR(config).apply, static_argnames="num_latents")
  logits = apply({"params": params}, tokens, positions)
  np.testing.assert_allclose(logits[exists], case["logits"][exists], atol=2e-5, rtol=0)
  last = apply({"params": params}, tokens, positions, num_latents=1)
  # With one latent the reference picks the input of shorter rows differently; the full row is common ground.
  np.testing.assert_allclose(last[0], case["logits_z1"][0], atol=2e-5, rtol=0, err_msg="with a single latent")


@pytest.mark.parametrize("name", MODELS)
def test_losses_and_gradients_match_the_reference(name):
  case = golden.Case(name)
  config, params = haiku.convert(case.tree("params"), case.kwargs)
  tokens, positions, exists = _inputs(case)
  weights = (case["loss_mask"] * exists).astype(np.float32)

  def total_loss(params):
    logits = PerceiverAR(config).apply({"params": params}, tokens, positions)
    parts = loss_lib.token_losses(logits, case["labels"] * exists, z_loss=1e-4, label_smoothing=0.0)
    return ((parts.cross_entropy + parts.z_loss) * weights).sum(), parts

  (total, parts), gradients = jax.jit(jax.value_and_grad(total_loss, has_aux=True))(params)
  scored = weights > 0
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


def test_fresh_parameters_have_the_reference_distribution():
  stats = json.loads((golden.FOLDER / "init_stats.json").read_text())
  # These two options only add parameters that no published config uses; the rest of the statistics stands.
  kwargs = {**stats["config"], "num_latents_per_position": 1, "initial_query_embed_style": "last_n_inputs"}

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
