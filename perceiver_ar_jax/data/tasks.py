"""The registry of tasks: each names its source, makes documents of its records, and says how it is scored.

A fork adds a task in a few lines: a seqio source, a function from one record to one whole document, and `add`. To
read, say, the poems of a prepared TFDS dataset as bytes:

    def poem(record):
      bytes_N = tf.cast(tf.io.decode_raw(record["text"], tf.uint8), tf.int32) + NUM_SPECIAL
      events_N = tf.concat([[SOS], bytes_N, [EOS]], axis=0)
      return {"events": events_N, "positions": tf.range(1, tf.size(events_N) + 1)[:, None]}

    tasks.add("poems", source=TfdsSource("my_poems:1.0.0"), preprocessors=[seqio.map_over_dataset(poem)],
              info=TaskInfo(unit="bits_per_byte", modality="bytes"), vocab_size=259)

Documents are whole: cutting them to the context is the work of features.py. Preprocessors may take `sequence_length`,
whose "events" is the longest crop (context + 1).
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence

import seqio
import tensorflow_datasets as tfds

from perceiver_ar_jax.config import InputError, nearest
from perceiver_ar_jax.data import EOS, NUM_SPECIAL, SOS, images, photos
from perceiver_ar_jax.data.sources import NumberSource, TfdsSource
from perceiver_ar_jax.data.tf_cpu import tf

UNITS = ("bits_per_dim", "accuracy", "bits_per_byte", "word_perplexity")

NUM_COPY_VALIDATION = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskInfo:
  """What evaluation and sampling need to know of a task."""

  unit: str
  """The task's own figure of merit: one of UNITS."""
  modality: str
  """What a document is: image or bytes."""
  image_size: int | None = None
  """Images: pixels a side."""
  image_order: str | None = None
  """Images: one of images.ORDERS."""

  def __post_init__(self):
    if self.unit not in UNITS:
      raise ValueError(f"unit={self.unit!r} is unknown. {nearest(self.unit, UNITS)}")


_INFO: dict[str, TaskInfo] = {}


def add(name: str, *, source: seqio.DataSource, preprocessors: Sequence[Callable], info: TaskInfo, vocab_size: int):
  """Registers a task whose preprocessors end in documents; see the module's example.

  Args:
    name: what `data.task` will call it.
    source: where the records come from.
    preprocessors: functions from dataset to dataset; the last yields `events` int32[N], `positions` int32[N, P] and,
      where not all events count in evaluation, `scored` int32[N].
    info: how to score and show it.
    vocab_size: number of ids, PAD, EOS and SOS included.
  """
  vocabulary = seqio.PassThroughVocabulary(vocab_size, eos_id=EOS)
  seqio.TaskRegistry.add(
    name,
    source=source,
    preprocessors=list(preprocessors),
    output_features={
      "events": seqio.Feature(vocabulary, add_eos=False, dtype=tf.int32),
      "positions": seqio.Feature(seqio.PassThroughVocabulary(0), add_eos=False, dtype=tf.int32, rank=2),
    },
  )
  _INFO[name] = info


def names() -> list[str]:
  """All registered tasks."""
  return sorted(_INFO)


def get_task(name: str, data_dir: str | os.PathLike | None = None) -> seqio.Task:
  """The task, reading prepared datasets from `data_dir`; raises InputError for an unknown name."""
  _require_known(name)
  task = seqio.TaskRegistry.get(name)
  if data_dir is not None and isinstance(task.source, TfdsSource):
    task = task.replace(source=task.source.at(data_dir))
  return task


def get_info(name: str) -> TaskInfo:
  """How the task is scored and shown; raises InputError for an unknown name."""
  _require_known(name)
  return _INFO[name]


def vocab_size(task: seqio.Task) -> int:
  """Number of ids that the task's documents may hold."""
  return task.output_features["events"].vocabulary.vocab_size


def _require_known(name: str) -> None:
  if name not in _INFO:
    raise InputError(f"data.task={name!r} is unknown. {nearest(name, _INFO)}")


def image_document(image_SxSxC: tf.Tensor, size: int, order: str) -> dict[str, tf.Tensor]:
  """The document of a picture uint8[size, size, 3]; see images.py."""
  image_SxSxC = tf.ensure_shape(image_SxSxC, [size, size, 3])
  if order == "rgb_planes":
    image_SxSxC = tf.transpose(image_SxSxC, [2, 0, 1])
  values_N = tf.cast(tf.reshape(image_SxSxC, [-1]), tf.int32) + NUM_SPECIAL
  return {
    "events": tf.concat([[SOS], values_N], axis=0),
    "positions": tf.constant(images.positions(size, order)),
  }


def copy_document(record: dict[str, tf.Tensor], length: int) -> dict[str, tf.Tensor]:
  """The copy sequence of `length` events that a record stands for; see `mirror`."""
  seed = tf.stack([tf.where(record["validation"], tf.constant(2, tf.int64), 1), record["number"]])
  random_K = tf.random.stateless_uniform(((length - 1) // 2,), seed, 0, 256, tf.int32, alg="philox")
  return mirror(random_K + NUM_SPECIAL, length)


def mirror(events_K: tf.Tensor, length: int) -> dict[str, tf.Tensor]:
  """SOS, K events, the same mirrored, EOS: `length` events at positions 1..length (paper, section 5.1).

  K is (length - 1) // 2; with an odd `length` the middle event stands once. `scored` leaves out what nobody can
  predict, the first K.
  """
  num_random = (length - 1) // 2
  mirrored = events_K[: length - 2 - num_random][::-1]
  return {
    "events": tf.concat([[SOS], events_K, mirrored, [EOS]], axis=0),
    "positions": tf.range(1, length + 1)[:, None],
    "scored": tf.cast(tf.range(length) > num_random, tf.int32),
  }


def _decode_image(record, size, order):
  image = tf.io.decode_image(record["image"], channels=3, expand_animations=False)
  return image_document(image, size, order)


def _photo(record, size, order):
  return image_document(photos.crop(record, size), size, order)


def _copies(dataset, sequence_length):
  return dataset.map(
    functools.partial(copy_document, length=sequence_length["events"]), num_parallel_calls=tf.data.AUTOTUNE
  )


def _add_image_tasks(prefix, size, source, to_document):
  for order in images.ORDERS:
    add(
      prefix if order == "pixel_raster" else f"{prefix}_{order}",
      source=source,
      preprocessors=[seqio.map_over_dataset(functools.partial(to_document, size=size, order=order))],
      info=TaskInfo(unit="bits_per_dim", modality="image", image_size=size, image_order=order),
      vocab_size=images.VOCAB_SIZE,
    )


for _size in (32, 64):
  _add_image_tasks(
    f"imagenet{_size}",
    _size,
    TfdsSource(f"downsampled_imagenet/{_size}x{_size}:2.0.0", decoders={"image": tfds.decode.SkipDecoding()}),
    _decode_image,
  )
  _add_image_tasks(
    f"photos{_size}",
    _size,
    NumberSource(photos.NUM_CROPS),
    _photo,
  )
add(
  "copy",
  source=NumberSource({"train": None, "validation": NUM_COPY_VALIDATION}),
  preprocessors=[_copies],
  info=TaskInfo(unit="accuracy", modality="bytes"),
  vocab_size=256 + NUM_SPECIAL,
)
