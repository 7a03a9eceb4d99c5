"""The device mesh: axes data, fsdp, tensor and context."""

import math

import jax
from jax.sharding import AxisType, Mesh

from perceiver_ar_jax.config import InputError, MeshConfig

AXES = ("data", "fsdp", "tensor", "context")


def make_mesh(config: MeshConfig, devices=None) -> Mesh:
  """A mesh over `devices` (default: all), with an axis of -1 taking what the others leave.

  Raises:
    InputError: the sizes do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  sizes = [getattr(config, axis) for axis in AXES]
  fixed = math.prod(size for size in sizes if size != -1)
  if -1 in sizes and len(devices) % fixed == 0:
    sizes[sizes.index(-1)] = len(devices) // fixed
  shape = dict(zip(AXES, sizes))
  if -1 in sizes or math.prod(sizes) != len(devices):
    raise InputError(
      f"The mesh {shape} needs a number of devices that its sizes multiply to, but there are {len(devices)}:"
      " change --config.mesh.data, fsdp, tensor or context (one of them may be -1, for the rest)."
    )
  return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def check_batch(batch_size: int, field: str, mesh: Mesh) -> None:
  """Raises InputError unless the rows of a batch divide over the data and fsdp axes, and over the hosts."""
  parts = math.lcm(mesh.shape["data"] * mesh.shape["fsdp"], jax.process_count())
  if batch_size % parts:
    raise InputError(
      f"{field}={batch_size} does not divide over the {parts} parts into which this mesh"
      f" ({', '.join(f'{axis} {size}' for axis, size in mesh.shape.items())}) splits a batch: make it a multiple of"
      f" {parts}, or give the mesh fewer data and fsdp devices."
    )
