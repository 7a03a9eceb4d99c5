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


# Peak FLOP/s: the pages of each version in Google Cloud's TPU documentation. Available memory: what libtpu 0.0.52
# reports when it refuses a program ("exceeds available HBM"); built in are 32, 16, 95 and 32 GB.
CHIPS = {
  "v4": Chip(peak_flops=275e12, hbm_bytes=int(30.75 * 2**30), dims=3),
  "v5e": Chip(peak_flops=197e12, hbm_bytes=int(15.75 * 2**30), dims=2),
  "v5p": Chip(peak_flops=459e12, hbm_bytes=int(95.73 * 2**30), dims=3),
  "v6e": Chip(peak_flops=918e12, hbm_bytes=int(31.24 * 2**30), dims=2),
}
_TPU_KINDS = {"TPU v6 lite": "v6e", "TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v4": "v4"}
_PEAK_FLOPS = {kind: CHIPS[version].peak_flops for kind, version in _TPU_KINDS.items()}
_PEAK_FLOPS |= {"NVIDIA H100": 989e12, "NVIDIA A100": 312e12}  # NVIDIA's data sheets, without sparsity
"""By the beginning of Device.device_kind, the longer ones first."""


def peak_flops(device_kind: str) -> float | None:
  """Returns the peak bfloat16 FLOP/s of a jax.Device by its device_kind; None for unknown ones, such as CPUs."""
  return next((flops for start, flops in _PEAK_FLOPS.items() if device_kind.startswith(start)), None)


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
  """Returns the topology of a name such as "v5e:16x16", or "2xv5e:16x16": two slices joined by a network.

  Raises InputError for an unknown version or shape.
  """
  match = re.fullmatch(r"(?:([1-9]\d*)x)?([a-z]\w*):(\d+(?:x\d+)*)", name.strip().lower())
  slices, version, sizes = match.groups() if match else (None, name, "")
  fix = f"give version and shape, such as v5e:16x16 or v4:4x4x8. {nearest(version, CHIPS)}"
  require(bool(match) and version in CHIPS, f"plan.topology={name!r} is not a slice of TPUs: {fix}")
  shape, dims = tuple(map(int, sizes.split("x"))), CHIPS[version].dims
  example = f"such as {version}:{'16x16' if dims == 2 else '4x4x8'}, {dims} numbers"
  require(len(shape) == dims and min(shape) > 0, f"plan.topology={name!r} is not a size of {version}, {example}.")
  return Topology(version, shape, int(slices or 1))
