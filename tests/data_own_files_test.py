"""Tasks that read files: each token scored once, exact resumption, hosts that share, and mistakes that are named."""

import csv
import dataclasses
import io
import pathlib
import re

import numpy as np
import PIL.Image
import pytest
import tensorflow_datasets as tfds

from perceiver_ar_jax.config import DataConfig, InputError
from perceiver_ar_jax.data import EOS, NUM_SPECIAL, SOS, music, texts, warn_once
from perceiver_ar_jax.data.music import Note
from tests import batches
from tests.batches import evaluate, take, write

HOSTS = 3

BOOKS = {  # capitals, so that nobody takes them for one of the other files
  "train": ["ONE LAMP BURNS\nBY THE HARBOUR.", "Q", "", "TWO BOATS, THREE OARS. " * 5, "NOBODY ROWS.", "RAIN"],
  "validation": ["", "THE TIDE IS OUT; THE SAND IS WET.", "V"],
  "test": ["AN ENDING"],
}
TEXTS = {
  "train": ["a heron stands in the reeds.\nit waits.", "x", "", "été, naïve: 猫", "tick tock " * 9 + "!", "end\n"],
  "validation": ["", "a second voice\tspeaks up. ", "no road goes on for ever " * 4, "y"],
}
NUMBERS = "".join(f"{number:03d} " for number in range(101))  # 404 bytes: where a stretch of it lies can be told

PIECES = {
  "train": [
    [Note(60, 66, 0.0, 0.5)],
    [],
    [Note(60, 66, 0.1, 0.4), Note(64, 70, 0.1, 0.4), Note(67, 90, 0.5, 2.75)],
    [Note(40 + step, 80, step / 4, step / 4 + 0.2) for step in range(12)],
    [Note(72, 2, 0.0, 0.01)],
    [Note(30, 126, 1.0, 4.0)],
  ],
  "validation": [[Note(50, 30, 0.0, 1.0), Note(52, 30, 1.0, 2.0)], [], [Note(90, 64, 0.2, 0.3)]],
  "test": [[Note(100, 10, 0.0, 1.0)]],
}
LEVELS, CODES = 2, 16
AUDIO = {  # frames x levels
  "train": [[[1, 2]], [[3, 4], [5, 6]], [[7, 8]] * 7, [[0, 15], [15, 0], [9, 9]], [[10, 11]], [[12, 13]] * 5],
  "validation": [[[4, 4], [2, 2], [1, 1]], [[15, 15]]],
}


@dataclasses.dataclass
class Case:
  """Files of a task and what they hold."""

  data: dict
  """Settings that lead to them."""
  documents: dict
  """{split: [events of each usable document]}, in order."""
  contents: dict | None = None
  """Texts: {split: [bytes of each usable document]}."""
  vocab_size: int = 259
  position_dims: int = 1


def of_text(content):
  return [SOS, *(byte + NUM_SPECIAL for byte in content), EOS]


def text_case(contents, **data):
  usable = {split: [one.encode() for one in some if one] for split, some in contents.items()}
  return Case(data, {split: [of_text(one) for one in some] for split, some in usable.items()}, contents=usable)


def named(contents, suffix):
  """{"train/0.txt": .., "validation/0.txt": ..} for {"train": [..], "validation": [..]}."""
  return {f"{split}/{index}{suffix}": one for split, some in contents.items() for index, one in enumerate(some)}


def halves(folder):
  """Settings that train on one folder and hold out the other."""
  return {"files": str(folder), "validation_files": str(folder / "validation")}


def npy(values, dtype=np.int32):
  file = io.BytesIO()
  np.save(file, np.array(values, dtype))
  return file.getvalue()


def npz(**arrays):
  file = io.BytesIO()
  np.savez(file, **{name: np.array(values, np.int32) for name, values in arrays.items()})
  return file.getvalue()


def png(pixels):
  file = io.BytesIO()
  PIL.Image.fromarray(pixels).save(file, format="PNG")
  return file.getvalue()


def write_pg19(folder):
  """Makes `folder` a TFDS data_dir with BOOKS in the layout of pg19 0.1.1."""
  version = folder / "pg19" / "0.1.1"
  version.mkdir(parents=True)
  identity = tfds.core.DatasetIdentity(
    name="pg19", config_name="", version="0.1.1", data_dir=str(version), module_name="pg19"
  )
  features = tfds.features.FeaturesDict(
    {
      "book_id": np.int32,
      "book_link": np.str_,
      "book_text": tfds.features.Text(),
      "book_title": np.str_,
      "publication_date": np.str_,
    }
  )
  writer = tfds.core.SequentialWriter(
    tfds.core.DatasetInfo(builder=identity, features=features), max_examples_per_shard=4
  )
  writer.initialize_splits(list(BOOKS))
  writer.add_examples(
    {
      split: [
        {
          "book_id": number,
          "book_link": "",
          "book_text": book,
          "book_title": f"{split} {number}",
          "publication_date": "1900",
        }
        for number, book in enumerate(books)
      ]
      for split, books in BOOKS.items()
    }
  )
  writer.close_all()
  return folder


def write_maestro(folder):
  """A MAESTRO v3 release of PIECES."""
  files = named(PIECES, ".midi")
  write(folder, {name: music.to_midi(notes) for name, notes in files.items()})
  columns = ("canonical_composer", "canonical_title", "split", "year", "midi_filename", "audio_filename", "duration")
  with (folder / "maestro-v3.0.0.csv").open("w", newline="") as file:
    table = csv.DictWriter(file, columns)
    table.writeheader()
    for name in files:
      split = name.split("/")[0]
      table.writerow({"canonical_title": "Étude, in two parts", "split": split, "year": 2004, "midi_filename": name})
  return folder


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
  """{name: Case}"""
  make = tmp_path_factory.mktemp
  random = np.random.default_rng(0)

  text_folder = write(make("texts"), {name: one.encode() for name, one in named(TEXTS, ".txt").items()})
  half = len(NUMBERS) // 2
  wiki = {name: write(make(f"wiki_{name}"), _wiki(name)) for name in ("raw", "tokens")}
  books = write_pg19(make("tfds"))

  usable = {split: [notes for notes in some if notes] for split, some in PIECES.items()}
  played = {split: [[SOS, *music.encode(notes), EOS] for notes in some] for split, some in usable.items()}
  midi = {
    name: music.to_midi(notes) for name, notes in named(PIECES, ".mid").items() if not name.startswith("test")
  } | {"train/broken.midi": b"MThd?"}

  pictures = {
    split: [random.integers(0, 256, (3, 3, 3), np.uint8) for _ in range(count)]
    for split, count in (("train", 6), ("validation", 3))
  }
  image_folder = write(
    make("images"), {name: png(one) for name, one in named(pictures, ".png").items()} | {"train/x.jpg": b"no picture"}
  )
  videos = {
    split: [random.integers(0, CODES, (frames, 2, 3)) for frames in counts]
    for split, counts in (("train", (1, 2, 5, 3, 1)), ("validation", (4, 1)))
  }
  # The first file lies on its side and the last is packed.
  audio = {name: npy(one) for name, one in named(AUDIO, ".npy").items()}
  audio |= {"train/9.npz": npz(codes=AUDIO["train"][5], scale=[1])}
  del audio["train/5.npy"]

  def by_split(some, events):
    return {split: [events(one) for one in ones] for split, ones in some.items()}

  made = {
    "text_files": text_case(TEXTS, task="text_files", **halves(text_folder)),
    "text_files by position": text_case(
      {"train": [NUMBERS[:half]], "validation": [NUMBERS[half:]]},
      task="text_files",
      files=str(write(make("long"), {"numbers.md": NUMBERS.encode()})),
      split_by="position",
      validation_fraction=0.5,
    ),
    "enwik8": text_case(
      {"train": [NUMBERS[:364]], "validation": [NUMBERS[364:384]], "test": [NUMBERS[384:]]},
      task="enwik8",
      data_dir=str(write(make("enwik8"), {"enwik8": NUMBERS.encode()})),
    ),
    **{
      f"wikitext103 {ending}": text_case(_WIKI, task="wikitext103", data_dir=str(folder))
      for ending, folder in wiki.items()
    },
    "pg19": text_case(BOOKS, task="pg19", data_dir=str(books)),
    "mixture": text_case(
      {split: BOOKS[split] + TEXTS[split] for split in TEXTS},
      task="pg19:3+text_files:1",
      data_dir=str(books),
      **halves(text_folder),
    ),
    "maestro_v3": Case({"task": "maestro_v3", "data_dir": str(write_maestro(make("maestro")))}, played, None, 391),
    "midi_files": Case({"task": "midi_files", **halves(write(make("midi"), midi))}, played, None, 391),
    "image_files": Case(
      {"task": "image_files", "image_size": 3, **halves(image_folder)},
      by_split(pictures, lambda one: [SOS, *(one.ravel().astype(int) + NUM_SPECIAL)]),
      position_dims=3,
    ),
    "audio_codes": Case(
      {
        "task": "audio_codes",
        "codebook_size": CODES,
        "code_levels": LEVELS,
        **halves(write(make("audio"), audio)),
      },
      by_split(
        AUDIO, lambda one: [SOS, *(code + level * CODES + 3 for frame in one for level, code in enumerate(frame))]
      ),
      vocab_size=LEVELS * CODES + NUM_SPECIAL,
      position_dims=2,
    ),
    "video_codes": Case(
      {
        "task": "video_codes",
        "codebook_size": CODES,
        **halves(write(make("video"), {name: npy(one, np.int16) for name, one in named(videos, ".npy").items()})),
      },
      by_split(videos, lambda one: [SOS, *(one.ravel() + NUM_SPECIAL)]),
      vocab_size=CODES + NUM_SPECIAL,
      position_dims=3,
    ),
  }
  assert sorted(made) == sorted(NAMES)
  return made


NAMES = [
  *("text_files", "text_files by position", "enwik8", "wikitext103 raw", "wikitext103 tokens", "pg19", "mixture"),
  *("maestro_v3", "midi_files", "image_files", "audio_codes", "video_codes"),
]
TEXT_NAMES = NAMES[:7]
ONE_RECORD = {"text_files by position", "enwik8", "wikitext103 raw", "wikitext103 tokens"}

_WIKI = {"train": [" = A title = \n\n some words , and more .\n"], "validation": [" = B = \n w\n"], "test": [" \n"]}


def _wiki(ending):
  short = {"train": "train", "validation": "valid", "test": "test"}
  return {f"wiki.{short[split]}.{ending}": one.encode() for split, (one,) in _WIKI.items()}


@pytest.fixture(autouse=True)
def nothing_said_so_far():
  warn_once.reset()


def settings(case, *, context=40, latents=8, **more):
  sizes = (300,) * case.position_dims
  data = DataConfig(**(case.data | more))
  return batches.config(data, context=context, latents=latents, sizes=sizes, vocab_size=case.vocab_size)


def as_string(events):
  """Events as characters, so that a stretch of them can be looked for."""
  return "".join(map(chr, events))


def crops(batch):
  """The crop of each row, as a string: its inputs and the last target."""
  return [as_string([*row[row > 0], last]) for row, last in zip(batch["inputs"], batch["targets"][:, -1])]


# Evaluation


def rows(config, hosts=1, batch=4, **more):
  """Rows of all hosts' evaluation batches, in the order of the split."""
  found = evaluate(config, hosts, batch, **more)
  assert len({len(each) for each in found}) == 1, "hosts would wait for each other for ever"
  return [
    {name: value[row] for name, value in one.items()} for step in zip(*found) for one in step for row in range(batch)
  ]


@pytest.mark.parametrize(
  "stride, latents, context, hosts", [(1, 1, 5, 1), (3, 4, 7, 1), (3, 4, 7, HOSTS), (8, 8, 40, HOSTS)]
)
@pytest.mark.parametrize("name", NAMES)
def test_evaluation_scores_each_event_of_each_document_once(name, stride, latents, context, hosts, cases):
  config = settings(cases[name], context=context, latents=latents)
  found = rows(config, hosts, stride=stride, num_latents=latents)
  documents = cases[name].documents["validation"]
  assert sum(row["weights"].sum() for row in found) == sum(len(document) - 1 for document in documents)
  targets = np.concatenate([row["targets"][row["weights"] == 1] for row in found])
  inputs = np.concatenate([row["inputs"][-latents:][row["weights"] == 1] for row in found])
  np.testing.assert_array_equal(targets, np.concatenate([document[1:] for document in documents]))
  np.testing.assert_array_equal(inputs, np.concatenate([document[:-1] for document in documents]))


@pytest.mark.parametrize("hosts", [1, HOSTS])
@pytest.mark.parametrize("part_bytes", [5, 2**20])
@pytest.mark.parametrize("name", TEXT_NAMES)
def test_evaluation_counts_words_and_bytes_once(name, part_bytes, hosts, cases, monkeypatch):
  monkeypatch.setattr(texts, "PART_BYTES", part_bytes)
  monkeypatch.setattr(texts, "_COUNT_BYTES", 3)  # Words go on across the stretches that are counted.
  found = rows(settings(cases[name]), hosts)
  contents = cases[name].contents["validation"]
  assert sum(row["bytes"] for row in found) == sum(map(len, contents))
  assert sum(row["words"] for row in found) == sum(len(content.split()) for content in contents)
  assert sum(row["weights"].sum() for row in found) == sum(len(content) + 1 for content in contents)


@pytest.mark.parametrize("name", ["enwik8", "wikitext103 raw", "pg19", "maestro_v3"])
def test_the_test_split_is_another_one(name, cases):
  found = rows(settings(cases[name]), split="test")
  targets = np.concatenate([row["targets"][row["weights"] == 1] for row in found])
  np.testing.assert_array_equal(targets, np.concatenate([one[1:] for one in cases[name].documents["test"]]))


# Training


@pytest.mark.parametrize("name", NAMES)
def test_training_rows_are_stretches_of_the_documents(name, cases):
  case = cases[name]
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
      batch["weights"], batch["targets"] > 0, err_msg="padding weighs, or a target does not"
    )
    assert batch["weights"].any(axis=1).all(), "a row is empty"
    earlier = batch["targets"][:, :-1]
    np.testing.assert_array_equal(
      earlier, np.where(earlier > 0, batch["inputs"][:, -4:], 0), err_msg="targets are not the inputs that follow"
    )
    np.testing.assert_array_equal((batch["positions"] > 0).all(axis=-1), batch["inputs"] > 0)
    for crop in crops(batch):
      origins = [index for index, document in enumerate(documents) if crop in document]
      assert origins, f"{[ord(one) for one in crop]} is in no document"
      seen.update(origins)
  assert seen == set(range(len(documents))), "a document never comes"


@pytest.mark.parametrize("name", TEXT_NAMES)
def test_training_rows_of_texts_decode_to_what_is_written(name, cases):
  iterator = batches.train_loader(settings(cases[name], context=12, latents=5), 6)
  written = [content.decode() for content in cases[name].contents["train"]]
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
def test_a_restored_iterator_goes_on_as_if_nothing_had_happened(variant, cases, tmp_path, monkeypatch):
  name = variant.split(",")[0]
  if name in ONE_RECORD:
    monkeypatch.setattr(texts, "PART_BYTES", 10)  # many records of one file
  config = settings(cases[name], **RESUMED[variant])
  iterator = batches.train_loader(config, 3)
  take(iterator, 5)
  iterator.save(tmp_path)
  expected = take(iterator, 8)
  restored = batches.train_loader(config, 3)
  take(restored, 2)  # What it did before must not matter.
  restored.restore(tmp_path)
  batches.assert_equal(take(restored, 8), expected)
  other = batches.train_loader(dataclasses.replace(config, seed=1), 3)
  assert not all(np.array_equal(one["inputs"], two["inputs"]) for one, two in zip(take(other, 8), expected))


def test_augmentation_changes_pitches_and_times_but_not_the_shapes(cases):
  case = cases["maestro_v3"]
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
def test_hosts_read_documents_of_their_own_and_together_all(name, cases):
  case = cases[name]
  config = settings(case, context=200, min_crop=201)  # Each row is a whole document.
  seen = [
    {crop for batch in take(batches.train_loader(config, 8, host, HOSTS), 8) for crop in crops(batch)}
    for host in range(HOSTS)
  ]
  assert sum(map(len, seen)) == len(set.union(*seen)), "two hosts read the same document"
  assert set.union(*seen) == {as_string(document) for document in case.documents["train"]}


@pytest.mark.parametrize("name", ["enwik8", "text_files by position"])
def test_hosts_share_the_parts_of_one_large_file(name, cases, monkeypatch):
  monkeypatch.setattr(texts, "PART_BYTES", 50)
  (document,) = map(as_string, cases[name].documents["train"])
  seen = []
  for host in range(HOSTS):
    iterator = batches.train_loader(settings(cases[name], context=20), 64, host, HOSTS)
    some = {crop for batch in take(iterator, 25) for crop in crops(batch)}
    seen.append({document.index(crop) + len(crop) for crop in some})
  assert sum(map(len, seen)) == len(set.union(*seen)), "two hosts train on crops that end at the same event"
  assert set.union(*seen) == set(range(2, len(document) + 1)), "crops end nowhere near some event"


def test_more_hosts_than_files_is_an_error(cases):
  with pytest.raises(InputError, match="'train' of text_files has 6 records, fewer than data.shards=7"):
    batches.train_loader(settings(cases["text_files"]), 2, 0, 7)


def test_a_mixture_draws_its_tasks_by_their_shares(cases):
  config = settings(cases["mixture"], context=200, min_crop=201)
  drawn = [crop for batch in take(batches.train_loader(config, 100), 20) for crop in crops(batch)]
  books = {as_string(document) for document in cases["pg19"].documents["train"]}
  assert sum(crop in books for crop in drawn) / len(drawn) == pytest.approx(0.75, abs=0.03)


# Splits


def test_a_single_file_cannot_be_split_by_file_but_by_position(tmp_path):
  write(tmp_path, {"only.txt": b"0123456789" * 4})
  case = Case({"task": "text_files", "files": str(tmp_path)}, {})
  with pytest.raises(InputError, match="validation_files.*split_by=position"):
    batches.train_loader(settings(case), 2)
  by_position = settings(case, context=60, min_crop=61, split_by="position", validation_fraction=0.1)
  assert set(crops(next(batches.train_loader(by_position, 2)))) == {as_string(of_text(b"0123456789" * 3 + b"012345"))}
  targets = [row["targets"][row["weights"] == 1].tolist() for row in rows(by_position, batch=1)]
  assert targets == [of_text(b"6789")[1:]]


# Mistakes


OWN_FILES = ("text_files", "midi_files", "image_files", "audio_codes", "video_codes")


def both(case, **more):
  """Training and evaluation under the same settings, each to be called."""
  return (
    lambda: next(batches.train_loader(settings(case, **more), 2)),
    lambda: evaluate(settings(case, **more)),
  )


@pytest.mark.parametrize("name", OWN_FILES)
def test_files_that_are_not_given_or_not_there_are_asked_for(name, cases, tmp_path):
  for read in both(cases[name], files=None):
    with pytest.raises(InputError, match=f"The task {name} reads your own files: set data.files"):
      read()
  for pattern in (tmp_path, tmp_path / "nowhere", tmp_path / "*.xyz"):
    for read in both(cases[name], files=str(pattern)):
      with pytest.raises(
        InputError, match=r"(contains no matching file|does not exist)\. Set data.files \(or data.validation_files\)"
      ):
        read()
  with pytest.raises(InputError, match="'nothing_here' does not exist"):
    evaluate(settings(cases[name], validation_files="nothing_here"))


@pytest.mark.parametrize(
  "name, release, missing",
  [
    ("wikitext103 raw", "WikiText-103", "wiki.train.raw"),
    ("enwik8", "enwik8", "enwik8 does not exist"),
    ("maestro_v3", "MAESTRO", "maestro-v3.0.0.csv does not exist"),
  ],
)
def test_a_release_that_is_not_given_or_not_there_is_asked_for(name, release, missing, cases, tmp_path):
  train, evaluation = both(cases[name], data_dir=None)
  for read in (train, evaluation):
    with pytest.raises(InputError, match=f"reads your copy of {release}: set data.data_dir"):
      read()
  with pytest.raises(InputError, match=missing) as error:
    next(batches.train_loader(settings(cases[name], data_dir=str(tmp_path)), 2))
  assert str(tmp_path) in str(error.value) and "data.data_dir" in str(error.value)


def test_books_that_are_not_prepared_are_asked_for(cases, tmp_path):
  for read in both(cases["pg19"], data_dir=str(tmp_path)):
    with pytest.raises(InputError, match="pg19:0.1.1 is not prepared in .*tfds build pg19"):
      read()


def test_a_table_without_a_split_is_told(cases, tmp_path):
  write(tmp_path, {"maestro-v3.0.0.csv": b"split,midi_filename\ntrain,a.midi\n"})
  with pytest.raises(InputError, match="lists no file in the split 'validation': is it complete"):
    evaluate(settings(cases["maestro_v3"], data_dir=str(tmp_path)))


@pytest.mark.parametrize("name", OWN_FILES)
def test_a_split_that_own_files_have_not_names_those_they_have(name, cases):
  with pytest.raises(InputError, match=f"{name} has no split 'test'.*train, validation"):
    evaluate(settings(cases[name]), split="test")
  with pytest.raises(InputError, match=f"{name} has no split 'trian'. Did you mean 'train'"):
    batches.train_loader(settings(cases[name], train_split="trian"), 2)


def test_a_mixture_of_different_vocabularies_names_them(cases):
  for read in both(cases["text_files"], task="text_files+midi_files:2"):
    with pytest.raises(InputError, match="text_files: text, 259 ids; midi_files: music, 391 ids"):
      read()


BAD = {
  "an empty text": ("text_files", "bad.txt", b"", "is empty"),
  "no MIDI at all": ("midi_files", "bad.mid", b"hello", "cannot be read as a MIDI file: it does not begin with MThd"),
  "an empty MIDI file": ("midi_files", "bad.mid", b"", "cannot be read as a MIDI file: it is empty"),
  "a MIDI file cut off": (
    "midi_files",
    "bad.mid",
    music.to_midi(PIECES["train"][3])[:60],
    "cannot be read as a MIDI file: it is truncated",
  ),
  "MIDI without notes": ("midi_files", "bad.mid", music.to_midi([]), "contains no notes"),
  "a picture cut off": (
    "image_files",
    "bad.png",
    png(np.random.default_rng(0).integers(0, 256, (9, 9, 3), np.uint8))[:200],
    "is not an image",
  ),
  "no picture": ("image_files", "bad.png", b"hello", "is not an image that can be read"),
  "no codes at all": ("audio_codes", "bad.npy", b"hello", "is not a .npy or .npz file of codes"),
  "pickled objects": ("audio_codes", "bad.npy", npy([[1, 2]], object), "is not a .npy or .npz file of codes"),
  "several arrays": ("audio_codes", "bad.npz", npz(one=[[1]], two=[[2]]), "name one of them codes"),
  "fractions": ("audio_codes", "bad.npy", npy([[1, 2]], np.float32), "contains float32, and codes are integers"),
  "codes too large": ("audio_codes", "bad.npy", npy([[0, 16]]), "codes from 0 to 16, outside 0..15"),
  "codes too small": ("video_codes", "bad.npy", npy([[[-1, 3]]]), "codes from -1 to 3, outside 0..15"),
  "no codes in it": ("video_codes", "bad.npy", npy(np.zeros((0, 2, 3))), "contains no codes"),
  "a level too few": ("audio_codes", "bad.npy", npy([[1], [2], [3]]), "is 1 levels, fewer than data.code_levels=2"),
  "a flat list": ("audio_codes", "bad.npy", npy([1, 2, 3]), r"the shape \(3,\).*frames x levels"),
  "one frame alone": ("video_codes", "bad.npy", npy([[1, 2]]), r"the shape \(1, 2\).*time x height x width"),
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
  """The lines about skipped records on standard error since the last look."""
  return [line for line in capsys.readouterr().err.splitlines() if line.startswith("Skipped: ")]


def good_and_bad(cases, bad, folder):
  """The case of one usable file beside an unusable one in each split, and the message."""
  name, file, content, message = BAD[bad]
  document = max(cases[name].documents["train"], key=len)
  good = pathlib.Path(cases[name].data["files"], "train", LONGEST[name])
  write(folder, {f"train/{file}": content, f"validation/{file}": content})
  write(folder, {f"{split}/{good.name}": good.read_bytes() for split in ("train", "validation")})
  both_splits = {"train": [document], "validation": [document]}
  return dataclasses.replace(cases[name], data=cases[name].data | halves(folder), documents=both_splits), message


@pytest.mark.parametrize("bad", BAD)
def test_what_cannot_be_used_is_named_once_and_replaced_by_other_crops(bad, cases, tmp_path, capsys):
  case, message = good_and_bad(cases, bad, tmp_path)
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
  found = rows(settings(case))
  assert sum(row["weights"].sum() for row in found) == len(document) - 1
  (line,) = skipped(capsys)
  assert str(tmp_path / "validation") in line and line.endswith("(2 skipped so far).")


@pytest.mark.parametrize("name", ["pg19", "midi_files"])
def test_each_record_that_is_skipped_is_counted(name, cases, capsys):
  take(batches.train_loader(settings(cases[name]), 8), 4)
  expected = {
    "pg19": [r"The book 'train 2' of pg19 is empty"],
    "midi_files": [r"train.1.mid contains no notes", r"broken.midi cannot be read as a MIDI file"],
  }[name]
  lines = skipped(capsys)
  assert len(lines) == len(expected)
  for words in expected:
    assert sum(bool(re.search(words, line)) for line in lines) == 1, f"{words} is not told once in {lines}"


@pytest.mark.parametrize("hosts", [1, HOSTS])
@pytest.mark.parametrize(
  "bad", ["an empty text", "no MIDI at all", "a picture cut off", "fractions", "one frame alone"]
)
def test_a_split_of_which_nothing_can_be_read_is_an_error(bad, hosts, cases, tmp_path, capsys):
  name, file, content, _ = BAD[bad]
  write(tmp_path, {f"{split}/{number}-{file}": content for split in ("train", "validation") for number in range(4)})
  case = dataclasses.replace(cases[name], data=cases[name].data | halves(tmp_path))
  with pytest.raises(InputError, match=f"'train' of {name} has 4 records, and none can be read: .*bad"):
    next(batches.train_loader(settings(case), 3, hosts - 1, hosts))
  assert skipped(capsys), "there are no reasons above"
  assert rows(settings(case), hosts) == []


def test_a_text_that_disappears_while_training_is_named_and_left_out(cases, tmp_path, capsys):
  folder = write(tmp_path, {f"{number}.txt": b"here today" for number in range(3)} | {"validation/v.txt": b"v"})
  case = dataclasses.replace(cases["text_files"], data=cases["text_files"].data | halves(folder))
  iterator = batches.train_loader(settings(case), 6)
  next(iterator)
  (folder / "1.txt").unlink()
  assert all(batch["weights"].any(axis=1).all() for batch in take(iterator, 5)), "its rows are empty"
  (line,) = skipped(capsys)
  assert "1.txt cannot be read: No such file" in line
  (folder / "1.txt").write_bytes(b"here")
  take(iterator, 5)
  assert not skipped(capsys) and warn_once.count("skipped") == 1, "one file is reported twice"
  warn_once.reset()
  take(iterator, 5)
  (line,) = skipped(capsys)
  assert "1.txt ends at byte 4 now, and was longer when training began" in line


def test_a_mixture_with_an_unreadable_task_goes_on(cases, tmp_path):
  write(
    tmp_path,
    {
      "train/a.mid": b"",
      "validation/b.mid": b"",
      "w/maestro-v3.0.0.csv": b"split,midi_filename\ntrain,a.mid\n",
      "w/a.mid": music.to_midi(PIECES["train"][3]),
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
    None,
    391,
  )
  assert next(batches.train_loader(settings(case), 2))["weights"].any(axis=1).all(), "a row is empty"
