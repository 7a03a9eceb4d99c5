"""Tasks that read files: missing files, wrong settings and unreadable files are named."""

import dataclasses
import pathlib
import re

import numpy as np
import pytest

from perceiver_ar_jax.config import InputError
from perceiver_ar_jax.data import midi, warn_once
from tests import batches
from tests.batches import evaluate, take, write
from tests.own_files import (
  HOSTS,
  NOTES,
  Case,
  as_string,
  crops,
  events_of_text,
  halves,
  npy,
  npz,
  png,
  rows,
  settings,
)


@pytest.fixture(autouse=True)
def no_warnings_so_far():
  warn_once.reset()


def test_a_single_file_cannot_be_split_by_file_but_by_position(tmp_path):
  write(tmp_path, {"only.txt": b"0123456789" * 4})
  case = Case({"task": "text_files", "files": str(tmp_path)}, {})
  with pytest.raises(InputError, match="validation_files.*split_by=position"):
    batches.train_loader(settings(case), 2)
  by_position = settings(case, context=60, min_crop=61, split_by="position", validation_fraction=0.1)
  expected = as_string(events_of_text(b"0123456789" * 3 + b"012345"))
  assert set(crops(next(batches.train_loader(by_position, 2)))) == {expected}
  targets = [row["targets"][row["weights"] == 1].tolist() for row in rows(by_position, batch=1)]
  assert targets == [events_of_text(b"6789")[1:]]


OWN_FILES = ("text_files", "midi_files", "image_files", "audio_codes", "video_codes")


def both(case, **data):
  """Two functions that read the data for training and for evaluation."""
  config = settings(case, **data)
  return (lambda: next(batches.train_loader(config, 2)), lambda: evaluate(config))


@pytest.mark.parametrize("name", OWN_FILES)
def test_missing_files_are_explained(name, file_cases, tmp_path):
  for read in both(file_cases[name], files=None):
    with pytest.raises(InputError, match=f"The task {name} reads your own files: set data.files"):
      read()
  for pattern in (tmp_path, tmp_path / "nowhere", tmp_path / "*.xyz"):
    for read in both(file_cases[name], files=str(pattern)):
      with pytest.raises(
        InputError, match=r"(contains no matching file|does not exist)\. Set data.files \(or data.validation_files\)"
      ):
        read()
  with pytest.raises(InputError, match="'nothing_here' does not exist"):
    evaluate(settings(file_cases[name], validation_files="nothing_here"))


@pytest.mark.parametrize(
  "name, release, missing",
  [
    ("wikitext103 raw", "WikiText-103", "wiki.train.raw"),
    ("enwik8", "enwik8", "enwik8 does not exist"),
    ("maestro_v3", "MAESTRO", "maestro-v3.0.0.csv does not exist"),
  ],
)
def test_a_missing_release_is_explained(name, release, missing, file_cases, tmp_path):
  train, evaluation = both(file_cases[name], data_dir=None)
  for read in (train, evaluation):
    with pytest.raises(InputError, match=f"reads your copy of {release}: set data.data_dir"):
      read()
  with pytest.raises(InputError, match=missing) as error:
    next(batches.train_loader(settings(file_cases[name], data_dir=str(tmp_path)), 2))
  assert str(tmp_path) in str(error.value) and "data.data_dir" in str(error.value)


def test_books_that_are_not_prepared_are_explained(file_cases, tmp_path):
  for read in both(file_cases["pg19"], data_dir=str(tmp_path)):
    with pytest.raises(InputError, match="pg19:0.1.1 is not prepared in .*tfds build pg19"):
      read()


def test_a_table_without_a_split_is_explained(file_cases, tmp_path):
  write(tmp_path, {"maestro-v3.0.0.csv": b"split,midi_filename\ntrain,a.midi\n"})
  with pytest.raises(InputError, match="lists no file in the split 'validation': is it complete"):
    evaluate(settings(file_cases["maestro_v3"], data_dir=str(tmp_path)))


@pytest.mark.parametrize("name", OWN_FILES)
def test_an_unknown_split_lists_the_known_ones(name, file_cases):
  with pytest.raises(InputError, match=f"{name} has no split 'test'.*train, validation"):
    evaluate(settings(file_cases[name]), split="test")
  with pytest.raises(InputError, match=f"{name} has no split 'trian'. Did you mean 'train'"):
    batches.train_loader(settings(file_cases[name], train_split="trian"), 2)


def test_a_mixture_of_different_vocabularies_names_them(file_cases):
  for read in both(file_cases["text_files"], task="text_files+midi_files:2"):
    with pytest.raises(InputError, match="text_files: text, 259 ids; midi_files: music, 391 ids"):
      read()


BAD = {
  "an empty text": ("text_files", "bad.txt", b"", "bad.txt has nothing to predict"),
  "not MIDI": ("midi_files", "bad.mid", b"hello", "cannot be read as a MIDI file: it does not contain the header"),
  "an empty MIDI file": ("midi_files", "bad.mid", b"", "cannot be read as a MIDI file: it does not contain"),
  "a truncated MIDI file": (
    "midi_files",
    "bad.mid",
    midi.write(NOTES["train"][3])[:60],
    "cannot be read as a MIDI file: it is truncated",
  ),
  "MIDI without notes": ("midi_files", "bad.mid", midi.write([]), "contains no notes"),
  "a truncated image": (
    "image_files",
    "bad.png",
    png(np.random.default_rng(0).integers(0, 256, (9, 9, 3), np.uint8))[:200],
    "is not an image",
  ),
  "no image": ("image_files", "bad.png", b"hello", "is not an image that can be read"),
  "not an array": ("audio_codes", "bad.npy", b"hello", "is not a .npy or .npz file of codes"),
  "pickled objects": ("audio_codes", "bad.npy", npy([[1, 2]], object), "is not a .npy or .npz file of codes"),
  "several arrays": ("audio_codes", "bad.npz", npz(one=[[1]], two=[[2]]), "name one of them codes"),
  "fractions": ("audio_codes", "bad.npy", npy([[1, 2]], np.float32), "contains float32, and codes are integers"),
  "codes too large": ("audio_codes", "bad.npy", npy([[0, 16]]), "codes from 0 to 16, outside 0..15"),
  "codes too small": ("video_codes", "bad.npy", npy([[[-1, 3]]]), "codes from -1 to 3, outside 0..15"),
  "an empty array": ("video_codes", "bad.npy", npy(np.zeros((0, 2, 3))), "contains no codes"),
  "too few levels": ("audio_codes", "bad.npy", npy([[1], [2], [3]]), "is 1 levels, fewer than data.code_levels=2"),
  "a flat list": ("audio_codes", "bad.npy", npy([1, 2, 3]), r"the shape \(3,\).*frames x levels"),
  "a single frame": ("video_codes", "bad.npy", npy([[1, 2]]), r"the shape \(1, 2\).*time x height x width"),
}


LONGEST = {
  "text_files": "4.txt",
  "midi_files": "3.mid",
  "image_files": "0.png",
  "audio_codes": "2.npy",
  "video_codes": "2.npy",
}
"""The training file with the longest document."""


def skipped(capsys):
  """The lines about skipped records on standard error since the last call."""
  return [line for line in capsys.readouterr().err.splitlines() if line.startswith("Skipped: ")]


def good_and_bad(file_cases, bad, folder):
  """The case of one usable file beside an unusable one in each split, and the message."""
  name, file, content, message = BAD[bad]
  document = max(file_cases[name].documents["train"], key=len)
  good = pathlib.Path(file_cases[name].data["files"], "train", LONGEST[name])
  write(folder, {f"train/{file}": content, f"validation/{file}": content})
  write(folder, {f"{split}/{good.name}": good.read_bytes() for split in ("train", "validation")})
  data, documents = file_cases[name].data | halves(folder), {"train": [document], "validation": [document]}
  return dataclasses.replace(file_cases[name], data=data, documents=documents), message


@pytest.mark.parametrize("bad", BAD)
def test_an_unreadable_file_is_named_once_and_replaced_by_other_crops(bad, file_cases, tmp_path, capsys):
  case, message = good_and_bad(file_cases, bad, tmp_path)
  (document,) = map(as_string, case.documents["train"])
  iterator = batches.train_loader(settings(case), 8)
  taken = take(iterator, 4)
  drawn = [crop for batch in taken for crop in crops(batch)]
  assert all(len(crop) > 1 and crop in document for crop in drawn), "a row is empty or made of something else"
  assert len(set(drawn)) > 8, "the rows of unreadable records repeat those of others"
  batches.assert_equal(take(batches.train_loader(settings(case), 8), 4), taken)
  (line,) = skipped(capsys)
  assert str(tmp_path / "train") in line and line.endswith("(1 skipped so far).")
  assert re.search(message, line), line
  assert sum(row["weights"].sum() for row in rows(settings(case))) == len(document) - 1
  (line,) = skipped(capsys)
  assert str(tmp_path / "validation") in line and line.endswith("(2 skipped so far).")


@pytest.mark.parametrize("name", ["pg19", "midi_files"])
def test_each_record_that_is_skipped_is_counted(name, file_cases, capsys):
  take(batches.train_loader(settings(file_cases[name]), 8), 4)
  expected = {
    "pg19": [r"A record of pg19 has nothing to predict"],
    "midi_files": [r"train.1.mid contains no notes", r"broken.midi cannot be read as a MIDI file"],
  }[name]
  lines = skipped(capsys)
  assert len(lines) == len(expected)
  for words in expected:
    assert sum(bool(re.search(words, line)) for line in lines) == 1, f"{words} is not reported once in {lines}"


@pytest.mark.parametrize("hosts", [1, HOSTS])
@pytest.mark.parametrize("bad", ["an empty text", "not MIDI", "a truncated image", "fractions", "a single frame"])
def test_a_split_of_which_nothing_can_be_read_is_an_error(bad, hosts, file_cases, tmp_path, capsys):
  name, file, content, _ = BAD[bad]
  write(tmp_path, {f"{split}/{number}-{file}": content for split in ("train", "validation") for number in range(4)})
  case = dataclasses.replace(file_cases[name], data=file_cases[name].data | halves(tmp_path))
  with pytest.raises(InputError, match=f"'train' of {name} contains no document that can be read: .*bad"):
    next(batches.train_loader(settings(case), 3, hosts - 1, hosts))
  assert skipped(capsys), "no reason is reported"
  with pytest.raises(InputError, match=f"'validation' of {name} contains no document that can be read: .*bad"):
    rows(settings(case), hosts)


def test_a_text_that_disappears_while_training_is_named_and_left_out(file_cases, tmp_path, capsys):
  folder = write(tmp_path, {f"{number}.txt": b"here today" for number in range(3)} | {"validation/v.txt": b"v"})
  case = dataclasses.replace(file_cases["text_files"], data=file_cases["text_files"].data | halves(folder))
  iterator = batches.train_loader(settings(case), 6)
  next(iterator)
  (folder / "1.txt").unlink()
  assert all(batch["weights"].any(axis=1).all() for batch in take(iterator, 5)), "a row is empty"
  (line,) = skipped(capsys)
  assert "1.txt cannot be read: No such file" in line
  (folder / "1.txt").write_bytes(b"here")
  take(iterator, 5)
  assert not skipped(capsys) and warn_once.count("skipped") == 1, "one file is reported twice"
  warn_once.reset()
  take(iterator, 5)
  (line,) = skipped(capsys)
  assert "1.txt ends at byte 4 now, and was longer when training began" in line


def test_a_mixture_with_an_unreadable_task_uses_the_others(file_cases, tmp_path):
  write(
    tmp_path,
    {
      "train/a.mid": b"",
      "validation/b.mid": b"",
      "w/maestro-v3.0.0.csv": b"split,midi_filename\ntrain,a.mid\n",
      "w/a.mid": midi.write(NOTES["train"][3]),
    },
  )
  case = Case(
    {
      "task": "midi_files:99+maestro_v3:1",
      "data_dir": str(tmp_path / "w"),
      "files": str(tmp_path / "train"),
      "validation_files": str(tmp_path / "validation"),
    },
    {},
    vocab_size=391,
  )
  assert next(batches.train_loader(settings(case), 2))["weights"].any(axis=1).all(), "a row is empty"
