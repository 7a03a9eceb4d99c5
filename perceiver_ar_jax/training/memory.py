"""Checks that a run fits into the memory of its devices, before weights are created.

XLA's memory analysis of a compiled program is exact, but needs a compilation, which may crash for shapes far beyond the
memory of any machine. So a lower limit is checked first.
"""

import contextlib
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import optax
import psutil
from jax.sharding import Mesh

from perceiver_ar_jax.config import Config, InputError
from perceiver_ar_jax.parallel import distributed, sharding
from perceiver_ar_jax.training import step as step_lib
from perceiver_ar_jax.training.state import TrainState

LESS_MEMORY = (
  "Lower train.batch_size or raise train.microbatches (temporary memory), set model.remat=full (activations) or"
  " model.attention=streamed (a long context), shard the weights over more devices with mesh.fsdp, or make"
  " the model smaller (latent_width, num_layers, num_latents)."
)
_FEWER_SAMPLES = (
  "Lower eval.num_samples, train without samples (--config.eval.num_samples=0) and sample with --mode=sample"
  " afterwards, or make the model smaller."
)


def compile_step(
  config: Config,
  optimizer: optax.GradientTransformation,
  abstract: TrainState,
  batch_spec: dict[str, jax.ShapeDtypeStruct],
  mesh: Mesh,
) -> jax.stages.Compiled:
  """Returns the compiled update for these shapes, with the state donated, and reports its memory.

  Raises:
    InputError: the update exceeds the devices' memory.
  """
  # The lower limit: weights, optimizer state, gradients and the input of each layer.
  model, rows = config.model, config.train.batch_size // config.train.microbatches // mesh.size
  latents = rows * model.num_latents * model.latent_width * jnp.dtype(model.dtype).itemsize
  minimum = sharding.bytes_per_device(abstract) + sharding.bytes_per_device(abstract.params)
  _check("The train step needs at least", minimum + model.num_layers * latents, LESS_MEMORY)
  shardings = sharding.batch_shardings(mesh, {name: spec.shape for name, spec in batch_spec.items()})
  batch = {
    name: jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=shardings[name]) for name, spec in batch_spec.items()
  }
  with _compiling("the train step", LESS_MEMORY):
    compiled = step_lib.lower(config, optimizer, abstract, batch, mesh).compile()
  memory = compiled.memory_analysis()
  distributed.log(
    f"Memory on each of {mesh.size} devices: weights, optimizer state and batch {_size(memory.argument_size_in_bytes)},"
    f" temporary {_size(memory.temp_size_in_bytes)}, available {_size(_bytes_per_device())}."
  )
  _check("The train step needs", memory.argument_size_in_bytes + bytes_beside_arguments(compiled), LESS_MEMORY)
  return compiled


def check_samples(num_samples: int, abstract: TrainState, compile_sampler: Callable[[dict], int]) -> None:
  """Checks that drawing samples fits in memory together with the training state, and reports its memory.

  Args:
    num_samples: the resolved `eval.num_samples`.
    abstract: shapes and shardings of the training state.
    compile_sampler: from shapes of the weights to bytes on each device in addition to the weights.

  Raises:
    InputError: it exceeds the devices' memory.
  """
  with _compiling("the sampler", _FEWER_SAMPLES):
    sampler_bytes = compile_sampler(abstract.params)
  state_bytes = sharding.bytes_per_device(abstract)
  distributed.log(
    f"Memory on each device: weights and optimizer state {_size(state_bytes)}, {num_samples} samples"
    f" {_size(sampler_bytes)}, available {_size(_bytes_per_device())}."
  )
  program = f"Training that draws {num_samples} samples (eval.num_samples) needs"
  _check(program, state_bytes + sampler_bytes, _FEWER_SAMPLES)


def bytes_beside_arguments(compiled: jax.stages.Compiled) -> int:
  """Returns the bytes that a program needs on each device besides its arguments: temporary memory and new outputs."""
  memory = compiled.memory_analysis()
  return memory.temp_size_in_bytes + max(memory.output_size_in_bytes - memory.alias_size_in_bytes, 0)


def _check(program: str, needed: int, fix: str) -> None:
  available = _bytes_per_device()
  if needed > available:
    raise InputError(f"{program} {_size(needed)} on each device, and each has {_size(available)}. {fix}")


@contextlib.contextmanager
def _compiling(program: str, fix: str) -> Iterator[None]:
  """A context that compiles; an InputError replaces the TPU compiler's refusal of a program that is too large."""
  start = time.monotonic()
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    raise InputError(f"{program.capitalize()} exceeds the devices' memory. {fix}") from error
  distributed.log(f"Compiled {program} in {time.monotonic() - start:.1f} s.")


def _size(num_bytes: int) -> str:
  return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"


def _bytes_per_device() -> int:
  """Returns the bytes that a local device may use; CPU devices share the available memory of the machine."""
  stats = jax.local_devices()[0].memory_stats() or {}
  return stats.get("bytes_limit") or psutil.virtual_memory().available // jax.local_device_count()
