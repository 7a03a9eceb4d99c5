"""The tasks of the project, each a function from the data settings of a config to a registry.Task.

| task | records | document |
|---|---|---|
| imagenet64, imagenet32 (_rgb_planes) | prepared TFDS downsampled_imagenet | the sub-pixels of a picture |
| photos64, photos32 (_rgb_planes) | crops of photographs in installed packages | the same |
| image_files | the user's own pictures | the same, `data.image_size` and `data.image_order` |
| pg19 | prepared TFDS pg19 | a book |
| wikitext103, enwik8 | the files of the release in `data.data_dir` | a split |
| text_files | the user's own texts | a file, or its part of the split |
| maestro_v1, maestro_v3 | the unpacked release in `data.data_dir` | a performance |
| midi_files | the user's own MIDI files | a file |
| audio_codes, video_codes | the user's own .npy and .npz files | a file |
| books_and_code | half pg19, half text_files | a mixture; a fork adds others with seqio.MixtureRegistry.add |
| copy | numbers | random bytes and the same mirrored |
"""

from __future__ import annotations

import csv
import functools
import io
import os
from collections.abc import Callable, Sequence

import numpy as np
import wrapt

from perceiver_ar_jax.config import DataConfig, InputError
from perceiver_ar_jax.data import EOS, NUM_SPECIAL, SOS, codes, images, music, photos, registry, texts
from perceiver_ar_jax.data.documents import Document, Unreadable
from perceiver_ar_jax.data.files import file_size, own_files, read_bytes, split_files
from perceiver_ar_jax.data.registry import Record, Task, add, get_tasks, names
from perceiver_ar_jax.data.sources import ListSource, NumberSource, TfdsSource
from perceiver_ar_jax.data.tf_cpu import seqio, tf, tfds

__all__ = ["Task", "add", "get_tasks", "names"]  # of the registry, filled

NUM_COPY_VALIDATION = 256

_OWN_SPLITS = ("train", "validation")
_RELEASE_SPLITS = ("train", "validation", "test")


def _list_files(data: DataConfig, suffixes: tuple[str, ...], split: str) -> list[Record]:
  """Returns the user's own files, one record {"path"} per file."""
  return [{"path": path} for path in split_files(data, split, suffixes)]


def _files(data: DataConfig, suffixes: tuple[str, ...]) -> ListSource:
  return ListSource(functools.partial(_list_files, data, suffixes), _OWN_SPLITS)


def _path(record: Record) -> str:
  return os.fsdecode(record["path"])


def register(data: DataConfig) -> seqio.Task:
  """Registers `data.task` under these settings with seqio, in place of the default ones; Beam's workers call this."""
  (task, _), *_ = get_tasks(data, registry.DEFAULT_MAX_EVENTS)
  seqio_task = registry.to_seqio(task)
  seqio.TaskRegistry.remove(data.task)
  seqio.TaskRegistry.add_provider(data.task, seqio_task)
  return seqio_task


# Images


def _image_task(name: str, source: seqio.DataSource, size: int, order: str, **more) -> Task:
  return Task(
    name=name,
    source=source,
    modality="image",
    unit="bits_per_dim",
    vocab_size=images.VOCAB_SIZE,
    position_dims=3,
    encoding={"image_size": size, "image_order": order},
    decode=lambda events: images.to_image(events, size, order),
    read=lambda path: images.document(images.load(read_bytes(path), path, size), order),
    length=images.num_events(size),
    place=lambda start, end: images.positions(size, order)[start:end],
    groups=lambda: registry.allow(images.VOCAB_SIZE, range(NUM_SPECIAL, images.VOCAB_SIZE)),
    **{"document": lambda record: images.document(record["image"], order), **more},
  )


def _map(function: Callable, dataset: tf.data.Dataset) -> tf.data.Dataset:
  return seqio.map_over_dataset(function)(dataset)


def _imagenet(size: int, order: str, data: DataConfig, max_events: int) -> Task:
  def decode(record):
    image = tf.io.decode_png(record["image"], channels=3)
    return {"image": tf.ensure_shape(image, [size, size, 3])}

  source = TfdsSource(
    f"downsampled_imagenet/{size}x{size}:2.0.0",
    decoders=lambda: {"image": tfds.decode.SkipDecoding()},  # images stay encoded until after the shuffle
    data_dir=data.data_dir,
  )
  return _image_task(data.task, source, size, order, preprocessors=[functools.partial(_map, decode)])


def _photos(size: int, order: str, data: DataConfig, max_events: int) -> Task:
  def crop(record):
    return {"image": photos.crop(record, size)}

  source = NumberSource(photos.NUM_CROPS)
  return _image_task(data.task, source, size, order, preprocessors=[functools.partial(_map, crop)])


def _image_files(data: DataConfig, max_events: int) -> Task:
  def document(record):
    image = images.load(read_bytes(_path(record)), _path(record), data.image_size)
    return images.document(image, data.image_order)

  source = _files(data, images.SUFFIXES)
  return _image_task(data.task, source, data.image_size, data.image_order, document=document)


# Text


def _text_task(name: str, source: seqio.DataSource, unit: str, data: DataConfig, document=None) -> Task:
  tokens = texts.tokenizer(data.sentencepiece)

  return Task(
    name=name,
    source=source,
    document=document or functools.partial(_part_of_file, tokens),
    modality="text",
    unit=unit,
    vocab_size=tokens.vocab_size,
    decode=tokens.decode,
    unknown=tokens.unknown,
    read=lambda content: tokens.document(texts.Text(content)),
    groups=lambda: registry.allow(tokens.vocab_size, tokens.drawable, [EOS]),
  )


def _part_of_file(tokens: texts.ByteTokenizer | texts.SubwordTokenizer, record: Record) -> Document:
  """Returns the document of a record of `_parts`."""
  text = texts.FileText(_path(record), int(record["offset"]), int(record["size"]))
  if not len(text):
    raise Unreadable(f"{_path(record)} is empty")
  texts.check_file(_path(record))
  start = int(record["part"]) * texts.PART_BYTES
  return tokens.document(text, (start, min(start + texts.PART_BYTES, len(text))))


def _parts(path: str, start: float = 0.0, end: float = 1.0) -> list[Record]:
  """Returns the records of a text file, or of its part from `start` to `end` (fractions of its size)."""
  size = file_size(path)
  offset, end = round(start * size), round(end * size)
  count = max(1, -(-(end - offset) // texts.PART_BYTES))
  return [{"path": path, "offset": offset, "size": end - offset, "part": part} for part in range(count)]


def _pg19(data: DataConfig, max_events: int) -> Task:
  tokens = texts.tokenizer(data.sentencepiece)

  def document(record):
    if not record["book_text"]:
      raise Unreadable(f"The book {os.fsdecode(record['book_title'])!r} of pg19 is empty")
    return tokens.document(texts.Text(record["book_text"]))

  source = TfdsSource("pg19:0.1.1", data_dir=data.data_dir)
  return _text_task(data.task, source, "word_perplexity", data, document)


def _wikitext103(data: DataConfig, max_events: int) -> Task:
  names = {"train": "wiki.train", "validation": "wiki.valid", "test": "wiki.test"}

  def records(split):
    folder = _release(data, "WikiText-103", "wiki.train.raw (or wiki.train.tokens) and its two siblings")
    for ending in ("raw", "tokens"):
      path = os.path.join(folder, f"{names[split]}.{ending}")
      if tf.io.gfile.exists(path):
        return _parts(path)
    raise InputError(
      f"data.data_dir={folder!r} contains neither {names[split]}.raw nor {names[split]}.tokens: point it at the folder"
      " of the unpacked WikiText-103 release."
    )

  return _text_task(data.task, ListSource(records, _RELEASE_SPLITS), "word_perplexity", data)


def _enwik8(data: DataConfig, max_events: int) -> Task:
  shares = {"train": (0.0, 0.9), "validation": (0.9, 0.95), "test": (0.95, 1.0)}

  def records(split):
    path = os.path.join(_release(data, "enwik8", "the file enwik8"), "enwik8")
    if not tf.io.gfile.exists(path):
      raise InputError(f"{path} does not exist: point data.data_dir at the folder that contains the file enwik8.")
    return _parts(path, *shares[split])

  return _text_task(data.task, ListSource(records, _RELEASE_SPLITS), "bits_per_byte", data)


def _text_files(data: DataConfig, max_events: int) -> Task:
  suffixes = (".txt", ".md", ".py")

  def records(split):
    if data.split_by == "file":
      return [part for path in split_files(data, split, suffixes) for part in _parts(path)]
    border = 1 - data.validation_fraction
    stretch = (0.0, border) if split == "train" else (border, 1.0)
    return [part for path in own_files(data, suffixes) for part in _parts(path, *stretch)]

  return _text_task(data.task, ListSource(records, _OWN_SPLITS), "bits_per_byte", data)


def _release(data: DataConfig, name: str, content: str) -> str:
  """Returns the folder of a release that the user has unpacked."""
  if not data.data_dir:
    raise InputError(
      f"The task {data.task} reads your copy of {name}: set data.data_dir (--config.data.data_dir=FOLDER) to the folder"
      f" that contains {content}."
    )
  return os.path.expanduser(data.data_dir)


# Symbolic music


@functools.lru_cache(maxsize=4096)  # files are parsed once: 4,096 performances take about 160 MB
def _performance(path: str) -> np.ndarray:
  """Returns the events int16[N] of a MIDI file."""
  content = read_bytes(path)
  try:
    events = music.encode(music.read_notes(content))
  except ValueError as error:
    raise Unreadable(f"{path} cannot be read as a MIDI file: {error}") from error
  if not len(events):
    raise Unreadable(f"{path} contains no notes")
  return events.astype(np.int16)


def _music_task(data: DataConfig, records: Callable[[str], Sequence[Record]], splits: tuple[str, ...]) -> Task:
  def document(record):
    return Document(np.concatenate([[SOS], _performance(_path(record)), [EOS]], dtype=np.int32))

  def augment(events, random):
    if data.max_transposition:
      events = music.transpose(events, int(random.integers(-data.max_transposition, data.max_transposition + 1)))
    if data.max_stretch:
      events = music.stretch(events, 1 + random.uniform(-data.max_stretch, data.max_stretch))
    return events

  return Task(
    name=data.task,
    source=ListSource(records, splits),
    document=document,
    modality="music",
    unit="nats_per_token",
    vocab_size=music.VOCAB_SIZE,
    decode=music.decode,
    read=lambda path: document({"path": path}),
    augment=augment if data.max_transposition or data.max_stretch else None,
  )


def _maestro(version: str, data: DataConfig, max_events: int) -> Task:
  def list_records(split):
    folder = _release(data, "MAESTRO", f"maestro-{version}.csv and the folders of MIDI files that it lists")
    table = os.path.join(folder, f"maestro-{version}.csv")
    if not tf.io.gfile.exists(table):
      raise InputError(f"{table} does not exist: point data.data_dir at the unpacked MAESTRO {version} release.")
    rows = csv.DictReader(io.StringIO(read_bytes(table).decode("utf-8")))
    records = [{"path": os.path.join(folder, row["midi_filename"])} for row in rows if row["split"] == split]
    if not records:
      raise InputError(f"{table} lists no file in the split {split!r}: is it complete?")
    return records

  return _music_task(data, list_records, _RELEASE_SPLITS)


def _midi_files(data: DataConfig, max_events: int) -> Task:
  return _music_task(data, functools.partial(_list_files, data, (".mid", ".midi", ".rmi")), _OWN_SPLITS)


# Codes of neural codecs


def _audio_codes(data: DataConfig, max_events: int) -> Task:
  def document(record):
    path = _path(record)
    frames = codes.load(read_bytes(path), path, data.codebook_size)
    frames = codes.audio_frames(frames, data.code_levels, data.code_layout, path)
    return codes.AudioDocument(codes.flatten_audio(frames, data.codebook_size), data.code_levels)

  return Task(
    name=data.task,
    source=_files(data, (".npy", ".npz")),
    document=document,
    modality="audio",
    unit="nats_per_token",
    vocab_size=codes.audio_vocab_size(data.code_levels, data.codebook_size),
    encoding={"code_levels": data.code_levels, "codebook_size": data.codebook_size},
    position_dims=2,
    read=lambda path: document({"path": path}),
    place=codes.AudioDocument(np.zeros(0, np.int32), data.code_levels).positions,
    groups=lambda: codes.audio_groups(data.code_levels, data.codebook_size),
    group=lambda places: np.maximum(places - 1, 0) % data.code_levels,
    decode=lambda events: codes.to_audio(events, data.code_levels, data.codebook_size),
    stored=lambda events, positions, counts: codes.AudioDocument(events, data.code_levels),
  )


def _video_codes(data: DataConfig, max_events: int) -> Task:
  def document(record):
    path = _path(record)
    return codes.video_document(codes.load(read_bytes(path), path, data.codebook_size), path)

  return Task(
    name=data.task,
    source=_files(data, (".npy", ".npz")),
    document=document,
    modality="video",
    unit="nats_per_token",
    vocab_size=data.codebook_size + NUM_SPECIAL,
    encoding={"codebook_size": data.codebook_size},
    position_dims=3,
    read=lambda path: document({"path": path}),
    place=None,  # the position of a code depends on the document's grid
    groups=lambda: registry.allow(
      data.codebook_size + NUM_SPECIAL, range(NUM_SPECIAL, data.codebook_size + NUM_SPECIAL)
    ),
    decode=lambda events: events[events >= NUM_SPECIAL] - NUM_SPECIAL,
  )


# The copy task


def _copy(data: DataConfig, max_events: int) -> Task:
  def document(record):
    random = np.random.Generator(np.random.Philox(key=[2 if record["validation"] else 1, int(record["number"])]))
    return mirror(random.integers(0, 256, (max_events - 1) // 2) + NUM_SPECIAL, max_events)

  return Task(
    name=data.task,
    source=NumberSource({"train": None, "validation": NUM_COPY_VALIDATION}),
    document=document,
    modality="copy",
    unit="accuracy",
    vocab_size=256 + NUM_SPECIAL,
    length=max_events,
    groups=lambda: np.concatenate(
      [registry.allow(256 + NUM_SPECIAL, ids) for ids in (range(NUM_SPECIAL, 256 + NUM_SPECIAL), [EOS])]
    ),
    group=lambda places: (places >= max_events - 1).astype(int),
    decode=lambda events: np.asarray(events) - NUM_SPECIAL,
  )


def mirror(events_K: np.ndarray, length: int) -> Document:
  """SOS, K events, the same mirrored, EOS: `length` events at positions 1..length (paper, section 5.1).

  K is (length - 1) // 2; with an odd `length` the middle event stands once. Only what can be predicted is scored: not
  the first K.
  """
  num_random = (length - 1) // 2
  mirrored = events_K[: length - 2 - num_random][::-1]
  return Document(
    np.concatenate([[SOS], events_K, mirrored, [EOS]], dtype=np.int32),
    positions=np.arange(1, length + 1, dtype=np.int32)[:, None],
    scored=np.arange(length) > num_random,
  )


for _size in (32, 64):
  for _order in images.ORDERS:
    _suffix = "" if _order == "pixel_raster" else f"_{_order}"
    add(f"imagenet{_size}{_suffix}", functools.partial(_imagenet, _size, _order))
    add(f"photos{_size}{_suffix}", functools.partial(_photos, _size, _order))
add("image_files", _image_files)
add("pg19", _pg19)
add("wikitext103", _wikitext103)
add("enwik8", _enwik8)
add("text_files", _text_files)
for _version in ("v1", "v3"):
  add(f"maestro_{_version}", functools.partial(_maestro, f"{_version}.0.0"))
add("midi_files", _midi_files)
add("audio_codes", _audio_codes)
add("video_codes", _video_codes)
add("copy", _copy)

wrapt.register_post_import_hook(
  lambda seqio: seqio.MixtureRegistry.add("books_and_code", [("pg19", 0.5), ("text_files", 0.5)]), "seqio"
)
