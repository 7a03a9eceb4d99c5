"""Sums over scored batches, and the metrics of a split that follow: in all units, by position, and how certain."""

import collections
from collections.abc import Mapping

import jax
import numpy as np
from scipy import stats

from perceiver_ar_jax.data import units

EDGES = (0, *(2**power for power in range(4, 28)))  # of buckets; from 512 on they divide those of the original release
_TOKENS = 2  # column of Totals._by_document


class Totals:
  """Sums in float64 of the results of eval steps."""

  def __init__(self):
    self._by_document = np.zeros((0, 3))  # nats, correct tokens and tokens of each
    self._sums = collections.defaultdict(float)
    self._num_windows = 0

  def add(self, sums: Mapping[str, jax.Array] | None) -> None:
    """Adds the sums of one batch; None adds nothing."""
    if sums is None:
      return
    sums = jax.device_get(sums)
    is_used = sums["document"] >= 0
    documents = sums["document"][is_used]
    self._num_windows += len(documents)
    num_new = max(max(documents, default=-1) + 1 - len(self._by_document), 0)
    self._by_document = np.pad(self._by_document, ((0, num_new), (0, 0)))
    rows = np.stack([sums["nats"], sums["correct"], sums["tokens"]], axis=1)
    np.add.at(self._by_document, documents, rows[is_used])
    for name, value in sums.items():
      if "_by_" in name:
        self._sums[name] += value.sum(axis=0, dtype=np.float64)
      elif name in ("histogram", *units.COUNTS):
        self._sums[name] += np.asarray(value, np.float64)

  @property
  def num_tokens(self) -> float:
    return self._by_document[:, _TOKENS].sum()

  def metrics(self, unit: str) -> dict:
    """Returns all metrics of the split; `unit` is the task's own."""
    sums = self._scored_sums()
    interval = None
    if (self._by_document[:, _TOKENS] > 0).sum() > 1:  # one document does not tell how others vary
      low, high = (units.compute_all(self._scored_sums(sign), unit) for sign in (-1, 1))
      interval = {name: [low[name], high[name]] for name in low}
    return {
      "num_documents": len(self._by_document),
      "num_windows": self._num_windows,
      "num_tokens": int(sums.tokens),
      **{f"num_{name}": int(self._sums[name]) for name in units.COUNTS if self._sums[name]},
      **units.compute_all(sums, unit),
      "histogram_entropy_bits": float(stats.entropy(self._sums["histogram"], base=2)),
      "interval_95": interval,
      **{f"by_{name}": self._buckets(name) for name in ("position", "context")},
    }

  def _scored_sums(self, sign: int = 0) -> units.ScoredSums:
    """Returns the sums; -1, 1: those at the ends of the 95% interval (ratio estimator over documents, Student's t)."""
    values, tokens = self._by_document[:, :_TOKENS], self._by_document[:, _TOKENS:]
    sums, count = values.sum(axis=0), int((tokens > 0).sum())
    if sign:
      variances = count / (count - 1) * np.square(values - sums / tokens.sum() * tokens).sum(axis=0)
      sums += sign * stats.t.ppf(0.975, count - 1) * np.sqrt(variances)
    return units.ScoredSums(*map(float, (tokens.sum(), *sums, *(self._sums[name] for name in units.COUNTS))))

  def _buckets(self, name: str) -> list[dict]:
    nats_K, tokens_K = self._sums[f"nats_by_{name}"], self._sums[f"tokens_by_{name}"]
    return [
      {"from": start, "to": end, "num_tokens": int(tokens), "nats_per_token": float(nats / tokens)}
      for start, end, nats, tokens in zip(EDGES, (*EDGES[1:], None), nats_K, tokens_K)
      if tokens
    ]
