"""Text: bytes and pieces written out, any stretch as a slice of the whole, and a SentencePiece model of its own."""

import re
from typing import NamedTuple

import numpy as np
import pytest

from perceiver_ar_jax.config import DataConfig, InputError
from perceiver_ar_jax.data import EOS, NUM_SPECIAL, PAD, SOS, tasks, texts
from perceiver_ar_jax.data.documents import Unreadable
from perceiver_ar_jax.data.texts import ByteDocument, ByteTokenizer, FileText, SubwordDocument, SubwordTokenizer, Text
from tests import tiny

SYLLABLES = ("ba", "ko", "ri", "mu", "te", "sha", "lo", "né", "vi", "du")


def words(count, seed):
  """Made-up words of one to four syllables."""
  random = np.random.default_rng(seed)
  return ["".join(random.choice(SYLLABLES, random.integers(1, 5))) for _ in range(count)]


LONG_TEXT = " ".join(f"{word}{number}" for number, word in enumerate(words(3000, seed=1))) + "\n"
"""Every word stands in it once, so that a stretch of it shows where it is from."""


class CountingText(Text):
  """A text that knows how many bytes were read of it."""

  num_read = 0

  def read(self, start, end):
    content = super().read(start, end)
    self.num_read += len(content)
    return content


def file_text(folder, content):
  """`content` as a stretch of a file that has other bytes on both sides."""
  (folder / "text").write_bytes(b"before" + content + b"after")
  return FileText(str(folder / "text"), 6, len(content))


# Byte tokenizer


def test_bytes_are_start_bytes_end():
  document = ByteDocument(Text(b"hi\n"))
  assert len(document) == 5
  assert document.read(0, 5).tolist() == [SOS, 107, 108, 13, EOS]
  assert document.read(0, 1).tolist() == [SOS] and document.read(4, 5).tolist() == [EOS]
  assert document.read(1, 3).tolist() == [107, 108] and document.read(0, 5).dtype == np.int32


def test_all_256_bytes_are_told_apart():
  everything = bytes(range(256))
  events = ByteTokenizer().encode(everything)
  assert events.tolist() == list(range(3, 259)) and ByteTokenizer.vocab_size == 259
  document = ByteDocument(Text(everything))
  np.testing.assert_array_equal(document.read(0, 258), [SOS, *events, EOS])


def test_decoding_leaves_out_specials_and_marks_what_is_no_utf8():
  tokens = ByteTokenizer()
  text = "a\tb  ü語\n"
  assert tokens.decode([SOS, *tokens.encode(text.encode()), EOS, PAD]) == text
  assert tokens.decode(tokens.encode("ü".encode()[:1])) == "\ufffd"
  assert tokens.decode(np.zeros(0, np.int32)) == ""


def stretches(length, count):
  """`count` random (start, end) with start < end, and the extreme ones."""
  random = np.random.default_rng(0)
  drawn = (sorted(random.choice(length + 1, 2, replace=False).tolist()) for _ in range(count))
  return [(0, length), (0, 1), (length - 1, length), (1, length - 1), *drawn]


@pytest.mark.parametrize("kept", ["in memory", "in a file"])
def test_any_stretch_of_bytes_is_that_slice_of_the_whole(kept, tmp_path):
  content = np.random.default_rng(1).integers(0, 256, 60, np.uint8).tobytes()
  document = ByteDocument(Text(content) if kept == "in memory" else file_text(tmp_path, content))
  expected = [SOS, *(byte + NUM_SPECIAL for byte in content), EOS]
  assert len(document) == len(expected)
  for start, end in stretches(len(expected), 200):
    assert document.read(start, end).tolist() == expected[start:end], f"events {start} to {end}"


def test_positions_count_from_the_start_of_the_stretch():
  document = ByteDocument(Text(b"abcdefghij"))
  assert document.positions(0, 3).tolist() == document.positions(7, 10).tolist() == [[1], [2], [3]]
  events, positions = document.crop(0.999, longest=3, shortest=2)
  assert events.tolist() == [108, 109, EOS] and positions.tolist() == [[1], [2], [3]]


def test_a_crop_of_bytes_reads_no_more_than_itself():
  text = CountingText(LONG_TEXT.encode())
  events, _ = ByteDocument(text).crop(0.5, longest=50, shortest=2)
  assert len(events) == 50 and text.num_read <= 50, f"{text.num_read} bytes were read for a crop of 50"


def test_a_stretch_of_a_file_shows_nothing_of_its_surroundings(tmp_path):
  text = file_text(tmp_path, b"0123456789")
  assert len(text) == 10 and text.read(0, 10) == b"0123456789" and text.read(3, 5) == b"34"
  assert text.read(-4, 2) == b"01" and text.read(8, 99) == b"89" and text.read(10, 99) == b""


@pytest.mark.parametrize(
  ("content", "message"), [(b"01234567", "ends at byte 8 now, and was longer"), (None, "cannot be read: No such file")]
)
def test_a_file_that_shrank_or_vanished_is_unreadable_by_name(content, message, tmp_path):
  path = tmp_path / "book.txt"
  path.write_bytes(b"0123456789")
  document = ByteDocument(FileText(str(path), 2, 8))
  assert document.read(0, 10).tolist() == [SOS, *range(53, 61), EOS]
  path.unlink()
  if content is not None:
    path.write_bytes(content)
  with pytest.raises(Unreadable, match=f"{re.escape(str(path))} {message}"):
    document.crop(0.999, longest=20, shortest=2)


# Counts


@pytest.mark.parametrize("block_bytes", [1, 2, 3, 2**24])
@pytest.mark.parametrize(
  ("content", "num_words"),
  [
    (b"one two", 2),
    (b"abcdefghijkl", 1),
    (b"  begins and ends in spaces \n", 5),
    (b"runs\n\n\n\tof    spaces\r\n", 3),
    (b" \t\n\v\f\r  ", 0),
    (b"a b c d e f", 6),
    ("Zahl\u00a0ist né".encode(), 2),  # a no-break space is no space in bytes
    (b"\x1c \x1d\x85 \x00", 3),
  ],
)
def test_words_and_bytes_are_counted_across_blocks(content, num_words, block_bytes, monkeypatch):
  monkeypatch.setattr(texts, "_COUNT_BYTES", block_bytes)
  expected = {"words": num_words, "bytes": len(content)}
  assert len(content.split()) == num_words and ByteDocument(Text(content)).counts() == expected


def test_random_texts_are_counted_as_python_splits_them(monkeypatch, tmp_path):
  monkeypatch.setattr(texts, "_COUNT_BYTES", 3)
  random = np.random.default_rng(0)
  for length in range(1, 80):
    content = bytes(random.choice(list(b"ab \n"), length).tolist())
    for text in (Text(content), file_text(tmp_path, content)):
      assert texts.count(text) == {"words": len(content.split()), "bytes": length}, content


# Parts of large files


def parts(path, split="train", **data):
  """The documents of all records of one text, of which the last half is held out."""
  data = DataConfig(task="text_files", files=str(path), split_by="position", validation_fraction=0.5, **data)
  ((task, _),) = tasks.get_tasks(data, 64)
  return [task.open(record) for record in task.source.get_dataset(split).as_numpy_iterator()]


def prefixes(document, num_draws):
  """The lengths of the crops that reach back to the text's start: the places where crops may end."""
  return {len(document.crop(draw / num_draws, 10**6, 1)[0]) for draw in range(num_draws)}


def test_parts_share_the_ends_of_crops_and_only_the_first_is_evaluated(tmp_path, monkeypatch):
  monkeypatch.setattr(texts, "PART_BYTES", 4)
  (tmp_path / "a.txt").write_bytes(b"0123456789" * 2)
  documents = parts(tmp_path)
  # SOS, 10 bytes, EOS: bytes 0-3, 4-7 and 8-9; SOS goes with the first part and EOS with the last.
  assert [sorted(prefixes(part, 16)) for part in documents] == [[1, 2, 3, 4, 5], [6, 7, 8, 9], [10, 11, 12]]
  assert [part.continues for part in documents] == [False, True, True]
  assert all(part.read(0, 12).tolist() == [SOS, *range(51, 61), EOS] for part in documents)


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("part_bytes", [1, 2, 3, 7, 100])
def test_crops_of_the_parts_are_those_of_one_document(part_bytes, split, tmp_path, monkeypatch):
  monkeypatch.setattr(texts, "PART_BYTES", part_bytes)
  for size in range(1, 16):
    content = bytes(range(97, 97 + size))
    (tmp_path / "a.txt").write_bytes(content + content)
    documents = parts(tmp_path, split)
    ends = [end for part in documents for end in prefixes(part, 32)]
    message = f"{size} bytes in parts of {part_bytes}"
    assert sorted(ends) == list(range(1, size + 3)), f"{message}: an end is in no part, or in two"
    assert [part.continues for part in documents] == [False] + [True] * (len(documents) - 1), message
    whole = ByteDocument(Text(content)).read(0, size + 2)
    crops = (part.crop(draw, 5, 1)[0] for part in documents for draw in (0, 0.3, 0.6, 0.999))
    assert all(crop.tobytes() in whole.tobytes() for crop in crops), f"{message}: a crop is no stretch of the text"


# SentencePiece


class Trained(NamedTuple):
  """What the command made, and what it said."""

  path: str
  content: bytes
  stdout: str
  tokens: SubwordTokenizer


def train(folder, output, vocab_size):
  """The finished process of the command that trains a model on the texts of a folder."""
  program = "-m perceiver_ar_jax.data.train_sentencepiece --config=configs/text_files.py".split()
  settings = [f"--config.data.files={folder}", f"--output={output}", f"--vocab_size={vocab_size}"]
  return tiny.python(*program, *settings)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A folder of two small texts, one of which is to train on."""
  result = tmp_path_factory.mktemp("texts")
  lines = np.array_split(words(3000, seed=2), 300)
  for name in ("one", "other"):
    (result / f"{name}.txt").write_text("\n".join(" ".join(line) for line in lines), encoding="utf-8")
  return result


@pytest.fixture(scope="module")
def trained(folder):
  path = folder / "pieces.model"
  result = train(folder, path, 400)
  assert result.returncode == 0, result.stderr
  return Trained(str(path), path.read_bytes(), result.stdout, SubwordTokenizer(str(path)))


class RecordingPieces:
  """A model that keeps what it was given to encode."""

  def __init__(self, tokens):
    self._tokens, self.given = tokens, []

  def encode(self, text):
    self.given.append(text)
    return self._tokens.encode(text)


def test_training_says_which_settings_go_with_the_model(trained):
  assert trained.tokens.vocab_size == 403, "400 pieces and three specials"
  text = " ".join(words(500, seed=4)).encode()
  assert len(trained.tokens.encode(text)) < len(text) / 2, "the pieces are no longer than bytes"
  assert f"--config.data.sentencepiece={trained.path} --config.model.vocab_size=403" in trained.stdout


def test_training_again_gives_the_same_model(trained, folder, tmp_path):
  result = train(folder, tmp_path / "new" / "again.model", 400)
  assert result.returncode == 0, result.stderr
  assert (tmp_path / "new" / "again.model").read_bytes() == trained.content


def test_more_pieces_than_the_text_has_end_in_one_paragraph(folder, tmp_path):
  result = train(folder, tmp_path / "large.model", 30_000)
  tiny.expect_error(result, "--vocab_size=30000", "value <= ")
  assert not (tmp_path / "large.model").exists()


def test_a_task_without_texts_is_told(tmp_path):
  arguments = ("--config=configs/copy.py", f"--output={tmp_path / 'copy.model'}")
  result = tiny.python("-m", "perceiver_ar_jax.data.train_sentencepiece", *arguments)
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


def test_pieces_give_back_every_text_to_the_letter(trained):
  for text in [*TEXTS, *random_texts(200), LONG_TEXT]:
    events = trained.tokens.encode(text.encode())
    assert trained.tokens.decode(events) == text
    assert trained.tokens.decode([SOS, *events, EOS, PAD, 403]) == text, "specials and ids beyond the model count"
    assert events.min() >= 3 and events.max() < 403, f"{text!r} has ids outside 3..402"
    assert trained.tokens.unknown not in events, f"{text!r} should be spelt in bytes where there is no piece"


def test_a_document_of_pieces_is_start_pieces_end(trained):
  document = SubwordDocument(Text(LONG_TEXT.encode()), trained.tokens)
  expected = [SOS, *trained.tokens.encode(LONG_TEXT.encode()), EOS]
  assert len(document) == len(expected)
  for start, end in stretches(len(expected), 30):
    assert document.read(start, end).tolist() == expected[start:end], f"events {start} to {end}"
    assert document.positions(start, end)[:, 0].tolist() == list(range(1, end - start + 1))
    before, after = (trained.tokens.decode(events) for events in (expected[:start], expected[start:]))
    assert before + after == LONG_TEXT, f"cut before event {start}, the text lost something or won something"
  assert document.counts() == {"words": 3000, "bytes": len(LONG_TEXT.encode())}


@pytest.mark.parametrize("num_scored", [1, 2, 5, 100, 1000, 10**6])
def test_the_head_of_a_text_of_pieces_is_a_stretch_of_whole_words_with_its_own_counts(num_scored, trained):
  text = CountingText(LONG_TEXT.encode())
  head = SubwordDocument(text, trained.tokens).head(num_scored)
  shown = trained.tokens.decode(head.read(0, len(head)))
  assert LONG_TEXT.startswith(shown) and head.counts() == texts.count(Text(shown.encode()))
  assert head.num_scored <= num_scored
  if num_scored > len(LONG_TEXT):
    assert shown == LONG_TEXT and head.read(len(head) - 1, len(head)).tolist() == [EOS]
  else:
    assert head.num_scored >= 0.9 * num_scored - 30, "more words would fit"
    assert text.num_read < 30 * (num_scored + 10), "a part was asked for"
    assert num_scored < 100 or LONG_TEXT[len(shown)].isspace()


def test_a_crop_of_pieces_is_a_full_stretch_of_the_text_that_ends_with_a_word(trained):
  document = SubwordDocument(Text(LONG_TEXT.encode()), trained.tokens)
  at_start = 0
  for draw in [*np.linspace(0, 0.02, 50), *np.linspace(0.02, 0.98, 100), *np.linspace(0.98, 1 - 1e-9, 50)]:
    events, positions = document.crop(draw, 40, 2)
    stretch = trained.tokens.decode(events)
    assert LONG_TEXT.count(stretch) == 1, f"{stretch!r} is no stretch of the text"
    start = LONG_TEXT.index(stretch)
    end = start + len(stretch)
    assert len(events) == 40 or events[0] == SOS, f"{len(events)} events, and there is more text before them"
    assert SOS not in events[1:] and (events[0] != SOS or start == 0), f"SOS at character {start}"
    assert EOS not in events[:-1] and (events[-1] == EOS) == (end == len(LONG_TEXT)), f"the end is character {end}"
    assert end == len(LONG_TEXT) or LONG_TEXT[end].isspace(), f"{stretch!r} ends within a word"
    assert positions[:, 0].tolist() == list(range(1, len(events) + 1))
    at_start += start == 0
  assert 5 < at_start < 60, "the draws should meet both the start and the rest"


def test_the_first_and_the_last_crop_meet_the_ends_of_the_text(trained):
  document = SubwordDocument(Text(LONG_TEXT.encode()), trained.tokens)
  first, _ = document.crop(0, 40, 1)
  assert trained.tokens.decode(first) == LONG_TEXT.split()[0] and first[0] == SOS
  later, _ = document.crop(0, 80, 40)
  assert 160 <= len(trained.tokens.decode(later).encode()) < 160 + 64, "40 pieces count as 160 bytes, and a word"
  last, _ = document.crop(1 - 1e-9, 40, 1)
  assert len(last) == 40 and last[-1] == EOS and LONG_TEXT.endswith(trained.tokens.decode(last))
  whole, _ = SubwordDocument(Text(b"bako rimu"), trained.tokens).crop(1 - 1e-9, 40, 40)
  assert whole.tolist() == [SOS, *trained.tokens.encode(b"bako rimu"), EOS]


def test_a_crop_of_pieces_does_without_the_rest_of_the_text(trained):
  text, recording = CountingText(LONG_TEXT.encode()), RecordingPieces(trained.tokens)
  events, _ = SubwordDocument(text, recording).crop(0.5, 40, 2)
  assert len(events) == 40
  assert text.num_read < 500 and len(recording.given[0]) < 500, f"{text.num_read} of {len(text)} bytes were read"


class WholeWords:
  """A model with far longer pieces than a crop reckons with."""

  def encode(self, text):
    return np.array([len(word) + NUM_SPECIAL for word in text.split()])


def test_a_crop_of_few_long_pieces_is_short_and_begins_without_sos():
  events, _ = SubwordDocument(Text(b"characteristically " * 100), WholeWords()).crop(0.5, 40, 2)
  assert 10 < len(events) < 20 and SOS not in events and EOS not in events


def test_without_any_space_no_crop_cuts_a_character(trained):
  text = "語né😀" * 30
  content = text.encode()
  character_ends = np.cumsum([len(character.encode()) for character in text])
  for end in range(1, len(content) - 64):
    recording = RecordingPieces(trained.tokens)
    SubwordDocument(Text(content), recording, part=(end, end)).crop(0, 12, 2)
    (given,) = recording.given
    assert given.decode() in text  # strict: raises for a character in part
    assert content[: character_ends[character_ends >= end][0]].endswith(given), f"the crop to byte {end} ends elsewhere"
    assert len(given) >= min(end, 12 * 8 - 4)


def test_parts_end_their_crops_of_pieces_where_one_document_would(trained, tmp_path, monkeypatch):
  content = (" ".join(words(30, seed=5)) + "\n").encode()
  (tmp_path / "a.txt").write_bytes(content * 2)
  monkeypatch.setattr(texts, "PART_BYTES", 50)
  documents = parts(tmp_path, sentencepiece=trained.path)
  whole = SubwordDocument(Text(content), trained.tokens)
  assert len(documents) > 2 and [part.continues for part in documents] == [False] + [True] * (len(documents) - 1)
  assert set().union(*(prefixes(part, 100) for part in documents)) == prefixes(whole, 400)
  assert all(part.read(0, len(part)).tolist() == whole.read(0, len(whole)).tolist() for part in documents)


def test_bytes_that_are_no_utf8_are_replaced_and_said_once(trained, capsys):
  document = SubwordDocument(Text(b"bako \xff rimu\n", "an odd text"), trained.tokens)
  for _ in range(2):
    events, _ = document.crop(1 - 1e-9, 40, 2)
    assert trained.tokens.decode(events) == "bako \ufffd rimu\n"
  assert len(document) == len(events)
  assert capsys.readouterr().err.count("an odd text is not all UTF-8") == 1


def test_a_model_file_that_cannot_be_read_is_named(tmp_path):
  (tmp_path / "text").write_text("this is no model")
  for path in (tmp_path / "missing.model", tmp_path / "text", tmp_path):
    with pytest.raises(
      InputError, match=f"data.sentencepiece does not name.*{re.escape(str(path))}.*train_sentencepiece"
    ):
      texts.tokenizer(str(path))


def test_the_text_task_takes_its_vocabulary_from_the_model(trained, folder):
  data = DataConfig(task="text_files", files=f"{folder}/*.txt", sentencepiece=trained.path)
  ((task, _),) = tasks.get_tasks(data, 64)
  assert (task.vocab_size, task.unknown, task.position_dims) == (403, 3, 1)
  assert task.decode([SOS, *trained.tokens.encode(b"bako"), EOS]) == "bako"


@pytest.mark.parametrize("text", ["日本語", "né"])
def test_the_last_character_is_not_cut(text, trained):
  content = text.encode()
  for end in range(1, len(content) + 1):
    events, _ = SubwordDocument(Text(content), trained.tokens, part=(end, end)).crop(0, 40, 1)
    assert trained.tokens.decode(events) == text, f"a crop that ends at byte {end}"


def test_the_last_word_is_not_cut(trained):
  content = b"bako rimu"
  crops = [SubwordDocument(Text(content), trained.tokens, part=(end, end)).crop(0, 40, 1)[0] for end in range(1, 10)]
  assert {trained.tokens.decode(crop) for crop in crops} == {"bako", "bako rimu"}
  assert all((crop[-1] == EOS) == (trained.tokens.decode(crop) == "bako rimu") for crop in crops)


def test_an_empty_model_file_is_named(tmp_path):
  (tmp_path / "empty.model").write_bytes(b"")
  with pytest.raises(InputError, match="data.sentencepiece does not name.*empty.model is empty"):
    SubwordTokenizer(str(tmp_path / "empty.model"))


def test_a_stretch_beyond_the_end_of_a_file_text_is_empty(tmp_path):
  (tmp_path / "text").write_bytes(b"before0123456789after")
  assert FileText(str(tmp_path / "text"), 6, 10).read(11, 99) == b""
