"""Text as subword tokens: a SentencePiece model is trained, loses nothing, and crops end with whole words."""

import re
from typing import NamedTuple

import numpy as np
import pytest

from perceiver_ar_jax.config import DataConfig, InputError
from perceiver_ar_jax.data import EOS, NUM_SPECIAL, PAD, SOS, splits, tasks, texts
from perceiver_ar_jax.data.texts import SubwordDocument, SubwordTokenizer
from tests import batches, tiny
from tests.texts import LONG_TEXT, CountingText, parts, prefixes, stretches, words


class Trained(NamedTuple):
  """The model that the command wrote, and its output."""

  path: str
  content: bytes
  stdout: str
  tokens: SubwordTokenizer


def train(*flags):
  """The result of the command that trains a model."""
  return tiny.run_module("perceiver_ar_jax.data.train_sentencepiece", *flags)


def train_on(folder, output, vocab_size):
  """The result of training a model on the texts of a folder."""
  flags = (f"--config.data.files={folder}", f"--output={output}", f"--vocab_size={vocab_size}")
  return train("--config=configs/text_files.py", *flags)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A folder of two small texts, one of them to train on."""
  result = tmp_path_factory.mktemp("texts")
  lines = np.array_split(words(3000, seed=2), 300)
  for name in ("one", "other"):
    (result / f"{name}.txt").write_text("\n".join(" ".join(line) for line in lines), encoding="utf-8")
  return result


@pytest.fixture(scope="module")
def subwords(folder):
  path = folder / "model.model"
  result = train_on(folder, path, 400)
  assert result.returncode == 0, result.stderr
  return Trained(str(path), path.read_bytes(), result.stdout, SubwordTokenizer(str(path)))


class RecordingPieces:
  """A model that records the texts that it encodes."""

  def __init__(self, tokens):
    self._tokens, self.given = tokens, []

  def encode(self, text):
    self.given.append(text)
    return self._tokens.encode(text)


def test_training_prints_the_settings_for_the_model(subwords):
  assert subwords.tokens.vocab_size == 403, "400 subword tokens and three specials"
  text = " ".join(words(500, seed=4)).encode()
  assert len(subwords.tokens.encode(text)) < len(text) / 2, "a subword token is hardly longer than a byte"
  assert f"--config.data.sentencepiece={subwords.path} --config.model.vocab_size=403" in subwords.stdout


def test_training_again_gives_the_same_model(subwords, folder, tmp_path):
  result = train_on(folder, tmp_path / "new" / "again.model", 400)
  assert result.returncode == 0, result.stderr
  assert (tmp_path / "new" / "again.model").read_bytes() == subwords.content


def test_a_vocabulary_that_the_text_cannot_fill_is_explained(folder, tmp_path):
  result = train_on(folder, tmp_path / "large.model", 30_000)
  tiny.expect_error(result, "--vocab_size=30000", "value <= ")
  assert not (tmp_path / "large.model").exists()


def test_a_task_without_texts_is_explained(tmp_path):
  result = train("--config=configs/copy.py", f"--output={tmp_path / 'copy.model'}")
  tiny.expect_error(result, "The task copy has no text to train on", "configs/text_files.py")


TEXTS = [
  "bako rimu",
  "  two  spaces   and more    ",
  "\ttabs\t\tand\nnewlines\r\n\r\n\n",
  " ",
  "né ünïcödé 日本語 😀 e\u0301 \u00a0\u3000 \ufeff",
  "<unk> <0x41> <s> \x00 \x7f",
]


def random_texts(count):
  """Texts that mix ASCII, control characters included, with the scripts of East Asia."""
  random = np.random.default_rng(3)
  for _ in range(count):
    points = np.where(random.random(30) < 0.5, random.integers(0, 128, 30), random.integers(0x3000, 0xD800, 30))
    yield "".join(map(chr, points))


def test_decoding_restores_every_text_exactly(subwords):
  for text in [*TEXTS, *random_texts(200), LONG_TEXT]:
    events = subwords.tokens.encode(text.encode())
    assert subwords.tokens.decode(events) == text
    assert subwords.tokens.decode([SOS, *events, EOS, PAD, 403]) == text, "specials and ids beyond the model count"
    assert events.min() >= 3 and events.max() < 403, f"{text!r} has ids outside 3..402"
    assert 3 not in events, f"{text!r} has the unknown token: it should be spelt in bytes where no other one fits"


def test_a_document_of_subword_tokens_has_a_start_and_an_end(subwords):
  document = SubwordDocument(LONG_TEXT.encode(), subwords.tokens)
  expected = [SOS, *subwords.tokens.encode(LONG_TEXT.encode()), EOS]
  assert len(document) == len(expected)
  for start, end in stretches(len(expected), 30):
    assert document.read(start, end).tolist() == expected[start:end], f"events {start} to {end}"
    assert document.positions(start, end)[:, 0].tolist() == list(range(1, end - start + 1))
    before, after = (subwords.tokens.decode(events) for events in (expected[:start], expected[start:]))
    assert before + after == LONG_TEXT, f"cut before event {start}, text is lost or added"
  assert document.counts() == {"words": 3000, "bytes": len(LONG_TEXT.encode())}


@pytest.mark.parametrize("num_scored", [1, 2, 5, 100, 1000, 10**6])
def test_the_head_of_a_document_has_the_words_and_bytes_of_its_events(num_scored, subwords):
  text = CountingText(LONG_TEXT.encode())
  head = SubwordDocument(text, subwords.tokens).head(num_scored)
  shown = subwords.tokens.decode(head.read(0, len(head)))
  assert LONG_TEXT.startswith(shown) and head.counts() == texts.count(shown.encode())
  if num_scored > len(LONG_TEXT):
    assert shown == LONG_TEXT and head.read(len(head) - 1, len(head)).tolist() == [EOS]
  else:
    assert head.num_scored == num_scored
    assert text.num_read < 30 * (num_scored + 10), "more than the head was read"


def test_an_evaluation_is_bounded_in_subword_tokens(subwords, tmp_path):
  batches.write(tmp_path, {"train.txt": "a text", "held-out.txt": "bako rimu bako"})
  files = {"files": f"{tmp_path}/train.txt", "validation_files": f"{tmp_path}/held-out.txt"}
  data = DataConfig(task="text_files", sentencepiece=subwords.path, **files)
  config = batches.config(data, context=8, latents=4, sizes=(10,), vocab_size=403)
  ((_, head),) = splits.documents(config, "validation", max_tokens=2)
  events = subwords.tokens.encode(b"bako rimu bako")
  assert head.read(0, len(head)).tolist() == [SOS, *events[:2]]


def test_a_crop_fills_its_length_and_ends_with_a_word(subwords):
  document = SubwordDocument(LONG_TEXT.encode(), subwords.tokens)
  at_start = 0
  for draw in [*np.linspace(0, 0.02, 50), *np.linspace(0.02, 0.98, 100), *np.linspace(0.98, 1 - 1e-9, 50)]:
    events, positions, _ = document.crop(draw, 40, 2)
    stretch = subwords.tokens.decode(events)
    assert LONG_TEXT.count(stretch) == 1, f"{stretch!r} is not in the text"
    start = LONG_TEXT.index(stretch)
    end = start + len(stretch)
    assert len(events) == 40 or events[0] == SOS, f"{len(events)} events, and there is more text before them"
    assert SOS not in events[1:] and (events[0] != SOS or start == 0), f"SOS at character {start}"
    assert EOS not in events[:-1] and (events[-1] == EOS) == (end == len(LONG_TEXT)), f"the end is character {end}"
    assert end == len(LONG_TEXT) or LONG_TEXT[end].isspace(), f"{stretch!r} ends within a word"
    assert positions[:, 0].tolist() == list(range(1, len(events) + 1))
    at_start += start == 0
  assert 5 < at_start < 60, "the draws should reach both the start and the rest"


def test_the_first_and_the_last_crop_reach_the_ends_of_the_text(subwords):
  document = SubwordDocument(LONG_TEXT.encode(), subwords.tokens)
  first, _, _ = document.crop(0, 40, 1)
  assert subwords.tokens.decode(first) == LONG_TEXT.split()[0] and first[0] == SOS
  later, _, _ = document.crop(0, 80, 40)
  assert 160 <= len(subwords.tokens.decode(later).encode()) < 160 + 64, (
    "40 subword tokens count as 160 bytes, and a word"
  )
  last, _, _ = document.crop(1 - 1e-9, 40, 1)
  assert len(last) == 40 and last[-1] == EOS and LONG_TEXT.endswith(subwords.tokens.decode(last))
  whole, _, _ = SubwordDocument(b"bako rimu", subwords.tokens).crop(1 - 1e-9, 40, 40)
  assert whole.tolist() == [SOS, *subwords.tokens.encode(b"bako rimu"), EOS]


def test_a_crop_reads_only_its_surroundings(subwords):
  text, recording = CountingText(LONG_TEXT.encode()), RecordingPieces(subwords.tokens)
  events, _, _ = SubwordDocument(text, recording).crop(0.5, 40, 2)
  assert len(events) == 40
  assert text.num_read < 500 and len(recording.given[0]) < 500, f"{text.num_read} of {len(text)} bytes were read"


class WholeWords:
  """A model with far longer subword tokens than a crop assumes."""

  def encode(self, text):
    return np.array([len(word) + NUM_SPECIAL for word in text.split()])


def test_a_crop_of_few_long_subword_tokens_is_short_and_begins_without_sos():
  events, _, _ = SubwordDocument(b"characteristically " * 100, WholeWords()).crop(0.5, 40, 2)
  assert 10 < len(events) < 20 and SOS not in events and EOS not in events


def test_without_any_space_no_crop_cuts_a_character(subwords):
  text = "語né😀" * 30
  content = text.encode()
  character_ends = np.cumsum([len(character.encode()) for character in text])
  for end in range(1, len(content) - 64):
    recording = RecordingPieces(subwords.tokens)
    SubwordDocument(content, recording, part=(end, end)).crop(0, 12, 2)
    (given,) = recording.given
    assert given.decode() in text  # strict: raises for a character in part
    assert content[: character_ends[character_ends >= end][0]].endswith(given), f"the crop to byte {end} ends elsewhere"
    assert len(given) >= min(end, 12 * 8 - 4)


def test_parts_end_their_crops_where_one_document_would(subwords, tmp_path, monkeypatch):
  content = (" ".join(words(30, seed=5)) + "\n").encode()
  (tmp_path / "a.txt").write_bytes(content * 2)
  monkeypatch.setattr(texts, "PART_BYTES", 50)
  documents = parts(tmp_path, sentencepiece=subwords.path)
  whole = SubwordDocument(content, subwords.tokens)
  assert len(documents) > 2 and [part.continues for part in documents] == [False] + [True] * (len(documents) - 1)
  assert set().union(*(prefixes(part, 100) for part in documents)) == prefixes(whole, 400)
  assert all(part.read(0, len(part)).tolist() == whole.read(0, len(whole)).tolist() for part in documents)


def test_bytes_that_are_not_utf8_are_replaced(subwords):
  document = SubwordDocument(b"bako \xff rimu\n", subwords.tokens)
  events, _, _ = document.crop(1 - 1e-9, 40, 2)
  assert subwords.tokens.decode(events) == "bako \ufffd rimu\n"
  assert len(document) == len(events)


def test_a_model_file_that_cannot_be_read_is_named(tmp_path):
  (tmp_path / "text").write_text("not a model")
  for path in (tmp_path / "missing.model", tmp_path / "text", tmp_path):
    with pytest.raises(
      InputError, match=f"data.sentencepiece does not name.*{re.escape(str(path))}.*train_sentencepiece"
    ):
      texts.tokenizer(str(path))


def test_the_text_task_has_the_vocabulary_of_the_model(subwords, folder):
  data = DataConfig(task="text_files", files=f"{folder}/*.txt", sentencepiece=subwords.path)
  ((task, _),) = tasks.get_tasks(data, 64)
  assert (task.vocab_size, task.position_dims) == (403, 1)
  assert task.decode([SOS, *subwords.tokens.encode(b"bako"), EOS]) == "bako"


@pytest.mark.parametrize("text", ["日本語", "né"])
def test_the_last_character_is_not_cut(text, subwords):
  content = text.encode()
  for end in range(1, len(content) + 1):
    events, _, _ = SubwordDocument(content, subwords.tokens, part=(end, end)).crop(0, 40, 1)
    assert subwords.tokens.decode(events) == text, f"a crop that ends at byte {end}"


def test_the_last_word_is_not_cut(subwords):
  content = b"bako rimu"
  crops = [SubwordDocument(content, subwords.tokens, part=(end, end)).crop(0, 40, 1)[0] for end in range(1, 10)]
  assert {subwords.tokens.decode(crop) for crop in crops} == {"bako", "bako rimu"}
  assert all((crop[-1] == EOS) == (subwords.tokens.decode(crop) == "bako rimu") for crop in crops)


def test_an_empty_model_file_is_named(tmp_path):
  (tmp_path / "empty.model").write_bytes(b"")
  with pytest.raises(InputError, match="data.sentencepiece does not name.*empty.model"):
    SubwordTokenizer(str(tmp_path / "empty.model"))
