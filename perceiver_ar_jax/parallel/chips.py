"""TPU chips and the slices that they form: peak FLOP/s, usable memory, names of topologies. Needs no chip."""

import math
import re
from typing import NamedTuple

from perceiver_ar_jax.config import nearest, require


class Chip(NamedTuple):
  """One chip, which a program sees as one device."""

  peak_flops: float  # bfloat16 FLOP/s of its matrix units
  hbm_bytes: int  # available to a program, which is less than what is built in
  dims: int  # of the torus or grid in which a slice's chips are linked
  cores_per_chip: int = 1  # by which the usual names of slices count: v4-128 has 64 chips


# Peak FLOP/s: the pages of each version in Google Cloud's TPU documentation. Available memory: what libtpu 0.0.52
# reports when it refuses a program ("exceeds available HBM"); built in are 32, 16, 95 and 32 GB.
CHIPS = {
  "v4": Chip(peak_flops=275e12, hbm_bytes=int(30.75 * 2**30), dims=3, cores_per_chip=2),
  "v5e": Chip(peak_flops=197e12, hbm_bytes=int(15.75 * 2**30), dims=2),
  "v5p": Chip(peak_flops=459e12, hbm_bytes=int(95.73 * 2**30), dims=3, cores_per_chip=2),
  "v6e": Chip(peak_flops=918e12, hbm_bytes=int(31.24 * 2**30), dims=2),
}
_TPU_KINDS = {"TPU v6 lite": "v6e", "TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v4": "v4"}
_PEAK_FLOPS = {kind: CHIPS[version].peak_flops for kind, version in _TPU_KINDS.items()}
_PEAK_FLOPS |= {"NVIDIA H100": 989e12, "NVIDIA A100": 312e12}  # NVIDIA's data sheets, without sparsity
"""By the beginning of Device.device_kind, the longer ones first."""


def peak_flops(device_kind: str) -> float | None:
  """Returns the peak bfloat16 FLOP/s of a jax.Device by its device_kind; None for unknown ones, such as CPUs."""
  return next((flops for start, flops in _PEAK_FLOPS.items() if device_kind.startswith(start)), None)


# Shapes of the slices that Cloud TPU offers, by dimensions, for names that do not spell the shape.
_SHAPES = {
  2: [(1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16)],
  3: [(2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4), (4, 4, 8), (4, 8, 8), (8, 8, 8), (8, 8, 16), (8, 16, 16)],
}


class Topology(NamedTuple):
  """Slices of TPU chips."""

  version: str  # a key of CHIPS
  shape: tuple[int, ...]  # chips along each dimension of a slice
  slices: int = 1

  @property
  def chip(self) -> Chip:
    return CHIPS[self.version]

  @property
  def num_chips(self) -> int:
    return self.slices * math.prod(self.shape)

  @property
  def slice_name(self) -> str:
    return f"{self.version}:{'x'.join(map(str, self.shape))}"

  def __str__(self) -> str:
    return f"{self.slices}x{self.slice_name}" if self.slices > 1 else self.slice_name


def parse_topology(name: str) -> Topology:
  """Returns the topology with a name such as "v5e:16x16", "v5litepod-256" or "v4-128" (64 chips: cores are counted).

  "2xv5e:16x16" are two slices joined by a network. Raises InputError for an unknown version or shape.
  """
  match = re.fullmatch(r"(?:([1-9]\d*)x(?=[a-z]))?([a-z]\w*?)(?::(\d+(?:x\d+)*)|-(\d+))", name.strip().lower())
  slices, version, spelled, cores = match.groups() if match else (None, name, None, None)
  version = "v5e" if version == "v5litepod" else version
  fix = "give version and shape, such as v5e:16x16 or v4:4x4x8, or the usual name of a slice, such as v4-128"
  is_slice = match is not None and version in CHIPS
  require(is_slice, f"plan.topology={name!r} is not a slice of TPUs: {fix}. {nearest(version, CHIPS)}")
  chip = CHIPS[version]
  usual = {f"{version}-{math.prod(shape) * chip.cores_per_chip}": shape for shape in _SHAPES[chip.dims]}
  shape = tuple(map(int, spelled.split("x"))) if spelled else usual.get(f"{version}-{cores}", ())
  example = f"{version}:{'16x16' if chip.dims == 2 else '4x4x8'}, {chip.dims} numbers, or one of {', '.join(usual)}"
  is_size = len(shape) == chip.dims and min(shape) > 0
  require(is_size, f"plan.topology={name!r} is not a size of {version}: give {example}.")
  return Topology(version, shape, int(slices or 1))
