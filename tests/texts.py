"""Texts to test with, a text that counts the bytes read from it, and helpers for documents of texts."""

import numpy as np

from perceiver_ar_jax.config import DataConfig
from perceiver_ar_jax.data import tasks

SYLLABLES = ("ba", "ko", "ri", "mu", "te", "sha", "lo", "né", "vi", "du")


def words(count, seed):
  """Made-up words of one to four syllables."""
  random = np.random.default_rng(seed)
  return ["".join(random.choice(SYLLABLES, random.integers(1, 5))) for _ in range(count)]


LONG_TEXT = " ".join(f"{word}{number}" for number, word in enumerate(words(3000, seed=1))) + "\n"
"""Every word occurs once, so that a stretch of it shows its position."""


class CountingText(bytes):
  """A text that counts the bytes read from it."""

  num_read = 0

  def __getitem__(self, part):
    content = super().__getitem__(part)
    self.num_read += len(content)
    return content


def stretches(length, count):
  """`count` random (start, end) with start < end, and the extreme ones."""
  random = np.random.default_rng(0)
  drawn = (sorted(random.choice(length + 1, 2, replace=False).tolist()) for _ in range(count))
  return [(0, length), (0, 1), (length - 1, length), (1, length - 1), *drawn]


def parts(path, split="train", **data):
  """The documents of all records of one text, of which the last half is held out."""
  data = DataConfig(task="text_files", files=str(path), split_by="position", validation_fraction=0.5, **data)
  ((task, _),) = tasks.get_tasks(data, 64)
  return [task.open(record) for record in task.source.get_dataset(split).as_numpy_iterator()]


def prefixes(document, num_draws):
  """The lengths of the crops that begin at the start of the text: the positions where crops may end."""
  return {len(document.crop(draw / num_draws, 10**6, 1)[0]) for draw in range(num_draws)}
