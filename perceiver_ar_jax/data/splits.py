"""The documents of a split in order, for evaluation and inspection, and their sliding windows."""

import itertools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from perceiver_ar_jax.config import Config, InputError
from perceiver_ar_jax.data import tasks, units, warn_once, windows
from perceiver_ar_jax.data.documents import Document
from perceiver_ar_jax.data.registry import Task
from perceiver_ar_jax.data.sources import ListSource
from perceiver_ar_jax.data.tf_cpu import tf


def documents(
  config: Config, split: str, max_sequences: int | None = None, max_tokens: int | None = None
) -> Iterator[tuple[Task, Document]]:
  """Yields the documents of a split in order, one task of a mixture after the other; unreadable ones are left out.

  Of each task, it yields at most the first `max_sequences` documents and `max_tokens` scored events, the last document
  cut. Raises InputError as loader.TrainLoader, where these limits do not suit the split, and if it yields nothing.
  """
  is_empty = True
  for task, _ in tasks.get_tasks(config.data, config.model.max_context + 1):
    task.num_records(config, split)
    records = task.source.get_dataset(split=split, shuffle=False)
    if max_sequences is None and max_tokens is None and records.cardinality() == tf.data.INFINITE_CARDINALITY:
      raise InputError(f"The split {split!r} of {task.name} never ends: set eval.max_sequences or eval.max_tokens.")
    opened = map(task.open, task.preprocess(records).as_numpy_iterator())
    whole = (document for document in opened if document is not None and not document.continues)
    left = max_tokens
    for document in itertools.islice(whole, max_sequences):
      if left is not None:
        document = document.head(left)
        left -= document.num_scored
      is_empty = False
      yield task, document
      if left == 0:
        break
  if is_empty:
    raise none_readable(config, split)


def num_documents(config: Config, split: str, max_sequences: int | None = None) -> int | None:
  """Returns how many documents `documents` yields at most; None where that is unknown."""
  total = 0
  for task, _ in tasks.get_tasks(config.data, config.model.max_context + 1):
    count = task.num_records(config, split)
    if isinstance(task.source, ListSource):
      count = task.source.num_documents(split)
    if count is None and max_sequences is None:
      return None
    total += min(limit for limit in (count, max_sequences) if limit is not None)
  return total


def eval_documents(config: Config) -> Iterator[tuple[Task, Document]]:
  """Yields the documents that `config.eval` scores."""
  settings = config.eval
  return documents(config, settings.split, settings.max_sequences, settings.max_tokens)


def none_readable(config: Config, split: str) -> InputError:
  """Returns the error of a split of which no document can be read, or nothing is scored."""
  return InputError(
    f"The split {split!r} of {config.data.task} contains no document that can be read: {warn_once.skip_reasons()}."
    " Remove such files, or hold out others (data.validation_fraction, data.validation_files)."
  )


def eval_batches(
  config: Config, documents: Iterable[tuple[Task, Document]], rows: Sequence[int] | None = None
) -> Iterator[windows.Batch]:
  """Yields batches of sliding windows over documents, in order, in which every scored event has weight 1 exactly once.

  Each batch takes the next `config.eval.batch_size` of all windows; the last one is padded with rows of PAD. `rows` are
  those of each batch to provide, in order; None: all. Raises InputError as loader.TrainLoader.

  Batches have more arrays than those of training, int32[B]: `document`, the number of the row's document, -1 for rows
  of PAD; `end`, the number of events of it up to the row's last target; and each of units.COUNTS, such as `words` of
  the original text: those of a document in its first row and 0 in the others.
  """
  settings, num_latents = config.eval, config.eval.num_latents or config.model.num_latents
  task, _ = tasks.get_tasks(config.data, config.model.max_context + 1)[0]
  rows = range(settings.batch_size) if rows is None else rows
  blocks = (
    (number, document, end, num_new)
    for number, (_, document) in enumerate(documents)
    for end, num_new in windows.eval_blocks(len(document), settings.stride or num_latents)
  )
  while batch_blocks := list(itertools.islice(blocks, settings.batch_size)):
    batch = windows.empty_batch(len(rows), config.model, task.position_dims, latents=num_latents)
    batch["document"] = np.full(len(rows), -1, np.int32)
    batch |= {name: np.zeros(len(rows), np.int32) for name in ("end", *units.COUNTS)}
    for index, row in enumerate(row for row in rows if row < len(batch_blocks)):
      number, document, end, num_new = batch_blocks[row]
      batch["document"][index], batch["end"][index] = number, end
      windows.eval_window(windows.row_of(batch, index), document, end, num_new)
      if end - num_new == 1:  # the document's first block
        counts = document.counts()
        for name in units.COUNTS:
          batch[name][index] = counts.get(name, 0)
    windows.check_positions(batch, config)
    yield batch
