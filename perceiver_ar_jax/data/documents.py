"""A document: one whole sequence of events, any range of which can be read without reading the rest."""

from collections.abc import Mapping

import numpy as np

from perceiver_ar_jax.config import InputError


class Unreadable(InputError):
  """A record contains no usable document; the message names it and the reason. Loaders report, count and skip it."""


class Document:
  """A sequence of N events; this class keeps them in memory, subclasses read and encode ranges on demand.

  Args:
    events: int32[N].
    positions: int32[N, P], 1-based; or a function (start, end) -> those of a range; None: they count from the first
      event of the range that is read, so that the positions of a text stay within the context however long it is.
    count: events -> the counts by which evaluation divides their likelihood, such as {"frames": 3}.
    scored: bool[N]: the events that are scored in evaluation; None: all of them.
  """

  ends: tuple[int, int] | None = None  # (first, last) end of training crops, where it has several records; None: 1..N
  continues: bool = False  # whether another record contains its beginning: evaluation reads the whole document there

  def __init__(self, events: np.ndarray, positions=None, count=lambda events: {}, scored=None):
    self._events, self._positions, self._scored, self._count = events, positions, scored, count

  def __len__(self) -> int:
    return len(self._events)

  def has_targets(self) -> bool:
    return len(self) > 1

  def read(self, start: int, end: int) -> np.ndarray:
    """Events start..end-1: int32[end - start]."""
    return self._events[start:end]

  def positions(self, start: int, end: int) -> np.ndarray:
    """Positions of events start..end-1: int32[end - start, P]."""
    if callable(self._positions):
      return self._positions(start, end)
    return count_positions(end - start) if self._positions is None else self._positions[start:end]

  def scored(self, start: int, end: int) -> np.ndarray:
    """Which of the events start..end-1 count in evaluation: bool[end - start]."""
    return np.ones(end - start, bool) if self._scored is None else self._scored[start:end]

  def counts(self, end: int | None = None) -> Mapping[str, int]:
    """What evaluation divides by beside tokens, for the events before `end`: units.COUNTS, such as words and bytes."""
    return self._count(self._events[:end])

  @property
  def num_scored(self) -> int:
    """Events that are predicted and count in evaluation."""
    return max(len(self) - 1, 0) if self._scored is None else int(self._scored[1:].sum())

  def head(self, num_scored: int) -> "Document":
    """Returns the document up to its `num_scored`-th scored event, with the counts of that part."""
    if self.num_scored <= num_scored:
      return self
    end = 1 + num_scored if self._scored is None else int(np.flatnonzero(self._scored[1:])[num_scored - 1]) + 2
    scored = None if self._scored is None else self._scored[:end]
    return Document(self.read(0, end), self.positions, lambda events: self.counts(len(events)), scored)

  def crop(self, draw: float, longest: int, shortest: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A training crop: (events int32[n], positions int32[n, P], scored bool[n]), n <= `longest`.

    It ends anywhere from event `shortest` to the last, uniformly, as `draw` in [0, 1) determines, and is as long as
    `longest` allows. Documents shorter than `shortest` are not cropped.
    """
    first, last = self.ends or (1, len(self))
    first = max(first, min(shortest, last))
    end = first + int(draw * (last - first + 1))
    start = max(end - longest, 0)
    return self.read(start, end), self.positions(start, end), self.scored(start, end)


def count_positions(length: int) -> np.ndarray:
  """1..length as int32[length, 1]."""
  return np.arange(1, length + 1, dtype=np.int32)[:, None]
