"""Position encodings (paper, section 3): tables added to the embedding, and rotations of queries and keys.

Positions are integers, 1-based, 0 on padding. ENCODINGS is the table of encodings: to add one, add a function and an
entry; `model.position_encoding` then accepts its name. Learned tables are parameters of layers.Embed.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from perceiver_ar_jax.config import InputError, ModelConfig, lookup, require


def sinusoidal(positions_BxL, *, size: int, width: int):
  """float32[B, L, width] for positions below `size`: sines in the first half, cosines in the second.

  Wavelengths range from 2 pi to 10,000 * 2 pi. With an odd width, the last column is 0.
  """
  half = width // 2
  frequencies = np.exp(np.arange(half) * (-np.log(10_000.0) / max(half - 1, 1)))
  waves = jnp.concatenate(_sin_cos(positions_BxL, size, frequencies), axis=-1)
  return jnp.pad(waves, ((0, 0), (0, 0), (0, width - 2 * half)))


def fourier(positions_BxL, *, size: int, width: int):
  """float32[B, L, width]: sines, then cosines, of pi * f * x; x in [-1, 1] over `size` positions, f in 1..size/2.

  The width must be even.
  """
  bands = np.pi * np.linspace(1.0, size / 2, width // 2)
  return jnp.concatenate(_sin_cos(positions_BxL, size, bands * 2 / max(size - 1, 1), phases=-bands), axis=-1)


def value_features(vocab_size: int, features: int):
  """float32[V, features]: sines and cosines of each id's value; 0 for PAD, EOS and SOS, which have none.

  The longest wave has half a period over all values, the shortest a period of four values.
  """
  values_V = np.arange(vocab_size) - 3  # after PAD, EOS and SOS
  frequencies = np.geomspace(np.pi / vocab_size, np.pi / 2, features // 2)
  angles_VxN = values_V[:, None] * frequencies
  waves_VxF = np.concatenate([np.sin(angles_VxN), np.cos(angles_VxN)], axis=1) * np.sqrt(2)
  return jnp.asarray(np.where(values_V[:, None] >= 0, waves_VxF, 0), jnp.float32)


def _sin_cos(positions_BxL, size: int, frequencies: np.ndarray, phases: np.ndarray | float = 0.0):
  """float32 sine and cosine [B, L, bands] of phase + frequency * position, exact to rounding for any `size`.

  A table with a million rows would be as large as what a long context must not keep, and a float32 angle is too
  coarse there. So a position is high * base + low, and two tables of about sqrt(size) rows are combined by the
  angle addition formulas.
  """
  base = math.isqrt(max(size - 1, 0)) + 1
  rows = np.arange(base)[:, None]
  low, high = rows * frequencies, rows * base * frequencies + phases
  sin_low, cos_low = (jnp.asarray(fn(low), jnp.float32)[positions_BxL % base] for fn in (np.sin, np.cos))
  sin_high, cos_high = (jnp.asarray(fn(high), jnp.float32)[positions_BxL // base] for fn in (np.sin, np.cos))
  return sin_high * cos_low + cos_high * sin_low, cos_high * cos_low - sin_high * sin_low


def terminal_relative(tokens_BxL, segments_BxL=None) -> jnp.ndarray:
  """int32[B, L, 1]: distance from the last token (of the same segment, if given), which is at 0; 0 on padding."""
  length = tokens_BxL.shape[1]
  distance_L = jnp.arange(length - 1, -1, -1, dtype=jnp.int32)
  valid_BxL, distance_BxL = tokens_BxL > 0, distance_L[None]
  if segments_BxL is not None:
    is_last_BxL = segments_BxL != jnp.pad(segments_BxL[:, 1:], ((0, 0), (0, 1)))
    distance_BxL -= jax.lax.cummax(jnp.where(is_last_BxL, distance_BxL, 0), axis=1, reverse=True)
  return jnp.where(valid_BxL, distance_BxL, 0)[..., None]


def rotary(config: ModelConfig, x_BxLxHxK, positions_BxLxP):
  """Queries or keys rotated by their positions; raises InputError for another number of position dimensions."""
  dimensions, width, used = positions_BxLxP.shape[-1], x_BxLxHxK.shape[-1], len(config.rotary_axes) or 1
  problem = f"Positions of this task have {dimensions} dimensions, and rotary positions use {used}"
  fix = "set model.rotary_axes, one entry for each dimension, or --config.model.positions_from_data=False"
  require(dimensions == used, f"{problem}: {fix}.")
  if not config.rotary_axes:
    wavelength = config.rotary_max_wavelength or config.max_context
    return rotate(x_BxLxHxK, positions_BxLxP[..., 0], fraction=config.rotary_fraction, max_wavelength=wavelength)
  bands = [int(width * fraction / 2) for fraction, _, _ in config.rotary_axes]
  frequencies = [
    2 * np.pi / np.geomspace(shortest, longest, count)
    for count, (_, shortest, longest) in zip(bands, config.rotary_axes, strict=True)
  ]
  positions_BxLxN = jnp.repeat(positions_BxLxP, np.array(bands), axis=-1, total_repeat_length=sum(bands))
  return _rotate(x_BxLxHxK, positions_BxLxN, np.concatenate(frequencies))


def rotate(x_BxLxHxK, positions_BxL, *, fraction: float, max_wavelength: float):
  """`x` with the leading `fraction` of each head rotated by angles proportional to its position (RoFormer).

  The exponents of `max_wavelength` range from 0 to 1 inclusive, as published checkpoints need; the common formulation
  stops one band short of 1.
  """
  bands = int(x_BxLxHxK.shape[-1] * fraction / 2)
  exponents = np.linspace(0.0, bands, bands) / max(bands, 1)
  return _rotate(x_BxLxHxK, positions_BxL[..., None], max_wavelength**-exponents)


def _rotate(x_BxLxHxK, positions_BxLxN, frequencies_N: np.ndarray):
  """`x` with its leading N interleaved pairs rotated by position * frequency; angles are computed in float32."""
  count = len(frequencies_N)
  if not count:
    return x_BxLxHxK
  angles_BxLxN = positions_BxLxN.astype(jnp.float32) * jnp.asarray(frequencies_N, jnp.float32)[None, None]
  # A product copies cosines and sines, with their signs, to both elements of each pair. Compilers would fuse any other
  # copy with what follows, and compute them again for every head and element. It is one product for each row, because
  # remat=dots keeps the results of those without such an axis.
  copies_Nx2N = np.repeat(np.eye(count), 2, axis=1)
  signs_2N = np.tile([-1.0, 1.0], count)

  def copied(x_BxLxN, copies_Nx2N):
    copies_BxNx2N = jnp.broadcast_to(jnp.asarray(copies_Nx2N, jnp.float32)[None], (len(x_BxLxN), *copies_Nx2N.shape))
    return jnp.einsum("bln,bnk->blk", x_BxLxN, copies_BxNx2N, precision=jax.lax.Precision.HIGHEST)[:, :, None]

  cos_BxLx1x2N = copied(jnp.cos(angles_BxLxN), copies_Nx2N)
  sin_BxLx1x2N = copied(jnp.sin(angles_BxLxN), copies_Nx2N * signs_2N)
  head_BxLxHx2N = x_BxLxHxK[..., : 2 * count].astype(jnp.float32)
  pairs = head_BxLxHx2N.reshape(*head_BxLxHx2N.shape[:-1], count, 2)
  exchanged_BxLxHx2N = jnp.flip(pairs, axis=-1).reshape(head_BxLxHx2N.shape)
  turned_BxLxHx2N = head_BxLxHx2N * cos_BxLx1x2N + exchanged_BxLxHx2N * sin_BxLx1x2N
  return jnp.concatenate([turned_BxLxHx2N.astype(x_BxLxHxK.dtype), x_BxLxHxK[..., 2 * count :]], axis=-1)


class Encoding(NamedTuple):
  """How positions enter the model."""

  table: Callable | None = None  # (positions_BxL, size, width) -> float32[B, L, width], added for each dimension
  learned: bool = False  # whether a learned table is added to the embedding for each position dimension
  rotate: Callable | None = None  # (config, x_BxLxHxK, positions_BxLxP) -> queries or keys rotated by their positions

  @property
  def is_added(self) -> bool:
    """Whether it needs model.position_sizes, the number of rows of each table."""
    return self.learned or self.table is not None


ENCODINGS: dict[str, Encoding] = {
  "sinusoidal": Encoding(table=sinusoidal),
  "fourier": Encoding(table=fourier),
  "learned": Encoding(learned=True),
  "rotary": Encoding(rotate=rotary),
  "relative": Encoding(),  # distances inside attention, which transformer_xl.py computes
}


def encoding_of(config: ModelConfig) -> Encoding:
  """The config's encoding; raises InputError for an unknown name, or names that cannot be combined."""
  names = config.position_encoding.split("+")
  parts = [lookup("model.position_encoding", name, ENCODINGS) for name in names]
  added, rotated = [part for part in parts if part.is_added], [part for part in parts if part.rotate]
  if len(parts) == 1:
    return parts[0]
  is_pair = (len(parts), len(added), len(rotated)) == (2, 1, 1)
  form = "one encoding, or one that is added to the embedding and one inside attention, such as learned+rotary"
  require(is_pair, f"model.position_encoding={config.position_encoding} must be {form}.")
  return added[0]._replace(rotate=rotated[0].rotate)


def check(config: ModelConfig) -> None:
  """Raises InputError if the config's encoding is unknown or lacks tables of the right sizes."""
  name, sizes, encoding = config.position_encoding, config.position_sizes, encoding_of(config)
  if config.rotary_axes and encoding.rotate is None:
    raise InputError(f"model.rotary_axes={config.rotary_axes} needs rotary positions, not {name}: leave it out.")
  if not encoding.is_added:
    return
  example = f"such as ({config.max_context + 1},)"
  require(bool(sizes), f"model.position_sizes is empty: {name} positions need a size for each dimension, {example}.")
  is_valid = config.positions_from_data or len(sizes) == 1 and sizes[0] >= config.max_context
  needed = f"one size of at least model.max_context={config.max_context}"
  require(is_valid, f"model.position_sizes={sizes} must be {needed}.")
  if encoding.table is fourier and config.input_width % 2:
    raise InputError(f"model.position_encoding={name} needs an even model.embed_width, not {config.input_width}.")
