"""The tasks of the project, each a function from data settings to a registry.Task; docs/data.md describes them."""

from __future__ import annotations

import csv
import functools
import io
import os
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import wrapt

from perceiver_ar_jax.config import DataConfig, require
from perceiver_ar_jax.data import EOS, NUM_SPECIAL, SOS, codes, images, music, photos, recall, rolls, texts
from perceiver_ar_jax.data.documents import Document, Unreadable, count_positions
from perceiver_ar_jax.data.files import file_size, own_files, read_bytes, split_files
from perceiver_ar_jax.data.registry import Record, Task, add, get_tasks, names
from perceiver_ar_jax.data.sources import ListSource, NumberSource, TfdsSource
from perceiver_ar_jax.data.tf_cpu import seqio, tf, tfds

__all__ = ["Task", "add", "get_tasks", "names"]  # of the registry, filled
NUM_GENERATED_VALIDATION = 256  # validation documents of copy and recall
_OWN_SPLITS = ("train", "validation")
_RELEASE_SPLITS = ("train", "validation", "test")


def _file_task(data: DataConfig, read: Callable[[str], Document], suffixes: Sequence[str], **fields) -> Task:
  """Returns the task whose documents `read` makes from the user's own files; `fields` are others of Task."""
  source = ListSource(lambda split: [{"path": path} for path in split_files(data, split, suffixes)], _OWN_SPLITS)
  defaults = {"source": source, "document": lambda record: read(os.fsdecode(record["path"]))}
  return Task(name=data.task, read=read, **defaults | fields)


def _release_file(data: DataConfig, release: str, *names: str) -> str:
  """Returns the path of the first of `names` that exists in the folder of a release that the user has unpacked."""
  problem = f"The task {data.task} reads your copy of {release}"
  require(bool(data.data_dir), f"{problem}: set data.data_dir to the folder of {names[0]}.")
  paths = [os.path.join(data.data_dir, name) for name in names]
  path = next(filter(tf.io.gfile.exists, paths), "")
  fix = f"set data.data_dir to the folder of the unpacked {release}"
  require(bool(path), f"{' or '.join(paths)} does not exist: {fix}.")
  return path


def _image_task(data: DataConfig, size: int, order: str, source=None, decode: Callable | None = None) -> Task:
  """Of the user's files; or of a source for whose records `decode` returns uint8[size, size, 3], in TensorFlow."""
  prepared = {
    "source": source,
    "preprocessors": [lambda records: seqio.map_over_dataset(lambda record: {"image": decode(record)})(records)],
    "document": lambda record: images.document(record["image"], order),
  }
  return _file_task(
    data,
    lambda path: images.document(images.load(read_bytes(path), path, size), order),
    images.SUFFIXES,
    modality="image",
    unit="bits_per_dim",
    vocab_size=images.VOCAB_SIZE,
    position_dims=3,
    encoding={"image_size": size, "image_order": order},
    decode=lambda events: images.to_image(events, size, order),
    length=1 + size * size * 3,
    place=lambda start, end: images.positions(size, order)[start:end],
    groups=[range(NUM_SPECIAL, images.VOCAB_SIZE)],
    **(prepared if source else {}),
  )


def _imagenet(size: int, order: str, data: DataConfig, max_events: int) -> Task:
  def decode(record):
    return tf.ensure_shape(tf.io.decode_png(record["image"], channels=3), [size, size, 3])

  source = TfdsSource(
    f"downsampled_imagenet/{size}x{size}:2.0.0",
    decoders=lambda: {"image": tfds.decode.SkipDecoding()},  # images stay encoded until after the shuffle
    data_dir=data.data_dir,
  )
  return _image_task(data, size, order, source, decode)


def _photos(size: int, order: str, data: DataConfig, max_events: int) -> Task:
  return _image_task(data, size, order, NumberSource(photos.NUM_CROPS), lambda record: photos.crop(record, size))


def _text_of_file(record: Record) -> tuple[texts.FileText, tuple[int, int]]:
  """Returns the text of a record of `_parts`, and the range of its bytes at which crops end."""
  path, start = os.fsdecode(record["path"]), int(record["part"]) * texts.PART_BYTES
  texts.check_file(path)
  text = texts.FileText(path, int(record["offset"]), int(record["size"]))
  return text, (start, min(start + texts.PART_BYTES, len(text)))


def _text_task(data: DataConfig, unit: str, source: seqio.DataSource, text: Callable = _text_of_file) -> Task:
  """`text` returns the arguments of the tokenizer's `document` for a record."""
  tokens = texts.tokenizer(data.sentencepiece)
  return Task(
    name=data.task,
    source=source,
    document=lambda record: tokens.document(*text(record)),
    modality="text",
    unit=unit,
    vocab_size=tokens.vocab_size,
    decode=tokens.decode,
    read=tokens.document,
    groups=[[EOS, *tokens.drawable]],
  )


def _parts(path: str, start: float = 0.0, end: float = 1.0) -> list[Record]:
  """Returns the records of a text file, or of its part from `start` to `end` (fractions of its size)."""
  size = file_size(path)
  offset, end = round(start * size), round(end * size)
  count = max(1, -(-(end - offset) // texts.PART_BYTES))
  return [{"path": path, "offset": offset, "size": end - offset, "part": part} for part in range(count)]


def _pg19(data: DataConfig, max_events: int) -> Task:
  source = TfdsSource("pg19:0.1.1", data_dir=data.data_dir)
  return _text_task(data, "word_perplexity", source, lambda record: (record["book_text"],))


def _wikitext103(data: DataConfig, max_events: int) -> Task:
  def records(split):
    name = f"wiki.{'valid' if split == 'validation' else split}"
    return _parts(_release_file(data, "WikiText-103", f"{name}.raw", f"{name}.tokens"))

  return _text_task(data, "word_perplexity", ListSource(records, _RELEASE_SPLITS))


def _enwik8(data: DataConfig, max_events: int) -> Task:
  shares = {"train": (0.0, 0.9), "validation": (0.9, 0.95), "test": (0.95, 1.0)}
  source = ListSource(lambda split: _parts(_release_file(data, "enwik8", "enwik8"), *shares[split]), _RELEASE_SPLITS)
  return _text_task(data, "bits_per_byte", source)


def _text_files(data: DataConfig, max_events: int) -> Task:
  suffixes, border = (".txt", ".md", ".py"), 1 - data.validation_fraction

  def records(split):
    if data.split_by == "file":
      return [part for path in split_files(data, split, suffixes) for part in _parts(path)]
    stretch = (0.0, border) if split == "train" else (border, 1.0)
    return [part for path in own_files(data, suffixes) for part in _parts(path, *stretch)]

  return _text_task(data, "bits_per_byte", ListSource(records, _OWN_SPLITS))


@functools.lru_cache(maxsize=4096)  # files are parsed once: 4,096 performances take about 160 MB
def _performance(path: str) -> np.ndarray:
  """Returns the events int16[N] of a MIDI file."""
  try:
    events = music.encode(music.read_notes(read_bytes(path)))
  except ValueError as error:
    raise Unreadable(f"{path} cannot be read as a MIDI file: {error}") from error
  if not len(events):
    raise Unreadable(f"{path} contains no notes")
  return events.astype(np.int16)


def _midi_files(data: DataConfig, max_events: int, **fields) -> Task:
  def augment(events, random):
    if data.max_transposition:
      events = music.transpose(events, int(random.integers(-data.max_transposition, data.max_transposition + 1)))
    if data.max_stretch:
      events = music.stretch(events, 1 + random.uniform(-data.max_stretch, data.max_stretch))
    return events

  return _file_task(
    data,
    lambda path: Document(np.concatenate([[SOS], _performance(path), [EOS]], dtype=np.int32)),
    (".mid", ".midi", ".rmi"),
    modality="music",
    unit="nats_per_token",
    vocab_size=music.VOCAB_SIZE,
    decode=music.decode,
    augment=augment if data.max_transposition or data.max_stretch else None,
    **fields,
  )


def _maestro(version: str, data: DataConfig, max_events: int) -> Task:
  def records(split):
    table = _release_file(data, "MAESTRO", f"maestro-{version}.csv")
    rows = csv.DictReader(io.StringIO(read_bytes(table).decode("utf-8")))
    paths = [os.path.join(os.path.dirname(table), row["midi_filename"]) for row in rows if row["split"] == split]
    require(bool(paths), f"{table} lists no file in the split {split!r}: is it complete?")
    return [{"path": path} for path in paths]

  return _midi_files(data, max_events, source=ListSource(records, _RELEASE_SPLITS))


@functools.lru_cache(maxsize=4)
def _rolls(path: str) -> Mapping[str, list[np.ndarray]]:
  return rolls.load(read_bytes(path), path)


def _piano_rolls(data: DataConfig, max_events: int) -> Task:
  def records(split):
    pieces = [
      {"path": path, "piece": piece, "split": split}
      for path in own_files(data, rolls.SUFFIXES)
      for piece in range(len(_rolls(path)[split]))
    ]
    require(bool(pieces), f"data.files={data.files} contains no piano rolls of the split {split!r}.")
    return pieces

  def document(record):
    return rolls.document(_rolls(os.fsdecode(record["path"]))[os.fsdecode(record["split"])][int(record["piece"])])

  def augment(events, random):
    return rolls.transpose(events, int(random.integers(-data.max_transposition, data.max_transposition + 1)))

  return Task(
    name=data.task,
    source=ListSource(records, _RELEASE_SPLITS),
    document=document,
    modality="rolls",
    unit="nats_per_frame",
    vocab_size=rolls.VOCAB_SIZE,
    decode=rolls.decode,
    augment=augment if data.max_transposition else None,
    groups=[range(NUM_SPECIAL, rolls.VOCAB_SIZE)],
  )


def _audio_codes(data: DataConfig, max_events: int) -> Task:
  levels, size = data.code_levels, data.codebook_size
  positions = functools.partial(codes.audio_positions, levels)

  def document(path):
    frames = codes.audio_frames(codes.load(read_bytes(path), path, size), levels, data.code_layout, path)
    return Document(codes.flatten_audio(frames, size), positions)

  return _file_task(
    data,
    document,
    (".npy", ".npz"),
    modality="audio",
    unit="nats_per_token",
    vocab_size=levels * size + NUM_SPECIAL,
    encoding={"code_levels": levels, "codebook_size": size},
    position_dims=2,
    place=positions,
    groups=[NUM_SPECIAL + np.arange(level * size, (level + 1) * size) for level in range(levels)],
    group=lambda places: np.maximum(places - 1, 0) % levels,
    decode=lambda events: codes.to_audio(events, levels, size),
  )


def _video_codes(data: DataConfig, max_events: int) -> Task:
  size, vocab_size = data.codebook_size, data.codebook_size + NUM_SPECIAL
  return _file_task(
    data,
    lambda path: codes.video_document(codes.load(read_bytes(path), path, size), path),
    (".npy", ".npz"),
    modality="video",
    unit="nats_per_token",
    vocab_size=vocab_size,
    encoding={"codebook_size": size},
    position_dims=3,
    place=None,  # the position of a code depends on the document's grid
    groups=[range(NUM_SPECIAL, vocab_size)],
    decode=codes.to_values,
  )


def _generated(data: DataConfig, vocab_size: int, length: int, draw: Callable, **fields) -> Task:
  """Returns a task whose documents of `length` events are drawn by `draw(rng)`, a different rng for each record."""

  def document(record):
    return draw(np.random.Generator(np.random.Philox(key=[2 if record["validation"] else 1, int(record["number"])])))

  return Task(
    name=data.task,
    source=NumberSource({"train": None, "validation": NUM_GENERATED_VALIDATION}),
    document=document,
    modality="numbers",
    unit="accuracy",
    vocab_size=vocab_size,
    length=length,
    decode=lambda events: np.asarray(events) - NUM_SPECIAL,
    **{"groups": [range(NUM_SPECIAL, vocab_size)]} | fields,
  )


def _copy(data: DataConfig, max_events: int) -> Task:
  vocab_size = 256 + NUM_SPECIAL
  return _generated(
    data,
    vocab_size,
    max_events,
    lambda rng: mirror(rng.integers(0, 256, (max_events - 1) // 2) + NUM_SPECIAL, max_events),
    groups=[range(NUM_SPECIAL, vocab_size), [EOS]],
    group=lambda places: (places >= max_events - 1).astype(int),
  )


def _recall(data: DataConfig, max_events: int) -> Task:
  pairs, queries = data.recall_pairs, data.recall_queries
  draw = functools.partial(recall.document, length=max_events, pairs=pairs, queries=queries)
  return _generated(data, recall.vocab_size(pairs), max_events, draw, train_scored_only=True)


def mirror(events_K: np.ndarray, length: int) -> Document:
  """SOS, K events, the same mirrored, EOS: `length` events at positions 1..length (paper, section 5.1).

  K is (length - 1) // 2; with an odd `length` the middle event stands once. The first K are not scored.
  """
  num_random = (length - 1) // 2
  mirrored = events_K[: length - 2 - num_random][::-1]
  return Document(
    np.concatenate([[SOS], events_K, mirrored, [EOS]], dtype=np.int32),
    positions=count_positions(length),
    scored=np.arange(length) > num_random,
  )


for _size in (32, 64):
  for _order in images.ORDERS:
    _suffix = "" if _order == "pixel_raster" else f"_{_order}"
    add(f"imagenet{_size}{_suffix}", functools.partial(_imagenet, _size, _order))
    add(f"photos{_size}{_suffix}", functools.partial(_photos, _size, _order))
for _version in ("v1", "v3"):
  add(f"maestro_{_version}", functools.partial(_maestro, f"{_version}.0.0"))
add("image_files", lambda data, max_events: _image_task(data, data.image_size, data.image_order))
for _build in (_pg19, _wikitext103, _enwik8, _text_files, _midi_files, _piano_rolls, _audio_codes, _video_codes):
  add(_build.__name__.removeprefix("_"), _build)
add("copy", _copy)
add("recall", _recall)

wrapt.register_post_import_hook(
  lambda seqio: seqio.MixtureRegistry.add("books_and_code", [("pg19", 0.5), ("text_files", 0.5)]), "seqio"
)
