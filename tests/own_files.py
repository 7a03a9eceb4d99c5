"""Small files of every task that reads files, and what a reader must find in them."""

import csv
import dataclasses
import io

import numpy as np
import PIL.Image
import tensorflow_datasets as tfds

from perceiver_ar_jax import config as config_lib
from perceiver_ar_jax.config import DataConfig
from perceiver_ar_jax.data import EOS, NUM_SPECIAL, SOS, midi, music
from perceiver_ar_jax.data.music import Note
from tests import batches
from tests.batches import write

HOSTS = 3

BOOKS = {  # in capitals, which no other file has
  "train": ["ONE LAMP BURNS\nBY THE HARBOUR.", "Q", "", "TWO BOATS, THREE OARS. " * 5, "NO ONE ROWS.", "RAIN"],
  "validation": ["", "THE TIDE IS OUT; THE SAND IS WET.", "V"],
  "test": ["AN ENDING"],
}
TEXTS = {
  "train": ["a heron waits in the reeds.\nit waits.", "x", "", "été, naïve: 猫", "tick tock " * 9 + "!", "end\n"],
  "validation": ["", "a second voice\tspeaks up. ", "no road leads on for ever " * 4, "y"],
}
NUMBERS = "".join(f"{number:03d} " for number in range(101))  # 404 bytes, of which every stretch occurs once
_WIKI = {"train": [" = A title = \n\n some words , and more .\n"], "validation": [" = B = \n w\n"], "test": [" \n"]}

NOTES = {
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

TEXT_NAMES = (
  *("text_files", "text_files by position", "enwik8", "wikitext103 raw", "wikitext103 tokens", "pg19", "mixture"),
)
NAMES = (*TEXT_NAMES, "maestro_v3", "midi_files", "image_files", "audio_codes", "video_codes")
"""Names of the cases."""
ONE_RECORD = {"text_files by position", "enwik8", "wikitext103 raw", "wikitext103 tokens"}


@dataclasses.dataclass
class Case:
  """Files of a task and their contents."""

  data: dict
  """Settings of DataConfig that lead to the files."""
  documents: dict
  """{split: [events of each usable document]}, in order."""
  contents: dict | None = None
  """Texts: {split: [bytes of each usable document]}."""
  vocab_size: int = 259
  position_dims: int = 1


def settings(case: Case, *, context=40, latents=8, **data) -> config_lib.Config:
  """A config that reads the files of `case`; `data` are further settings of DataConfig."""
  sizes = (300,) * case.position_dims
  data = DataConfig(**(case.data | data))
  return batches.config(data, context=context, latents=latents, sizes=sizes, vocab_size=case.vocab_size)


def as_string(events) -> str:
  """Events as characters, so that `in` finds a stretch of them."""
  return "".join(map(chr, events))


def crops(batch) -> list[str]:
  """The crop of each row, as a string: its inputs and the last target."""
  return [as_string([*row[row > 0], last]) for row, last in zip(batch["inputs"], batch["targets"][:, -1])]


def rows(config, hosts=1, batch=4, **settings) -> list[dict]:
  """Rows of all hosts' evaluation batches, in the order of the split."""
  batches_of_hosts = batches.evaluate(config, hosts, batch, **settings)
  assert len(set(map(len, batches_of_hosts))) == 1, "hosts would wait for each other for ever"
  return [
    {name: value[row] for name, value in of_host.items()}
    for step in zip(*batches_of_hosts)
    for of_host in step
    for row in range(batch)
  ]


def events_of_text(content: bytes) -> list[int]:
  return [SOS, *(byte + NUM_SPECIAL for byte in content), EOS]


def named(contents: dict, suffix: str) -> dict:
  """{"train/0.txt": .., "validation/0.txt": ..} for {"train": [..], "validation": [..]}."""
  return {f"{split}/{index}{suffix}": content for split in contents for index, content in enumerate(contents[split])}


def halves(folder) -> dict:
  """Settings that train on one folder and hold out the other."""
  return {"files": str(folder), "validation_files": str(folder / "validation")}


def npy(values, dtype=np.int32) -> bytes:
  file = io.BytesIO()
  np.save(file, np.array(values, dtype))
  return file.getvalue()


def npz(**arrays) -> bytes:
  file = io.BytesIO()
  np.savez(file, **{name: np.array(values, np.int32) for name, values in arrays.items()})
  return file.getvalue()


def png(pixels) -> bytes:
  file = io.BytesIO()
  PIL.Image.fromarray(pixels).save(file, format="PNG")
  return file.getvalue()


def _write_pg19(folder):
  """Writes BOOKS in the layout of pg19 0.1.1 and returns the folder, a TFDS data_dir."""
  version = folder / "pg19" / "0.1.1"
  version.mkdir(parents=True)
  identity = tfds.core.DatasetIdentity(
    name="pg19", config_name="", version="0.1.1", data_dir=str(version), module_name="pg19"
  )
  texts = {name: np.str_ for name in ("book_link", "book_title", "publication_date")}
  features = tfds.features.FeaturesDict({"book_id": np.int32, "book_text": tfds.features.Text(), **texts})
  writer = tfds.core.SequentialWriter(
    tfds.core.DatasetInfo(builder=identity, features=features), max_examples_per_shard=4
  )
  writer.initialize_splits(list(BOOKS))
  constant = {"book_link": "", "publication_date": "1900"}
  writer.add_examples(
    {
      split: [
        {"book_id": number, "book_text": book, "book_title": f"{split} {number}", **constant}
        for number, book in enumerate(books)
      ]
      for split, books in BOOKS.items()
    }
  )
  writer.close_all()
  return folder


def _write_maestro(folder):
  """Writes NOTES as a MAESTRO v3 release and returns the folder."""
  files = named(NOTES, ".midi")
  write(folder, {name: midi.write(notes) for name, notes in files.items()})
  columns = ("canonical_composer", "canonical_title", "split", "year", "midi_filename", "audio_filename", "duration")
  with (folder / "maestro-v3.0.0.csv").open("w", newline="") as file:
    table = csv.DictWriter(file, columns)
    table.writeheader()
    for name in files:
      split = name.split("/")[0]
      table.writerow({"canonical_title": "Étude, in two parts", "split": split, "year": 2004, "midi_filename": name})
  return folder


def _wiki(ending):
  names = {"train": "train", "validation": "valid", "test": "test"}
  return {f"wiki.{names[split]}.{ending}": content for split, (content,) in _WIKI.items()}


def _text_case(contents: dict, **data) -> Case:
  usable = {split: [text.encode() for text in contents[split] if text] for split in contents}
  return Case(data, {split: list(map(events_of_text, usable[split])) for split in usable}, contents=usable)


def _text_cases(make_folder) -> dict[str, Case]:
  text_folder = write(make_folder("texts"), named(TEXTS, ".txt"))
  half = len(NUMBERS) // 2
  wiki = {name: write(make_folder(f"wiki_{name}"), _wiki(name)) for name in ("raw", "tokens")}
  books = str(_write_pg19(make_folder("tfds")))
  return {
    "text_files": _text_case(TEXTS, task="text_files", **halves(text_folder)),
    "text_files by position": _text_case(
      {"train": [NUMBERS[:half]], "validation": [NUMBERS[half:]]},
      task="text_files",
      files=str(write(make_folder("long"), {"numbers.md": NUMBERS})),
      split_by="position",
      validation_fraction=0.5,
    ),
    "enwik8": _text_case(
      {"train": [NUMBERS[:364]], "validation": [NUMBERS[364:384]], "test": [NUMBERS[384:]]},
      task="enwik8",
      data_dir=str(write(make_folder("enwik8"), {"enwik8": NUMBERS})),
    ),
    "wikitext103 raw": _text_case(_WIKI, task="wikitext103", data_dir=str(wiki["raw"])),
    "wikitext103 tokens": _text_case(_WIKI, task="wikitext103", data_dir=str(wiki["tokens"])),
    "pg19": _text_case(BOOKS, task="pg19", data_dir=books),
    "mixture": _text_case(
      {split: BOOKS[split] + TEXTS[split] for split in TEXTS},
      task="pg19:3+text_files:1",
      data_dir=books,
      **halves(text_folder),
    ),
  }


def make_cases(make_folder) -> dict[str, Case]:
  """{name: Case}; `make_folder(name)` returns a new folder."""
  random = np.random.default_rng(0)
  played = {split: [[SOS, *music.encode(notes), EOS] for notes in NOTES[split] if notes] for split in NOTES}
  midi_files = {name: midi.write(notes) for name, notes in named(NOTES, ".mid").items() if not name.startswith("test")}
  images = {
    split: [random.integers(0, 256, (3, 3, 3), np.uint8) for _ in range(count)]
    for split, count in (("train", 6), ("validation", 3))
  }
  image_files = {name: png(pixels) for name, pixels in named(images, ".png").items()} | {"train/x.jpg": b"no image"}
  videos = {
    split: [random.integers(0, CODES, (frames, 2, 3)) for frames in counts]
    for split, counts in (("train", (1, 2, 5, 3, 1)), ("validation", (4, 1)))
  }
  video_files = {name: npy(codes, np.int16) for name, codes in named(videos, ".npy").items()}
  audio_files = {name: npy(codes) for name, codes in named(AUDIO, ".npy").items()}
  del audio_files["train/5.npy"]
  audio_files["train/9.npz"] = npz(codes=AUDIO["train"][5], scale=[1])
  codebook = {"codebook_size": CODES}

  def audio_events(frames):
    return [SOS, *(code + level * CODES + NUM_SPECIAL for frame in frames for level, code in enumerate(frame))]

  def flat_events(values):
    return [SOS, *(values.ravel().astype(int) + NUM_SPECIAL)]

  def by_split(contents, events):
    return {split: list(map(events, contents[split])) for split in contents}

  cases = _text_cases(make_folder) | {
    "maestro_v3": Case(
      {"task": "maestro_v3", "data_dir": str(_write_maestro(make_folder("maestro")))}, played, vocab_size=391
    ),
    "midi_files": Case(
      {"task": "midi_files", **halves(write(make_folder("midi"), midi_files | {"train/broken.midi": b"MThd?"}))},
      played,
      vocab_size=391,
    ),
    "image_files": Case(
      {"task": "image_files", "image_size": 3, **halves(write(make_folder("images"), image_files))},
      by_split(images, flat_events),
      position_dims=3,
    ),
    "audio_codes": Case(
      {"task": "audio_codes", "code_levels": LEVELS, **codebook, **halves(write(make_folder("audio"), audio_files))},
      by_split(AUDIO, audio_events),
      vocab_size=LEVELS * CODES + NUM_SPECIAL,
      position_dims=2,
    ),
    "video_codes": Case(
      {"task": "video_codes", **codebook, **halves(write(make_folder("video"), video_files))},
      by_split(videos, flat_events),
      vocab_size=CODES + NUM_SPECIAL,
      position_dims=3,
    ),
  }
  assert sorted(cases) == sorted(NAMES)
  return cases
