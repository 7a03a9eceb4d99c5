"""Position encodings: absolute tables added to the embedding, and rotary for queries and keys (paper, section 3).

Positions are integers, 1-based, 0 on padding. This room holds the mathematics only; perceiver_ar.py decides
which encoding a model uses and owns the learned tables.
"""

import jax.numpy as jnp
import numpy as np


def sinusoidal_table(size: int, width: int) -> np.ndarray:
  """float32[size, width]: sines in the first half, cosines in the second, wavelengths from 2 pi to 10,000 * 2 pi."""
  half = width // 2
  frequencies = np.exp(np.arange(half) * (-np.log(10_000.0) / max(half - 1, 1)))
  angles = np.arange(size)[:, None] * frequencies
  table = np.zeros((size, width), np.float32)
  table[:, :half] = np.sin(angles)
  table[:, half : 2 * half] = np.cos(angles)
  return table


def fourier_table(size: int, width: int) -> np.ndarray:
  """float32[size, width]: sines then cosines of pi * f * x with x in [-1, 1] and f evenly spaced in 1..size/2.

  Raises ValueError for an odd width.
  """
  if width % 2:
    raise ValueError(f"Fourier positions need an even embedding width, not {width}.")
  frequencies = np.linspace(1.0, size / 2, width // 2)
  angles = np.pi * np.linspace(-1.0, 1.0, size)[:, None] * frequencies
  return np.concatenate([np.sin(angles), np.cos(angles)], axis=-1).astype(np.float32)


TABLES = {"sinusoidal": sinusoidal_table, "fourier": fourier_table}


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
