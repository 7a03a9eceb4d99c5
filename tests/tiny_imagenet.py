"""A downsampled_imagenet/32x32 of a few records in the real layout, written by TFDS itself."""

import pathlib

import numpy as np
import tensorflow_datasets as tfds

NUM_TRAIN, NUM_VALIDATION = 22, 7


def write(folder: pathlib.Path) -> None:
  """Makes `folder` a TFDS data_dir; the first sub-pixel of picture k is k, from 100 on in validation."""
  version = folder / "downsampled_imagenet" / "32x32" / "2.0.0"
  version.mkdir(parents=True)
  random = np.random.default_rng(0)

  def records(first, count):
    for number in range(first, first + count):
      image = random.integers(0, 256, (32, 32, 3), np.uint8)
      image[0, 0] = number
      yield {"image": image}

  identity = tfds.core.DatasetIdentity(
    name="downsampled_imagenet",
    config_name="32x32",
    version="2.0.0",
    data_dir=str(version),
    module_name="downsampled_imagenet",
  )
  features = tfds.features.FeaturesDict({"image": tfds.features.Image(encoding_format="png")})
  writer = tfds.core.SequentialWriter(
    tfds.core.DatasetInfo(builder=identity, features=features), max_examples_per_shard=8
  )
  writer.initialize_splits(["train", "validation"])
  writer.add_examples({"train": records(0, NUM_TRAIN), "validation": records(100, NUM_VALIDATION)})
  writer.close_all()
