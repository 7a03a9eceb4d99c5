"""Makes rows of batches: an endless, resumable stream of training batches, and a pass over a split for evaluation.

Batches are dicts of NumPy arrays: inputs int32[B, L], positions int32[B, L, P], targets int32[B, M], weights
float32[B, M]. Which rows of a batch a host makes, and how it brings them to its devices, is global_batch.py's.

Order of the training stages: a shard's records, still encoded -> shuffle -> repeat -> documents -> crops ->
batches. Shuffling before repeating makes every epoch see each record just once, and shuffling encoded records keeps
the saved state at the size of the shuffle buffer. The first stages are tf.data's, whose state can be saved; the others,
from documents on, are functions of a record and its number in NumPy, and have no state.
"""

import concurrent.futures
import functools
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from etils import epath

from perceiver_ar_jax.config import Config, InputError
from perceiver_ar_jax.data import features
from perceiver_ar_jax.data import records as records_lib
from perceiver_ar_jax.data.documents import Document, Unreadable
from perceiver_ar_jax.data.features import Batch
from perceiver_ar_jax.data.registry import Record, Task
from perceiver_ar_jax.data.sources import ListSource, sentencepiece_fingerprint
from perceiver_ar_jax.data.tasks import get_tasks
from perceiver_ar_jax.data.tf_cpu import tf

_SHUFFLE_BYTES = 32 * 2**20
"""The most that the records in a shuffle take on average: whole books would make checkpoints of gigabytes."""
_THREADS = min(16, os.cpu_count() or 1)
"""Threads of a host that make rows, in Python."""


class _Example(NamedTuple):
  """What a training row is made of."""

  task: Task
  record: Record
  draw: float
  """Decides on the crop, in [0, 1)."""
  seed: int
  """Decides on its augmentation."""


class TrainIterator:
  """Training batches of one shard of the records, without end; the same ones for the same settings and after a restore.

  Args:
    config: the experiment; `data`, `seed` and the model's context and latents shape the stream.
    batch_size: rows of each batch.
    shard_index: this shard's number; each consists of records of its own.
    shard_count: number of shards.
    rows: the rows of each batch to make, in order; None: all. They do not depend on which others are made.

  Raises:
    InputError: unknown task or split, data that is not prepared, fewer records than shards, no record that can be read,
      or events and positions for which the model has no room (the last two only once a batch shows it).
  """

  def __init__(
    self,
    config: Config,
    batch_size: int,
    shard_index: int = 0,
    shard_count: int = 1,
    rows: Sequence[int] | None = None,
  ):
    self._config, self._batch_size = config, batch_size
    self._shard_index, self._shard_count = shard_index, shard_count
    self._rows = range(batch_size) if rows is None else rows
    shares = get_tasks(config.data, records_lib.longest_crop(config))
    self._tasks = [task for task, _ in shares]
    self._cumulative_shares = np.cumsum([share for _, share in shares])
    self._smallest_share = min(share for _, share in shares)
    split = config.data.train_split
    self._num_records = []
    for task in self._tasks:
      records_lib.check_vocabulary(task, config)
      records_lib.check_position_dims(task, config)
      self._num_records.append(records_lib.num_records(task, split))
      if self._num_records[-1] is not None and self._num_records[-1] < shard_count:
        raise InputError(
          f"The split {split!r} of {task.name} has {self._num_records[-1]} records, fewer than"
          f" data.shards={shard_count}, the parts that they are to be divided into: lower it, or train on more data."
        )
    self._name = f"shard-{shard_index:05d}-of-{shard_count:05d}"
    # What fixes the stream: a state restored under other settings would silently be another stream.
    self._stream = {
      "task": config.data.task,
      "split": split,
      "num_records": self._num_records,
      "files": [task.source.fingerprint(split) for task in self._tasks if isinstance(task.source, ListSource)],
      "cached": config.data.cache_dir is not None,
      "seed": config.seed,
      "min_crop": config.data.min_crop,
      "shuffle_buffer": config.data.shuffle_buffer,
      "sentencepiece": sentencepiece_fingerprint(config.data),
      "context": config.model.max_context,
      "latents": config.model.num_latents,
      "batch_size_per_shard": batch_size,
      "shard_count": shard_count,
    }
    self._begin()

  def _begin(self):
    """Moves to the beginning of the stream."""
    self._num_batches = 0
    """Batches drawn so far, whatever became of them; each one's number is the seed of its crops."""
    self._records = [iter(self._open(task)) for task in self._tasks]

  def _open(self, task: Task) -> tf.data.Dataset:
    config = self._config
    records = records_lib.shard_records(
      task.source, config.data.train_split, config.seed, self._shard_index, self._shard_count
    )
    record_bytes = getattr(task.source, "bytes_per_record", lambda split: 0)(config.data.train_split)
    buffer = min(
      -(-config.data.shuffle_buffer // self._shard_count),
      max(1, int(_SHUFFLE_BYTES / self._shard_count / max(record_bytes, 1))),
    )
    records = records.shuffle(buffer, seed=config.seed, reshuffle_each_iteration=True).repeat()
    records = records_lib.preprocess(task, records)
    # Records of one shape come a batch at a time, which saves a call for each; a mixture draws one by one.
    fixed = all(spec.shape.is_fully_defined() for spec in records.element_spec.values())
    return records.batch(self._batch_size if fixed and len(self._tasks) == 1 else 1)

  @property
  def task(self) -> Task:
    """The task, or the first one of a mixture, whose tasks have one modality and vocabulary."""
    return self._tasks[0]

  @property
  def spec(self) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and type of each array of a whole batch, without drawing one."""
    batch = self._empty(1)
    return {name: jax.ShapeDtypeStruct((self._batch_size, *row.shape[1:]), row.dtype) for name, row in batch.items()}

  def _empty(self, size: int) -> Batch:
    model = self._config.model
    dims = self.task.position_dims
    return features.empty_batch(size, context=model.max_context, latents=model.num_latents, position_dims=dims)

  def __iter__(self) -> "TrainIterator":
    return self

  def __next__(self) -> Batch:
    for _ in range(self._max_attempts()):
      batch, examples, readable = self._empty(len(self._rows)), self._draw(), {}
      list(_pool().map(functools.partial(self._fill, batch, examples, readable), range(_THREADS)))
      if self._make_up(batch, examples, readable):
        records_lib.check_positions(batch["positions"], self._config)
        return batch
    raise InputError(
      f"The split {self._config.data.train_split!r} of {self._config.data.task} has {sum(self._num_records)} records,"
      f" and none can be read: {records_lib.skip_reasons()}."
    )

  def _fill(self, batch: Batch, examples: list[_Example], readable: dict[int, bool], first: int) -> None:
    """Fills every _THREADS-th row from `first` on; notes in `readable` which examples can be read."""
    for place in range(first, len(self._rows), _THREADS):
      example = self._rows[place]
      readable[example] = self._try(batch, place, examples[example], examples[example])

  def _make_up(self, batch: Batch, examples: list[_Example], readable: dict[int, bool]) -> bool:
    """Gives rows whose records cannot be read a crop of the next example that can be; False if there is none.

    It may be one of a row that is not made here, so that a batch is the same however many hosts make it.
    """
    for place, row in enumerate(self._rows):
      if readable[row]:
        continue
      for other in ((row + step) % len(examples) for step in range(1, len(examples))):
        if readable.get(other, True):
          readable[other] = self._try(batch, place, examples[row], examples[other])
          if readable[other]:
            break
      else:
        return False
    return True

  def _try(self, batch: Batch, place: int, example: _Example, source: _Example) -> bool:
    """Fills a row by the draws of `example` with a crop of the record of `source`; False if that cannot be read."""
    document = source.task.open(source.record)
    if document is None:
      return False
    try:
      self._crop(batch, place, example._replace(task=source.task), document)
      return True
    except Unreadable as error:  # a file that vanished or shrank since it was listed
      source.task.skip(source.record, error)
      return False

  def _crop(self, batch: Batch, place: int, example: _Example, document: Document) -> None:
    augment = example.task.augment
    if augment:
      augment = functools.partial(augment, random=np.random.default_rng(example.seed))
    row = features.row_of(batch, place)
    features.train_window(row, document, example.draw, min_crop=self._config.data.min_crop, augment=augment)

  def _max_attempts(self) -> int:
    """Batches in a row without a readable record after which there is none in the whole split."""
    if None in self._num_records:
      return 2**62
    return 2 + int(2 * sum(self._num_records) / self._batch_size / self._smallest_share)

  def _draw(self) -> list[_Example]:
    """What the rows of the next batch are made of."""
    # Numbering batches over all shards gives each of them crops of its own.
    number = self._num_batches * self._shard_count + self._shard_index
    random = np.random.Generator(np.random.Philox(key=[self._config.seed % 2**64, number]))
    self._num_batches += 1
    draws, seeds = random.random(self._batch_size), random.integers(2**63, size=self._batch_size)
    if len(self._tasks) == 1:
      chosen, records = [0] * self._batch_size, []
      while len(records) < self._batch_size:
        records += self._next(0)
    else:
      places = np.searchsorted(self._cumulative_shares, random.random(self._batch_size), side="right")
      chosen = np.minimum(places, len(self._tasks) - 1)
      records = [record for index in chosen for record in self._next(index)]
    return list(map(_Example, [self._tasks[index] for index in chosen], records, draws, seeds))

  def _next(self, index: int) -> list[Record]:
    """The next record or records of a task."""
    batch = next(self._records[index], None)
    if batch is None:
      raise InputError(
        f"Shard {self._shard_index} of {self._shard_count} has no record of {self._tasks[index].name}: there are too"
        " few files with records in them. Lower data.shards, or cache with fewer --shards."
      )
    return records_lib.to_records(batch)

  def save(self, directory: os.PathLike | str) -> None:
    """Writes the complete state into files of this shard's own under `directory`, which is made if need be."""
    directory = epath.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    self._checkpoint().write(os.fspath(directory / self._name))
    state = {"num_batches": self._num_batches, "stream": self._stream}
    (directory / f"{self._name}.json").write_text(json.dumps(state, indent=2) + "\n")

  def restore(self, directory: os.PathLike | str) -> None:
    """Restores the state that `save` wrote: the next batch is the one that followed then.

    Raises:
      InputError: the state is of other shards, or belongs to another stream (other settings).
      FileNotFoundError: `directory` contains no state at all.
    """
    directory = epath.Path(directory)
    settings = directory / f"{self._name}.json"
    if not settings.exists():
      shards = sorted(path.stem for path in directory.glob("shard-*.json")) if directory.exists() else []
      if not shards:
        raise FileNotFoundError(f"{directory} contains no state of a data iterator")
      raise InputError(
        f"{directory} contains no data iterator state for {self._name}, only for {', '.join(shards)}: set data.shards"
        " back to what it was."
      )
    state = json.loads(settings.read_text())
    saved = state["stream"]
    names = {"num_records": "number of records", "files": "checksum of the files' names"}
    changed = [
      f"{names.get(name, name)} was {saved.get(name)!r} and is {value!r}"
      for name, value in self._stream.items()
      if saved.get(name) != value
    ]
    if changed:
      raise InputError(
        f"The place in the data that {directory} holds means nothing here, since the data or its settings are others"
        f" than they were ({'; '.join(changed)}): put files and settings back as they were, or start in a new workdir."
      )
    # Begin anew: the state of an iterator that had not begun does not undo the shuffles of one that has.
    self._begin()
    self._checkpoint().read(os.fspath(directory / self._name)).assert_consumed()
    self._num_batches = state["num_batches"]

  def _checkpoint(self) -> tf.train.Checkpoint:
    return tf.train.Checkpoint(**{f"records_{index}": records for index, records in enumerate(self._records)})


def eval_documents(config: Config) -> Iterator[tuple[Task, Document]]:
  """Yields the documents that `config.eval` scores; raises InputError as records.documents."""
  settings = config.eval
  return records_lib.documents(config, settings.split, settings.max_sequences, settings.max_tokens)


def check_held_out(config: Config) -> None:
  """Raises InputError if `eval_documents` fails or yields nothing; stops at the first document that can be read."""
  if next(eval_documents(config), None) is None:
    raise records_lib.none_readable(config, config.eval.split)


def eval_batches(
  config: Config, documents: Iterable[tuple[Task, Document]], rows: Sequence[int] | None = None
) -> Iterator[Batch]:
  """Yields batches of sliding windows over documents, in order, in which every scored event has weight 1 exactly once.

  The windows of all documents form one list, and each batch takes the next `config.eval.batch_size` of them; the last
  one is filled up with rows of PAD and weight 0. So hosts that make some of the rows each yield equally many batches.

  Batches have two more arrays than those of training, int32[B]: `document`, the number of the row's document, -1 for
  rows of PAD; and `end`, the number of events of it up to the row's last target. Batches of text have two further ones:
  `words` and `bytes` of the original text, those of each document in its first row and 0 in the others.

  Args:
    config: `eval` determines the windows.
    documents: such as `eval_documents`.
    rows: the rows of each batch to make, in order; None: all.

  Raises:
    InputError: as TrainIterator, or as `documents`.
  """
  settings, num_latents = config.eval, config.eval.num_latents or config.model.num_latents
  task, _ = get_tasks(config.data, records_lib.longest_crop(config))[0]
  counted = ("words", "bytes") if task.modality == "text" else ()
  rows = range(settings.batch_size) if rows is None else rows

  def blocks() -> Iterator[tuple[int, Document, int, int, bool]]:
    for number, (_, document) in enumerate(documents):
      for block, (end, num_new) in enumerate(features.eval_blocks(len(document), settings.stride or num_latents)):
        yield number, document, end, num_new, block == 0

  for windows in _batched(blocks(), settings.batch_size):
    batch = features.empty_batch(
      len(rows), context=config.model.max_context, latents=num_latents, position_dims=task.position_dims
    )
    batch |= {name: np.zeros(len(rows), np.int32) for name in ("end", *counted)}
    batch["document"] = np.full(len(rows), -1, np.int32)
    for index, row in enumerate(rows):
      if row >= len(windows):
        break
      number, document, end, num_new, is_first = windows[row]
      batch["document"][index], batch["end"][index] = number, end
      features.eval_window(features.row_of(batch, index), document, end, num_new)
      for name in counted if is_first else ():
        batch[name][index] = document.counts()[name]
    records_lib.check_positions(batch["positions"], config)
    yield batch


@functools.cache
def _pool() -> concurrent.futures.ThreadPoolExecutor:
  """The threads that make rows, of all iterators."""
  return concurrent.futures.ThreadPoolExecutor(_THREADS)


def _batched(items: Iterable, size: int) -> Iterator[list]:
  """Lists of `size` items, the last one maybe shorter."""
  items = iter(items)
  while batch := list(itertools.islice(items, size)):
    yield batch
