"""What attention reads: keys and values as a function of their inputs (`Keys`) or as a KV cache (`CachedKeys`).

This module also owns the visibility rule that every kernel follows: query m is at slot L - M + m and attends to key l
iff l <= L - M + m and valid_BxL[l]. In packed rows, valid_BxL is int32: the number of the document of each slot, 0 on
padding, negative where the key is hidden from all others; then both must be of one document. Kernels are in
attention.py and streamed.py. Shape letters: perceiver_ar.py.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from perceiver_ar_jax.parallel import sharding

MASKED = -1e30  # finite, so that a row with every key masked does not become NaN

product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _inputs(unused_weights, inputs):
  return inputs


class Keys(NamedTuple):
  """Keys and values that are projected on demand, for any range of slots, so that a kernel decides how many exist."""

  project: Callable[[Any, Any], tuple[jax.Array, jax.Array]]
  """(weights, inputs of halo + C slots) -> k_BxCxHxK, v_BxCxHxK; a pure function that closes over no tracers."""
  weights: Any  # a tree of float arrays, the same for every slot
  inputs: Any  # a tree of arrays [B, L, ...]; of integers, where there is a halo
  halo: int = 0  # number of slots before a chunk that its projection reads; zeros before the first slot
  sharded: bool = False  # whether the slots are sharded over the mesh ("slots" in sharding.RULES)

  @classmethod
  def from_arrays(cls, k_BxLxHxK, v_BxLxHxK, *, sharded: bool = False) -> "Keys":
    """Wraps keys and values that are already projected."""
    return cls(_inputs, (), (k_BxLxHxK, v_BxLxHxK), sharded=sharded)

  def to_arrays(self) -> tuple[jax.Array, jax.Array]:
    """(k_BxLxHxK, v_BxLxHxK) of all slots."""
    inputs = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (self.halo, 0)) + ((0, 0),) * (x.ndim - 2)), self.inputs)
    k_BxLxHxK, v_BxLxHxK = self.project(self.weights, inputs)
    if self.sharded:
      k_BxLxHxK, v_BxLxHxK = (sharding.constrain(x, "batch", "slots", None, None) for x in (k_BxLxHxK, v_BxLxHxK))
    return k_BxLxHxK, v_BxLxHxK


class CachedKeys(NamedTuple):
  """The KV cache of one layer, N = B * H: one query reads this layout fast, and new slots are written in place.

  Rows and heads share an axis: with a head axis of size 1, XLA's CPU compiler copies the whole cache for every token.
  """

  k_NxSxK: jax.Array
  v_NxSxK: jax.Array

  @classmethod
  def from_arrays(cls, k_BxSxHxK, v_BxSxHxK) -> "CachedKeys":
    """Converts keys and values from the layout of the layers."""
    return cls(*(x.swapaxes(1, 2).reshape(-1, x.shape[1], x.shape[3]) for x in (k_BxSxHxK, v_BxSxHxK)))

  def to_keys(self, num_rows: int) -> Keys:
    """Converts back to the layout of the layers; B = `num_rows`."""
    return Keys.from_arrays(*(x.reshape(num_rows, -1, *x.shape[1:]).swapaxes(1, 2) for x in self))

  def sharded(self) -> "CachedKeys":
    """The cache, sharded over the mesh in use: rows and heads as in the models, slots over its axis `context`."""
    return CachedKeys(*(sharding.constrain(x, "batch_heads", "context", None) for x in self))

  def attend(self, q_Bx1xHxK, valid_BxS):
    """attended_Bx1xHxK: one query per row attends to all valid slots."""
    rows, _, heads, width = q_Bx1xHxK.shape
    q_NxK = scaled(q_Bx1xHxK).reshape(rows * heads, width)
    scores_NxS = product("nk,nsk->ns", q_NxK, self.k_NxSxK)
    scores_NxS = jnp.where(jnp.repeat(valid_BxS, heads, axis=0), scores_NxS, MASKED)
    weights_NxS = jax.nn.softmax(scores_NxS, axis=-1).astype(q_Bx1xHxK.dtype)
    return jnp.einsum("ns,nsk->nk", weights_NxS, self.v_NxSxK).reshape(q_Bx1xHxK.shape)


def write(tree, updates, slot):
  """A tree of [B, S, ...] with the `updates` [B, 1, ...] written to `slot`, int32[]."""
  at_slot = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=slot, axis=1)
  return jax.tree.map(lambda x, update: at_slot(x, update.astype(x.dtype)), tree, updates)


def scaled(q_BxMxHxK):
  """Queries divided by the square root of their width."""
  return q_BxMxHxK * q_BxMxHxK.shape[-1] ** -0.5


def query_segments(valid_BxL, num_queries: int):
  """int32[B, M]: the segments of the last M of L slots in packed rows; None where `valid_BxL` is boolean."""
  if valid_BxL.dtype == bool:
    return None
  return jnp.abs(valid_BxL if num_queries == valid_BxL.shape[1] else sharding.last_slots(valid_BxL, num_queries))


def visible(slots_C, num_queries: int, num_keys: int, valid_BxC, keep_own: bool, segments_BxM=None):
  """bool[B, 1, M, C]: which of the keys at `slots_C` each of the last M of L slots attends to.

  With `keep_own`, a query also attends to its own slot, valid or not. `segments_BxM`: see `query_segments`.
  """
  own_M = jnp.arange(num_keys - num_queries, num_keys)[:, None]
  causal_1xMxC, valid_BxMxC = (slots_C[None] <= own_M)[None], valid_BxC[:, None, :]
  if segments_BxM is not None:
    valid_BxMxC = valid_BxMxC == segments_BxM[:, :, None]
  visible_BxMxC = causal_1xMxC & valid_BxMxC
  if keep_own:
    visible_BxMxC |= (slots_C[None] == own_M)[None]
  return visible_BxMxC[:, None]
