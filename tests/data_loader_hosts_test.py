"""The global batch does not know how many hosts there are."""

import jax
import numpy as np
import pytest

from perceiver_ar_jax.config import InputError
from perceiver_ar_jax.data.loader import TrainLoader, to_global
from tests import tiny

HOSTS = [
  [list(range(8))],
  [[0, 1, 2, 3], [4, 5, 6, 7]],
  [[0, 1], [2, 3], [4, 5], [6, 7]],
  [[0, 1, 2], [3, 4, 5, 6, 7]],  # a shard in the hands of two
  [[0, 1, 2, 3], [0, 1, 2, 3], [4, 5, 6, 7]],  # rows that two hosts need
]


def _batch(hosts: list[TrainLoader]) -> np.ndarray:
  """The inputs of the next global batch, which hosts of the same rows must agree on."""
  inputs = np.full((8, 32), -1)
  for host in hosts:
    for row, values in zip(host.rows, next(host)["inputs"], strict=True):
      assert inputs[row].tolist() in (values.tolist(), [-1] * 32)
      inputs[row] = values
  return inputs


@pytest.mark.parametrize(("shards", "packing"), [(1, 1), (2, 1), (4, 1), (2, 3)])
def test_batches_are_the_same_on_any_hosts_and_resume_on_others(shards, packing, tmp_path):
  config = tiny.config(data__shards=shards, data__packing=packing, data__min_crop=16 if packing == 1 else 2)
  loader = TrainLoader(config)
  expected = [next(loader)["inputs"] for _ in range(4)]
  assert len({tuple(row) for batch in expected for row in batch.tolist()}) == 32, "rows are repeated"
  for number, rows in enumerate(HOSTS):
    hosts = [TrainLoader(config, rows, host) for host in range(len(rows))]
    for index in range(2):
      np.testing.assert_array_equal(_batch(hosts), expected[index])
    for host in hosts:
      host.save(tmp_path / str(number))
    others = HOSTS[number - 1]
    resumed = [TrainLoader(config, others, host) for host in range(len(others))]
    for host in resumed:
      host.restore(tmp_path / str(number))
    np.testing.assert_array_equal(_batch(resumed), expected[2])


def test_a_host_makes_only_rows_of_its_own():
  host = TrainLoader(tiny.config(data__shards=4), [[0, 1], [2, 3], [4, 5], [6, 7]], 2)
  assert next(host)["inputs"].shape == (2, 32)
  assert host.spec["inputs"].shape == (8, 32)
  assert len(host._shards) == 1, "it reads records that it does not need"


def test_shards_must_divide_the_batch():
  with pytest.raises(InputError, match="data.shards=3 does not divide train.batch_size=8"):
    tiny.config(data__shards=3)


def test_a_global_array_holds_the_batch():
  mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
  batch = {"inputs": np.arange(6, dtype=np.int32).reshape(2, 3)}
  array = to_global(batch, 2, {"inputs": sharding})["inputs"]
  assert isinstance(array, jax.Array) and array.sharding == sharding
  np.testing.assert_array_equal(array, batch["inputs"])
