"""Small crops of photographs in scikit-image, scikit-learn and matplotlib, so that training needs no download.

A record is only the number of a crop; photograph, scale, corner and mirroring are a stateless hash of it. So the state
of a pipeline over 50,000 crops is a few integers, and every crop can be reproduced from its number. The pixels are in
memory once, as a pyramid of each photograph shrunk by averaging areas.
"""

from __future__ import annotations

import functools
import importlib.util
import pathlib

import numpy as np
import PIL.Image

from perceiver_ar_jax.config import InputError
from perceiver_ar_jax.data.tf_cpu import tf

PHOTOGRAPHS = {
  "train": (
    ("skimage", "data/astronaut.png", 1.0),  # NASA (Eileen Collins), public domain
    ("skimage", "data/coffee.png", 1.0),  # Rachel Michetti, CC0
    ("skimage", "data/rocket.jpg", 1.0),  # SpaceX, released into the public domain
    ("skimage", "data/hubble_deep_field.jpg", 0.1),  # NASA and ESA, public domain
    ("skimage", "data/retina.jpg", 0.3),  # Mikael Häggström, CC0
    ("matplotlib", "mpl-data/sample_data/grace_hopper.jpg", 1.0),  # James S. Davis, U.S. Navy, public domain
    ("sklearn", "datasets/images/flower.jpg", 1.0),  # flickr.com/photos/vultilion/6056698931, CC BY 2.0
  ),
  "validation": (
    ("skimage", "data/chelsea.png", 1.0),  # Stéfan van der Walt, CC0
    ("sklearn", "datasets/images/china.jpg", 1.0),  # danielbuechele, flickr.com/.../6061409035, CC BY 2.0
  ),
}
"""(import name of the package, path in it, weight) of each photograph; no photograph is in two splits.

Others in these packages are left out because their terms are not stated. Hubble's and the retina's are mostly black and
weigh less, because dark crops are learned quickly.
"""

NUM_CROPS = {"train": 50_000, "validation": 64}  # per epoch; 64, so that scoring all of them takes minutes on a laptop
_FIELDS_OF_VIEW = (2.0, 5.0, 9.0, 13.0)  # shorter side of a pyramid level in sides of a crop: from a scene to a detail
_SALTS = {"train": 1, "validation": 3}
_TONES_SALT, _NOISE_SALT = 5, 6


def crop(record: dict[str, tf.Tensor], size: int) -> tf.Tensor:
  """Returns the crop uint8[size, size, 3] of a NumberSource record; training crops are augmented at random."""
  validation, train = (functools.partial(_crop, record["number"], split, size) for split in ("validation", "train"))
  return tf.cond(record["validation"], validation, train)


def _crop(number: tf.Tensor, split: str, size: int) -> tf.Tensor:
  pixels, sides, weights = _pyramids(split, size)
  # A larger level has more different crops, so it is drawn more often: in proportion to its shorter side.
  shares = weights * sides.min(axis=1)
  shares = np.cumsum(shares / shares.sum()).astype(np.float32)
  draws = _uniform((4,), _SALTS[split], number)
  level = tf.minimum(tf.searchsorted(shares, draws[:1], side="right")[0], len(sides) - 1)
  room = tf.cast(tf.gather(tf.constant(sides), level) - size + 1, tf.float32)
  corner = tf.cast(draws[1:3] * room, tf.int32)
  picture = tf.slice(tf.constant(pixels)[level], [corner[0], corner[1], 0], [size, size, 3])
  if split == "validation":
    return picture
  picture = tf.where(draws[3] < 0.5, picture[:, ::-1], picture)
  # A tone curve for each channel, because few photographs have few tones and colors. A value stands for an interval,
  # of which a random element is taken: rounded values would have gaps, which no other picture has.
  exponents = 0.5 * 3.2 ** _uniform((3,), _TONES_SALT, number)
  values = tf.cast(picture, tf.float32) + _uniform((size, size, 3), _NOISE_SALT, number)
  return tf.cast(tf.minimum(256 * (values / 256) ** exponents, 255), tf.uint8)


def _uniform(shape: tuple[int, ...], salt: int, number: tf.Tensor) -> tf.Tensor:
  return tf.random.stateless_uniform(shape, seed=tf.stack([salt, number]), alg="philox")


@functools.lru_cache
def _pyramids(split: str, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """The levels uint8[levels, height, width, 3] of a split, padded with black, their true sizes int32[levels, 2], and
  weights float[levels]."""
  levels, weights = [], []
  for package, path, weight in PHOTOGRAPHS[split]:
    image = _load(package, path)
    for field in _FIELDS_OF_VIEW:
      shrink = size * field / min(image.size)
      if shrink <= 1:
        levels.append(np.asarray(image.resize([round(side * shrink) for side in image.size], PIL.Image.Resampling.BOX)))
        weights.append(weight)
  sides = np.array([level.shape[:2] for level in levels], np.int32)
  pixels = np.zeros((len(levels), *sides.max(axis=0), 3), np.uint8)
  for row, level in zip(pixels, levels):
    row[: level.shape[0], : level.shape[1]] = level
  return pixels, sides, np.array(weights)


def _load(package: str, path: str) -> PIL.Image.Image:
  # Finding the package without importing it saves seconds.
  spec = importlib.util.find_spec(package)
  file = pathlib.Path(spec.submodule_search_locations[0]) / path if spec else None
  if file is None or not file.exists():
    fix = "run `pip install scikit-image scikit-learn matplotlib`"
    raise InputError(f"The photograph {path} of the package {package} is not installed: {fix}.")
  return PIL.Image.open(file).convert("RGB")
