"""Every kernel equals `reference` in values and gradients, whatever the chunk, the padding and the shape."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from perceiver_ar_jax.models import attention_kernels as kernels


def _inputs(num_queries, num_keys, dtype=np.float32):
  rng = np.random.default_rng(0)
  q, k, v = (jnp.asarray(rng.normal(size=(2, length, 3, 4)), dtype) for length in (num_queries, num_keys, num_keys))
  valid = np.ones((2, num_keys), bool)
  valid[1, : num_keys // 3] = False  # padding on the left of the second row
  return q, k, v, valid


def test_reference_is_causal_softmax_attention():
  q, k, v, valid = _inputs(2, 5)
  out = kernels.reference(q, k, v, valid)
  scores = np.einsum("k,lk->l", q[1, 0, 2], k[1, :, 2]) / 2.0  # row 1, latent 0 on slot 3, head 2; K = 4
  weights = np.exp(scores) * valid[1] * (np.arange(5) <= 3)
  np.testing.assert_allclose(out[1, 0, 2], weights / weights.sum() @ v[1, :, 2], rtol=1e-5)


@pytest.mark.parametrize(("num_queries", "num_keys"), [(4, 13), (13, 13), (1, 7)])
@pytest.mark.parametrize("chunk", [1, 3, 5, 13, 64])
def test_chunked_equals_reference(chunk, num_queries, num_keys):
  q, k, v, valid = _inputs(num_queries, num_keys)
  sees = np.arange(num_keys - num_queries, num_keys) >= num_keys // 3  # queries on padding mean nothing
  weights = jnp.asarray(np.random.default_rng(1).normal(size=q.shape) * np.stack([sees | True, sees])[..., None, None])

  def run(kernel, *kwargs):
    def loss(q, k, v):
      out = kernel(q, k, v, valid, *kwargs)
      return (out * weights).sum(), out

    (_, out), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    return out * (weights != 0), *gradients

  for ours, truth in zip(run(kernels.chunked, chunk), run(kernels.reference)):
    np.testing.assert_allclose(ours, truth, atol=2e-6)


def test_chunked_in_bfloat16_stays_close():
  exact = kernels.reference(*_inputs(4, 13))
  half = kernels.chunked(*_inputs(4, 13, jnp.bfloat16), 5)
  assert half.dtype == jnp.bfloat16
  np.testing.assert_allclose(half.astype(jnp.float32), exact, atol=0.05)


def test_chunked_keeps_nothing_of_the_size_of_all_scores():
  def temp_bytes(kernel):
    shapes = [jax.ShapeDtypeStruct((1, length, 1, 8), "float32") for length in (256, 8192, 8192)]
    valid = jax.ShapeDtypeStruct((1, 8192), "bool")
    gradient = jax.grad(lambda q, k, v, valid: kernel(q, k, v, valid).sum(), argnums=(0, 1, 2))
    return jax.jit(gradient).lower(*shapes, valid).compile().memory_analysis().temp_size_in_bytes

  assert temp_bytes(kernels.chunked) < temp_bytes(kernels.reference) / 3
  assert temp_bytes(kernels.auto) == temp_bytes(kernels.chunked), "auto walks over large contexts"
