"""Where records come from: prepared TFDS datasets, read in place and never generated; or mere numbers.

Both keep little in the saved state of a pipeline: records that are still encoded, or numbers.
"""

import os
from collections.abc import Mapping

import seqio
import tensorflow_datasets as tfds

from perceiver_ar_jax.config import InputError, nearest
from perceiver_ar_jax.data.tf_cpu import tf


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
    super().__init__(name, tfds_data_dir=data_dir, caching_permitted=False, read_only=True)

  def at(self, data_dir: str | os.PathLike | None) -> "TfdsSource":
    """The same source in another folder of prepared datasets."""
    return TfdsSource(self._name, decoders=self._read_decoders, data_dir=data_dir)

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


class NumberSource(seqio.FunctionDataSource):
  """Records that are only numbers, for tasks whose documents are a pure function of them.

  A record is {"number": int64, "validation": bool}, in order from 0; a document made by hashing both is different in
  each split.

  Args:
    counts: how many numbers each split has; None: without end.
  """

  def __init__(self, counts: Mapping[str, int | None]):
    self._counts = dict(counts)
    finite = {split: count for split, count in counts.items() if count is not None}
    super().__init__(self._records, splits=tuple(counts), num_input_examples=finite, caching_permitted=False)

  def _records(self, split: str, shuffle_files: bool) -> tf.data.Dataset:
    del shuffle_files
    count = self._counts[split]
    numbers = tf.data.Dataset.range(2**62).repeat() if count is None else tf.data.Dataset.range(count)
    return numbers.map(lambda number: {"number": number, "validation": split == "validation"})
