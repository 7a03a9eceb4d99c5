"""Chips and what is made of them, slices of TPUs and nodes of GPUs: what each can do, and what their names mean.

Nothing here needs a chip or its compiler.
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
  """HBM that a program may use, less than what is built in."""
  hbm_bandwidth: float
  """Bytes/s between HBM and the chip."""
  ici_bandwidth: float
  """Bytes/s that it sends to its neighbours, all links together, one way."""
  dims: int
  """Of the torus or grid in which a slice's chips are linked; GPUs have 0."""
  cores_per_chip: int = 1
  """By which the usual names of slices count: v4-128 has 64 chips."""
  network_bandwidth: float = 0.0
  """GPUs: bytes/s that each sends to other nodes."""
  target: str = ""
  """GPUs: the device as XLA's compiler wants it described."""


# Peak FLOP/s, HBM bandwidth and interconnect (in Gbit/s there: 2400, 1600, 4800, 3584): the pages on each version in
# Google Cloud's TPU documentation. HBM that a program may use: what libtpu 0.0.52 says when it
# refuses one ("exceeds available HBM"); built in are 32, 16, 95 and 32 GB.
CHIPS = {
  "v4": Chip(
    peak_flops=275e12,
    hbm_bytes=int(30.75 * 2**30),
    hbm_bandwidth=1228e9,
    ici_bandwidth=300e9,
    dims=3,
    cores_per_chip=2,
  ),
  "v5e": Chip(
    peak_flops=197e12,
    hbm_bytes=int(15.75 * 2**30),
    hbm_bandwidth=819e9,
    ici_bandwidth=200e9,
    dims=2,
  ),
  "v5p": Chip(
    peak_flops=459e12,
    hbm_bytes=int(95.73 * 2**30),
    hbm_bandwidth=2765e9,
    ici_bandwidth=600e9,
    dims=3,
    cores_per_chip=2,
  ),
  "v6e": Chip(
    peak_flops=918e12,
    hbm_bytes=int(31.24 * 2**30),
    hbm_bandwidth=1638e9,
    ici_bandwidth=448e9,
    dims=2,
  ),
}

# FLOP/s, HBM and NVLink: NVIDIA's data sheets of the SXM modules with 80 GB; network: one port of 400 or 200 Gbit/s for
# each GPU, as in DGX systems. A program may use three quarters of the memory, JAX's default.
_GPU_TARGET = """platform_name: "CUDA" device_description_str: "{name}" dnn_version_info {{ major: 9 minor: 1 }}
gpu_device_info {{ threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
shared_memory_per_core: {shared} shared_memory_per_block_optin: {optin} threads_per_core_limit: 2048 core_count: {cores}
fpus_per_core: {fpus} block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
memory_bandwidth: {bandwidth} l2_cache_size: {cache} clock_rate_ghz: {clock} device_memory_size: {memory}
cuda_compute_capability {{ major: {major} }} registers_per_core_limit: 65536 registers_per_block_limit: 65536 }}"""
CHIPS |= {
  "h100": Chip(
    peak_flops=989e12,
    hbm_bytes=84_942_979_072 * 3 // 4,
    hbm_bandwidth=3352e9,
    ici_bandwidth=450e9,
    dims=0,
    network_bandwidth=50e9,
    target=_GPU_TARGET.format(
      name="NVIDIA H100 80GB HBM3",
      shared=233_472,
      optin=232_448,
      cores=132,
      fpus=128,
      bandwidth=3_352_320_000_000,
      cache=52_428_800,
      clock=1.98,
      memory=84_942_979_072,
      major=9,
    ),
  ),
  "a100": Chip(
    peak_flops=312e12,
    hbm_bytes=84_974_239_744 * 3 // 4,
    hbm_bandwidth=2039e9,
    ici_bandwidth=300e9,
    dims=0,
    network_bandwidth=25e9,
    target=_GPU_TARGET.format(
      name="NVIDIA A100-SXM4-80GB",
      shared=167_936,
      optin=166_912,
      cores=108,
      fpus=64,
      bandwidth=2_039_000_000_000,
      cache=41_943_040,
      clock=1.41,
      memory=84_974_239_744,
      major=8,
    ),
  ),
}

# What JAX calls the devices: beginnings of Device.device_kind, the longer ones first.
_DEVICE_KINDS = {
  "TPU v6 lite": "v6e",
  "TPU v5 lite": "v5e",
  "TPU v5": "v5p",
  "TPU v4": "v4",
  "NVIDIA H100": "h100",
  "NVIDIA A100": "a100",
}


def of_device(device_kind: str) -> Chip | None:
  """The chip that a jax.Device of this kind is; None where its figures are not known, as of CPUs."""
  return next((CHIPS[name] for start, name in _DEVICE_KINDS.items() if device_kind.startswith(start)), None)


# The shape of a slice of so many chips where its name does not say it, as Cloud TPU makes it.
_SHAPES = {
  2: {
    chips: shape
    for shape in ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
    for chips in [math.prod(shape)]
  },
  3: {
    chips: shape
    for shape in (
      (2, 2, 1),
      (2, 2, 2),
      (2, 2, 4),
      (2, 4, 4),
      (4, 4, 4),
      (4, 4, 8),
      (4, 8, 8),
      (8, 8, 8),
      (8, 8, 16),
      (8, 16, 16),
    )
    for chips in [math.prod(shape)]
  },
}


@dataclasses.dataclass(frozen=True)
class Topology:
  """Slices of TPU chips, or nodes of GPUs."""

  version: str
  """A key of CHIPS."""
  shape: tuple[int, ...]
  """Chips along each dimension of a slice; of GPUs, nodes and GPUs in each."""
  slices: int = 1

  @property
  def chip(self) -> Chip:
    return CHIPS[self.version]

  @property
  def num_chips(self) -> int:
    return self.slices * math.prod(self.shape)

  @property
  def sent_bandwidth(self) -> float:
    """Bytes/s that each chip sends to others at best; between nodes of GPUs, the network's."""
    return self.chip.network_bandwidth if not self.chip.dims and self.shape[0] > 1 else self.chip.ici_bandwidth

  @property
  def shape_name(self) -> str:
    """One slice's."""
    return f"{self.version}:{'x'.join(map(str, self.shape))}"

  def __str__(self) -> str:
    return f"{self.slices}x{self.shape_name}" if self.slices > 1 else self.shape_name


def parse(name: str) -> Topology:
  """The slice of a name, "v5e:16x16" or "v5litepod-256"; "v4-128" counts cores, two a chip, and is v4:4x4x4.

  "2xv5e:16x16" are two of them, which a network joins. "h100:8" is a node of eight GPUs, "h100:4x8" four of them.

  Raises:
    InputError: an unknown version, or a shape that no slice of it has.
  """
  several = re.fullmatch(r"([1-9]\d*)x([a-z].*)", name.strip().lower())
  if several:
    one = parse(several[2])
    if not one.chip.dims:
      raise InputError(f"plan.topology={name!r}: write how many nodes of how many GPUs, such as {one.version}:4x8.")
    return dataclasses.replace(one, slices=int(several[1]))
  match = re.fullmatch(r"(\w+?)(?::(\d+(?:x\d+)*)|-(\d+))", name.strip().lower())
  version = match and {"v5litepod": "v5e", "v5lite": "v5e", "v6lite": "v6e"}.get(match[1], match[1])
  if match is None or version not in CHIPS:
    raise InputError(
      f"plan.topology={name!r} names no slice of TPUs or nodes of GPUs: write version and shape, such as v5e:16x16,"
      f" v4:4x4x8 or h100:4x8 (4 nodes of 8), or a slice's usual name, such as v4-128."
      f" {nearest(version or name, CHIPS)}"
    )
  chip = CHIPS[version]
  if not chip.dims:
    shape = tuple(map(int, match[2].split("x"))) if match[2] else ()
    if len(shape) not in (1, 2) or min(shape) < 1:
      raise InputError(
        f"plan.topology={name!r}: write how many GPUs, {version}:8, or how many nodes of how many, {version}:4x8."
      )
    return Topology(version, (1, *shape)[-2:])
  if match[3]:
    count, rest = divmod(int(match[3]), chip.cores_per_chip)
    if rest or count not in _SHAPES[chip.dims]:
      usual = ", ".join(f"{version}-{chips * chip.cores_per_chip}" for chips in sorted(_SHAPES[chip.dims]))
      raise InputError(
        f"plan.topology={name!r} is no usual size. Known: {usual}; or give a shape, {_example(version)}."
      )
    return Topology(version, _SHAPES[chip.dims][count])
  shape = tuple(map(int, match[2].split("x")))
  single = math.prod(shape) == 1
  # Four chips to a host, in a square; a slice has whole hosts.
  if len(shape) != chip.dims or not (single or (shape[0] % 2 == 0 and shape[1] % 2 == 0 and min(shape) > 0)):
    raise InputError(
      f"plan.topology={name!r} is no shape of a {version} slice: it needs {chip.dims} numbers, of which the first two"
      f" are even since a host has 2x2 chips, such as {_example(version)}."
    )
  return Topology(version, shape)


def _example(version: str) -> str:
  return f"{version}:{'16x16' if CHIPS[version].dims == 2 else '4x4x8'}"
