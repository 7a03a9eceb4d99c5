"""Multi-query associative recall (Arora et al., 2023, arXiv 2312.04927): key/value pairs among filler, then queries.

Ids: the special ones, filler, keys (twice as many as pairs), values. Only values after queried keys are scored.
"""

import numpy as np

from perceiver_ar_jax.config import require
from perceiver_ar_jax.data import NUM_SPECIAL, SOS
from perceiver_ar_jax.data.documents import Document, count_positions

NUM_VALUES = 64
_FILLER, _FIRST_KEY = NUM_SPECIAL, NUM_SPECIAL + 1


def vocab_size(pairs: int) -> int:
  """Number of ids of documents with `pairs` key/value pairs."""
  return _FIRST_KEY + 2 * pairs + NUM_VALUES


def document(rng: np.random.Generator, length: int, pairs: int, queries: int) -> Document:
  """SOS, `pairs` pairs at random distances, then `queries` of the keys, each followed by its value: `length` events.

  No key occurs in two pairs. Raises InputError if `length` is too small, or there are more queries than pairs.
  """
  num_body = length - 1 - 2 * queries
  needed = f"at most as many queries as pairs and {1 + 2 * pairs + 2 * queries} events"
  problem = f"data.recall_pairs={pairs} and data.recall_queries={queries} need {needed}, but model.max_context gives"
  require(queries <= pairs and num_body >= 2 * pairs, f"{problem} {length}: raise it or lower these.")
  keys = _FIRST_KEY + rng.permutation(2 * pairs)[:pairs]
  values = _FIRST_KEY + 2 * pairs + rng.integers(0, NUM_VALUES, pairs)
  # A pair and a filler are a unit each; units that are pairs become two events.
  is_pair = np.zeros(num_body - pairs, bool)
  is_pair[rng.permutation(len(is_pair))[:pairs]] = True
  first = np.flatnonzero(is_pair) + np.arange(pairs)
  body = np.full(num_body, _FILLER)
  body[first], body[first + 1] = keys, values
  asked = rng.permutation(pairs)[:queries]
  tail = np.stack([keys[asked], values[asked]], axis=1).reshape(-1)
  scored = np.zeros(length, bool)
  scored[length - 2 * queries + 1 :: 2] = True
  return Document(np.concatenate([[SOS], body, tail], dtype=np.int32), count_positions(length), scored=scored)
