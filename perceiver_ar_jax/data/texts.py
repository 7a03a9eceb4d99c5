"""Text as events: bytes, or the pieces of a SentencePiece model; read from memory or straight out of large files.

The events of a text are SOS, its bytes or pieces, EOS. Byte or piece v is the event v + NUM_SPECIAL.
"""

import functools
import re

import numpy as np

from perceiver_ar_jax.config import InputError
from perceiver_ar_jax.data import EOS, NUM_SPECIAL, SOS
from perceiver_ar_jax.data.documents import Document, Unreadable
from perceiver_ar_jax.data.sources import read_bytes
from perceiver_ar_jax.data.warn_once import warn_once

PART_BYTES = 2**20
"""A large file counts as one record for each so many bytes, so that hosts can share it and epochs get through it."""

_BYTES_PER_PIECE = 8
"""Text read for each piece of a crop: generous, since whoever reads less gets a crop shorter than the context."""
_TYPICAL_BYTES_PER_PIECE = 4
_LONGEST_WORD_BYTES = 64
_WHITESPACE = re.compile(rb"\s")
_WORDS = re.compile(rb"\S+")
_COUNT_BYTES = 2**24


class Bytes:
  """The vocabulary of the 256 bytes."""

  vocab_size = 256 + NUM_SPECIAL
  unknown: int | None = None
  drawable = range(NUM_SPECIAL, vocab_size)

  def encode(self, text: bytes) -> np.ndarray:
    """int32[bytes]."""
    return np.frombuffer(text, np.uint8).astype(np.int32) + NUM_SPECIAL

  def decode(self, events: np.ndarray) -> str:
    """The text of any events; specials are left out and bytes that are no UTF-8 become U+FFFD."""
    values = np.asarray(events)[np.asarray(events) >= NUM_SPECIAL] - NUM_SPECIAL
    return values.astype(np.uint8).tobytes().decode("utf-8", errors="replace")

  def document(self, text: "Text", part: tuple[int, int] | None = None) -> Document:
    """The document of a text; see ByteDocument."""
    return ByteDocument(text, part)


class Pieces:
  """The vocabulary of a SentencePiece model.

  Args:
    path: the .model file.

  Raises:
    InputError: there is no such file, or it is no model.
  """

  def __init__(self, path: str):
    import sentencepiece  # takes a while, and bytes do without

    try:
      content = read_bytes(path)
      if not content:
        raise Unreadable(f"{path} is empty")
      self._model = sentencepiece.SentencePieceProcessor(model_proto=content)
    except (Unreadable, RuntimeError) as error:
      reason = error if isinstance(error, Unreadable) else f"{path}: {error}"
      raise InputError(
        f"data.sentencepiece names no SentencePiece model: {reason}. Train one with `python -m"
        " perceiver_ar_jax.data.train_sentencepiece --config=... --output=FILE` and set"
        " --config.data.sentencepiece=FILE, or read bytes: --config.data.sentencepiece=None"
        " --config.model.vocab_size=259."
      ) from error
    self.vocab_size = self._model.get_piece_size() + NUM_SPECIAL
    self.unknown = self._model.unk_id() + NUM_SPECIAL
    """The event that stands for text which the model has no piece for."""
    pieces = range(self._model.get_piece_size())
    self.drawable = [
      piece + NUM_SPECIAL
      for piece in pieces
      if not (self._model.is_unknown(piece) or self._model.is_control(piece) or self._model.is_unused(piece))
    ]
    """Events that stand for text."""

  def encode(self, text: bytes) -> np.ndarray:
    """int32[pieces]; bytes that are no UTF-8 become U+FFFD."""
    return np.array(self._model.encode(text.decode("utf-8", errors="replace")), np.int32) + NUM_SPECIAL

  def decode(self, events: np.ndarray) -> str:
    """The text of any events; specials and ids beyond the model are left out."""
    events = np.asarray(events)
    known = events[(events >= NUM_SPECIAL) & (events < self.vocab_size)]
    return self._model.decode((known - NUM_SPECIAL).tolist())

  def document(self, text: "Text", part: tuple[int, int] | None = None) -> Document:
    """The document of a text; see PieceDocument."""
    return PieceDocument(text, self, part)


@functools.lru_cache(maxsize=8)
def tokenizer(path: str | None) -> Bytes | Pieces:
  """The vocabulary of a SentencePiece model file, or of bytes for None."""
  return Bytes() if path is None else Pieces(path)


class Text:
  """Bytes in memory, any stretch of which can be read; `name` is for messages."""

  def __init__(self, content: bytes, name: str = "A text"):
    self._content, self.name = content, name

  def __len__(self) -> int:
    return len(self._content)

  def read(self, start: int, end: int) -> bytes:
    """Bytes start..end-1, as far as they exist."""
    return self._content[max(start, 0) : end]


class FileText(Text):
  """Bytes offset..offset+size-1 of a file, read when asked for."""

  def __init__(self, path: str, offset: int, size: int):
    self.name, self._offset, self._size = path, offset, size

  def __len__(self) -> int:
    return self._size

  def read(self, start: int, end: int) -> bytes:
    start, end = max(start, 0), min(end, self._size)
    return read_bytes(self.name, self._offset + start, max(end - start, 0))


class ByteDocument(Document):
  """A text's bytes, never held at once.

  Args:
    text: not empty.
    part: the stretch of bytes whose events training crops may end at; None: all of it.
  """

  def __init__(self, text: Text, part: tuple[int, int] | None = None):
    super().__init__(np.zeros(0, np.int32))
    self.text = text
    start, end = part or (0, len(text))
    self.ends = (1 if start == 0 else start + 2, end + (2 if end == len(text) else 1))
    self.continues = start > 0

  def __len__(self) -> int:
    return len(self.text) + 2

  def read(self, start: int, end: int) -> np.ndarray:
    events = np.empty(end - start, np.int32)
    first, last = int(start == 0), int(end == len(self))
    events[:first], events[len(events) - last :] = SOS, EOS
    bytes_N = np.frombuffer(self.text.read(start - 1, end - 1), np.uint8)
    np.add(bytes_N, NUM_SPECIAL, out=events[first : len(events) - last], dtype=np.int32)
    return events

  def counts(self) -> dict[str, int]:
    return count(self.text)


class PieceDocument(Document):
  """A text's pieces: all of them once somebody asks for their number, otherwise those of a crop.

  Args:
    text: not empty.
    pieces: the model.
    part: the stretch of bytes at which training crops may end; None: all of it.
  """

  def __init__(self, text: Text, pieces: Pieces, part: tuple[int, int] | None = None):
    self.text, self._pieces, self._part = text, pieces, part or (0, len(text))
    self._positions = self._scored = None
    self.continues = self._part[0] > 0

  @functools.cached_property
  def _events(self) -> np.ndarray:
    return self._encode(0, self.text.read(0, len(self.text)))

  def _encode(self, start: int, content: bytes) -> np.ndarray:
    """The events of the stretch that begins at byte `start`, with SOS and EOS at the ends of the text: int32[n]."""
    try:
      content.decode("utf-8")
    except UnicodeDecodeError:
      warn_once("such texts", f"{self.text.name} is not all UTF-8: SentencePiece reads U+FFFD where it is not")
    first, last = [SOS] * (start == 0), [EOS] * (start + len(content) == len(self.text))
    return np.array([*first, *self._pieces.encode(content), *last], np.int32)

  def has_targets(self) -> bool:
    return len(self.text) > 0  # without encoding it

  def counts(self) -> dict[str, int]:
    return count(self.text)

  def crop(self, draw: float, longest: int, shortest: int) -> tuple[np.ndarray, np.ndarray]:
    """As Document.crop, but drawn in bytes, `shortest` being about `_TYPICAL_BYTES_PER_PIECE` of them each, and cut
    between words: a long text need not be encoded for the sake of one stretch of it.
    """
    first, last = self._part
    first = max(first, 1, min(shortest * _TYPICAL_BYTES_PER_PIECE, last))
    end = first + int(draw * (last - first + 1))
    ahead = self.text.read(end, end + _LONGEST_WORD_BYTES)
    end += _next_boundary(ahead if len(ahead) == _LONGEST_WORD_BYTES else ahead + b"\n")  # a text's end ends a word
    start = max(end - longest * _BYTES_PER_PIECE, 0)
    text = self.text.read(start, end)
    if start > 0:
      cut = _next_boundary(text[:_LONGEST_WORD_BYTES])
      start, text = start + cut, text[cut:]
    events = self._encode(start, text)[-longest:]
    return events, self.positions(0, len(events))


def _next_boundary(text: bytes) -> int:
  """Where the first word of `text` ends; where its first whole character begins if no space is in sight."""
  space = _WHITESPACE.search(text)
  if space:
    return space.start()
  return next((place for place, byte in enumerate(text) if byte & 0xC0 != 0x80), 0)


def count(text: Text) -> dict[str, int]:
  """{"words": whitespace-separated ones, "bytes": all}, a stretch at a time."""
  words, inside = 0, False
  for start in range(0, len(text), _COUNT_BYTES):
    part = text.read(start, start + _COUNT_BYTES)
    words += len(_WORDS.findall(part)) - (inside and not part[:1].isspace())
    inside = not part[-1:].isspace()
  return {"words": words, "bytes": len(text)}
