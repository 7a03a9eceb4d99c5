"""Checksums see changed values and changed order, whatever the mesh."""

import jax.numpy as jnp
import numpy as np
import pytest

from perceiver_ar_jax.training import fingerprint
from tests import tiny

VALUES = np.random.default_rng(0).standard_normal((6, 4, 8)).astype(np.float32)


def _differ(old, new) -> bool:
  """Whether the fingerprint of `old` tells it from `new`."""
  saved = fingerprint.compute({"params": {"w": jnp.asarray(old)}})
  assert not fingerprint.differences(saved, {"params": {"w": jnp.asarray(old)}})
  return fingerprint.differences(saved, {"params": {"w": jnp.asarray(new)}}) == ["params['w']"]


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


def test_it_is_the_same_on_every_mesh_and_no_values_travel():
  program = """
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from perceiver_ar_jax.training import fingerprint
mesh = jax.make_mesh((4, 2), ("a", "b"))
values = np.random.default_rng(0).standard_normal((6, 4, 8)).astype(np.float32)
print(fingerprint.compute({"params": {"w": values}})["params['w']"])
for spec in [(None, "a"), ("b", "a"), (None, "b", "a"), (None, None, ("a", "b"))]:
  sharded = jax.device_put(values, NamedSharding(mesh, PartitionSpec(*spec)))
  print(fingerprint.compute({"params": {"w": sharded}})["params['w']"])
  program = fingerprint._SUMS[2].lower([sharded]).compile().as_text()
  assert "all-reduce" in program and "all-gather" not in program and "all-to-all" not in program
"""
  result = tiny.python("-c", program, num_devices=8)
  assert result.returncode == 0, result.stderr
  expected = fingerprint.compute({"params": {"w": jnp.asarray(VALUES)}})["params['w']"]
  assert result.stdout.split() == [str(expected)] * 5
