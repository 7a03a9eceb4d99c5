"""From a task's source to its records and documents, and whether the model has room for them.

The records are tf.data's: they are read, and decoded where that is TensorFlow's part, in the background and with
bounded buffers, since all that a stage has ready belongs to a saved state. pipeline.py makes batches of what comes out.
"""

import itertools
from collections.abc import Iterator, Mapping

import numpy as np
import seqio

from perceiver_ar_jax.config import Config, InputError, nearest
from perceiver_ar_jax.data.documents import Document
from perceiver_ar_jax.data.registry import Record, Task
from perceiver_ar_jax.data.sources import TfdsSource
from perceiver_ar_jax.data.tasks import get_tasks
from perceiver_ar_jax.data.tf_cpu import tf
from perceiver_ar_jax.data.warn_once import last_message

AHEAD = 64
"""Records that TensorFlow has ready, small ones such as decoded pictures of 64x64; they are part of a saved state."""
_TF_THREADS = 8
"""Threads that read and decode records, in TensorFlow."""


def documents(config: Config, split: str, max_sequences: int | None = None) -> Iterator[tuple[Task, Document]]:
  """The documents of a split in order, one task of a mixture after the other, unreadable ones left out.

  Raises:
    InputError: as TrainIterator; or an endless split without `max_sequences`.
  """
  for task, _ in get_tasks(config.data, longest_crop(config)):
    check_vocabulary(task, config)
    check_position_dims(task, config)
    num_records(task, split)
    records = task.source.get_dataset(split=split, shuffle=False)
    if max_sequences is None and records.cardinality() == tf.data.INFINITE_CARDINALITY:
      raise InputError(
        f"The split {split!r} of {task.name} never ends: set eval.max_sequences to how many sequences to score."
      )
    opened = (task.open(record) for batch in preprocess(task, records).batch(1) for record in to_records(batch))
    whole = (document for document in opened if document is not None and not document.continues)
    for document in itertools.islice(whole, max_sequences):
      yield task, document


def none_readable(config: Config, split: str) -> InputError:
  """Returns what to raise where `documents` yields nothing."""
  last = last_message("skipped").removeprefix("Skipped: ") or "it is empty"
  return InputError(
    f"The split {split!r} of {config.data.task} has no document that can be read. The last reason: {last}."
    " Fix or remove such files, or hold out others (data.validation_fraction, data.validation_files)."
  )


def longest_crop(config: Config) -> int:
  """In events: the context's inputs and the last one's target."""
  return config.model.max_context + 1


def to_records(batch: Mapping[str, tf.Tensor]) -> list[Record]:
  """The records of a batch of them."""
  values = [value.numpy() for value in batch.values()]
  return [dict(zip(batch, one)) for one in zip(*values)]


def preprocess(task: Task, records: tf.data.Dataset) -> tf.data.Dataset:
  """The records after TensorFlow's part of the work, if there is any; then it goes on in the background."""
  for preprocessor in task.preprocessors:
    records = preprocessor(records)
  if task.preprocessors:
    records = records.prefetch(AHEAD)
  options = tf.data.Options()
  options.deterministic = True
  # All elements that a stage has ready are part of the saved state, so every buffer is bounded: parallel maps by the
  # threads there are, and no stages that TensorFlow adds by itself.
  options.threading.private_threadpool_size = _TF_THREADS
  options.autotune.enabled = False
  options.experimental_optimization.inject_prefetch = False
  options.experimental_optimization.map_and_batch_fusion = False
  return records.with_options(options)


def num_records(task: Task, split: str) -> int | None:
  """Records of a split, None where nobody knows; raises InputError for an unknown split or missing data."""
  if isinstance(task.source, TfdsSource):
    return task.source.num_input_examples(split)
  if split not in task.source.splits:
    raise InputError(f"The task {task.name} has no split {split!r}. {nearest(split, task.source.splits)}")
  return task.source.num_input_examples(split)


def shard_records(source, split: str, seed: int, index: int, count: int) -> tf.data.Dataset:
  """One shard of the records, the files (where there are any) in a new order in each epoch."""
  if source.supports_arbitrary_sharding:
    return source.get_dataset(
      split=split, shuffle=True, seed=seed, shard_info=seqio.ShardInfo(index=index, num_shards=count)
    )
  return source.get_dataset(split=split, shuffle=False).shard(count, index)


def check_vocabulary(task: Task, config: Config) -> None:
  """Raises InputError if the model has fewer token ids than the task."""
  size = task.vocab_size
  if size > config.model.vocab_size:
    raise InputError(
      f"The task {task.name} has {size} token ids (PAD, EOS and SOS included), but model.vocab_size is"
      f" {config.model.vocab_size}: set --config.model.vocab_size={size} or more."
    )


def check_position_dims(task: Task, config: Config) -> None:
  """Raises InputError if the model's positions have other dimensions than the task's."""
  if not config.model.positions_from_data or config.model.position_encoding == "relative":
    return
  if config.model.position_encoding == "rotary":
    if task.position_dims != 1:
      raise InputError(
        f"The task {task.name} has {task.position_dims} position dimensions, and rotary positions are one number: count"
        " them from the last token instead (--config.model.positions_from_data=False), or use learned ones."
      )
  elif len(config.model.position_sizes) != task.position_dims:
    raise InputError(
      f"Positions of the task {task.name} have {task.position_dims} dimensions, but"
      f" model.position_sizes={config.model.position_sizes} has {len(config.model.position_sizes)}: give one size"
      " (largest position + 1) for each."
    )


def check_positions(positions_BxLxP: np.ndarray, config: Config) -> None:
  """Raises InputError if a position lies beyond the model's tables."""
  if not config.model.positions_from_data or config.model.position_encoding in ("rotary", "relative"):
    return
  # One dimension at a time: over all at once, NumPy takes ten times as long.
  largest = [int(positions_BxLxP[..., dimension].max()) for dimension in range(positions_BxLxP.shape[-1])]
  sizes = config.model.position_sizes
  if any(position >= size for position, size in zip(largest, sizes)):
    raise InputError(
      f"The task {config.data.task} has positions up to {tuple(largest)}, beyond model.position_sizes={sizes}: make"
      " each size at least the largest position + 1 of all documents, which --mode=data shows."
    )
