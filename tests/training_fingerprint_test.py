"""Checksums see changed values and changed order, whatever the mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from perceiver_ar_jax.training import checkpoint

VALUES = np.random.default_rng(0).standard_normal((6, 4, 8)).astype(np.float32)


def _differ(old, new) -> bool:
  """Whether the fingerprint of `old` differs from that of `new`."""
  saved = checkpoint.fingerprint({"params": {"w": jnp.asarray(old)}})
  assert not checkpoint.differences(saved, {"params": {"w": jnp.asarray(old)}})
  return checkpoint.differences(saved, {"params": {"w": jnp.asarray(new)}}) == ["params['w']"]


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_swapped_slices_are_seen(axis):
  swapped = np.moveaxis(VALUES.copy(), axis, 0)
  swapped[[0, -1]] = swapped[[-1, 0]]
  assert _differ(VALUES, np.moveaxis(swapped, 0, axis))


def test_other_orders_are_seen():
  assert _differ(VALUES, np.concatenate([VALUES[3:], VALUES[:3]]))  # two shards
  assert _differ(VALUES[:, :, :4], VALUES[:, :, :4].transpose(0, 2, 1))
  assert _differ(VALUES[0], VALUES[0].T.reshape(4, 8))
  signs = np.where(np.arange(8) % 2, 1.0, -1.0).astype(np.float32)  # bits that differ by 2^31
  assert _differ(signs, -signs)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int32", "uint8", "int8", "bool", "float8_e4m3fn"])
def test_every_type_is_fingerprinted(dtype):
  values = jnp.asarray([0, 1, 1, 0, 1, 0, 0, 0]).astype(dtype)
  assert _differ(values, values[::-1])
  assert _differ(values, values.at[0].set(1))
  assert _differ(values[0], values[1]), "scalars"


def test_each_bit_counts():
  bits = VALUES.view(np.uint32)
  for bit in range(32):
    changed = bits.copy()
    changed[3, 2, 5] ^= np.uint32(1 << bit)
    assert _differ(VALUES, changed.view(np.float32))


def _sharded_checksums() -> list[str]:
  """Checksums of VALUES on one device and in several shardings over eight; asserts that no values are exchanged."""
  mesh, arrays = jax.make_mesh((4, 2), ("a", "b")), [VALUES]
  for spec in [(None, "a"), ("b", "a"), (None, "b", "a"), (None, None, ("a", "b"))]:
    arrays.append(jax.device_put(VALUES, NamedSharding(mesh, PartitionSpec(*spec))))
    program = checkpoint._sums.lower([arrays[-1]]).compile().as_text()
    assert "all-reduce" in program and "all-gather" not in program and "all-to-all" not in program
  return [str(checkpoint.fingerprint({"params": {"w": array}})["params['w']"]) for array in arrays]


@pytest.mark.slow
def test_it_is_the_same_on_every_mesh_and_no_values_are_exchanged(eight_devices):
  expected = checkpoint.fingerprint({"params": {"w": jnp.asarray(VALUES)}})["params['w']"]
  assert eight_devices(_sharded_checksums) == [str(expected)] * 5
