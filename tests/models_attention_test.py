"""Every kernel equals `reference` in values and gradients, whatever the chunk, the padding and the shape."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from perceiver_ar_jax.config import InputError, MeshConfig
from perceiver_ar_jax.models import attention, streamed
from perceiver_ar_jax.models.keys import Keys
from perceiver_ar_jax.models.perceiver_ar import PerceiverAR
from perceiver_ar_jax.parallel.mesh import AXES, make_mesh
from tests import tiny


def _inputs(num_queries, num_keys, dtype=np.float32):
  rng = np.random.default_rng(0)
  q, k, v = (jnp.asarray(rng.normal(size=(2, length, 3, 4)), dtype) for length in (num_queries, num_keys, num_keys))
  valid = np.ones((2, num_keys), bool)
  valid[1, : num_keys // 3] = False  # padding on the left of the second row
  valid[0, num_keys // 2] = False  # and an input that was dropped
  return q, k, v, valid


def _sees_a_key(num_queries, num_keys, valid):
  """[2, M, 1, 1]: whether a query attends to any key."""
  return np.cumsum(valid, axis=1)[:, num_keys - num_queries :, None, None] > 0


def _values_and_gradients(kernel, q, k, v, valid, **kwargs):
  weights = np.random.default_rng(1).normal(size=q.shape) * _sees_a_key(q.shape[1], k.shape[1], valid)

  def loss(q, k, v):
    out = kernel(q, Keys.from_arrays(k, v), valid, **kwargs)
    return (out * weights).sum(), out

  (_, out), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)
  return out * (weights != 0), *gradients


def test_reference_is_causal_softmax_attention():
  q, k, v, valid = _inputs(2, 5)
  out = attention.reference(q, Keys.from_arrays(k, v), valid)
  scores = np.einsum("k,lk->l", q[1, 0, 2], k[1, :, 2]) / 2.0  # row 1, latent 0 on slot 3, head 2; K = 4
  weights = np.exp(scores) * valid[1] * (np.arange(5) <= 3)
  np.testing.assert_allclose(out[1, 0, 2], weights / weights.sum() @ v[1, :, 2], rtol=1e-5)


def test_keep_own_shows_each_query_its_own_slot_and_no_other_dropped_one():
  q, k, v, _ = _inputs(3, 3)
  out = attention.reference(q, Keys.from_arrays(k, v), np.zeros((2, 3), bool), keep_own=True)
  np.testing.assert_allclose(out, v, rtol=1e-5)


@pytest.mark.parametrize(
  ("num_queries", "num_keys", "keep_own", "chunks"),
  [
    (4, 13, False, (1, 5, 13)),  # of one key; a part at the end; all keys
    (4, 13, True, (3,)),
    (13, 13, False, (3,)),
    (13, 13, True, (1, 5, 64)),
    (1, 7, False, (64,)),
    (1, 7, True, (3, 7)),
  ],
)
def test_chunked_equals_reference(num_queries, num_keys, keep_own, chunks):
  inputs = _inputs(num_queries, num_keys)
  expected = _values_and_gradients(attention.reference, *inputs, keep_own=keep_own)
  for chunk in chunks:
    ours = _values_and_gradients(streamed.chunked, *inputs, chunk=chunk, keep_own=keep_own)
    for array, expected_array in zip(ours, expected):
      np.testing.assert_allclose(array, expected_array, atol=2e-6, err_msg=f"chunk {chunk}")


@pytest.mark.parametrize("chunk", [3, 64])
def test_streamed_equals_reference_with_gradients_of_the_projection(chunk):
  q, *_, valid = _inputs(4, 13)
  rng = np.random.default_rng(2)
  ids = jnp.asarray(rng.integers(0, 6, (2, 13)))
  weights = {name: jnp.asarray(rng.normal(size=(6, 3, 4)), jnp.float32) for name in "kv"}

  def make(weights, source):
    return weights["k"][source["ids"]] * source["scale"][..., None, None], weights["v"][source["ids"]]

  def loss(kernel, q, weights, scale):
    keys = Keys(make, weights, {"ids": ids, "scale": scale})
    out = kernel(q, keys, valid)
    return (jnp.sin(out) * _sees_a_key(4, 13, valid)).sum()

  def gradients(kernel):
    fn = jax.jit(jax.value_and_grad(functools.partial(loss, kernel), argnums=(0, 1, 2)))
    return fn(q, weights, jnp.linspace(0.5, 2.0, 26).reshape(2, 13))

  for array, expected in zip(
    jax.tree.leaves(gradients(functools.partial(streamed.streamed, chunk=chunk))),
    jax.tree.leaves(gradients(attention.reference)),
    strict=True,
  ):
    np.testing.assert_allclose(array, expected, atol=5e-6)


def test_cpus_scan_as_many_rows_at_a_time_as_fit_their_caches(monkeypatch):
  inputs = _inputs(4, 13)
  expected = _values_and_gradients(attention.reference, *inputs)

  def lowered(num_scores):
    monkeypatch.setattr(streamed, "_CPU_SCORES", num_scores)
    q, k, v, valid = inputs
    return (
      jax.jit(lambda q, k, v: streamed.streamed(q, Keys.from_arrays(k, v), valid, chunk=5)).lower(q, k, v).as_text()
    )

  scores_of_a_row, scores_of_both = "tensor<1x3x4x5xf32>", "tensor<2x3x4x5xf32>"
  with jax.set_mesh(make_mesh(MeshConfig(), jax.devices("cpu")[:1])):
    assert scores_of_both in lowered(2 * 3 * 4 * 5)
    assert scores_of_both not in lowered(2 * 3 * 4 * 5 - 1) and scores_of_a_row in lowered(2 * 3 * 4 * 5 - 1)
    ours = _values_and_gradients(streamed.streamed, *inputs, chunk=5)  # one row at a time
  for array, expected_array in zip(ours, expected, strict=True):
    np.testing.assert_allclose(array, expected_array, atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("num_queries", "num_keys", "block"), [(4, 13, 512), (130, 130, 512), (130, 130, 128)])
def test_splash_equals_reference(num_queries, num_keys, block, monkeypatch):
  monkeypatch.setattr(attention, "_MAX_BLOCK", block)
  inputs = _inputs(num_queries, num_keys)
  ours = _values_and_gradients(functools.partial(attention.splash, interpret=True), *inputs)
  for array, expected in zip(ours, _values_and_gradients(attention.reference, *inputs)):
    np.testing.assert_allclose(array, expected, atol=1e-5)


def _lowered(kernel, platform):
  """The program of the kernel's gradient for a platform that need not be here."""
  q, k, v, valid = _inputs(128, 256, jnp.bfloat16)
  gradient = jax.grad(
    lambda q, k, v: kernel(q, Keys.from_arrays(k, v), valid).astype(jnp.float32).sum(), argnums=(0, 1, 2)
  )
  return jax.jit(gradient).trace(q, k, v).lower(lowering_platforms=(platform,)).as_text()


def test_splash_lowers_for_the_tpu():
  assert _lowered(attention.splash, "tpu").count("tpu_custom_call") >= 2  # forward and backward


def test_cudnn_lowers_for_the_gpu(monkeypatch):
  from jax._src.cudnn import fused_attention_stablehlo as cudnn

  # What a machine with a Hopper GPU would answer.
  monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
  monkeypatch.setattr(cudnn, "check_compute_capability", lambda capability: True)

  def kernel(q, keys, valid, **kwargs):
    def fill(x):  # cuDNN wants heads whose width is a multiple of 8
      return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, 4)))

    return attention.cudnn(fill(q), Keys.from_arrays(*map(fill, keys.to_arrays())), valid, **kwargs)

  program = _lowered(kernel, "cuda")
  assert "__cudnn$fmhaScaleBiasSoftmax(" in program and "__cudnn$fmhaScaleBiasSoftmaxBackward(" in program


@pytest.mark.parametrize(("name", "platform"), [("cudnn", "GPU"), ("splash", "TPU")])
def test_kernels_of_other_platforms_are_refused(name, platform):
  mesh = make_mesh(MeshConfig(), jax.devices()[:1])
  config = tiny.config(model__attention=name, model__dtype="bfloat16").model
  with pytest.raises(InputError, match=f"{name} runs on {platform}s only"):
    attention.check(config, mesh)
  attention.check(tiny.config(model__attention="auto").model, mesh)


def test_cudnn_in_float32_and_unknown_kernels_are_refused():
  with pytest.raises(InputError, match="cudnn computes in bfloat16 only: set model.dtype=bfloat16"):
    attention.check(tiny.config(model__attention="cudnn", model__dtype="float32").model)
  with pytest.raises(InputError, match="model.attention='stremed' is unknown. Did you mean 'streamed'"):
    attention.check(tiny.config(model__attention="stremed").model)


def test_streamed_in_bfloat16_stays_close():
  q, k, v, valid = _inputs(4, 13)
  exact = attention.reference(q, Keys.from_arrays(k, v), valid)
  half = streamed.streamed(*_half(q, k, v), valid, chunk=5)
  assert half.dtype == jnp.bfloat16
  np.testing.assert_allclose(half.astype(jnp.float32), exact, atol=0.05)


def _half(q, k, v):
  q, k, v = (x.astype(jnp.bfloat16) for x in (q, k, v))
  return q, Keys.from_arrays(k, v)


def test_chunked_keeps_nothing_of_the_size_of_all_scores():
  def temp_bytes(kernel):
    shapes = [jax.ShapeDtypeStruct((1, length, 1, 8), "float32") for length in (256, 8192, 8192)]
    valid = jax.ShapeDtypeStruct((1, 8192), "bool")
    gradient = jax.grad(lambda q, k, v, valid: kernel(q, Keys.from_arrays(k, v), valid).sum(), argnums=(0, 1, 2))
    return jax.jit(gradient).lower(*shapes, valid).compile().memory_analysis().temp_size_in_bytes

  assert temp_bytes(streamed.chunked) < temp_bytes(attention.reference) / 3


_TPU, _H100 = "TPU v5 lite", "NVIDIA H100 80GB HBM3"


@pytest.mark.parametrize(
  ("kind", "dtype", "shape_MxHxK", "num_keys", "name"),
  [
    ("cpu", "float32", (2**7, 2, 8), 2**8, "streamed"),
    ("cpu", "float32", (2**7 - 1, 2, 8), 2**8, "reference"),
    ("cpu", "bfloat16", (1024, 16, 64), 1024, "streamed"),
    ("", "bfloat16", (1024, 16, 64), 1024, "streamed"),  # no mesh
    (_TPU, "bfloat16", (1024, 16, 64), 1024, "splash"),
    ("TPU v6 lite", "float32", (300, 2, 8), 300, "splash"),
    (_TPU, "bfloat16", (128, 16, 64), 128, "reference"),
    (_TPU, "bfloat16", (1024, 16, 64), 12_416, "streamed"),  # a cross-attention
    (_H100, "bfloat16", (1024, 16, 64), 1024, "cudnn"),
    (_H100, "bfloat16", (1024, 16, 64), 8192, "cudnn"),  # keys, values and mask: as large as what streaming stores
    (_H100, "bfloat16", (1024, 16, 64), 8194, "streamed"),
    (_H100, "bfloat16", (1024, 16, 64), 2**20, "streamed"),
    (_H100, "bfloat16", (32_768, 16, 64), 32_768, "streamed"),
    (_H100, "float32", (1024, 16, 64), 1024, "streamed"),
    (_H100, "bfloat16", (1024, 16, 136), 1024, "streamed"),
    (_H100, "bfloat16", (1024, 16, 60), 1024, "streamed"),
    (_H100, "bfloat16", (1024, 16, 64), 1025, "streamed"),
    ("NVIDIA GeForce RTX 4090", "bfloat16", (1024, 16, 64), 1024, "cudnn"),
    ("NVIDIA GeForce RTX 2080 Ti", "bfloat16", (1024, 16, 64), 1024, "streamed"),
    ("Tesla V100-SXM2-16GB", "bfloat16", (1024, 16, 64), 1024, "streamed"),
    ("AMD Instinct MI300X", "bfloat16", (1024, 16, 64), 1024, "streamed"),
  ],
)
def test_auto_chooses_by_device_and_shape(kind, dtype, shape_MxHxK, num_keys, name):
  def choose(keep_own=False, sharded=False):
    return attention.choose(kind, jnp.dtype(dtype), shape_MxHxK, num_keys, keep_own, sharded, 512)

  assert choose() == name
  assert choose(keep_own=True) == ("streamed" if name == "splash" else name), "latent dropout"
  assert choose(sharded=True) == ("streamed" if name in ("splash", "cudnn") else name), "mesh.context > 1"


@pytest.mark.parametrize(("kind", "platform", "num_pallas"), [(_TPU, "tpu", 1), ("cpu", "cpu", 0)])
def test_auto_reads_the_devices_of_the_mesh_and_not_those_of_the_process(kind, platform, num_pallas):
  """Splash for the layers, one under a scan, and never for the cross-attention."""
  device = AbstractDevice(device_kind=kind, num_cores=1, platform=platform)
  model = PerceiverAR(tiny.config(model__max_context=512, model__num_latents=256, model__position_sizes=(514,)).model)
  ids_1xL = jax.ShapeDtypeStruct((1, 512), "int32")

  def apply(tokens_1xL):
    return model.init_with_output(jax.random.key(0), tokens_1xL, tokens_1xL[..., None])[0]

  with jax.sharding.use_abstract_mesh(AbstractMesh((1,) * 4, AXES, (AxisType.Auto,) * 4, abstract_device=device)):
    assert str(jax.make_jaxpr(apply)(ids_1xL)).count("pallas_call[") == num_pallas
