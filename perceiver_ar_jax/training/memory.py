"""Checks that the train step fits into the memory of its devices, before weights are created."""

import time

import jax
import psutil
from jax.sharding import Mesh

from perceiver_ar_jax.config import Config, InputError, require
from perceiver_ar_jax.parallel import distributed, sharding
from perceiver_ar_jax.training.step import Batch, Optimizer, TrainState, lower

LESS_MEMORY = (
  "Lower train.batch_size or raise train.microbatches, set model.remat=full or model.attention=streamed, shard the"
  " weights over more devices with mesh.fsdp, or make the model smaller."
)


def compile_step(
  config: Config, optimizer: Optimizer, abstract: TrainState, batch_spec: Batch, mesh: Mesh
) -> jax.stages.Compiled:
  """Returns the compiled update for these shapes, with the state donated; InputError if it exceeds the memory."""
  weights = sharding.bytes_per_device(abstract) + sharding.bytes_per_device(abstract.params)
  _check({"weights, gradients and optimizer state": weights})  # first, since compiling for huge shapes may crash
  start = time.monotonic()
  try:
    compiled = lower(config, optimizer, abstract, batch_spec, mesh).compile()
  except jax.errors.JaxRuntimeError as error:  # the TPU's compiler refuses what does not fit
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    raise InputError(f"The train step exceeds the devices' memory. {LESS_MEMORY}") from error
  distributed.log(f"Compiled the train step in {time.monotonic() - start:.1f} s.")
  arguments, temporary = compiled.memory_analysis().argument_size_in_bytes, bytes_beside_arguments(compiled)
  sizes = _check({"weights, optimizer state and batch": arguments, "temporary": temporary})
  distributed.log(f"Memory on each device: {sizes}.")
  return compiled


def bytes_beside_arguments(compiled: jax.stages.Compiled) -> int:
  """Returns the bytes that a program needs on each device besides its arguments: temporary memory and new outputs."""
  memory = compiled.memory_analysis()
  return memory.temp_size_in_bytes + max(memory.output_size_in_bytes - memory.alias_size_in_bytes, 0)


def _check(parts: dict[str, int]) -> str:
  """Returns the bytes of the parts on each device as a text; raises InputError if they exceed its memory."""
  stats = jax.local_devices()[0].memory_stats() or {}
  # CPU devices share the available memory of the machine.
  available = stats.get("bytes_limit") or psutil.virtual_memory().available // jax.local_device_count()
  sizes = ", ".join(f"{name} {format_bytes(size)}" for name, size in {**parts, "available": available}.items())
  is_small = sum(parts.values()) <= available
  require(is_small, f"The train step exceeds the memory on each device ({sizes}). {LESS_MEMORY}")
  return sizes


def format_bytes(num_bytes: int) -> str:
  """Returns a size such as 1.50 GiB."""
  return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**29 else f"{num_bytes / 2**20:.1f} MiB"
