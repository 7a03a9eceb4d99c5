"""TPU chips and the slices made of them: what each can do, and what the names of slices mean.

Nothing here needs a TPU or its compiler.
"""

import dataclasses
import math
import re

from perceiver_ar_jax.config import InputError, nearest


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
  """One TPU chip."""

  peak_flops: float
  """bfloat16 FLOP/s of its matrix units."""
  hbm_bytes: int
  """HBM that a program may use: what the compiler says is available, less than what is built in."""
  hbm_bandwidth: float
  """Bytes/s between HBM and the chip."""
  ici_bandwidth: float
  """Bytes/s that it sends to its neighbours, all links together, one way."""
  dims: int
  """Of the torus or grid in which a slice's chips are linked."""
  cores_per_chip: int
  """By which the usual names of slices count: v4-128 has 64 chips. A program sees one device for each chip."""


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
    cores_per_chip=1,
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
    cores_per_chip=1,
  ),
}

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
  """A slice of TPU chips."""

  version: str
  """A key of CHIPS."""
  shape: tuple[int, ...]
  """Chips along each dimension."""

  @property
  def chip(self) -> Chip:
    return CHIPS[self.version]

  @property
  def num_chips(self) -> int:
    return math.prod(self.shape)

  def __str__(self) -> str:
    return f"{self.version}:{'x'.join(map(str, self.shape))}"


def parse(name: str) -> Topology:
  """The slice of a name, "v5e:16x16" or "v5litepod-256"; "v4-128" counts cores, two a chip, and is v4:4x4x4.

  Raises:
    InputError: an unknown version, or a shape that no slice of it has.
  """
  match = re.fullmatch(r"(\w+?)(?::(\d+(?:x\d+)*)|-(\d+))", name.strip().lower())
  version = match and {"v5litepod": "v5e", "v5lite": "v5e", "v6lite": "v6e"}.get(match[1], match[1])
  if match is None or version not in CHIPS:
    hint = nearest(version or name, CHIPS)
    if version in ("cuda", "gpu"):
      hint = (
        "Only TPUs can be planned for: XLA compiles for a GPU where one is. There, start training: it compiles first,"
        " says what memory the step takes, and refuses before anything is allocated if that is too much."
      )
    raise InputError(
      f"plan.topology={name!r} names no slice of TPUs: write its version and shape, such as v5e:16x16 or v4:4x4x8, or"
      f" its usual name, such as v4-128. {hint}"
    )
  chip = CHIPS[version]
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
