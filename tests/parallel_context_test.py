"""A long context sharded over devices: same results, less memory per device, only latents are exchanged."""

import re

import jax
import numpy as np
import pytest

from benchmarks.step import at_context, random_batch
from perceiver_ar_jax.config import MeshConfig
from perceiver_ar_jax.evaluation.evaluate import make_eval_step
from perceiver_ar_jax.parallel import sharding
from perceiver_ar_jax.parallel.mesh import make_mesh
from perceiver_ar_jax.training import optimizer as optimizer_lib
from perceiver_ar_jax.training.step import init_state, make_train_step
from tests import tiny

pytestmark = pytest.mark.slow

CONTEXT = 8200  # not a multiple of the chunk
_COLLECTIVE = re.compile(
  r"= (\S.*?) (?:all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
)


def measure(kernel: str, num_devices: int, **overrides) -> dict:
  """Losses of two steps, temporary bytes, and the number of elements of the largest array that devices exchange."""
  shape = {"vocab_size": 32, "num_layers": 1, "mlp_widening": 2, "attention": kernel, "attention_chunk": 300}
  shape = {f"model__{name}": value for name, value in shape.items()} | {"model__dropout": 0.0, "train__batch_size": 4}
  schedule = {"train__optimizer__warmup_steps": 0, "train__optimizer__schedule": "constant"}
  mesh_sizes = {name[6:]: value for name, value in overrides.items() if name.startswith("mesh__")}
  config = at_context(tiny.config(**{**shape, **schedule, **overrides}), CONTEXT)
  mesh = make_mesh(MeshConfig(**mesh_sizes), jax.devices()[:num_devices])
  optimizer = optimizer_lib.make_optimizer(config.train.optimizer, config.train.steps)
  batch = random_batch(config)
  batch["positions"] = np.where(
    np.arange(CONTEXT)[None, :, None] < [[[3000]], [[0]], [[0]], [[8190]]], 0, batch["positions"]
  )
  batch["inputs"] *= batch["positions"][..., 0] > 0  # padding; in the last row even among the latents
  if config.data.packing > 1:  # some begin among the latents
    begins = np.isin(np.arange(CONTEXT), (4100, 8190, 8195))
    batch["segments"] = np.where(batch["inputs"] > 0, np.cumsum(begins)[None] + 1, 0).astype(np.int32)
  layout = sharding.batch_shardings(mesh, {name: array.shape for name, array in batch.items()})
  batch, losses = jax.device_put(batch, layout), []
  with jax.set_mesh(mesh):
    state = init_state(config, optimizer, mesh, tiny.random_params(config.model))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    step = jax.jit(make_train_step(config, optimizer), donate_argnums=0, out_shardings=(shardings, None))
    step = step.lower(state, batch, jax.random.key(0)).compile()
    places = jax.device_put({name: np.zeros(4, np.int32) for name in ("document", "end")})
    score = jax.jit(make_eval_step(config)).lower(state.params, batch | places).compile()
    for index in range(2):
      state, metrics = step(state, batch, jax.random.key(index))
      losses.append(float(metrics["loss"]))
    losses.append(float(score(state.params, batch | places)["nats"].sum()))
  return {
    "losses": losses,
    "temp_bytes": step.memory_analysis().temp_size_in_bytes,
    "largest_exchange": max(map(_largest_exchange, (step.as_text(), score.as_text()))),
  }


def _largest_exchange(program: str) -> int:
  arrays = [dims for shape in _COLLECTIVE.findall(program) for dims in re.findall(r"\w+\[([\d,]*)\]", shape)]
  return max((int(np.prod([int(size) for size in dims.split(",") if size])) for dims in arrays), default=0)


@pytest.fixture(scope="module")
def measured(eight_devices):
  """{mesh: result of `measure`}."""
  every_axis = {"mesh__data": 1, "mesh__fsdp": 2, "mesh__tensor": 2, "mesh__context": 2, "train__microbatches": 2}
  return {
    "one": eight_devices(measure, "chunked", 1),
    "context": eight_devices(measure, "chunked", 8, mesh__data=1, mesh__context=8),
    "convolved, one": eight_devices(measure, "chunked", 1, model__conv_taps=2),
    "convolved": eight_devices(measure, "streamed", 8, model__conv_taps=2, **every_axis),
    "packed, one": eight_devices(measure, "reference", 1, model__conv_taps=2, data__packing=4),
    "packed": eight_devices(measure, "streamed", 8, model__conv_taps=2, data__packing=4, **every_axis),
  }


def test_training_and_evaluation_equal_those_of_one_device(measured):
  np.testing.assert_allclose(measured["context"]["losses"], measured["one"]["losses"], rtol=1e-5)


def test_keys_mixed_across_the_borders_of_devices_equal_those_of_one_device(measured):
  """On a mesh of all axes, with microbatches."""
  np.testing.assert_allclose(measured["convolved"]["losses"], measured["convolved, one"]["losses"], rtol=1e-5)


def test_packed_documents_across_devices_equal_those_of_one_device(measured):
  np.testing.assert_allclose(measured["packed"]["losses"], measured["packed, one"]["losses"], rtol=1e-5)
  assert abs(measured["packed"]["losses"][-1] / measured["convolved"]["losses"][-1] - 1) > 1e-4, "nothing is hidden"


@pytest.mark.parametrize("mesh", ["context", "convolved", "packed"])
def test_nothing_as_long_as_the_context_is_exchanged(mesh, measured):
  largest = measured[mesh]["largest_exchange"]
  assert 0 < largest < CONTEXT / 8, f"devices exchange an array of {largest} elements"


def test_each_device_keeps_its_part_of_keys_and_values(measured):
  assert measured["context"]["temp_bytes"] < measured["one"]["temp_bytes"] / 6
