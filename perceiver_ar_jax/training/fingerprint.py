"""Checksums of arrays: the same on every mesh, different after almost any change of values or of their order.

The checksum of an array is the uint32 sum, over its elements, of a hash of the element's bits and its index in the
whole array. Each device sums its shard, and only sums travel. The index is hashed as well, so swapped rows, columns or
shards change the sum.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

_VERSION = {"fingerprint_version": 2}


def compute(trees: Mapping[str, Any]) -> dict[str, int]:
  """Returns {path of an array: its checksum} of all arrays of the named trees, and the version."""
  leaves = _leaves(trees)
  sums = jax.device_get(_sums(list(leaves.values())))
  return {path: int(value) for path, value in zip(leaves, sums)} | _VERSION


def differences(saved: Mapping[str, int], trees: Mapping[str, Any]) -> list[str]:
  """Returns the paths of arrays in `trees` whose checksum is not that of a `saved` fingerprint of this version."""
  if not _VERSION.items() <= saved.items():
    return []
  return [path for path, value in compute(trees).items() if saved.get(path) != value]


def missing(saved: Mapping[str, int], trees: Mapping[str, Any]) -> list[str]:
  """Returns the paths of arrays in `trees`, or of their shapes, that a `saved` fingerprint does not list."""
  return [path for path in _leaves(trees) if path not in saved]


def _leaves(trees: Mapping[str, Any]) -> dict[str, Any]:
  return {
    name + jax.tree_util.keystr(path): leaf
    for name, tree in trees.items()
    for path, leaf in jax.tree.leaves_with_path(tree)
  }


@jax.jit
def _sums(leaves: list[jax.Array]) -> list[jax.Array]:
  return list(map(_ordered_sum, leaves))


def _ordered_sum(leaf: jax.Array) -> jax.Array:
  if leaf.dtype == bool:
    bits = leaf.astype(jnp.uint32)
  else:  # types of 64 bits get a last axis of two
    unsigned = {8: jnp.uint32, 4: jnp.uint32, 2: jnp.uint16, 1: jnp.uint8}[leaf.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32)
  # One axis after the other, so that arrays of more than 2^32 elements need no wider index.
  index = jnp.zeros(bits.shape, jnp.uint32)
  for axis in range(bits.ndim):
    index = _mix(index + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) + jnp.uint32(0x9E3779B9))
  return _mix(bits + index).sum(dtype=jnp.uint32)


def _mix(x: jax.Array) -> jax.Array:
  """A bijection of uint32 in which each input bit affects all output bits (the finalizer of MurmurHash3)."""
  x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
  return x ^ (x >> 16)
