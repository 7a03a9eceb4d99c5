"""Tasks that read files: each token is scored once, training resumes exactly, hosts share the data."""

import dataclasses

import numpy as np
import pytest

from perceiver_ar_jax.config import InputError
from perceiver_ar_jax.data import NUM_SPECIAL, texts, warn_once
from tests import batches
from tests.batches import take
from tests.own_files import (
  HOSTS,
  NAMES,
  ONE_RECORD,
  TEXT_NAMES,
  as_string,
  crops,
  rows,
  settings,
)


@pytest.fixture(autouse=True)
def no_warnings_so_far():
  warn_once.reset()


@pytest.mark.parametrize(
  ("name", "stride", "latents", "context", "hosts"),
  [
    *((name, 3, 4, 7, HOSTS) for name in NAMES),
    *((name, *windows) for name in NAMES[:2] for windows in ((1, 1, 5, 1), (3, 4, 7, 1), (8, 8, 40, HOSTS))),
  ],
)
def test_evaluation_scores_each_event_of_each_document_once(name, stride, latents, context, hosts, file_cases):
  config = settings(file_cases[name], context=context, latents=latents)
  scored = rows(config, hosts, stride=stride, num_latents=latents)
  documents = file_cases[name].documents["validation"]
  assert sum(row["weights"].sum() for row in scored) == sum(len(document) - 1 for document in documents)
  targets = np.concatenate([row["targets"][row["weights"] == 1] for row in scored])
  inputs = np.concatenate([row["inputs"][-latents:][row["weights"] == 1] for row in scored])
  np.testing.assert_array_equal(targets, np.concatenate([document[1:] for document in documents]))
  np.testing.assert_array_equal(inputs, np.concatenate([document[:-1] for document in documents]))


@pytest.mark.parametrize(("part_bytes", "hosts"), [(5, HOSTS), (2**20, 1)])
@pytest.mark.parametrize("name", TEXT_NAMES)
def test_evaluation_counts_words_and_bytes_once(name, part_bytes, hosts, file_cases, monkeypatch):
  monkeypatch.setattr(texts, "PART_BYTES", part_bytes)
  monkeypatch.setattr(texts, "_COUNT_BYTES", 3)  # words cross the stretches that are counted
  scored = rows(settings(file_cases[name]), hosts)
  contents = file_cases[name].contents["validation"]
  assert sum(row["bytes"] for row in scored) == sum(map(len, contents))
  assert sum(row["words"] for row in scored) == sum(len(content.split()) for content in contents)
  assert sum(row["weights"].sum() for row in scored) == sum(len(content) + 1 for content in contents)


@pytest.mark.parametrize("name", ["enwik8", "wikitext103 raw", "pg19", "maestro_v3"])
def test_the_test_split_has_its_own_documents(name, file_cases):
  scored = rows(settings(file_cases[name]), split="test")
  targets = np.concatenate([row["targets"][row["weights"] == 1] for row in scored])
  np.testing.assert_array_equal(
    targets, np.concatenate([document[1:] for document in file_cases[name].documents["test"]])
  )


@pytest.mark.parametrize("name", NAMES)
def test_training_rows_are_stretches_of_the_documents(name, file_cases):
  case = file_cases[name]
  iterator = batches.train_loader(settings(case, context=12, latents=5), 6)
  documents = [as_string(document) for document in case.documents["train"]]
  seen = set()
  for batch in take(iterator, 10):
    described = {key: (value.dtype.name, value.shape) for key, value in batch.items()}
    assert described == {
      "inputs": ("int32", (6, 12)),
      "positions": ("int32", (6, 12, case.position_dims)),
      "targets": ("int32", (6, 5)),
      "weights": ("float32", (6, 5)),
    }
    np.testing.assert_array_equal(
      batch["weights"], batch["targets"] > 0, err_msg="padding has a weight, or a target has none"
    )
    assert batch["weights"].any(axis=1).all(), "a row is empty"
    earlier = batch["targets"][:, :-1]
    np.testing.assert_array_equal(
      earlier, np.where(earlier > 0, batch["inputs"][:, -4:], 0), err_msg="targets are not the inputs that follow"
    )
    np.testing.assert_array_equal((batch["positions"] > 0).all(axis=-1), batch["inputs"] > 0)
    for crop in crops(batch):
      origins = [index for index, document in enumerate(documents) if crop in document]
      assert origins, f"{list(map(ord, crop))} is in no document"
      seen.update(origins)
  assert seen == set(range(len(documents))), "a document is never drawn"


@pytest.mark.parametrize("name", TEXT_NAMES)
def test_training_rows_of_texts_decode_to_what_is_written(name, file_cases):
  iterator = batches.train_loader(settings(file_cases[name], context=12, latents=5), 6)
  written = [content.decode() for content in file_cases[name].contents["train"]]
  for batch in take(iterator, 5):
    for row in batch["inputs"]:
      shown = iterator.task.decode(row).strip("\ufffd")  # The crop may begin or end inside a character.
      assert any(shown in text for text in written), f"{shown!r} is in no file"


RESUMED = {name: {} for name in NAMES} | {
  "maestro_v3, augmented": {"max_transposition": 6, "max_stretch": 0.1},
  "midi_files, augmented": {"max_transposition": 2},
  "pg19, small shuffle": {"shuffle_buffer": 2},
}


@pytest.mark.parametrize("variant", RESUMED)
def test_a_restored_iterator_resumes_exactly(variant, file_cases, tmp_path, monkeypatch):
  name = variant.split(",")[0]
  if name in ONE_RECORD:
    monkeypatch.setattr(texts, "PART_BYTES", 10)  # many records of one file
  config = settings(file_cases[name], **RESUMED[variant])
  iterator = batches.train_loader(config, 3)
  take(iterator, 5)
  iterator.save(tmp_path)
  expected = take(iterator, 8)
  restored = batches.train_loader(config, 3)
  take(restored, 2)  # must not matter
  restored.restore(tmp_path)
  batches.assert_equal(take(restored, 8), expected)
  of_other_seed = take(batches.train_loader(dataclasses.replace(config, seed=1), 3), 8)
  assert not all(np.array_equal(batch["inputs"], same["inputs"]) for batch, same in zip(of_other_seed, expected))


def test_augmentation_changes_pitches_and_times_but_not_the_shapes(file_cases):
  case = file_cases["maestro_v3"]
  plain = next(batches.train_loader(settings(case), 99))
  moved = next(batches.train_loader(settings(case, max_transposition=5), 99))
  notes = (moved["inputs"] >= NUM_SPECIAL) & (moved["inputs"] < NUM_SPECIAL + 256)
  steps = (moved["inputs"] - plain["inputs"])[notes]
  assert set(steps) == set(range(-5, 6)), "crops are not transposed by -5..5"
  np.testing.assert_array_equal(moved["inputs"][~notes], plain["inputs"][~notes], err_msg="more than notes changed")
  stretched = next(batches.train_loader(settings(case, max_stretch=0.2), 99))
  assert {key: value.shape for key, value in stretched.items()} == {key: value.shape for key, value in plain.items()}
  assert (stretched["inputs"] != plain["inputs"]).any()


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ONE_RECORD])
def test_hosts_read_documents_of_their_own_and_together_all(name, file_cases):
  case = file_cases[name]
  config = settings(case, context=200, min_crop=201)  # Each row is a whole document.
  seen = [
    {crop for batch in take(batches.train_loader(config, 8, host, HOSTS), 8) for crop in crops(batch)}
    for host in range(HOSTS)
  ]
  assert sum(map(len, seen)) == len(set.union(*seen)), "two hosts read the same document"
  assert set.union(*seen) == {as_string(document) for document in case.documents["train"]}


@pytest.mark.parametrize("name", ["enwik8", "text_files by position"])
def test_hosts_share_the_parts_of_one_large_file(name, file_cases, monkeypatch):
  monkeypatch.setattr(texts, "PART_BYTES", 50)
  (document,) = map(as_string, file_cases[name].documents["train"])
  seen = []
  for host in range(HOSTS):
    iterator = batches.train_loader(settings(file_cases[name], context=20), 64, host, HOSTS)
    drawn = {crop for batch in take(iterator, 25) for crop in crops(batch)}
    seen.append({document.index(crop) + len(crop) for crop in drawn})
  assert sum(map(len, seen)) == len(set.union(*seen)), "two hosts train on crops that end at the same event"
  assert set.union(*seen) == set(range(2, len(document) + 1)), "no crop ends at some event"


def test_more_hosts_than_files_is_an_error(file_cases):
  with pytest.raises(InputError, match="'train' of text_files has 6 records, fewer than data.shards=7"):
    batches.train_loader(settings(file_cases["text_files"]), 2, 0, 7)


def test_a_mixture_draws_its_tasks_by_their_shares(file_cases):
  config = settings(file_cases["mixture"], context=200, min_crop=201)
  drawn = [crop for batch in take(batches.train_loader(config, 100), 20) for crop in crops(batch)]
  books = {as_string(document) for document in file_cases["pg19"].documents["train"]}
  assert sum(crop in books for crop in drawn) / len(drawn) == pytest.approx(0.75, abs=0.03)
