"""Converts documents to model inputs: crops for training, sliding blocks for evaluation, all of one fixed shape.

Events e_0 .. e_{N-1} of a document give the inputs e_0 .. e_{N-2} and the targets e_1 .. e_{N-1}: each target is the
event after its input. A window is the range of at most `context` inputs that ends at a given event, right-aligned
(PAD on the left), with the targets of its last `latents` inputs:

    context 4, latents 2, events SOS a b c d e:   ending at e:   inputs   a   b   c   d   targets d e
                                                  ending at b:   inputs PAD PAD SOS   a   targets a b

A batch is a dict of arrays that are initially padding, `empty_batch`; each row is filled with one window, or in packed
batches (data.packing) with several, from the right. Segments number them; one begins before the latents at most:

    context 6, latents 4, SOS a b and SOS c d e:  inputs   PAD SOS   c   d SOS   a   targets d e a b
                                                  segments   0   2   2   2   1   1
"""

from collections.abc import Callable, Iterator

import numpy as np

from perceiver_ar_jax.config import Config, ModelConfig, require
from perceiver_ar_jax.data.documents import Document

Batch = dict[str, np.ndarray]
"""inputs int32[B, L], positions int32[B, L, P], targets int32[B, M], weights float32[B, M]; a row has no B.

Positions are left out where the model does not read them. Packed batches also have segments int32[B, L]."""


def check_positions(batch: Batch, config: Config) -> None:
  """Raises InputError if a position is outside the model's tables."""
  sizes, positions_BxLxP = config.model.position_sizes, batch.get("positions")
  if positions_BxLxP is None or len(sizes) != positions_BxLxP.shape[-1]:
    return  # without tables, or refused by the model
  # One dimension at a time: over all at once, NumPy takes ten times as long.
  largest = tuple(int(positions_BxLxP[..., dimension].max()) for dimension in range(len(sizes)))
  is_inside = all(position < size for position, size in zip(largest, sizes))
  problem = f"The task {config.data.task} has positions up to {largest}, beyond model.position_sizes={sizes}"
  fix = "make each size at least the largest position + 1 of all documents, which --mode=data shows"
  require(is_inside, f"{problem}: {fix}.")


def empty_batch(
  size: int, model: ModelConfig, position_dims: int, *, latents: int | None = None, packed: bool = False
) -> Batch:
  """B = `size` rows of padding with weight 0 for `model`; M = `latents` (None: the model's), P = `position_dims`."""
  context, latents = model.max_context, latents or model.num_latents
  batch = {
    "inputs": np.zeros((size, context), np.int32),
    "targets": np.zeros((size, latents), np.int32),
    "weights": np.zeros((size, latents), np.float32),
  }
  if model.positions_from_data:
    batch["positions"] = np.zeros((size, context, position_dims), np.int32)
  return batch | ({"segments": np.zeros((size, context), np.int32)} if packed else {})


def row_of(batch: Batch, index: int) -> Batch:
  """Views of one row of a batch."""
  return {name: values[index] for name, values in batch.items()}


def train_window(
  row: Batch, document: Document, draw: float, min_crop: int, scored_only: bool = False, augment: Callable | None = None
) -> int:
  """Fills an empty row with the crop of a document (at least 2 events) that `draw` in [0, 1) determines: Document.crop.

  It has at least `min_crop` events, so that the first ones, which all short crops contain, are not over-sampled. Its
  targets have weight 1, with `scored_only` those that are scored. `augment` returns other events for those of the crop,
  whose positions must be those that count from its start. Returns the number of inputs.
  """
  longest = len(row["inputs"]) + 1
  events, positions, scored = document.crop(draw, longest, max(min_crop, 2))  # an input and its target
  if augment:
    events = augment(events)[-longest:]
    positions = document.positions(0, len(events))
  scored = scored if scored_only else np.ones(len(events), bool)
  return _fill(row, events, positions, scored, len(row["targets"]))


def eval_window(row: Batch, document: Document, end: int, num_new: int) -> None:
  """Fills an empty row with the window whose last target is event `end` - 1 of a document, `end` in 2..N.

  At most the last `num_new` targets have weight 1, if the document scores them.
  """
  start = max(end - 1 - len(row["inputs"]), 0)
  _fill(row, document.read(start, end), document.positions(start, end), document.scored(start, end), num_new)


def eval_blocks(num_events: int, stride: int) -> Iterator[tuple[int, int]]:
  """Yields (end, num_new): blocks of `stride` targets that together cover each target of a document exactly once.

  The first block may be shorter, so that all later ones have as much context as possible.
  """
  return ((1 + end, min(stride, end)) for end in reversed(range(num_events - 1, 0, -stride)))


def _fill(row: Batch, events: np.ndarray, positions: np.ndarray, scored: np.ndarray, num_new: int) -> int:
  """Writes n inputs and the last of their n targets, from n + 1 events; returns n."""
  count = len(events) - 1
  if count < 1:
    return 0
  row["inputs"][-count:] = events[:-1]
  if "positions" in row:
    row["positions"][-count:] = positions[:-1]
  targets = min(count, len(row["targets"]))
  row["targets"][-targets:] = events[-targets:]
  new = min(targets, num_new)
  row["weights"][-new:] = scored[-new:]
  return count
