"""Position encodings: absolute ones added to the embedding, and rotary for queries and keys (paper, section 3).

Positions are integers, 1-based, 0 on padding. This room holds the mathematics only; perceiver_ar.py decides
which encoding a model uses and owns the learned tables.
"""

import math

import jax.numpy as jnp
import numpy as np


def sinusoidal(positions_BxL, *, size: int, width: int):
  """float32[B, L, width] for positions below `size`: sines in the first half, cosines in the second.

  Wavelengths run from 2 pi to 10,000 * 2 pi. An odd width leaves its last column 0.
  """
  half = width // 2
  frequencies = np.exp(np.arange(half) * (-np.log(10_000.0) / max(half - 1, 1)))
  waves = jnp.concatenate(_sin_cos(positions_BxL, size, frequencies), axis=-1)
  return jnp.pad(waves, ((0, 0), (0, 0), (0, width - 2 * half)))


def fourier(positions_BxL, *, size: int, width: int):
  """float32[B, L, width]: sines, then cosines, of pi * f * x; x in [-1, 1] over `size` positions, f in 1..size/2.

  Raises ValueError for an odd width.
  """
  if width % 2:
    raise ValueError(f"Fourier positions need an even embedding width, not {width}.")
  bands = np.pi * np.linspace(1.0, size / 2, width // 2)
  return jnp.concatenate(_sin_cos(positions_BxL, size, bands * 2 / max(size - 1, 1), phases=-bands), axis=-1)


ABSOLUTE = {"sinusoidal": sinusoidal, "fourier": fourier}


def _sin_cos(positions_BxL, size: int, frequencies: np.ndarray, phases: np.ndarray | float = 0.0):
  """float32 sine and cosine [B, L, bands] of phase + frequency * position, exact to rounding for any `size`.

  A table of a million rows would be as large as what a long context must not keep, and a float32 angle is too
  coarse there. So a position is high * base + low, and two tables of about sqrt(size) rows are combined by the
  addition theorems.
  """
  base = math.isqrt(max(size - 1, 0)) + 1
  rows = np.arange(base)[:, None]
  low, high = rows * frequencies, rows * base * frequencies + phases
  table = [jnp.asarray(fn(angles), jnp.float32) for angles in (high, low) for fn in (np.sin, np.cos)]
  high_BxL, low_BxL = positions_BxL // base, positions_BxL % base
  sin_high, cos_high, sin_low, cos_low = (
    part[index] for part, index in zip(table, (high_BxL, high_BxL, low_BxL, low_BxL), strict=True)
  )
  return sin_high * cos_low + cos_high * sin_low, cos_high * cos_low - sin_high * sin_low


def terminal_relative(tokens_BxL) -> jnp.ndarray:
  """int32[B, L, 1]: the last token is 0, counting up towards the past; 0 on padding."""
  length = tokens_BxL.shape[1]
  distance_L = jnp.arange(length - 1, -1, -1, dtype=jnp.int32)
  return jnp.where(tokens_BxL > 0, distance_L[None], 0)[..., None]


def rotate(x_BxLxHxK, positions_BxL, *, fraction: float, max_wavelength: float):
  """`x` with the leading `fraction` of each head rotated by angles proportional to its position (RoFormer).

  Pairs are interleaved. The exponents of `max_wavelength` run from 0 to 1 inclusive, as published
  checkpoints need; the common formulation stops one band short of 1. Angles are computed in float32.
  """
  rotated = int(x_BxLxHxK.shape[-1] * fraction / 2) * 2
  if not rotated:
    return x_BxLxHxK
  bands = rotated // 2
  exponents = np.linspace(0.0, bands, bands) * (2.0 / rotated)
  frequencies = (max_wavelength**-exponents).astype(np.float32)
  angles = positions_BxL[..., None, None].astype(jnp.float32) * jnp.asarray(frequencies)[None, None, None]
  cos, sin = jnp.cos(angles), jnp.sin(angles)
  head = x_BxLxHxK[..., :rotated].astype(jnp.float32)
  even, odd = head[..., 0::2], head[..., 1::2]
  turned = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1).reshape(head.shape)
  return jnp.concatenate([turned.astype(x_BxLxHxK.dtype), x_BxLxHxK[..., rotated:]], axis=-1)
