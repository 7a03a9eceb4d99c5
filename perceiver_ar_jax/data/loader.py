"""Training batches: an endless, exactly resumable stream, the same on any number of hosts.

The path of a batch: records of a shard, still encoded -> shuffle -> repeat -> documents -> random crops -> rows of the
hosts -> arrays over all devices. Shuffling before repeating makes every epoch use each record exactly once, and
shuffling encoded records keeps the saved state at the size of the shuffle buffer. The first stages are tf.data's, whose
state can be saved; the later ones are pure functions of a record and its number in NumPy.

The records are divided into `data.shards` shards, each of which provides an equal range of rows of every batch. A host
draws the records of the shards of its rows (encoded, or mere numbers and paths) and opens the documents of its own rows
only. Shards do not depend on hosts, so neither does their saved position.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from etils import epath
from jax.sharding import Sharding

from perceiver_ar_jax.config import Config, InputError
from perceiver_ar_jax.data import windows
from perceiver_ar_jax.data.documents import Unreadable
from perceiver_ar_jax.data.registry import Record, Task, skip_reasons, to_records
from perceiver_ar_jax.data.sources import ListSource, sentencepiece_fingerprint
from perceiver_ar_jax.data.tasks import get_tasks
from perceiver_ar_jax.data.tf_cpu import tf
from perceiver_ar_jax.data.windows import Batch

_SHUFFLE_BYTES = 32 * 2**20
"""Average size limit of a shuffle buffer: whole books would make checkpoints of gigabytes."""
_THREADS = min(16, os.cpu_count() or 1)
"""Threads of a host that fill rows, in Python."""


class _Example(NamedTuple):
  """A record that was drawn for a row, and the random numbers of the row."""

  task: Task
  record: Record
  draw: float
  """Determines the crop, in [0, 1)."""
  seed: int
  """Seed of its augmentation."""


@dataclasses.dataclass
class _Shard:
  """One shard of the records, and the position in it."""

  index: int
  rows: Sequence[int]
  """The rows that this host fills, among those that the shard provides for each batch."""
  is_saved_here: bool
  """Whether this host saves the position, which is the same on all hosts that read the shard."""
  records: list[Iterator] = dataclasses.field(default_factory=list)
  """Of each task."""
  num_batches: int = 0
  """Batches drawn, including those without a readable record; the number is the seed of a batch's crops."""


class TrainLoader:
  """Training batches, of each the rows of one host; the same for the same settings and after a restore.

  Batches are dicts of NumPy arrays: inputs int32[B, L], positions int32[B, L, P], targets int32[B, M], weights
  float32[B, M].

  Args:
    config: the experiment; `data`, `seed`, the batch size and the model's context and latents determine the batches.
    rows_of_hosts: for each host the rows of a batch that it provides, in order; None: one host provides all.
    host: the index of this host.

  Raises:
    InputError: unknown task or split, data that is not prepared, fewer records than shards, no readable record, or
      token ids and positions outside the model's tables (the last two only once a batch contains them).
  """

  def __init__(self, config: Config, rows_of_hosts: Sequence[Sequence[int]] | None = None, host: int = 0):
    self._config, self._split = config, config.data.train_split
    self._num_shards = config.data.shards
    self._shard_rows = config.train.batch_size // self._num_shards
    shares = get_tasks(config.data, windows.longest_crop(config))
    self._tasks = [task for task, _ in shares]
    self._cumulative_shares = np.cumsum([share for _, share in shares])
    self._smallest_share = min(share for _, share in shares)
    self._num_records = [self._count_records(task) for task in self._tasks]
    rows_of_hosts = [range(config.train.batch_size)] if rows_of_hosts is None else rows_of_hosts
    self.rows = rows_of_hosts[host]
    rows_of_shards = [self._rows_of_shard(self.rows, shard) for shard in range(self._num_shards)]
    self._shards = [
      _Shard(shard, rows, not any(self._rows_of_shard(others, shard) for others in rows_of_hosts[:host]))
      for shard, rows in enumerate(rows_of_shards)
      if rows
    ]
    for shard in self._shards:
      self._start(shard)

  def _count_records(self, task: Task) -> int | None:
    task.check_vocabulary(self._config)
    count = task.num_records(self._split)
    if count is not None and count < self._num_shards:
      raise InputError(
        f"The split {self._split!r} of {task.name} has {count} records, fewer than data.shards={self._num_shards}:"
        " lower it, or train on more data."
      )
    return count

  def _rows_of_shard(self, rows: Sequence[int], shard: int) -> list[int]:
    """Those of the batch's `rows` that `shard` provides, counted from its first row."""
    return [row - shard * self._shard_rows for row in rows if row // self._shard_rows == shard]

  def _start(self, shard: _Shard) -> None:
    """Moves to the start of the shard."""
    shard.num_batches, shard.records = 0, [iter(self._open(task, shard.index)) for task in self._tasks]

  def _open(self, task: Task, shard: int) -> tf.data.Dataset:
    data, seed = self._config.data, self._config.seed
    records = task.shard_records(self._split, seed=seed, index=shard, count=self._num_shards)
    record_bytes = getattr(task.source, "bytes_per_record", lambda split: 0)(self._split)
    buffer = min(
      -(-data.shuffle_buffer // self._num_shards),
      max(1, int(_SHUFFLE_BYTES / self._num_shards / max(record_bytes, 1))),
    )
    records = task.preprocess(records.shuffle(buffer, seed=seed, reshuffle_each_iteration=True).repeat())
    # Records of a fixed shape are drawn a batch at a time, which saves a call for each; a mixture draws one by one.
    fixed = all(spec.shape.is_fully_defined() for spec in records.element_spec.values())
    return records.batch(self._shard_rows if fixed and len(self._tasks) == 1 else 1)

  @property
  def task(self) -> Task:
    """The task, or the first one of a mixture, whose tasks have one modality and vocabulary."""
    return self._tasks[0]

  @property
  def spec(self) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and type of each array of a global batch, without drawing one."""
    rows = self._config.train.batch_size
    return {name: jax.ShapeDtypeStruct((rows, *row.shape[1:]), row.dtype) for name, row in self._empty(1).items()}

  def _empty(self, size: int) -> Batch:
    model, dims = self._config.model, self.task.position_dims
    return windows.empty_batch(size, context=model.max_context, latents=model.num_latents, position_dims=dims)

  def __iter__(self) -> TrainLoader:
    return self

  def __next__(self) -> Batch:
    batch, start = self._empty(len(self.rows)), 0
    for shard in self._shards:
      self._fill(shard, {name: values[start : start + len(shard.rows)] for name, values in batch.items()})
      start += len(shard.rows)
    windows.check_positions(batch["positions"], self._config)
    return batch

  def _fill(self, shard: _Shard, batch: Batch) -> None:
    """Fills the rows of one shard, which are empty."""
    for _ in range(self._max_attempts()):
      examples, readable = self._draw(shard), {}

      def fill_some(first: int, examples=examples, readable=readable) -> None:
        for index in range(first, len(shard.rows), _THREADS):
          example = examples[shard.rows[index]]
          readable[shard.rows[index]] = self._try(batch, index, example, example)

      list(_pool().map(fill_some, range(_THREADS)))
      if self._replace_unreadable(shard, batch, examples, readable):
        return
    raise InputError(
      f"The split {self._split!r} of {self._config.data.task} has {sum(self._num_records)} records, and none can be"
      f" read: {skip_reasons()}."
    )

  def _replace_unreadable(
    self, shard: _Shard, batch: Batch, examples: list[_Example], readable: dict[int, bool]
  ) -> bool:
    """Fills rows whose record is unreadable with a crop of the next readable example; False if all are unreadable.

    The example may belong to a row of another host, so that a batch is the same for any number of hosts.
    """
    for index, row in enumerate(shard.rows):
      if readable[row]:
        continue
      for candidate in ((row + step) % len(examples) for step in range(1, len(examples))):
        if readable.get(candidate, True):
          readable[candidate] = self._try(batch, index, examples[row], examples[candidate])
          if readable[candidate]:
            break
      else:
        return False
    return True

  def _try(self, batch: Batch, index: int, example: _Example, source: _Example) -> bool:
    """Fills a row with the random numbers of `example` and the record of `source`; False if that is unreadable."""
    document = source.task.open(source.record)
    if document is None:
      return False
    augment = source.task.augment
    if augment:
      augment = functools.partial(augment, random=np.random.default_rng(example.seed))
    row, min_crop = windows.row_of(batch, index), self._config.data.min_crop
    try:
      windows.train_window(row, document, example.draw, min_crop=min_crop, augment=augment)
      return True
    except Unreadable as error:  # a file that vanished or shrank since it was listed
      source.task.skip(source.record, error)
      return False

  def _max_attempts(self) -> int:
    """Number of batches without a readable record after which the whole split is known to have none."""
    if None in self._num_records:
      return 2**62
    return 2 + int(2 * sum(self._num_records) / self._shard_rows / self._smallest_share)

  def _draw(self, shard: _Shard) -> list[_Example]:
    """The examples of all rows that the shard provides for the next batch."""
    # Numbering batches over all shards gives the crops of each shard their own random numbers.
    number, size = shard.num_batches * self._num_shards + shard.index, self._shard_rows
    random = np.random.Generator(np.random.Philox(key=[self._config.seed % 2**64, number]))
    shard.num_batches += 1
    draws, seeds = random.random(size), random.integers(2**63, size=size)
    if len(self._tasks) == 1:
      chosen, records = [0] * size, []
      while len(records) < size:
        records += self._next_records(shard, 0)
    else:
      drawn = np.searchsorted(self._cumulative_shares, random.random(size), side="right")
      chosen = np.minimum(drawn, len(self._tasks) - 1)
      records = [record for index in chosen for record in self._next_records(shard, index)]
    return list(map(_Example, [self._tasks[index] for index in chosen], records, draws, seeds))

  def _next_records(self, shard: _Shard, task_index: int) -> list[Record]:
    batch = next(shard.records[task_index], None)
    if batch is None:
      raise InputError(
        f"Shard {shard.index} of {self._num_shards} has no record of {self._tasks[task_index].name}: there are too few"
        " files with records in them. Lower data.shards, or cache with fewer --shards."
      )
    return to_records(batch)

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

    Raises:
      InputError: the state is of other shards, or of other data (other settings).
      FileNotFoundError: `directory` contains no state at all.
    """
    for shard in self._shards:
      self._restore(shard, epath.Path(directory))

  def _restore(self, shard: _Shard, directory: epath.Path) -> None:
    path = directory / f"{self._name(shard)}.json"
    if not path.exists():
      saved_shards = sorted(path.stem for path in directory.glob("shard-*.json")) if directory.exists() else []
      if not saved_shards:
        raise FileNotFoundError(f"{directory} contains no state of a data iterator")
      raise InputError(
        f"{directory} contains no data iterator state for {self._name(shard)}, only for {', '.join(saved_shards)}: set"
        " data.shards back to what it was."
      )
    state = json.loads(path.read_text())
    names = {"num_records": "number of records", "files": "checksum of the files' names"}
    changed = [
      f"{names.get(name, name)} was {state['stream'].get(name)!r} and is {value!r}"
      for name, value in self._stream.items()
      if state["stream"].get(name) != value
    ]
    if changed:
      raise InputError(
        f"The data position in {directory} does not apply, since the data or its settings have changed"
        f" ({'; '.join(changed)}): restore files and settings, or start in a new workdir."
      )
    # From the start: the state of an iterator that was not used does not undo the shuffles of one that was.
    self._start(shard)
    self._checkpoint(shard).read(os.fspath(directory / self._name(shard))).assert_consumed()
    shard.num_batches = state["num_batches"]

  @functools.cached_property
  def _stream(self) -> dict:
    """Everything that determines the batches: a state restored under other settings would silently give others."""
    config = self._config
    sources = [task.source for task in self._tasks if isinstance(task.source, ListSource)]
    return {
      "task": config.data.task,
      "split": self._split,
      "num_records": self._num_records,
      "files": [source.fingerprint(self._split) for source in sources],
      "cached": config.data.cache_dir is not None,
      "seed": config.seed,
      "min_crop": config.data.min_crop,
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
    return tf.train.Checkpoint(**{f"records_{index}": records for index, records in enumerate(shard.records)})


def to_global(
  batch: Mapping[str, np.ndarray], rows: Sequence[int], batch_size: int, shardings: Mapping[str, Sharding]
) -> dict[str, jax.Array]:
  """Global arrays of `batch_size` rows, some of which each host provides.

  Args:
    batch: this host's rows.
    rows: their numbers, in order: at least those on its devices.
    batch_size: rows of all hosts together.
    shardings: the sharding of each array; dimensions other than the rows may be sharded as well.
  """

  def globalise(values: np.ndarray, sharding: Sharding) -> jax.Array:
    def local_part(index: tuple[slice, ...]) -> np.ndarray:
      first, end, _ = index[0].indices(batch_size)
      start = np.searchsorted(rows, first)
      return values[(slice(start, start + end - first), *index[1:])]

    return jax.make_array_from_callback((batch_size, *values.shape[1:]), sharding, local_part)

  return {name: globalise(values, shardings[name]) for name, values in batch.items()}


@functools.cache
def _pool() -> concurrent.futures.ThreadPoolExecutor:
  """The threads that fill rows, of all loaders."""
  return concurrent.futures.ThreadPoolExecutor(_THREADS)
