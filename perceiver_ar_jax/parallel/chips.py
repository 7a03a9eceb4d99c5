"""Accelerator chips and the slices of TPUs or nodes of GPUs that they form.

Owns peak FLOP/s, usable memory and the names of topologies. Nothing here needs a chip or its compiler.
"""

import dataclasses
import math
import re

from perceiver_ar_jax.config import InputError, nearest


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
  """One chip, which a program sees as one device."""

  peak_flops: float
  """bfloat16 FLOP/s of its matrix units, without sparsity."""
  hbm_bytes: int
  """Memory available to a program, which is less than what is built in."""
  dims: int
  """Dimensions of the torus or grid in which a slice's chips are linked; 0 for GPUs."""
  cores_per_chip: int = 1
  """Cores by which the usual names of slices count: v4-128 has 64 chips."""
  target: str = ""
  """GPUs: the device description that XLA compiles for."""


# Peak FLOP/s: the pages of each version in Google Cloud's TPU documentation. Available memory: what libtpu 0.0.52
# reports when it refuses a program ("exceeds available HBM"); built in are 32, 16, 95 and 32 GB.
CHIPS = {
  "v4": Chip(peak_flops=275e12, hbm_bytes=int(30.75 * 2**30), dims=3, cores_per_chip=2),
  "v5e": Chip(peak_flops=197e12, hbm_bytes=int(15.75 * 2**30), dims=2),
  "v5p": Chip(peak_flops=459e12, hbm_bytes=int(95.73 * 2**30), dims=3, cores_per_chip=2),
  "v6e": Chip(peak_flops=918e12, hbm_bytes=int(31.24 * 2**30), dims=2),
}

# Peak FLOP/s and the device description: NVIDIA's data sheets of the SXM modules with 80 GB. A program may use three
# quarters of the memory, JAX's default.
_GPU_TARGET = """platform_name: "CUDA" device_description_str: "{name}" dnn_version_info {{ major: 9 minor: 1 }}
gpu_device_info {{ threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
shared_memory_per_core: {shared} shared_memory_per_block_optin: {optin} threads_per_core_limit: 2048 core_count: {cores}
fpus_per_core: {fpus} block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
memory_bandwidth: {bandwidth} l2_cache_size: {cache} clock_rate_ghz: {clock} device_memory_size: {memory}
cuda_compute_capability {{ major: {major} }} registers_per_core_limit: 65536 registers_per_block_limit: 65536 }}"""


def _gpu(peak_flops: float, memory: int, **description) -> Chip:
  target = _GPU_TARGET.format(memory=memory, **description)
  return Chip(peak_flops=peak_flops, hbm_bytes=memory * 3 // 4, dims=0, target=target)


_H100 = {"name": "NVIDIA H100 80GB HBM3", "shared": 233_472, "optin": 232_448, "cores": 132, "fpus": 128, "clock": 1.98}
_H100 |= {"bandwidth": 3_352_320_000_000, "cache": 52_428_800, "major": 9}
_A100 = {"name": "NVIDIA A100-SXM4-80GB", "shared": 167_936, "optin": 166_912, "cores": 108, "fpus": 64, "clock": 1.41}
_A100 |= {"bandwidth": 2_039_000_000_000, "cache": 41_943_040, "major": 8}
CHIPS |= {"h100": _gpu(989e12, 84_942_979_072, **_H100), "a100": _gpu(312e12, 84_974_239_744, **_A100)}

# Beginnings of Device.device_kind, the longer ones first.
_DEVICE_KINDS = {"TPU v6 lite": "v6e", "TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v4": "v4"}
_DEVICE_KINDS |= {"NVIDIA H100": "h100", "NVIDIA A100": "a100"}


def chip_of_device(device_kind: str) -> Chip | None:
  """Returns the chip of a jax.Device by its device_kind; None for unknown ones, such as CPUs."""
  return next((CHIPS[name] for start, name in _DEVICE_KINDS.items() if device_kind.startswith(start)), None)


# Shapes of the slices that Cloud TPU offers, by dimensions, for names that do not spell the shape.
_SHAPES = {
  0: [],
  2: [(1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16)],
  3: [(2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4), (4, 4, 8), (4, 8, 8), (8, 8, 8), (8, 8, 16), (8, 16, 16)],
}


@dataclasses.dataclass(frozen=True)
class Topology:
  """Slices of TPU chips, or nodes of GPUs."""

  version: str
  """A key of CHIPS."""
  shape: tuple[int, ...]
  """Chips along each dimension of a slice; for GPUs, the number of nodes and of GPUs per node."""
  slices: int = 1

  @property
  def chip(self) -> Chip:
    return CHIPS[self.version]

  @property
  def num_chips(self) -> int:
    return self.slices * math.prod(self.shape)

  @property
  def slice_name(self) -> str:
    """The name of a single slice, such as v5e:16x16."""
    return f"{self.version}:{'x'.join(map(str, self.shape))}"

  def __str__(self) -> str:
    return f"{self.slices}x{self.slice_name}" if self.slices > 1 else self.slice_name


def parse_topology(name: str) -> Topology:
  """Returns the topology with a name such as "v5e:16x16", "v5litepod-256" or "v4-128" (64 chips: cores are counted).

  "2xv5e:16x16" are two slices joined by a network, "h100:8" is a node of eight GPUs, "h100:4x8" are four such nodes.

  Raises:
    InputError: the version is unknown, or no slice of it has this shape.
  """
  match = re.fullmatch(r"(?:([1-9]\d*)x(?=[a-z]))?([a-z]\w*?)(?::(\d+(?:x\d+)*)|-(\d+))", name.strip().lower())
  slices, version, spelled, cores = match.groups() if match else (None, name, None, None)
  version = {"v5litepod": "v5e", "v5lite": "v5e", "v6lite": "v6e"}.get(version, version)
  if match is None or version not in CHIPS:
    raise InputError(
      f"plan.topology={name!r} is not a slice of TPUs or nodes of GPUs: give version and shape, such as v5e:16x16,"
      " v4:4x4x8 or h100:4x8 (4 nodes of 8), or the usual name of a slice, such as v4-128."
      f" {nearest(version, CHIPS)}"
    )
  chip = CHIPS[version]
  usual = {f"{version}-{math.prod(shape) * chip.cores_per_chip}": shape for shape in _SHAPES[chip.dims]}
  shape = tuple(map(int, spelled.split("x"))) if spelled else usual.get(f"{version}-{cores}", ())
  if chip.dims:
    # Four chips to a host, in a square; a slice has whole hosts.
    whole_hosts = math.prod(shape) == 1 or all(size % 2 == 0 for size in shape[:2])
    valid = len(shape) == chip.dims and min(shape) > 0 and whole_hosts
    required = (
      f"{version}:{'16x16' if chip.dims == 2 else '4x4x8'}, {chip.dims} numbers, of which the first two are even"
    )
    required += f" since a host has 2x2 chips, or one of {', '.join(usual)}"
  else:
    valid = len(shape) in (1, 2) and min(shape) > 0 and not slices
    required = f"the number of GPUs, {version}:8, or of nodes and of GPUs per node, {version}:4x8"
    shape = (1, *shape)[-2:]
  if not valid:
    raise InputError(f"plan.topology={name!r} is not a size of {version}: give {required}.")
  return Topology(version, shape, int(slices or 1))
