"""The loss against the original release, over a grid of label smoothing and z-loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from perceiver_ar_jax.training import loss as loss_lib
from tests import golden


@pytest.mark.parametrize("z_loss", [0.0, 0.0001, 0.01])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_losses_and_gradients_match_the_reference(label_smoothing, z_loss):
  case, suffix = golden.Case("losses"), f"ls{label_smoothing}_zl{z_loss}"
  weights = case["weights"]

  def weighted(logits):
    parts = loss_lib.token_losses(logits, case["targets"], z_loss=z_loss, label_smoothing=label_smoothing)
    return ((parts.cross_entropy + parts.z_loss) * weights).sum(), parts

  gradient, parts = jax.grad(weighted, has_aux=True)(case["logits"])
  total = (parts.cross_entropy + parts.z_loss) * weights
  np.testing.assert_allclose(total, case[f"loss_{suffix}"], atol=2e-5, rtol=0)
  np.testing.assert_allclose(parts.z_loss * weights, case[f"zloss_{suffix}"], atol=2e-5, rtol=0)
  np.testing.assert_allclose(gradient, case[f"grad_{suffix}"], atol=1e-6, rtol=1e-4)


def test_uniform_logits_cost_the_logarithm_of_the_vocabulary():
  parts = loss_lib.token_losses(np.zeros((1, 1, 8)), np.array([[3]]), z_loss=0.5, label_smoothing=0.0)
  np.testing.assert_allclose(parts.cross_entropy, [[np.log(8)]], rtol=1e-6)
  np.testing.assert_allclose(parts.z_loss, [[0.5 * np.log(8) ** 2]], rtol=1e-6)


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_chunks_of_latents_change_neither_sums_nor_gradients(chunk):
  rng = np.random.default_rng(0)
  latents, kernel = jnp.asarray(rng.normal(size=(2, 7, 4))), jnp.asarray(rng.normal(size=(4, 9)))
  targets, weights = jnp.asarray(rng.integers(0, 9, (2, 7))), jnp.asarray(rng.integers(0, 2, (2, 7)), jnp.float32)

  def run(chunk):
    def total(latents, kernel):
      losses = loss_lib.score(
        lambda part: part @ kernel, latents, targets, z_loss=0.1, label_smoothing=0.1, chunk=chunk
      )
      sums = loss_lib.weighted_sums(losses, weights)
      return sums["loss"] + sums["z_loss"], sums

    return jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))(latents, kernel)

  for chunked, whole in zip(jax.tree.leaves(run(chunk)), jax.tree.leaves(run(None)), strict=True):
    np.testing.assert_allclose(chunked, whole, rtol=1e-5, atol=1e-6)


def test_chunks_keep_the_logits_of_a_large_vocabulary_from_existing_at_once():
  def temp_bytes(chunk):
    def total(latents, kernel):
      zeros, ones = jnp.zeros((2, 512), jnp.int32), jnp.ones((2, 512))
      return loss_lib.weighted_sums(loss_lib.score(lambda part: part @ kernel, latents, zeros, chunk=chunk), ones)[
        "loss"
      ]

    shapes = jax.ShapeDtypeStruct((2, 512, 8), "float32"), jax.ShapeDtypeStruct((8, 8192), "float32")
    compiled = jax.jit(jax.grad(total, argnums=(0, 1))).lower(*shapes).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  assert temp_bytes(64) < temp_bytes(None) / 4
