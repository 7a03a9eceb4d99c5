"""From a task's source to its records and documents, and whether the model has room for them.

The records are tf.data's: they are read, and decoded where that is TensorFlow's part, in the background and with
bounded buffers, since all that a stage has ready belongs to a saved state. pipeline.py makes batches of what comes out.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from perceiver_ar_jax.config import Config, InputError, nearest
from perceiver_ar_jax.data.documents import Document, Unreadable
from perceiver_ar_jax.data.registry import Record, Task
from perceiver_ar_jax.data.sources import ListSource, TfdsSource
from perceiver_ar_jax.data.tasks import get_tasks
from perceiver_ar_jax.data.tf_cpu import seqio, tf
from perceiver_ar_jax.data.warn_once import newest_messages

AHEAD = 64
"""Records that TensorFlow has ready, small ones such as decoded pictures of 64x64; they are part of a saved state."""
_TF_THREADS = 8
"""Threads that read and decode records, in TensorFlow."""


def documents(
  config: Config, split: str, max_sequences: int | None = None, max_tokens: int | None = None
) -> Iterator[tuple[Task, Document]]:
  """Yields the documents of a split in order, one task of a mixture after the other; unreadable ones are left out.

  Args:
    config: the experiment.
    split: its name.
    max_sequences: only the first documents of each task; None: all.
    max_tokens: only documents up to this many scored events of each task, the last document cut; None: all.

  Raises:
    InputError: as TrainIterator; an endless split without a limit; or `max_tokens` is too small for any part of the
      first document.
  """
  for task, _ in get_tasks(config.data, longest_crop(config)):
    check_vocabulary(task, config)
    check_position_dims(task, config)
    num_records(task, split)
    records = task.source.get_dataset(split=split, shuffle=False)
    if max_sequences is None and max_tokens is None and records.cardinality() == tf.data.INFINITE_CARDINALITY:
      raise InputError(f"The split {split!r} of {task.name} never ends: set eval.max_sequences or eval.max_tokens.")
    opened = (_open(task, record) for batch in preprocess(task, records).batch(1) for record in to_records(batch))
    whole = (document for document in opened if document is not None and not document.continues)
    for document in _bounded(itertools.islice(whole, max_sequences), max_tokens):
      yield task, document


def num_documents(config: Config, split: str, max_sequences: int | None = None) -> int | None:
  """Returns how many documents `documents` yields at most; None where that is unknown."""
  total = 0
  for task, _ in get_tasks(config.data, longest_crop(config)):
    count = num_records(task, split)
    if isinstance(task.source, ListSource):
      count = task.source.num_documents(split)
    counts = [limit for limit in (count, max_sequences) if limit is not None]
    if not counts:
      return None
    total += min(counts)
  return total


def _open(task: Task, record: Record) -> Document | None:
  """As Task.open; None as well for a document that is read only when needed and cannot be read."""
  document = task.open(record)
  try:
    if document is not None and not document.continues:
      document.check_readable()
    return document
  except Unreadable as error:
    task.skip(record, error)
    return None


def _bounded(documents: Iterable[Document], max_tokens: int | None) -> Iterator[Document]:
  """Yields documents until `max_tokens` events are scored, the last one cut; see Document.head."""
  left, num_yielded = max_tokens, 0
  for document in documents:
    head = document if left is None else document.head(left)
    if head is None or not head.num_scored:
      if not num_yielded:
        raise InputError(
          f"eval.max_tokens={max_tokens} ends within the first document, and words and bytes of so small a part, or of"
          " a part of cached subword tokens, are unknown: raise it, or set eval.max_sequences instead."
        )
      return
    yield head
    num_yielded += 1
    if left is not None:
      left -= head.num_scored
      if left <= 0:
        return


def none_readable(config: Config, split: str) -> InputError:
  """Returns the error to raise where `documents` yields nothing."""
  return InputError(
    f"The split {split!r} of {config.data.task} contains no document that can be read: {skip_reasons()}. Fix or"
    " remove such files, or hold out others (data.validation_fraction, data.validation_files)."
  )


def skip_reasons() -> str:
  """Returns the newest reasons for which records were skipped."""
  reasons = [message.removeprefix("Skipped: ") for message in newest_messages("skipped", 3)]
  return "; ".join(reasons) or "it is empty"


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
