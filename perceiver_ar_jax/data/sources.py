"""Sources of records: prepared TFDS datasets, lists of files, and numbers.

All keep the saved state of a pipeline small: it contains encoded records, file names, or numbers.
"""

from __future__ import annotations

import functools
import json
import os
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np

from perceiver_ar_jax.config import DataConfig, InputError
from perceiver_ar_jax.data.files import read_bytes
from perceiver_ar_jax.data.tf_cpu import tf, tfds


class _Source:
  """A seqio.DataSourceInterface, implemented without importing seqio before records are read."""

  supports_arbitrary_sharding = True
  caching_permitted = performs_internal_shuffling = False
  splits: Collection[str] = ()


class TfdsSource(_Source):
  """A prepared TFDS dataset, read so that many hosts can share it and that training resumes exactly.

  seqio's own source keeps the records of a small dataset in a cache that becomes part of every checkpoint, splits by
  whole files only, and starts a download where data is missing. `name` has config and version,
  "downsampled_imagenet/64x64:2.0.0"; `data_dir` is as for tfds.load, and `decoders()`.
  """

  def __init__(self, name: str, *, decoders=None, data_dir: str | None = None):
    self._name, self._decoders, self._data_dir = name, decoders, data_dir

  @functools.cached_property
  def _builder(self) -> tfds.core.DatasetBuilder:
    builder = tfds.builder(self._name, data_dir=self._data_dir)
    if not tf.io.gfile.exists(os.path.join(builder.data_dir, "dataset_info.json")):
      raise InputError(
        f"The dataset {self._name} is not prepared in {builder.data_dir}. Set data.data_dir to the folder of your"
        f" prepared TFDS datasets, or prepare it once with `tfds build {self._name} --data_dir=...`. The task photos32"
        " (--config=configs/photos32.py) needs no data."
      )
    return builder

  @property
  def splits(self) -> Collection[str]:
    return self._builder.info.splits

  def num_input_examples(self, split: str) -> int:
    try:
      return self.splits[split].num_examples
    except ValueError as error:
      problem = f"The split {split!r} of {self._name} cannot be read"
      raise InputError(f"{problem}: write 'train[:90%]' or 'train[100:]'.") from error

  def bytes_per_record(self, split: str) -> float:
    """Returns the average size of a stored record."""
    info = self.splits[split.partition("[")[0]]
    return info.num_bytes / max(info.num_examples, 1)

  def get_dataset(self, split="train", shuffle=True, seed=None, shard_info=None, **unused) -> tf.data.Dataset:
    """`shuffle` shuffles the files, differently in every epoch."""
    if shard_info and shard_info.num_shards > 1:
      split = tfds.even_splits(split, shard_info.num_shards, drop_remainder=False)[shard_info.index]
    read_config = tfds.ReadConfig(
      shuffle_seed=seed,
      shuffle_reshuffle_each_iteration=True,
      try_autocache=False,
      skip_prefetch=True,
      interleave_block_length=4,  # The records that each open file has read ahead are saved too.
    )
    decoders = self._decoders and self._decoders()
    return self._builder.as_dataset(split=split, shuffle_files=shuffle, read_config=read_config, decoders=decoders)


class ListSource(_Source):
  """Records listed on first use, each a dict of the `path` of a file and other small values.

  `list_records` returns the records of a split, all with the same keys, or raises InputError if there is no record.
  """

  def __init__(self, list_records: Callable[[str], Sequence[Mapping[str, str | int]]], splits: Sequence[str]):
    self._list, self.splits = functools.cache(list_records), tuple(splits)

  def num_input_examples(self, split: str) -> int:
    return len(self._list(split))

  def num_documents(self, split: str) -> int:
    """Documents of the split: a large text has several records, its parts."""
    return sum(not record.get("part") for record in self._list(split))

  def fingerprint(self, split: str) -> str:
    """Returns a checksum of the names of the files and their division into records, independent of their folder."""
    records = [{**record, "path": os.path.basename(record["path"])} for record in self._list(split)]
    return f"{zlib.crc32(json.dumps(records).encode()):08x}"

  def get_dataset(self, split="train", shuffle=True, seed=None, shard_info=None, **unused) -> tf.data.Dataset:
    records = self._list(split)
    columns = {name: np.array([record[name] for record in records]) for name in records[0]}
    return _shard(tf.data.Dataset.from_tensor_slices(columns), shard_info)


def sentencepiece_fingerprint(data: DataConfig) -> str | None:
  """Returns a checksum of the SentencePiece model, whose path may differ between machines; None for bytes."""
  return None if data.sentencepiece is None else f"crc32 {zlib.crc32(read_bytes(data.sentencepiece)):08x}"


class NumberSource(_Source):
  """Records {"number": int64, "validation": bool}, in order from 0, for documents that are a pure function of them.

  `counts` has the number of records of each split, None for an endless one.
  """

  def __init__(self, counts: Mapping[str, int | None]):
    self._counts, self.splits = dict(counts), tuple(counts)

  def num_input_examples(self, split: str) -> int | None:
    return self._counts[split]

  def get_dataset(self, split="train", shuffle=True, seed=None, shard_info=None, **unused) -> tf.data.Dataset:
    count = self._counts[split]
    numbers = tf.data.Dataset.range(2**62).repeat() if count is None else tf.data.Dataset.range(count)
    return _shard(numbers.map(lambda number: {"number": number, "validation": split == "validation"}), shard_info)


def _shard(records: tf.data.Dataset, shard_info) -> tf.data.Dataset:
  return records if shard_info is None else records.shard(shard_info.num_shards, shard_info.index)
