"""The units of held-out loss, named by tasks: how each is computed from sums over scored tokens, and printed."""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple


class ScoredSums(NamedTuple):
  """Sums over the scored tokens of a split."""

  tokens: float
  nats: float
  correct: float  # tokens that the model finds most likely
  words: float = 0.0
  bytes: float = 0.0
  frames: float = 0.0  # words and bytes of the original text, frames of piano rolls; 0 for other data

  @property
  def bits(self) -> float:
    return self.nats / math.log(2)


COUNTS = ("words", "bytes", "frames")  # names of the sums that documents provide (Document.counts)


class Unit(NamedTuple):
  """One entry of UNITS."""

  compute: Callable[[ScoredSums], float]
  summary: str = "{bits_per_token:.3f} bits/token"  # format of the one-line summary, by the metrics of a result
  token_loss: str = "bits/token"  # name of the loss of a token in bits, in the progress bar of training
  applies: Callable[[ScoredSums], bool] = lambda sums: True  # whether it is reported for tasks with another unit


UNITS: dict[str, Unit] = {
  "nats_per_token": Unit(
    lambda sums: sums.nats / sums.tokens, "{nats_per_token:.3f} nats/token, {bits_per_token:.3f} bits/token"
  ),
  "bits_per_token": Unit(lambda sums: sums.bits / sums.tokens),
  "bits_per_dim": Unit(  # a token is one sub-pixel
    lambda sums: sums.bits / sums.tokens, "{bits_per_dim:.3f} bits/dim", "bits/dim", applies=lambda sums: False
  ),
  "bits_per_byte": Unit(
    lambda sums: sums.bits / sums.bytes,
    "{bits_per_byte:.3f} bits/byte, {bits_per_token:.3f} bits/token",
    applies=lambda sums: sums.bytes > 0,
  ),
  "word_perplexity": Unit(
    lambda sums: math.exp(min(sums.nats / max(sums.words, 1), 88.0)),  # a text of spaces is one word; within float32
    "perplexity {word_perplexity:.4g} per word, {bits_per_token:.3f} bits/token",
    applies=lambda sums: sums.bytes > 0,
  ),
  "nats_per_frame": Unit(
    lambda sums: sums.nats / max(sums.frames, 1),
    "{nats_per_frame:.3f} nats/frame, {bits_per_token:.3f} bits/token",
    applies=lambda sums: False,
  ),
  "accuracy": Unit(lambda sums: sums.correct / sums.tokens),
}


def compute_all(sums: ScoredSums, unit: str) -> Mapping[str, float]:
  """Returns the loss in the task's own unit and in every other one that applies."""
  return {name: entry.compute(sums) for name, entry in UNITS.items() if name == unit or entry.applies(sums)}
