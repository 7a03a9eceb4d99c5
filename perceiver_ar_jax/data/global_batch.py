"""Global batches: the same rows whatever the number of hosts, each host making those that its devices hold.

The records are divided into `data.shards` parts, each of which gives an equal run of rows of every batch. A host runs
the parts that its rows come from: with one shard each host draws all records (cheap: they are still encoded, or mere
numbers and paths) and opens those of its rows alone; with as many shards as hosts each reads only records of its own.
Since parts know nothing of hosts, neither does their saved position: a run goes on exactly on any number of hosts.
"""

import os
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.sharding import Sharding

from perceiver_ar_jax.config import Config
from perceiver_ar_jax.data.features import Batch
from perceiver_ar_jax.data.pipeline import TrainIterator
from perceiver_ar_jax.data.registry import Task


class HostBatches:
  """Endless training batches, of each the rows of one host.

  Args:
    config: the experiment.
    rows_of_hosts: for each host the rows of a batch that it makes, in order; None: one host makes all.
    host: the number of this one.

  Raises:
    InputError: as TrainIterator.
  """

  def __init__(self, config: Config, rows_of_hosts: Sequence[Sequence[int]] | None = None, host: int = 0):
    shards, batch_size = config.data.shards, config.train.batch_size
    rows_of_hosts = [range(batch_size)] if rows_of_hosts is None else rows_of_hosts
    self.rows = rows_of_hosts[host]
    self._batch_size = batch_size
    size = batch_size // shards

    def part(rows: Sequence[int], shard: int) -> list[int]:
      return [row - shard * size for row in rows if row // size == shard]

    self._parts = {
      shard: TrainIterator(config, size, shard, shards, part(self.rows, shard))
      for shard in range(shards)
      if part(self.rows, shard)
    }
    # All hosts that run a shard stand at the same place in it; one of them saves it.
    self._saved_here = [shard for shard in self._parts if not any(part(rows, shard) for rows in rows_of_hosts[:host])]

  @property
  def task(self) -> Task:
    """The task, or the first one of a mixture."""
    return next(iter(self._parts.values())).task

  @property
  def spec(self) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and type of each array of a global batch."""
    one = next(iter(self._parts.values())).spec
    return {
      name: jax.ShapeDtypeStruct((self._batch_size, *array.shape[1:]), array.dtype) for name, array in one.items()
    }

  def __iter__(self) -> "HostBatches":
    return self

  def __next__(self) -> Batch:
    batches = [next(part) for part in self._parts.values()]
    if len(batches) == 1:
      return batches[0]
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}

  def save(self, directory: os.PathLike | str) -> None:
    """Writes the position of the shards that fall to this host into files of their own under `directory`."""
    for shard in self._saved_here:
      self._parts[shard].save(directory)

  def restore(self, directory: os.PathLike | str) -> None:
    """Takes up the position that all hosts together saved, on however many; raises InputError as TrainIterator."""
    for part in self._parts.values():
      part.restore(directory)


def to_global(
  batch: Mapping[str, np.ndarray], rows: Sequence[int], batch_size: int, shardings: Mapping[str, Sharding]
) -> dict[str, jax.Array]:
  """Global arrays of `batch_size` rows, of which each host has made some.

  Args:
    batch: this host's rows.
    rows: their numbers, in order: at least those that its devices hold.
    batch_size: rows of all hosts together.
    shardings: the layout of each array; dimensions other than the rows may be split as well.
  """

  def one(values: np.ndarray, sharding: Sharding) -> jax.Array:
    def part(index: tuple[slice, ...]) -> np.ndarray:
      first, end, _ = index[0].indices(batch_size)
      start = np.searchsorted(rows, first)
      return values[(slice(start, start + end - first), *index[1:])]

    return jax.make_array_from_callback((batch_size, *values.shape[1:]), sharding, part)

  return {name: one(values, shardings[name]) for name, values in batch.items()}
