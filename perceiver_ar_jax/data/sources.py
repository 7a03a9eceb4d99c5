"""Where records come from: prepared TFDS datasets, read in place and never generated; lists of files; or mere numbers.

All keep little in the saved state of a pipeline: records that are still encoded, file names, or numbers.
"""

import glob
import json
import os
import pathlib
import zlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import seqio
import tensorflow_datasets as tfds

from perceiver_ar_jax.config import DataConfig, InputError, nearest
from perceiver_ar_jax.data.documents import Unreadable
from perceiver_ar_jax.data.tf_cpu import tf
from perceiver_ar_jax.data.warn_once import warn_once


class TfdsSource(seqio.TfdsDataSource):
  """A prepared TFDS dataset, read as training over many hosts and resuming exactly demand.

  seqio's own source loads with TFDS's defaults, which keep a small dataset's records in a cache that ends up in every
  checkpoint, split no finer than whole files, and start a download where data is missing. This one reads exact
  sub-ranges of records, shuffles files anew in each epoch from a seed, caches nothing and only ever reads.

  Args:
    name: TFDS name with config and version: "downsampled_imagenet/64x64:2.0.0".
    decoders: as for tfds.load; tfds.decode.SkipDecoding() keeps pictures encoded until they are through the shuffle.
    data_dir: folder of prepared datasets; None: TFDS's own default.
  """

  def __init__(self, name: str, *, decoders=None, data_dir: str | os.PathLike | None = None):
    self._name = name
    self._read_decoders = decoders
    data_dir = None if data_dir is None else os.fspath(data_dir)
    super().__init__(name, tfds_data_dir=data_dir, caching_permitted=True, read_only=True)

  @property
  def supports_arbitrary_sharding(self) -> bool:
    return True

  def num_input_examples(self, split: str) -> int:
    """Records of a split, or of a part of it such as "train[:90%]".

    Raises:
      InputError: the dataset is not prepared, or has no such split.
    """
    splits = self._prepared().info.splits
    name = split.partition("[")[0]
    if name not in splits:
      raise InputError(f"The dataset {self._name} has no split {name!r}. {nearest(name, splits)}")
    try:
      return splits[split].num_examples
    except ValueError as error:
      raise InputError(
        f"The split {split!r} of {self._name} cannot be read: write a part of it as in 'train[:90%]' or 'train[100:]'."
      ) from error

  def bytes_per_record(self, split: str) -> float:
    """What a record takes as it is stored, on average."""
    info = self._prepared().info.splits[split.partition("[")[0]]
    return info.num_bytes / max(info.num_examples, 1)

  def get_dataset(self, split="train", shuffle=True, seed=None, shard_info=None, **unused) -> tf.data.Dataset:
    """Records of one host's part of `split`; `shuffle` shuffles its files, in another order in every epoch."""
    del unused
    if shard_info and shard_info.num_shards > 1:
      split = tfds.even_splits(split, shard_info.num_shards, drop_remainder=False)[shard_info.index]
    read_config = tfds.ReadConfig(
      shuffle_seed=seed,
      shuffle_reshuffle_each_iteration=True,
      try_autocache=False,
      skip_prefetch=True,
      interleave_block_length=4,  # What each open file has read ahead is saved too: keep it short.
    )
    return self._prepared().as_dataset(
      split=split, shuffle_files=shuffle, read_config=read_config, decoders=self._read_decoders
    )

  def _prepared(self) -> tfds.core.DatasetBuilder:
    builder = self.tfds_dataset.builder
    if not tf.io.gfile.exists(os.path.join(builder.data_dir, "dataset_info.json")):
      raise InputError(
        f"The dataset {self._name} is not prepared in {builder.data_dir}. Point data.data_dir"
        " (--config.data.data_dir=...) at the folder of your prepared TFDS datasets, or prepare it once with `tfds"
        f" build {self._name} --data_dir=...`; nothing is downloaded from here. The task photos32"
        " (--config=configs/photos32.py) needs no data at all."
      )
    return builder


class ListSource(seqio.FunctionDataSource):
  """Records that a function lists, each a dict of a file's `path` and other small values; listed once, when asked for.

  Args:
    list_records: split -> records, all with the same keys; raises InputError where there are none.
    splits: names of the splits.
  """

  def __init__(self, list_records: Callable[[str], Sequence[Mapping[str, str | int]]], splits: Sequence[str]):
    self._list_records, self._listed = list_records, {}
    super().__init__(self._records, splits=tuple(splits), caching_permitted=True)

  def num_input_examples(self, split: str) -> int:
    """Records of the split."""
    return len(self._list(split))

  def fingerprint(self, split: str) -> str:
    """Changes with the names of the files and how they are cut into records, but not with their folder."""
    records = [{**record, "path": pathlib.PurePath(record["path"]).name} for record in self._list(split)]
    return f"{zlib.crc32(json.dumps(records).encode()):08x}"

  def list_shards(self, split: str) -> list[str]:
    """Parts into which offline caching may divide its work."""
    return [f"{split}-{index}" for index in range(min(len(self._list(split)), 64))]

  @property
  def supports_arbitrary_sharding(self) -> bool:
    return True

  def get_dataset(self, split="train", shuffle=True, seed=None, shard_info=None, **unused) -> tf.data.Dataset:
    """The records in order, or one host's share of them: the shuffle of the pipeline is all they need."""
    del shuffle, seed, unused
    records = self._records(split, False)
    return records if shard_info is None else records.shard(shard_info.num_shards, shard_info.index)

  def _records(self, split: str, shuffle_files: bool) -> tf.data.Dataset:
    del shuffle_files
    records = self._list(split)
    return tf.data.Dataset.from_tensor_slices(
      {name: np.array([record[name] for record in records]) for name in records[0]}
    )

  def _list(self, split: str) -> Sequence[Mapping[str, str | int]]:
    if split not in self._listed:
      self._listed[split] = self._list_records(split)
    return self._listed[split]


class CachedSource(seqio.DataSource):
  """The documents that data/cache.py stored of a task.

  Args:
    task: the task, as seqio sees it.
    data: the settings; `cache_dir` says where to look, and those in CACHED_SETTINGS must be those of the cache.
  """

  def __init__(self, task: seqio.Task, data: DataConfig):
    self._task, self._folder = task, os.path.join(data.cache_dir, task.name)
    super().__init__(splits=(), caching_permitted=False)
    self._data = data

  @property
  def splits(self) -> tuple[str, ...]:
    """The splits that are stored."""
    self._check()
    return tuple(sorted(path.split(".")[-2] for path in tf.io.gfile.glob(os.path.join(self._folder, "stats.*.json"))))

  @property
  def supports_arbitrary_sharding(self) -> bool:
    return True

  def list_shards(self, split: str) -> list[str]:
    """The files of the split."""
    return tf.io.gfile.glob(os.path.join(self._folder, f"{split}.tfrecord-*"))

  def num_input_examples(self, split: str) -> int:
    """Documents of the split."""
    return self._stats(split)["examples"]

  def bytes_per_record(self, split: str) -> float:
    """What a document takes in memory, on average."""
    stats = self._stats(split)
    return 4 * (stats["events_tokens"] + stats.get("positions_tokens", 0)) / stats["examples"]

  def get_dataset(self, split="train", shuffle=True, seed=None, shard_info=None, **unused) -> tf.data.Dataset:
    """Stored documents: events, positions, and what counts there are; `shuffle` shuffles the files in each epoch."""
    del unused
    self._check()
    seqio.set_global_cache_dirs([self._data.cache_dir])  # seqio remembers them for good, and takes the first that fits
    return self._task.get_dataset(
      None,
      split,
      use_cached=True,
      shuffle=shuffle,
      shuffle_buffer_size=1,
      seed=seed,
      shard_info=shard_info,
      num_epochs=1,
    )

  def _stats(self, split: str) -> dict[str, int]:
    self._check()
    with tf.io.gfile.GFile(os.path.join(self._folder, f"stats.{split}.json")) as file:
      return json.load(file)

  def _check(self) -> None:
    """Raises InputError if there is no finished cache of the task, or one made under other settings."""
    path = os.path.join(self._folder, CACHE_SETTINGS)
    if not tf.io.gfile.exists(os.path.join(self._folder, "COMPLETED")) or not tf.io.gfile.exists(path):
      raise InputError(
        f"data.cache_dir={self._data.cache_dir!r} holds no finished cache of the task {self._task.name}: make it with"
        " launch/cache_tasks.sh, or read the data itself (--config.data.cache_dir=None)."
      )
    with tf.io.gfile.GFile(path) as file:
      stored = json.load(file)
    changed = [
      f"{name} was {stored.get(name)!r} and is {value!r}"
      for name, value in cache_settings(self._data).items()
      if stored.get(name, value) != value  # older caches lack newer settings
    ]
    if changed:
      raise InputError(
        f"The cache of {self._task.name} in data.cache_dir={self._data.cache_dir!r} was made under other settings"
        f" ({'; '.join(changed)}): use these, or fill another folder."
      )


CACHE_SETTINGS = "settings.json"


def cache_settings(data: DataConfig) -> dict[str, str | int | None]:
  """What the stored documents of a task depend on, beside its files."""
  names = ("image_size", "image_order", "codebook_size", "code_levels", "code_layout")
  return {name: getattr(data, name) for name in names} | {"sentencepiece": sentencepiece_fingerprint(data)}


def sentencepiece_fingerprint(data: DataConfig) -> str | None:
  """Tells models apart by their content, since they may lie elsewhere on another machine; None for bytes."""
  return None if data.sentencepiece is None else f"crc32 {zlib.crc32(read_bytes(data.sentencepiece)):08x}"


def find_files(pattern: str, suffixes: Sequence[str]) -> list[str]:
  """The files of a glob ("**" crosses folders), or those under a folder whose names end in one of `suffixes`, sorted.

  Raises:
    InputError: there are none.
  """
  path = os.path.expanduser(pattern)
  if os.path.isdir(path):
    found = [
      name for name in glob.glob(f"{glob.escape(path)}/**", recursive=True) if name.lower().endswith(tuple(suffixes))
    ]
  elif "://" in path:
    found = tf.io.gfile.glob(path)
  else:
    found = glob.glob(path, recursive=True)
  found = sorted(name for name in found if not os.path.isdir(name) and _is_utf8(name))
  if not found:
    what = "does not exist" if not glob.has_magic(path) and not os.path.exists(path) else "holds no fitting file"
    raise InputError(
      f"{pattern!r} {what}. Set data.files (or data.validation_files) to a folder with files that end in"
      f" {' or '.join(suffixes)}, or to a glob in quotes, of any ending, such as 'folder/**/*{suffixes[0]}'."
    )
  return found


def _is_utf8(name: str) -> bool:
  """Whether TensorFlow can hold the name; warns if not."""
  try:
    name.encode("utf-8")
  except UnicodeEncodeError:
    warn_once("skipped", f"Skipped: the name of {name!r} is not UTF-8")
    return False
  return True


def _real(path: str) -> str:
  """The same for all ways to spell a path."""
  return path if "://" in path else os.path.realpath(path)


def own_files(data: DataConfig, suffixes: Sequence[str]) -> list[str]:
  """The user's own files, `data.files`; raises InputError if there are none."""
  if not data.files:
    raise InputError(
      f"The task {data.task} reads your own files: set data.files to a folder, or to a glob in quotes as in"
      f" --config.data.files='folder/**/*{suffixes[0]}'."
    )
  return find_files(data.files, suffixes)


def split_files(data: DataConfig, split: str, suffixes: Sequence[str]) -> list[str]:
  """The files of "train" or "validation" among the user's own, by `data.validation_files` or else by a share of names.

  A file's split depends on its name alone, so that files that join later move no other; but where the share would
  hold out none, it is the one file whose name comes first by that measure.

  Raises:
    InputError: no files, or too few to hold one out.
  """
  files = own_files(data, suffixes)
  if data.validation_files:
    held_out = {_real(file) for file in find_files(data.validation_files, suffixes)}
  else:
    ranks = {file: zlib.crc32(pathlib.PurePath(file).name.encode()) / 2**32 for file in files}
    held_out = {file for file in files if ranks[file] < data.validation_fraction} or {min(files, key=ranks.get)}
    held_out = set(map(_real, held_out))
  chosen = sorted(held_out) if split == "validation" else [file for file in files if _real(file) not in held_out]
  if not chosen:
    raise InputError(
      f"All files that match data.files={data.files!r} ({len(files)}) are held out for validation, so none is left to"
      " train on: add files, name those to hold out in data.validation_files, or, for text, hold out the last part of"
      " each (--config.data.split_by=position)."
    )
  return chosen


def read_bytes(path: str, start: int = 0, size: int = -1) -> bytes:
  """`size` bytes of a file from `start` on (-1: all the rest); paths such as gs://... go through TensorFlow.

  Raises:
    Unreadable: it cannot be read, or has become shorter.
  """
  try:
    with tf.io.gfile.GFile(path, "rb") if "://" in path else open(path, "rb") as file:
      file.seek(start)
      content = file.read(size)
  except (OSError, tf.errors.OpError) as error:
    raise Unreadable(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
  if len(content) < size:
    raise Unreadable(f"{path} ends at byte {start + len(content):,} now, and was longer when training began")
  return content


class NumberSource(seqio.FunctionDataSource):
  """Records that are only numbers, for tasks whose documents are a pure function of them.

  A record is {"number": int64, "validation": bool}, in order from 0; a document made by hashing both is different in
  each split.

  Args:
    counts: how many numbers each split has; None: without end.
  """

  def __init__(self, counts: Mapping[str, int | None]):
    self._counts = dict(counts)
    super().__init__(self._records, splits=tuple(counts), caching_permitted=False)

  def num_input_examples(self, split: str) -> int | None:
    """Records of the split; None: endless."""
    return self._counts[split]

  def _records(self, split: str, shuffle_files: bool) -> tf.data.Dataset:
    del shuffle_files
    count = self._counts[split]
    numbers = tf.data.Dataset.range(2**62).repeat() if count is None else tf.data.Dataset.range(count)
    return numbers.map(lambda number: {"number": number, "validation": split == "validation"})
