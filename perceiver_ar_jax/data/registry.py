"""Tasks and their registry: a task defines a source, converts its records to documents, and names their unit.

A builder makes the task for the data settings of a config, and `add` registers it, also as a seqio task of the same
name: docs/extending.md has an example.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import wrapt

from perceiver_ar_jax.config import Config, DataConfig, InputError, nearest, require
from perceiver_ar_jax.config.checks import require_choice
from perceiver_ar_jax.data import EOS, NUM_SPECIAL, units, warn_once
from perceiver_ar_jax.data.documents import Document, Unreadable, count_positions
from perceiver_ar_jax.data.sources import TfdsSource
from perceiver_ar_jax.data.tf_cpu import seqio, tf

PREFETCH = 64  # records that TensorFlow has ready, such as decoded pictures of 64x64; they are part of a saved state
_MODALITIES = ("audio", "image", "music", "numbers", "rolls", "text", "video")
Record = Mapping[str, Any]  # one record of a source: NumPy scalars and arrays, bytes for strings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
  """A dataset under given data settings."""

  name: str
  source: seqio.DataSource
  document: Callable[[Record], Document]  # converts a record of the source to a document; see `open` for its errors
  modality: str
  unit: str  # unit of its held-out loss: one of units.UNITS
  vocab_size: int  # number of event ids, PAD, EOS and SOS included
  decode: Callable[[np.ndarray], Any]  # converts events int32[n] to a picture, a text, notes or codes (of video flat)
  position_dims: int = 1
  encoding: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  """Settings that determine the meaning of ids and positions: a model can only be used with those of its training."""
  preprocessors: Sequence[Callable[..., tf.data.Dataset]] = ()
  """Functions from dataset to dataset between source and `document`, such as decoding PNG in TensorFlow."""
  augment: Callable[[np.ndarray, np.random.Generator], np.ndarray] | None = None
  """Changes the events of a training crop at random."""
  train_scored_only: bool = False
  """Whether training, too, leaves out what evaluation does not score: ids that nothing predicts."""
  read: Callable[[Any], Document] | None = None
  """Returns the document of a prompt: the bytes of a text, or else the path (str) of a file; None: no such prompts."""
  length: int | None = None  # events of every document; None: they vary
  place: Callable[[int, int], np.ndarray] | None = lambda start, end: count_positions(end - start)
  """(start, end) -> positions int32[end - start, P] of these events of a generated document, in a window from `start`;
  None: they are part of the document."""
  groups: Sequence[Iterable[int]] | None = None
  """The events allowed at the indices of each group; None: one group, of all events but PAD and SOS."""
  group: Callable[[np.ndarray], np.ndarray] = np.zeros_like  # indices int[n] in a document -> their groups int[n]

  def __post_init__(self):
    require_choice("unit", self.unit, units.UNITS)
    require_choice("modality", self.modality, _MODALITIES)

  def allowed(self) -> np.ndarray:
    """bool[G, V], see `groups`."""
    groups = self.groups or [[EOS, *range(NUM_SPECIAL, self.vocab_size)]]
    return np.stack([np.isin(np.arange(self.vocab_size), list(ids)) for ids in groups])

  def open(self, record: Record) -> Document | None:
    """Returns the document of a record; None, with a warning, if it cannot be decoded or has nothing to predict.

    Errors of the settings, memory and the file system are raised: the next record would meet them too.
    """
    name = os.fsdecode(record["path"]) if "path" in record else f"A record of {self.name}"
    try:
      document = self.document(record)
      if document.has_targets():
        return document
      reason = f"{name} has nothing to predict"
    except Unreadable as error:
      reason = str(error)
    except (InputError, MemoryError):
      raise
    except Exception as error:
      if isinstance(error, OSError) and error.errno is not None:  # decoders raise it without a number
        raise
      reason = f"{name} cannot be decoded ({type(error).__name__}: {error})"
    self.skip(record, reason)
    return None

  def skip(self, record: Record, reason: object) -> None:
    """Reports that a record is not used; a file counts once, however many of its records are skipped, and how often."""
    warn_once.warn_once("skipped", f"Skipped: {reason}", subject=record.get("path"))

  def num_records(self, config: Config, split: str) -> int | None:
    """Returns the number of records of a split, None if it is endless.

    Raises InputError for an unknown split, missing data, or a model with fewer token ids than the task.
    """
    size, given = self.vocab_size, config.model.vocab_size
    require(size <= given, f"{self.name} has {size} token ids: model.vocab_size={given} must be at least {size}.")
    name = split.partition("[")[0] if isinstance(self.source, TfdsSource) else split  # parts such as train[:90%]
    known = self.source.splits
    require(name in known, f"The task {self.name} has no split {name!r}. {nearest(name, known)}")
    return self.source.num_input_examples(split)

  def preprocess(self, records: tf.data.Dataset) -> tf.data.Dataset:
    """Returns the records after TensorFlow's part of the work, which continues in the background."""
    for preprocessor in self.preprocessors:
      records = preprocessor(records)
    if self.preprocessors:
      records = records.prefetch(PREFETCH)
    # Elements that a stage has ready are part of the saved state, so every buffer is bounded and none is added.
    options = tf.data.Options()
    options.deterministic = True  # TFDS turns it off where it shuffles files
    options.threading.private_threadpool_size = 8
    options.autotune.enabled = False
    options.experimental_optimization.inject_prefetch = False
    options.experimental_optimization.map_and_batch_fusion = False
    return records.with_options(options)


Builder = Callable[[DataConfig, int], Task]  # (data settings, longest crop in events) -> task; it reads nothing
_BUILDERS: dict[str, Builder] = {}


def add(name: str, build: Builder) -> None:
  """Registers a task, here and, once seqio is imported, under default settings with seqio."""

  def add_to_seqio(seqio):
    task = build(DataConfig(task=name), 2048)  # the longest crop, on which only the length of copies depends
    seqio.TaskRegistry.add_provider(name, to_seqio(task))

  _BUILDERS[name] = build
  wrapt.register_post_import_hook(add_to_seqio, "seqio")


def names() -> list[str]:
  """All registered tasks and mixtures."""
  return sorted({*_BUILDERS, *seqio.MixtureRegistry.names()})


def get_tasks(data: DataConfig, max_events: int) -> list[tuple[Task, float]]:
  """The task that `data` names, or the tasks of the mixture, each with its share of the training examples.

  `data.task` is the name of a task or a seqio.Mixture, or a mixture itself: "pg19:3+text_files:1". Raises InputError
  for an unknown name, a wrong rate, or tasks of different vocabularies.
  """
  rates = _mixture_rates(data.task)
  tasks = [_BUILDERS[name](dataclasses.replace(data, task=name), max_events) for name in rates]
  if len({(task.modality, task.vocab_size, task.position_dims) for task in tasks}) > 1:
    kinds = "; ".join(f"{task.name}: {task.modality}, {task.vocab_size} ids" for task in tasks)
    raise InputError(f"data.task={data.task!r} mixes different vocabularies ({kinds}): mix tasks of one vocabulary.")
  return [(task, rate / sum(rates.values())) for task, rate in zip(tasks, rates.values())]


def _mixture_rates(name: str) -> dict[str, float]:
  if name not in _BUILDERS and name in seqio.MixtureRegistry.names():
    mixture = seqio.MixtureRegistry.get(name)
    return {task.name: mixture.get_rate(task) for task in mixture.tasks}
  rates = {}
  for part in name.split("+"):
    task, _, rate = part.strip().partition(":")
    if task not in _BUILDERS:
      raise InputError(f"data.task={name!r} is unknown. {nearest(task, names())}")
    try:
      rates[task] = float(rate or 1)
    except ValueError:
      rates[task] = 0
    is_share = 0 < rates[task] < float("inf")
    require(is_share, f"data.task={name!r}: {rate!r} is not a valid share of the mixture: give a number above 0.")
  return rates


def to_seqio(task: Task) -> seqio.Task:
  """The seqio task that yields the documents of `task` whole: their events and positions."""

  def whole(names: Sequence[str], *values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    document = task.open(dict(zip(names, values)))
    if document is None or document.continues:
      return np.zeros(0, np.int32), np.zeros((0, task.position_dims), np.int32)  # filtered out below
    events, positions = document.read(0, len(document)), document.positions(0, len(document))
    return np.asarray(events, np.int32), np.asarray(positions, np.int32)

  def to_document(record: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    read, values = functools.partial(whole, list(record)), list(record.values())
    events, positions = tf.numpy_function(read, values, [tf.int32, tf.int32], stateful=False)
    events.set_shape([None])
    positions.set_shape([None, task.position_dims])
    return {"events": events, "positions": positions}

  def to_documents(records: tf.data.Dataset) -> tf.data.Dataset:
    # Functions of a record and not a generator, whose iterators cannot be saved.
    return records.map(to_document).filter(lambda document: tf.size(document["events"]) > 1)

  def feature(ids: int, rank: int) -> seqio.Feature:
    return seqio.Feature(seqio.PassThroughVocabulary(ids, EOS), add_eos=False, dtype=tf.int32, rank=rank)

  return seqio.Task(
    task.name,
    source=task.source,
    preprocessors=[*task.preprocessors, to_documents],
    output_features={"events": feature(task.vocab_size, 1), "positions": feature(0, 2)},
  )
