"""From sums of scored batches to the figures of a split: per token, in the task's unit, by place, and how certain."""

import collections
import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np
from scipy import stats

EDGES = (0, *(2**power for power in range(4, 28)))
"""Where one bucket of positions or of context ends and the next begins; from 512 on they divide the release's."""

_NATS, _RIGHT, _TOKENS = range(3)


class Totals:
  """What a split costs so far: sums in float64 of what eval steps return."""

  def __init__(self):
    self._by_document = np.zeros((0, 3))
    """Nats, right guesses and tokens of each."""
    self._sums = collections.defaultdict(float)
    self._num_windows = 0

  def add(self, sums: Mapping[str, jax.Array] | None) -> None:
    """Adds those of one batch; None: nothing."""
    if sums is None:
      return
    sums = jax.device_get(sums)
    used = sums["document"] >= 0
    documents = sums["document"][used]
    self._num_windows += len(documents)
    more = max(documents, default=-1) + 1 - len(self._by_document)
    if more > 0:
      self._by_document = np.pad(self._by_document, ((0, more), (0, 0)))
    np.add.at(
      self._by_document, documents, np.stack([sums[name][used] for name in ("nats", "right", "tokens")], axis=1)
    )
    for name, value in sums.items():
      if "_by_" in name:
        self._sums[name] += value.sum(axis=0, dtype=np.float64)
      elif name in ("histogram", "words", "bytes"):
        self._sums[name] += np.asarray(value, np.float64)

  @property
  def num_tokens(self) -> float:
    """Tokens scored so far."""
    return self._by_document[:, _TOKENS].sum()

  def figures(self, unit: str) -> dict:
    """All figures of the split; `unit` is the task's own."""
    tokens, histogram = self.num_tokens, self._sums["histogram"]
    frequencies = histogram[histogram > 0] / tokens
    nats, accuracy = (_ratio(self._by_document[:, one], self._by_document[:, _TOKENS]) for one in (_NATS, _RIGHT))
    result = {
      "num_documents": len(self._by_document),
      "num_windows": self._num_windows,
      "num_tokens": int(tokens),
      **self._in_units(nats.value, unit),
      "accuracy": accuracy.value,
      "histogram_entropy_bits": float(-(frequencies * np.log2(frequencies)).sum()),
      "interval_95": None,
    }
    if self._sums["bytes"]:
      result |= {"num_words": int(self._sums["words"]), "num_bytes": int(self._sums["bytes"])}
    if nats.error is not None:
      ends = [self._in_units(nats.value + sign * nats.error, unit) for sign in (-1, 1)]
      result["interval_95"] = {name: [end[name] for end in ends] for name in ends[0]}
      result["interval_95"]["accuracy"] = [accuracy.value - accuracy.error, accuracy.value + accuracy.error]
    return result | {f"by_{name}": self._buckets(name) for name in ("position", "context")}

  def _in_units(self, nats_per_token: float, unit: str) -> dict[str, float]:
    """That many nats per token in every unit that applies; all grow with it."""
    result = {"nats_per_token": nats_per_token, "bits_per_token": nats_per_token / math.log(2)}
    if unit == "bits_per_dim":
      result["bits_per_dim"] = result["bits_per_token"]  # a token is one sub-pixel
    words, num_bytes = self._sums["words"], self._sums["bytes"]
    if num_bytes:  # of the text itself, so that figures of all vocabularies compare
      nats = nats_per_token * self.num_tokens
      result["bits_per_byte"] = float(nats / math.log(2) / num_bytes)
      result["word_perplexity"] = math.exp(min(nats / max(words, 1), 700.0))  # a text of spaces counts as a word
    return result

  def _buckets(self, name: str) -> list[dict]:
    nats_K, tokens_K = self._sums[f"nats_by_{name}"], self._sums[f"tokens_by_{name}"]
    return [
      {"from": first, "to": end, "num_tokens": int(tokens), "nats_per_token": float(nats / tokens)}
      for first, end, nats, tokens in zip(EDGES, (*EDGES[1:], None), nats_K, tokens_K)
      if tokens
    ]


class _Ratio(NamedTuple):
  value: float
  error: float | None
  """Half the width of the 95% interval; None where one document says nothing of others."""


def _ratio(numerators: np.ndarray, denominators: np.ndarray) -> _Ratio:
  """Of two sums over documents: documents are drawn at random, tokens of one are not (ratio estimator, Student's t)."""
  total, count = denominators.sum(), int((denominators > 0).sum())
  value = float(numerators.sum() / total)
  if count < 2:
    return _Ratio(value, None)
  variance = count / (count - 1) * np.square(numerators - value * denominators).sum() / total**2
  return _Ratio(value, float(stats.t.ppf(0.975, count - 1) * math.sqrt(variance)))
