"""Text as bytes: any stretch is a slice of the whole, words and bytes are counted once, large files have parts."""

import re

import numpy as np
import pytest

from perceiver_ar_jax.data import EOS, NUM_SPECIAL, PAD, SOS, texts
from perceiver_ar_jax.data.documents import Unreadable
from perceiver_ar_jax.data.texts import ByteDocument, ByteTokenizer, FileText
from tests.texts import LONG_TEXT, CountingText, parts, prefixes, stretches


def file_text(folder, content):
  """`content` as a stretch of a file that has other bytes on both sides."""
  (folder / "text").write_bytes(b"before" + content + b"after")
  return FileText(str(folder / "text"), 6, len(content))


def test_bytes_are_start_bytes_end():
  document = ByteDocument(b"hi\n")
  assert len(document) == 5
  assert document.read(0, 5).tolist() == [SOS, 107, 108, 13, EOS]
  assert document.read(0, 1).tolist() == [SOS] and document.read(4, 5).tolist() == [EOS]
  assert document.read(1, 3).tolist() == [107, 108] and document.read(0, 5).dtype == np.int32


def test_all_256_bytes_have_different_ids():
  everything = bytes(range(256))
  document = ByteDocument(everything)
  assert document.read(0, 258).tolist() == [SOS, *range(3, 259), EOS] and ByteTokenizer.vocab_size == 259


def test_decoding_omits_specials_and_marks_bytes_that_are_not_utf8():
  tokens = ByteTokenizer()
  text = "a\tb  ü語\n"
  assert tokens.decode([SOS, *(byte + NUM_SPECIAL for byte in text.encode()), EOS, PAD]) == text
  assert tokens.decode(["ü".encode()[0] + NUM_SPECIAL]) == "\ufffd"
  assert tokens.decode(np.zeros(0, np.int32)) == ""


@pytest.mark.parametrize("kept", ["in memory", "in a file"])
def test_any_stretch_of_bytes_is_that_slice_of_the_whole(kept, tmp_path):
  content = np.random.default_rng(1).integers(0, 256, 60, np.uint8).tobytes()
  document = ByteDocument(content if kept == "in memory" else file_text(tmp_path, content))
  expected = [SOS, *(byte + NUM_SPECIAL for byte in content), EOS]
  assert len(document) == len(expected)
  for start, end in stretches(len(expected), 200):
    assert document.read(start, end).tolist() == expected[start:end], f"events {start} to {end}"


def test_positions_count_from_the_start_of_the_stretch():
  document = ByteDocument(b"abcdefghij")
  assert document.positions(0, 3).tolist() == document.positions(7, 10).tolist() == [[1], [2], [3]]
  events, positions, _ = document.crop(0.999, longest=3, shortest=2)
  assert events.tolist() == [108, 109, EOS] and positions.tolist() == [[1], [2], [3]]


def test_a_crop_of_bytes_reads_no_more_than_itself():
  text = CountingText(LONG_TEXT.encode())
  events, _, _ = ByteDocument(text).crop(0.5, longest=50, shortest=2)
  assert len(events) == 50 and text.num_read <= 50, f"{text.num_read} bytes were read for a crop of 50"


def test_a_stretch_of_a_file_contains_nothing_else(tmp_path):
  text = file_text(tmp_path, b"0123456789")
  assert len(text) == 10 and text[:] == b"0123456789" and text[3:5] == b"34"
  assert text[:2] == b"01" and text[8:99] == b"89" and text[10:99] == b""


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


def test_a_stretch_beyond_the_end_of_a_file_text_is_empty(tmp_path):
  (tmp_path / "text").write_bytes(b"before0123456789after")
  assert FileText(str(tmp_path / "text"), 6, 10)[11:99] == b""


@pytest.mark.parametrize("block_bytes", [1, 3, 2**24])
@pytest.mark.parametrize(
  ("content", "num_words"),
  [
    (b"one two", 2),
    (b"abcdefghijkl", 1),
    (b"  begins and ends in spaces \n", 5),
    (b"runs\n\n\n\tof    spaces\r\n", 3),
    (b" \t\n\v\f\r  ", 0),
    (b"a b c d e f", 6),
    ("Zahl\u00a0ist né".encode(), 2),  # a no-break space does not separate words in bytes
    (b"\x1c \x1d\x85 \x00", 3),
  ],
)
def test_words_and_bytes_are_counted_across_blocks(content, num_words, block_bytes, monkeypatch):
  monkeypatch.setattr(texts, "_COUNT_BYTES", block_bytes)
  expected = {"words": num_words, "bytes": len(content)}
  assert len(content.split()) == num_words and ByteDocument(content).counts() == expected


def test_random_texts_are_counted_as_python_splits_them(monkeypatch, tmp_path):
  monkeypatch.setattr(texts, "_COUNT_BYTES", 3)
  random = np.random.default_rng(0)
  for length in range(1, 80):
    content = bytes(random.choice(list(b"ab \n"), length).tolist())
    for text in (content, file_text(tmp_path, content)):
      assert ByteDocument(text).counts() == {"words": len(content.split()), "bytes": length}, content


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
    whole = ByteDocument(content).read(0, size + 2)
    crops = (part.crop(draw, 5, 1)[0] for part in documents for draw in (0, 0.3, 0.6, 0.999))
    assert all(crop.tobytes() in whole.tobytes() for crop in crops), f"{message}: a crop is not in the text"
