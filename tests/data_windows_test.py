"""Windows: small cases written out, and every crop and block of the published pipeline."""

import json
import pathlib

import numpy as np
import pytest

from perceiver_ar_jax.data import EOS, SOS, documents, windows
from perceiver_ar_jax.data.documents import Document
from tests import tiny

GOLDEN = np.load(pathlib.Path(__file__).parent / "golden" / "data.npz")
INDEX = json.loads(str(GOLDEN["index"]))
VARLEN = json.loads(str(GOLDEN["varlen/docs"]))
DUMMY6 = [[68, 69, 70, 71, 72, 73]]


def document(events, positions=None, scored=None):
  """A document with positions 1..N."""
  events = np.asarray(events, np.int32)
  return Document(events, documents.count_positions(len(events)) if positions is None else positions, scored=scored)


def model(context, latents):
  return tiny.config(model__max_context=context, model__num_latents=latents).model


def window(events, end, num_new, context, latents, dims=1, **more):
  batch = windows.empty_batch(1, model(context, latents), dims)
  row = windows.row_of(batch, 0)
  windows.eval_window(row, document(events, **more), end, num_new)
  return row


def eval_windows(events, stride, context, latents, **more):
  """The rows of all windows of one document, in order."""
  blocks = windows.eval_blocks(len(events), stride)
  return [window(events, end, num_new, context, latents, **more) for end, num_new in blocks]


def shifted_left(row):
  """The reference pads on the right: the same row with its zeros behind."""
  row = np.asarray(row)
  count = np.count_nonzero(row)
  return np.concatenate([row[len(row) - count :], np.zeros(len(row) - count, row.dtype)])


def with_specials(events, sos):
  return [SOS] * sos + list(events) + [EOS]


def test_a_window_in_the_middle_is_full():
  row = window([2, 10, 11, 12, 13, 14], 5, 2, context=3, latents=2)
  assert row["inputs"].tolist() == [10, 11, 12]
  assert row["positions"].tolist() == [[2], [3], [4]]
  assert row["targets"].tolist() == [12, 13]
  assert row["weights"].tolist() == [1, 1]


def test_a_window_at_the_start_is_padded_on_the_left():
  row = window([2, 10, 11, 12, 13, 14], 3, 9, context=4, latents=3)
  assert row["inputs"].tolist() == [0, 0, 2, 10]
  assert row["positions"].tolist() == [[0], [0], [1], [2]]
  assert row["targets"].tolist() == [0, 10, 11]
  assert row["weights"].tolist() == [0, 1, 1], "padding must not be scored"


def test_only_new_targets_that_are_scored_weigh():
  scored = np.array([0, 0, 0, 1, 0, 1], bool)
  assert window([2, 10, 11, 12, 13, 14], 6, 2, context=5, latents=4)["weights"].tolist() == [0, 0, 1, 1]
  assert window([2, 10, 11, 12, 13, 14], 6, 4, context=5, latents=4, scored=scored)["weights"].tolist() == [0, 1, 0, 1]
  assert window([2, 10, 11, 12, 13, 14], 6, 2, context=5, latents=4, scored=scored)["weights"].tolist() == [0, 0, 0, 1]


def test_a_row_that_is_not_filled_is_all_padding():
  batch = windows.empty_batch(2, model(3, 2), 2)
  assert {name: value.shape for name, value in batch.items()} == {
    "inputs": (2, 3),
    "positions": (2, 3, 2),
    "targets": (2, 2),
    "weights": (2, 2),
  }
  assert not any(value.any() for value in batch.values())


def test_positions_with_more_dimensions_come_along():
  positions = np.arange(1, 13, dtype=np.int32).reshape(4, 3)
  row = window([2, 10, 11, 12], 4, 1, context=5, latents=1, dims=3, positions=positions)
  assert row["positions"].tolist() == [[0, 0, 0], [0, 0, 0], [1, 2, 3], [4, 5, 6], [7, 8, 9]]


def test_inputs_and_targets_are_the_events_shifted_by_one():
  for events, inputs, targets in zip(GOLDEN["shift/events"], GOLDEN["shift/inputs"], GOLDEN["shift/targets"]):
    events = events[events > 0]
    row = window(events, len(events), 8, context=8, latents=8)
    np.testing.assert_array_equal(shifted_left(row["inputs"]), inputs)
    np.testing.assert_array_equal(shifted_left(row["targets"]), targets)
  positions = GOLDEN["shift/image_idxs"][0]
  row = window(np.full(49, 5), 49, 1, context=48, latents=1, dims=3, positions=positions)
  np.testing.assert_array_equal(row["positions"], GOLDEN["shift/image_input_idxs"][0])


def train_rows(events, min_crop, context, count, first_seed=0, **more):
  """`count` training crops of one document, stacked."""
  batch = windows.empty_batch(count, model(context, context), 1)
  for index in range(count):
    draw = np.random.default_rng([7, first_seed + index]).random()
    windows.train_window(windows.row_of(batch, index), document(events, **more), draw, min_crop=min_crop)
  return batch


@pytest.mark.parametrize("case", [name for name in INDEX if name.startswith("train_crops/")])
def test_training_crops_are_those_of_the_reference_and_as_frequent(case):
  settings = INDEX[case]
  context = settings["max_context_length"] - 1  # there it counts events, and the last is not an input
  golden = {}
  for events, positions in zip(GOLDEN[f"{case}/events"], GOLDEN[f"{case}/event_idxs"]):
    count = np.count_nonzero(events)
    golden[tuple(events[:count])] = tuple(positions[:count])
  seen = {}
  for doc in VARLEN:
    rows = train_rows(with_specials(doc, 1), settings["minimum_crop_length"], context, count=600)
    crops = {}
    for inputs, positions, targets, weights in zip(*(rows[k] for k in ("inputs", "positions", "targets", "weights"))):
      count = np.count_nonzero(inputs)
      crop = (*inputs[len(inputs) - count :], targets[-1])
      crops[crop] = crops.get(crop, 0) + 1
      seen[crop] = tuple(positions[len(positions) - count :, 0])
      assert weights.sum() == count and weights[-count:].all()
    # Ends are even: with 600 draws of k crops, none strays further than about five standard deviations.
    expected = 600 / len(crops)
    for crop, count in crops.items():
      assert abs(count - expected) <= 5 * np.sqrt(expected) + 1, f"crop {crop} came {count} times, not about {expected}"
  assert set(seen) == set(golden), "the set of possible crops differs"
  for crop, positions in seen.items():
    assert positions == golden[crop][:-1]


def test_training_crops_depend_on_the_seed_alone():
  first, again = (train_rows(range(3, 40), 1, 8, count=50) for _ in range(2))
  of_other_seed = train_rows(range(3, 40), 1, 8, count=50, first_seed=1000)
  np.testing.assert_array_equal(first["inputs"], again["inputs"])
  assert not np.array_equal(first["inputs"], of_other_seed["inputs"])


def test_training_weighs_what_evaluation_leaves_out():
  rows = train_rows([2, 10, 11, 12], 4, context=3, count=1, scored=np.zeros(4, bool))
  assert rows["weights"].tolist() == [[1, 1, 1]]


def test_a_part_of_a_document_ends_its_crops_there_and_reaches_back_beyond_it():
  doc = document(list(range(100, 120)))
  doc.ends = (11, 14)
  crops = [doc.crop(draw, longest=6, shortest=2) for draw in (0, 0.25, 0.5, 0.75, 0.999)]
  assert [events.tolist()[-1] for events, *_ in crops] == [110, 111, 112, 113, 113]
  assert all(len(events) == 6 for events, *_ in crops)


@pytest.mark.parametrize(("scored_only", "weights"), [(False, [1, 1, 1]), (True, [0, 1, 0])])
def test_training_leaves_out_events_that_are_not_scored_where_asked(scored_only, weights):
  batch = windows.empty_batch(1, model(3, 3), 1)
  scored = np.array([False, False, True, False])
  windows.train_window(
    windows.row_of(batch, 0), Document(np.arange(4, 8), scored=scored), 0.5, min_crop=4, scored_only=scored_only
  )
  assert batch["weights"].tolist() == [weights]


def test_an_augmented_crop_keeps_its_newest_events_and_counts_them_anew():
  def double(events):
    return np.repeat(events, 2)

  batch = windows.empty_batch(1, model(5, 5), 1)
  plain = Document(np.array([2, 10, 11, 12], np.int32))
  windows.train_window(windows.row_of(batch, 0), plain, 0.5, min_crop=4, augment=double)
  assert batch["inputs"].tolist() == [[10, 10, 11, 11, 12]] and batch["targets"].tolist() == [[10, 11, 11, 12, 12]]
  assert batch["positions"][0, :, 0].tolist() == [1, 2, 3, 4, 5]


def test_blocks_are_even_and_the_short_one_comes_first():
  rows = eval_windows([2, 10, 11, 12, 13, 14], stride=2, context=3, latents=2)
  assert [row["inputs"].tolist() for row in rows] == [[0, 0, 2], [2, 10, 11], [11, 12, 13]]
  assert [row["targets"].tolist() for row in rows] == [[0, 10], [11, 12], [13, 14]]
  assert [row["weights"].tolist() for row in rows] == [[0, 1], [1, 1], [1, 1]]


@pytest.mark.parametrize("case", [name for name in INDEX if name.startswith("block_eval/")])
def test_evaluation_blocks_are_those_of_the_reference(case):
  settings = INDEX[case]
  context, stride = settings["max_context_length"], settings["block_eval_window"]
  docs = VARLEN if settings["dataset"] == "varlen" else DUMMY6
  rows = [
    row for doc in docs for row in eval_windows(with_specials(doc, settings["include_sos"]), stride, context, context)
  ]
  inputs, targets = (GOLDEN[f"{case}/{name}"].reshape(-1, context) for name in ("inputs", "targets"))
  filled = inputs.any(axis=1)
  assert len(rows) == filled.sum() and filled[: len(rows)].all()
  for number, row in enumerate(rows):
    np.testing.assert_array_equal(shifted_left(row["inputs"]), inputs[number])
    np.testing.assert_array_equal(shifted_left(row["targets"]), targets[number])
    if settings["include_event_idxs"]:
      golden = GOLDEN[f"{case}/input_idxs"].reshape(-1, context)[number]
      np.testing.assert_array_equal(shifted_left(row["positions"][:, 0]), golden)


@pytest.mark.parametrize("dataset", ["dummy6", "varlen"])
@pytest.mark.parametrize("sos", [0, 1])
@pytest.mark.parametrize("events", [4, 9])
def test_stride_1_gives_the_incremental_windows_of_the_reference(dataset, sos, events):
  golden = GOLDEN[f"eval_crops/{dataset}/sos{sos}/ctx{events}_min1/events"].reshape(-1, events)
  wanted = {tuple(crop[crop > 0]) for crop in golden if np.count_nonzero(crop) > 1}
  docs = VARLEN if dataset == "varlen" else DUMMY6
  ours = [row for doc in docs for row in eval_windows(with_specials(doc, sos), 1, events - 1, 1)]
  assert {(*row["inputs"][row["inputs"] > 0], row["targets"][0]) for row in ours} == wanted
  assert len(ours) == len(wanted) and all(row["weights"].tolist() == [1] for row in ours)


@pytest.mark.parametrize("length", [2, 3, 17, 18, 40])
@pytest.mark.parametrize(
  "stride, latents, context", [(1, 1, 1), (1, 4, 9), (3, 4, 9), (4, 4, 9), (8, 8, 8), (5, 8, 40)]
)
def test_every_target_is_scored_exactly_once_with_as_much_context_as_fits(length, stride, latents, context):
  events = list(range(100, 100 + length))
  rows = eval_windows(events, stride, context, latents)
  scored = [target for row in rows for target, weight in zip(row["targets"], row["weights"]) if weight == 1]
  assert scored == events[1:]
  for row in rows:
    assert set(row["weights"]) <= {0, 1} and row["targets"][-1] > 0
    assert np.count_nonzero(row["inputs"]) == min(context, row["targets"][-1] - 100)


def test_documents_too_short_to_predict_anything_have_no_blocks():
  assert eval_windows([2], 4, 8, 4) == [] and eval_windows([], 4, 8, 4) == []
