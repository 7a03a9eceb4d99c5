"""The loss against the reference implementation, over a grid of label smoothing and z-loss."""

import jax
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
