"""Training batches: an endless, exactly resumable stream, the same on any number of hosts.

Records of a shard, still encoded -> shuffle -> repeat are stages of tf.data, whose state can be saved. Every epoch uses
each record once, and the state has the size of the shuffle buffer. Then come pure functions of a record and its number:
documents -> random crops -> rows -> arrays over devices.

Each of `data.shards` shards of the records provides an equal range of rows of every batch, whatever the hosts. A host
draws the records of the shards of its rows and opens the documents of its own rows only.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np
from etils import epath
from jax.sharding import Sharding

from perceiver_ar_jax.config import Config, InputError, require
from perceiver_ar_jax.data import documents, splits, tasks, windows
from perceiver_ar_jax.data.registry import Record, Task
from perceiver_ar_jax.data.sources import ListSource, sentencepiece_fingerprint
from perceiver_ar_jax.data.tf_cpu import seqio, tf

_SHUFFLE_BYTES = 32 * 2**20  # average size limit of a shuffle buffer, which checkpoints contain
_pool = concurrent.futures.ThreadPoolExecutor(min(16, os.cpu_count() or 1))


@dataclasses.dataclass
class _Shard:
  """One shard of the records, and the position in it."""

  index: int
  rows: Sequence[int]  # those that this host fills, among those that the shard provides for each batch
  is_saved_here: bool  # whether this host saves the position, which is the same on all hosts that read the shard
  batches: Sequence[Iterator] = ()  # of the records of each task: tf.data's iterators, whose state is saved
  records: Sequence[Iterator[Record]] = ()  # the records of each task one by one, from `batches`
  num_batches: int = 0  # batches drawn, including those without a readable record: the seed of a batch's crops


class TrainLoader(Iterator[windows.Batch]):
  """Training batches (windows.Batch), of each the rows of one host; the same for the same settings and when restored.

  `rows_of_hosts` are the rows of a batch that each host provides, in order (None: one host provides all), and `host` is
  the index of this one. Raises InputError for an unknown task or split, data that is not prepared, fewer records than
  shards, too few token ids; and, in drawing a batch, if no record is readable, or positions are outside their tables.
  """

  def __init__(self, config: Config, rows_of_hosts: Sequence[Sequence[int]] | None = None, host: int = 0):
    self._config, self._split, self._num_shards = config, config.data.train_split, config.data.shards
    self._shard_rows, self._packing = config.train.batch_size // self._num_shards, config.data.packing
    self._tasks, self._shares = zip(*tasks.get_tasks(config.data, config.model.max_context + 1))
    self._num_records = [task.num_records(config, self._split) for task in self._tasks]
    for task, count in zip(self._tasks, self._num_records):
      problem = f"The split {self._split!r} of {task.name} has {count} records, fewer than"
      require(count is None or count >= self._num_shards, f"{problem} data.shards={self._num_shards}.")
    rows_of_hosts = [range(config.train.batch_size)] if rows_of_hosts is None else rows_of_hosts
    self.rows, self._shards = rows_of_hosts[host], []
    for index in range(self._num_shards):
      rows_of_shard = range(index * self._shard_rows, (index + 1) * self._shard_rows)
      if rows := [row - rows_of_shard.start for row in self.rows if row in rows_of_shard]:
        is_read_before = any(row in rows_of_shard for row in itertools.chain(*rows_of_hosts[:host]))
        self._shards.append(_Shard(index, rows, is_saved_here=not is_read_before))
        self._start(self._shards[-1])

  @property
  def task(self) -> Task:
    """The task, or the first one of a mixture, whose tasks have one modality and vocabulary."""
    return self._tasks[0]

  @property
  def spec(self) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and type of each array of a global batch."""
    return jax.eval_shape(lambda: self._empty(self._config.train.batch_size))

  def _empty(self, size: int) -> windows.Batch:
    return windows.empty_batch(size, self._config.model, self.task.position_dims, packed=self._packing > 1)

  def _start(self, shard: _Shard) -> None:
    shard.num_batches, shard.batches = 0, [iter(self._batches(task, shard.index)) for task in self._tasks]
    shard.records = [itertools.chain.from_iterable(map(_to_records, batches)) for batches in shard.batches]

  def _batches(self, task: Task, index: int) -> tf.data.Dataset:
    """Returns the records of one shard, in batches; files are in a different order in each epoch."""
    seed, source, split = self._config.seed, task.source, self._split
    if source.supports_arbitrary_sharding:
      shard = seqio.ShardInfo(index=index, num_shards=self._num_shards)
      records = source.get_dataset(split=split, shuffle=True, seed=seed, shard_info=shard)
    else:
      records = source.get_dataset(split=split, shuffle=False).shard(self._num_shards, index)
    record_bytes = max(source.bytes_per_record(split), 1) if hasattr(source, "bytes_per_record") else 1
    most = max(1, int(_SHUFFLE_BYTES / self._num_shards / record_bytes))
    buffer = min(-(-self._config.data.shuffle_buffer // self._num_shards), most)
    records = task.preprocess(records.shuffle(buffer, seed=seed, reshuffle_each_iteration=True).repeat())
    # Records of a fixed shape are drawn a batch at a time, which saves a call for each; a mixture draws one by one.
    fixed = all(spec.shape.is_fully_defined() for spec in records.element_spec.values())
    return records.batch(self._shard_rows if fixed and len(self._tasks) == 1 else 1)

  def __next__(self) -> windows.Batch:
    batch = self._empty(len(self.rows))
    rows = (windows.row_of(batch, index) for index in range(len(self.rows)))
    for shard in self._shards:
      self._fill(shard, list(itertools.islice(rows, len(shard.rows))))
    windows.check_positions(batch, self._config)
    return batch

  def _fill(self, shard: _Shard, rows: list[windows.Batch]) -> None:
    num_records = sum(2**60 if count is None else count for count in self._num_records)
    for _ in range(2 + int(2 * num_records / self._shard_rows / min(self._shares))):  # then every record was drawn
      fill_row = functools.partial(self._fill_row, *self._draw(shard), set())
      if all(list(_pool.map(fill_row, shard.rows, rows))):
        return
    raise splits.none_readable(self._config, self._split)

  def _fill_row(self, records, draws, seeds, unreadable: set[int], number: int, row: windows.Batch) -> bool:
    """Fills row `number` of a shard from its records, from the right; returns False if no record can be read."""
    for index in range(self._packing):
      count = self._fill_window(records, draws, seeds, unreadable, number * self._packing + index, row)
      if count is None:
        return index > 0
      if self._packing > 1:
        row["segments"][len(row["segments"]) - count :] = index + 1
      if count >= len(row["targets"]):
        break
      row = {name: values[: len(values) - count] for name, values in row.items()}  # the free slots
    return True

  def _fill_window(self, records, draws, seeds, unreadable: set[int], number: int, row: windows.Batch) -> int | None:
    """Fills a row, with the random numbers of record `number` of a shard; returns the number of inputs.

    An unreadable record is replaced by the next readable one of the shard, whichever host's it is; None: none is.
    """
    for candidate in (*range(number, len(records)), *range(number)):
      if candidate in unreadable:
        continue
      task, record = records[candidate]
      document = task.open(record)
      if document is not None:
        augment = task.augment and functools.partial(task.augment, random=np.random.default_rng(seeds[number]))
        min_crop, scored_only = self._config.data.min_crop, task.train_scored_only
        try:
          return windows.train_window(row, document, draws[number], min_crop, scored_only=scored_only, augment=augment)
        except documents.Unreadable as error:  # a file that vanished or shrank since it was listed
          task.skip(record, error)
      unreadable.add(candidate)
    return None

  def _draw(self, shard: _Shard) -> tuple[list[tuple[Task, Record]], np.ndarray, np.ndarray]:
    """Returns the records of all rows of the shard in the next batch, with a number in [0, 1) and a seed each."""
    # Numbering batches over all shards gives the crops of each shard their own random numbers.
    number, size = shard.num_batches * self._num_shards + shard.index, self._shard_rows * self._packing
    random = np.random.Generator(np.random.Philox(key=[self._config.seed % 2**64, number]))
    shard.num_batches += 1
    draws, seeds = random.random(size), random.integers(2**63, size=size)
    chosen = np.searchsorted(np.cumsum(self._shares[:-1]), random.random(size), side="right")
    records = [(self._tasks[index], next(shard.records[index], None)) for index in chosen]
    for task, record in records:
      if record is None:
        raise InputError(f"Shard {shard.index} of {self._num_shards} has no record of {task.name}: lower data.shards.")
    return records, draws, seeds

  def save(self, directory: os.PathLike | str) -> None:
    """Writes the position of the shards that this host saves, in files of their own, under `directory`."""
    directory = epath.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for shard in self._shards:
      if shard.is_saved_here:
        self._checkpoint(shard).write(os.fspath(directory / self._name(shard)))
        state = {"num_batches": shard.num_batches, "stream": self._stream}
        (directory / f"{self._name(shard)}.json").write_text(json.dumps(state, indent=2) + "\n")

  def restore(self, directory: os.PathLike | str) -> None:
    """Restores the position that all hosts together saved, on any number: the next batch is the one that followed.

    Raises InputError if the state is of other shards, data or settings; FileNotFoundError if it contains no state.
    """
    directory = epath.Path(directory)
    saved_shards = {path.stem for path in directory.glob("shard-*.json")}
    if not saved_shards:
      raise FileNotFoundError(f"{directory} contains no state of a data iterator")
    for shard in self._shards:
      if self._name(shard) not in saved_shards:
        raise InputError(f"{directory} has no state for data.shards={self._num_shards}: set it back to what it was.")
      state = json.loads((directory / f"{self._name(shard)}.json").read_text())
      saved = {"packing": 1} | state["stream"]  # older states lack it
      changed = [f"{k} was {saved.get(k)!r} and is {v!r}" for k, v in self._stream.items() if saved.get(k) != v]
      problem = f"The data position in {directory} does not apply, since the data or its settings have changed"
      require(not changed, f"{problem} ({'; '.join(changed)}): restore them, or start in a new workdir.")
      # From the start: the state of an iterator that was not used does not undo the shuffles of one that was.
      self._start(shard)
      self._checkpoint(shard).read(os.fspath(directory / self._name(shard))).assert_consumed()
      shard.num_batches = state["num_batches"]

  @functools.cached_property
  def _stream(self) -> dict:
    """Everything that determines the batches: a state restored under other settings would silently give others."""
    config, sources = self._config, [task.source for task in self._tasks]
    return {
      "task": config.data.task,
      "split": self._split,
      "num_records": self._num_records,
      "files": [source.fingerprint(self._split) for source in sources if isinstance(source, ListSource)],
      "cached": False,  # older versions could read documents from data.cache_dir
      "seed": config.seed,
      "min_crop": config.data.min_crop,
      "packing": self._packing,
      "shuffle_buffer": config.data.shuffle_buffer,
      "sentencepiece": sentencepiece_fingerprint(config.data),
      "context": config.model.max_context,
      "latents": config.model.num_latents,
      "batch_size_per_shard": self._shard_rows,
      "shard_count": self._num_shards,
    }

  def _name(self, shard: _Shard) -> str:
    return f"shard-{shard.index:05d}-of-{self._num_shards:05d}"

  def _checkpoint(self, shard: _Shard) -> tf.train.Checkpoint:
    return tf.train.Checkpoint(**{f"records_{index}": batches for index, batches in enumerate(shard.batches)})


def _to_records(batch: Mapping[str, tf.Tensor]) -> list[Record]:
  return [dict(zip(batch, record)) for record in zip(*(value.numpy() for value in batch.values()))]


def to_global(
  batch: Mapping[str, np.ndarray], batch_size: int, shardings: Mapping[str, Sharding]
) -> dict[str, jax.Array]:
  """Global arrays of `batch_size` rows, of which `batch` contains those that this host provides."""
  return {
    name: jax.make_array_from_process_local_data(shardings[name], values, (batch_size, *values.shape[1:]))
    for name, values in batch.items()
  }
