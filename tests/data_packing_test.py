"""Several documents in a row of a training batch: what a row contains, exact resumption, unreadable records."""

import json

import numpy as np
import pytest

from perceiver_ar_jax.config import DataConfig, InputError
from perceiver_ar_jax.data import EOS, SOS, documents, loader
from tests import batches
from tests.batches import take
from tests.texts import words

A, B = ord("a") + 3, ord("b") + 3


def _config(folder, contents, *, context, latents, **data):
  batches.write(folder, {f"train/{name}": text for name, text in contents.items()} | {"validation.txt": "held out"})
  settings = {"min_crop": 1000, "packing": 2} | data  # with texts shorter than min_crop, no text is cropped
  files = {"files": f"{folder}/train", "validation_files": f"{folder}/validation.txt"}
  data = DataConfig(task="text_files", **files, **settings)
  return batches.config(data, context=context, latents=latents, sizes=(context + 1,))


def _first_row(config):
  batch = next(batches.train_loader(config, 1))
  return {name: values[0].tolist() for name, values in batch.items()}


def test_a_row_is_filled_from_the_right_and_no_target_crosses_a_border(tmp_path):
  row = _first_row(_config(tmp_path, {"ab.txt": "ab"}, context=8, latents=5))  # SOS a b EOS, twice
  assert row == {
    "inputs": [0, 0, SOS, A, B, SOS, A, B],
    "positions": [[0], [0], [1], [2], [3], [1], [2], [3]],
    "segments": [0, 0, 2, 2, 2, 1, 1, 1],
    "targets": [B, EOS, A, B, EOS],
    "weights": [1, 1, 1, 1, 1],
  }


def test_the_last_document_is_cropped_to_the_slots_that_are_left(tmp_path):
  row = _first_row(_config(tmp_path, {"ab.txt": "ab"}, context=5, latents=5))
  assert row == {
    "inputs": [A, B, SOS, A, B],
    "positions": [[1], [2], [1], [2], [3]],
    "segments": [2, 2, 1, 1, 1],
    "targets": [B, EOS, A, B, EOS],
    "weights": [1, 1, 1, 1, 1],
  }


@pytest.mark.parametrize(("packing", "weights"), [(1, [0, 0, 0, 1, 1, 1]), (2, [1] * 6), (5, [1] * 6)])
def test_a_row_has_at_most_that_many_documents_and_no_more_than_the_latents_need(packing, weights, tmp_path):
  row = _first_row(_config(tmp_path, {"ab.txt": "ab"}, context=20, latents=6, packing=packing))
  assert row["weights"] == weights
  assert row.get("segments", [1])[-1] == 1 and max(row.get("segments", [1])) == min(packing, 2)


def test_every_segment_is_a_whole_text_but_the_last_one_which_is_the_end_of_one(tmp_path):
  texts = {f"{number}.txt": " ".join(words(1 + number % 7, seed=number)) for number in range(30)}
  config = _config(tmp_path, texts, context=96, latents=64, packing=4)
  known = {(SOS, *(value + 3 for value in text.encode()), EOS) for text in texts.values()}
  seen, lengths = set(), set()
  for batch in take(batches.train_loader(config, 8), 6):
    for inputs, positions, targets, weights, segments in zip(
      *(batch[name] for name in ("inputs", "positions", "targets", "weights", "segments"))
    ):
      lengths.add(segments.max())
      assert np.all(np.diff(segments) <= 0 if segments.all() else np.diff(segments[segments > 0]) <= 0)
      np.testing.assert_array_equal(weights, segments[-64:] > 0)
      for number in range(1, segments.max() + 1):
        slots = np.flatnonzero(segments == number)
        events = (*inputs[slots], targets[slots[-1] - 32])
        np.testing.assert_array_equal(positions[slots, 0], np.arange(1, len(slots) + 1))
        inside = slots[slots >= 32]
        np.testing.assert_array_equal(targets[inside - 32], events[len(slots) - len(inside) + 1 :])
        if number < segments.max():
          assert events in known and len(inside) == len(slots)
        else:
          assert any(text[-len(events) :] == events for text in known)
        seen.add(events)
  assert len(seen & known) == 30 and {2, 3, 4} <= lengths


def _texts(tmp_path, **data):
  texts = {f"{number}.txt": " ".join(words(1 + number % 5, seed=number)) for number in range(20)}
  return _config(tmp_path, texts, context=64, latents=32, shuffle_buffer=6, **{"packing": 3} | data)


def test_a_restored_loader_continues_with_the_next_records(tmp_path):
  config = _texts(tmp_path)
  iterator = batches.train_loader(config, 4)
  take(iterator, 3)
  iterator.save(tmp_path / "state")
  expected = take(iterator, 5)
  restored = batches.train_loader(config, 4)
  take(restored, 2)
  restored.restore(tmp_path / "state")
  batches.assert_equal(take(restored, 5), expected)


def test_a_state_of_rows_of_other_sizes_is_refused_and_one_without_the_setting_is_of_single_documents(tmp_path):
  packed, single = _texts(tmp_path), _texts(tmp_path, packing=1)
  batches.train_loader(packed, 4).save(tmp_path / "packed")
  with pytest.raises(InputError, match="packing was 3 and is 1"):
    batches.train_loader(single, 4).restore(tmp_path / "packed")
  iterator = batches.train_loader(single, 4)
  next(iterator)
  iterator.save(tmp_path / "single")
  path = tmp_path / "single" / "shard-00000-of-00001.json"
  state = json.loads(path.read_text())
  del state["stream"]["packing"]
  path.write_text(json.dumps(state))
  with pytest.raises(InputError, match="packing was 1 and is 3"):
    batches.train_loader(packed, 4).restore(tmp_path / "single")
  restored = batches.train_loader(single, 4)
  restored.restore(tmp_path / "single")
  batches.assert_equal([next(restored)], [next(iterator)])


def test_unreadable_records_are_replaced_and_rows_are_filled_all_the_same(tmp_path, monkeypatch):
  read = loader.windows.train_window

  def fail_on_short_texts(row, document, *args, **named):
    if len(document) < 20:
      raise documents.Unreadable("gone")
    return read(row, document, *args, **named)

  monkeypatch.setattr(loader.windows, "train_window", fail_on_short_texts)
  batch = next(batches.train_loader(_texts(tmp_path), 8))
  assert batch["weights"].all() and batch["segments"].max() == 2
