"""The device mesh: axes data, fsdp, tensor and context."""

import contextlib
import ctypes
import math
import os
from collections.abc import Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from perceiver_ar_jax.config import MESH_AXES as AXES
from perceiver_ar_jax.config import Config, MeshConfig, require

_MAX_CPU_DEVICES = 8
_MAX_COPIES_BYTES = 2**30
_MALLOC = {-4: 0, -1: 2**30, -2: 2**28}  # glibc's M_MMAP_MAX, M_TRIM_THRESHOLD and M_TOP_PAD, in bytes


def make_mesh(config: MeshConfig, devices=None) -> Mesh:
  """A mesh over `devices` (default: all); an axis of -1 gets all devices that the other axes leave.

  Only the axis data spans several slices, which a slow network connects. Raises InputError if the sizes do not fit the
  devices or their slices.
  """
  devices = jax.devices() if devices is None else devices
  sizes = [getattr(config, axis) for axis in AXES]
  fixed = math.prod(size for size in sizes if size != -1)
  if -1 in sizes and len(devices) % fixed == 0:
    sizes[sizes.index(-1)] = len(devices) // fixed
  shape, count = dict(zip(AXES, sizes)), len(devices)
  mistake = f"The product of the mesh sizes {shape} must be the number of devices, {count} (-1: all that remain)"
  require(math.prod(sizes) == count, f"{mistake}: change mesh.data, fsdp, tensor or context.")
  axis_types = (AxisType.Auto,) * len(AXES)
  slices = len({getattr(device, "slice_index", 0) for device in devices})
  if slices == 1:
    return jax.make_mesh(tuple(sizes), AXES, axis_types=axis_types, devices=devices)
  mistake = f"mesh.data={sizes[0]}, the only axis that spans slices, must be a multiple of {slices}"
  require(sizes[0] % slices == 0, f"The {count} devices form {slices} slices: {mistake}.")
  grid = mesh_utils.create_hybrid_device_mesh([sizes[0] // slices, *sizes[1:]], [slices, 1, 1, 1], devices)
  return Mesh(grid, AXES, axis_types=axis_types)


def use_cpu_cores(config: Config, batch_sizes: Sequence[int]) -> None:
  """Splits batches over as many virtual CPU devices as there are cores, up to 8, that divide all `batch_sizes`.

  One device leaves cores idle: XLA computes small operations on one core. Settings of the mesh and of JAX take
  precedence. Call it before any use of a device; accelerators are not affected.
  """
  if os.environ.get("JAX_NUM_CPU_DEVICES") or "host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
    return
  count = 1
  if config.mesh == MeshConfig():
    # Every device has the weights, their gradients and the optimizer's state.
    layers, width, vocab = config.model.num_layers, config.model.latent_width, config.model.vocab_size
    copy_bytes = 16 * ((12 * layers + 12) * width**2 + 2 * vocab * width)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    most = min(cores, _MAX_CPU_DEVICES, max(_MAX_COPIES_BYTES // copy_bytes, 1))
    count = max(count for count in range(1, most + 1) if math.gcd(*batch_sizes) % count == 0)
  with contextlib.suppress(RuntimeError):  # devices are in use already: by another run in this process
    jax.config.update("jax_num_cpu_devices", count)


def keep_host_memory() -> None:
  """Makes glibc's malloc reuse the buffers of a step in the next one; other C libraries are left as they are.

  By default glibc returns large buffers to the system, which must then fault in and zero every page in each step:
  31,000 page faults and up to a fifth of the time of a small model's step.
  """
  with contextlib.suppress(AttributeError, TypeError):
    libc = ctypes.CDLL(None)
    for parameter, value in _MALLOC.items():
      libc.mallopt(parameter, value)


def check_batch(batch_size: int, field: str, mesh: Mesh) -> None:
  """Raises InputError unless the size of the data and fsdp axes divides the rows of a batch."""
  size = mesh.shape["data"] * mesh.shape["fsdp"]
  require(batch_size % size == 0, f"{field}={batch_size} is not divisible by {size}, mesh.data x mesh.fsdp.")


def rows_of_processes(mesh: Mesh, batch_size: int) -> list[list[int]]:
  """The rows of a batch on the devices of each process; the same where these differ only along tensor or context."""
  parts = mesh.devices.reshape(mesh.shape["data"] * mesh.shape["fsdp"], -1)
  size = batch_size // len(parts)
  rows = [set() for _ in range(1 + max(device.process_index for device in mesh.devices.flat))]
  for index, devices in enumerate(parts):
    for device in devices:
      rows[device.process_index].update(range(index * size, (index + 1) * size))
  return [sorted(numbers) for numbers in rows]
