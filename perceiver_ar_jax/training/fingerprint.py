"""Checksums of arrays: the same on every mesh, different after almost any change of values or of their order.

The checksum of an array is the uint32 sum, over its elements, of a hash of the element's bits and its index in the
whole array. A sum does not depend on how the array is sharded: each device sums its shard, and only sums travel. Since
the index is hashed as well, swapped rows, columns or shards change it.

A fingerprint stores its version. Version 1, of older checkpoints, sums the bits alone.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

_VERSION = "fingerprint_version"


def compute(trees: Mapping[str, Any]) -> dict[str, int]:
  """Returns {path of an array: its checksum} of all arrays of the named trees, and the version."""
  return _checksums(trees, version=2) | {_VERSION: 2}


def differences(saved: Mapping[str, int], trees: Mapping[str, Any]) -> list[str]:
  """Returns the paths of arrays in `trees` whose checksum is not that of a `saved` fingerprint."""
  current = _checksums(trees, version=saved.get(_VERSION, 1))
  return [path for path in current if saved.get(path) != current[path]]


def missing(saved: Mapping[str, int], trees: Mapping[str, Any]) -> list[str]:
  """Returns the paths of arrays in `trees`, or of their shapes, that a `saved` fingerprint does not list."""
  return [path for path in _leaves(trees) if path not in saved]


def _leaves(trees: Mapping[str, Any]) -> dict[str, Any]:
  return {
    name + jax.tree_util.keystr(path): leaf
    for name, tree in trees.items()
    for path, leaf in jax.tree.leaves_with_path(tree)
  }


def _checksums(trees: Mapping[str, Any], version: int) -> dict[str, int]:
  leaves = _leaves(trees)
  sums = jax.device_get(_SUMS[version](list(leaves.values())))
  return {path: int(value) for path, value in zip(leaves, sums)}


def _bits(leaf: jax.Array) -> jax.Array:
  """Returns the uint32 bits of each element; with a last axis of two for types of 64 bits."""
  if leaf.dtype == bool:
    return leaf.astype(jnp.uint32)
  unsigned = {8: jnp.uint32, 4: jnp.uint32, 2: jnp.uint16, 1: jnp.uint8}[leaf.dtype.itemsize]
  return jax.lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32)


def _ordered_sum(leaf: jax.Array) -> jax.Array:
  bits = _bits(leaf)
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


_SUMS = {
  1: jax.jit(lambda leaves: [_bits(leaf).sum(dtype=jnp.uint32) for leaf in leaves]),
  2: jax.jit(lambda leaves: list(map(_ordered_sum, leaves))),
}
