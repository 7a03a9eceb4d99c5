"""Checks that a run fits into the memory of its devices, before weights are created.

XLA's memory analysis is exact, but needs a compilation, which may crash for huge shapes, so a lower limit comes first.
"""

import contextlib
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import psutil
from jax.sharding import Mesh

from perceiver_ar_jax.config import Config, InputError, require
from perceiver_ar_jax.parallel import distributed, sharding
from perceiver_ar_jax.training.step import Batch, Optimizer, TrainState, lower

LESS_MEMORY = (
  "Lower train.batch_size or raise train.microbatches, set model.remat=full or model.attention=streamed, shard the"
  " weights over more devices with mesh.fsdp, or make the model smaller."
)
_FEWER_SAMPLES = "Lower eval.num_samples (--config.eval.num_samples=0: no samples), or make the model smaller."


def compile_step(
  config: Config, optimizer: Optimizer, abstract: TrainState, batch_spec: Batch, mesh: Mesh
) -> jax.stages.Compiled:
  """Returns the compiled update for these shapes, with the state donated; InputError if it exceeds the memory."""
  model, rows = config.model, config.train.batch_size // config.train.microbatches // mesh.size
  inputs = model.num_layers * rows * model.num_latents * model.latent_width * jnp.dtype(model.dtype).itemsize
  weights = sharding.bytes_per_device(abstract) + sharding.bytes_per_device(abstract.params)
  lower_limit = {"weights, gradients and optimizer state": weights, "inputs of the layers": inputs}
  _check("The train step", lower_limit, LESS_MEMORY)
  with _compiling("the train step", LESS_MEMORY):
    compiled = lower(config, optimizer, abstract, batch_spec, mesh).compile()
  arguments, temporary = compiled.memory_analysis().argument_size_in_bytes, bytes_beside_arguments(compiled)
  parts = {"weights, optimizer state and batch": arguments, "temporary": temporary}
  distributed.log(_check("The train step", parts, LESS_MEMORY))
  return compiled


def check_samples(num_samples: int, abstract: TrainState, compile_sampler: Callable[[dict], int]) -> None:
  """Raises InputError if drawing samples exceeds the memory beside the state; see Sampler.bytes_per_device."""
  with _compiling("the sampler", _FEWER_SAMPLES):
    sampler_bytes = compile_sampler(abstract.params)
  parts = {"weights and optimizer state": sharding.bytes_per_device(abstract), f"{num_samples} samples": sampler_bytes}
  distributed.log(_check("Training that draws samples", parts, _FEWER_SAMPLES))


def bytes_beside_arguments(compiled: jax.stages.Compiled) -> int:
  """Returns the bytes that a program needs on each device besides its arguments: temporary memory and new outputs."""
  memory = compiled.memory_analysis()
  return memory.temp_size_in_bytes + max(memory.output_size_in_bytes - memory.alias_size_in_bytes, 0)


def _check(program: str, parts: dict[str, int], fix: str) -> str:
  """Returns the bytes of the parts on each device as a text; raises InputError if they exceed its memory."""
  stats = jax.local_devices()[0].memory_stats() or {}
  # CPU devices share the available memory of the machine.
  available = stats.get("bytes_limit") or psutil.virtual_memory().available // jax.local_device_count()
  sizes = ", ".join(f"{name} {format_bytes(size)}" for name, size in {**parts, "available": available}.items())
  require(sum(parts.values()) <= available, f"{program} exceeds the memory on each device ({sizes}). {fix}")
  return f"Memory on each device: {sizes}."


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


def format_bytes(num_bytes: int) -> str:
  """Returns a size such as 1.50 GiB."""
  return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**29 else f"{num_bytes / 2**20:.1f} MiB"
