"""Text as events: bytes, or subword tokens of a SentencePiece model; read from memory or from parts of large files.

The events of a text are SOS, its bytes or subword tokens, EOS. Byte or token v is the event v + NUM_SPECIAL.
"""

import codecs
import functools
import re

import numpy as np

from perceiver_ar_jax.config import InputError
from perceiver_ar_jax.data import EOS, NUM_SPECIAL, SOS
from perceiver_ar_jax.data.documents import Document, Unreadable
from perceiver_ar_jax.data.files import file_size, read_bytes
from perceiver_ar_jax.data.warn_once import warn_once

PART_BYTES = 2**20  # of a record of a large file, so that hosts can share it and crops are drawn evenly from it
_BYTES_PER_SUBWORD = 8  # read per subword token of a crop: ample, since with fewer it could not fill the context
_TYPICAL_BYTES_PER_SUBWORD = 4
_LONGEST_WORD_BYTES = 64
_WHITESPACE, _WORDS = re.compile(rb"\s"), re.compile(rb"\S+")
_COUNT_BYTES = 2**24
_CHARACTER = re.compile(rb"[^\x80-\xbf]")  # its first byte, in UTF-8


class ByteTokenizer:
  """The vocabulary of the 256 byte values."""

  vocab_size = 256 + NUM_SPECIAL
  drawable = range(NUM_SPECIAL, vocab_size)

  def decode(self, events: np.ndarray) -> str:
    """Returns the text of any events; specials are left out and bytes that are not UTF-8 become U+FFFD."""
    values = np.asarray(events)[np.asarray(events) >= NUM_SPECIAL] - NUM_SPECIAL
    return values.astype(np.uint8).tobytes().decode("utf-8", errors="replace")

  def document(self, text: "Text", part: tuple[int, int] | None = None) -> Document:
    return ByteDocument(text, part)


class SubwordTokenizer:
  """The vocabulary of the SentencePiece model in the file `path`; raises InputError if it is not a model."""

  def __init__(self, path: str):
    import sentencepiece  # slow, and not needed for bytes

    self._model = model = sentencepiece.SentencePieceProcessor()
    try:
      model.LoadFromSerializedProto(read_bytes(path))
    except (Unreadable, RuntimeError) as error:
      raise InputError(
        f"data.sentencepiece does not name a SentencePiece model: {path} ({error}). Set it to where the file is now,"
        " train one (perceiver_ar_jax.data.train_sentencepiece), or read bytes: --config.data.sentencepiece=None"
        " --config.model.vocab_size=259."
      ) from error
    self.vocab_size = model.get_piece_size() + NUM_SPECIAL
    without_text = (model.is_unknown, model.is_control, model.is_unused)
    tokens = range(model.get_piece_size())
    self.drawable = [token + NUM_SPECIAL for token in tokens if not any(test(token) for test in without_text)]

  def encode(self, text: bytes) -> np.ndarray:
    """Returns the subword tokens as events, int32[N]; bytes that are not UTF-8 become U+FFFD."""
    return np.array(self._model.encode(text.decode("utf-8", errors="replace")), np.int32) + NUM_SPECIAL

  def decode(self, events: np.ndarray) -> str:
    """Returns the text of any events; specials and ids beyond the model are left out."""
    events = np.asarray(events)
    known = events[(events >= NUM_SPECIAL) & (events < self.vocab_size)]
    return self._model.decode((known - NUM_SPECIAL).tolist())

  def document(self, text: "Text", part: tuple[int, int] | None = None) -> Document:
    return SubwordDocument(text, self, part)


@functools.lru_cache(maxsize=8)
def tokenizer(path: str | None) -> ByteTokenizer | SubwordTokenizer:
  """Returns the vocabulary of a SentencePiece model file, or of bytes for None."""
  return ByteTokenizer() if path is None else SubwordTokenizer(path)


@functools.lru_cache(maxsize=2**16)
def check_file(path: str) -> None:
  """Warns once if files are not plain UTF-8: they were probably not meant to be read as they are."""
  head = read_bytes(path, 0, min(4096, file_size(path)))
  try:
    characters = set(codecs.getincrementaldecoder("utf-8")().decode(head))  # the head may end within a character
  except UnicodeDecodeError:
    characters = {"\0"}
  if characters & {"\0", "\ufeff"}:
    kind = "not plain UTF-8 (but UTF-16, a byte order mark, or compressed, for example)"
    warn_once(None, f"{path} is {kind}: it is read byte by byte. Convert or unpack such files.", kind)


class FileText:
  """Bytes offset..offset+size-1 of a file; a slice of it is read on demand, as `bytes`."""

  def __init__(self, path: str, offset: int, size: int):
    self._path, self._offset, self._size = path, offset, size

  def __len__(self) -> int:
    return self._size

  def __getitem__(self, part: slice) -> bytes:
    start, end, _ = part.indices(self._size)
    return read_bytes(self._path, self._offset + start, max(end - start, 0))


Text = bytes | FileText


class _TextDocument(Document):
  """A text. Training crops may end in its bytes `part` = (first, last + 1); None: anywhere."""

  _positions = _scored = None

  def __init__(self, text: Text, part: tuple[int, int] | None):
    self.text, self._part = text, part or (0, len(text))
    self.continues = self._part[0] > 0

  def has_targets(self) -> bool:
    return len(self.text) > 0

  def counts(self, end: int | None = None) -> dict[str, int]:
    return count(self.text)


class ByteDocument(_TextDocument):
  """A text as bytes, never all in memory."""

  def __init__(self, text: Text, part: tuple[int, int] | None = None):
    super().__init__(text, part)
    start, end = self._part
    self.ends = (1 if start == 0 else start + 2, end + (2 if end == len(text) else 1))

  def __len__(self) -> int:
    return len(self.text) + 2

  def read(self, start: int, end: int) -> np.ndarray:
    bytes_N = np.frombuffer(self.text[max(start - 1, 0) : end - 1], np.uint8)
    specials = int(start == 0), int(end == len(self))
    return np.pad(bytes_N.astype(np.int32) + NUM_SPECIAL, specials, constant_values=(SOS, EOS))

  def counts(self, end: int | None = None) -> dict[str, int]:
    return count(self.text, end and end - 1)


class SubwordDocument(_TextDocument):
  """A text as subword tokens: all are encoded once their number is needed, otherwise only those of a crop."""

  def __init__(self, text: Text, tokenizer: SubwordTokenizer, part: tuple[int, int] | None = None):
    super().__init__(text, part)
    self._tokenizer = tokenizer

  @functools.cached_property
  def _events(self) -> np.ndarray:
    return self._encode(0, self.text[:])

  def _encode(self, start: int, content: bytes) -> np.ndarray:
    """Encodes `content` from byte `start` on, with SOS and EOS at the ends of the text: int32[N]."""
    sos, eos = [SOS] * (start == 0), [EOS] * (start + len(content) == len(self.text))
    return np.array([*sos, *self._tokenizer.encode(content), *eos], np.int32)

  def head(self, num_scored: int) -> Document:
    """As Document.head, but encodes no more of a long text; words and bytes are those of the decoded events."""
    text = self.text[: num_scored * _BYTES_PER_SUBWORD]
    if len(text) < len(self.text):
      starts = [character.start() for character in _CHARACTER.finditer(text[-4:])]
      text = text[: len(text) - 4 + starts[-1]] if starts else text  # without its last character, which may be cut
    part = SubwordDocument(text, self._tokenizer)
    if len(text) == len(self.text) and part.num_scored <= num_scored:
      return self
    events = part.read(0, min(1 + num_scored, len(part) - 1))  # without the part's EOS, which is not the text's
    return Document(events, count=lambda events: count(self._tokenizer.decode(events).encode()))

  def crop(self, draw: float, longest: int, shortest: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As Document.crop, but drawn in bytes and cut between words, so that only the crop of a long text is encoded."""
    first, last = self._part
    first = max(first, 1, min(shortest * _TYPICAL_BYTES_PER_SUBWORD, last))
    end = first + int(draw * (last - first + 1))
    ahead = self.text[end : end + _LONGEST_WORD_BYTES]
    end += _next_boundary(ahead if len(ahead) == _LONGEST_WORD_BYTES else ahead + b"\n")  # a text's end ends a word
    start = max(end - longest * _BYTES_PER_SUBWORD, 0)
    text = self.text[start:end]
    if start > 0:
      cut = _next_boundary(text[:_LONGEST_WORD_BYTES])
      start, text = start + cut, text[cut:]
    events = self._encode(start, text)[-longest:]
    return events, self.positions(0, len(events)), self.scored(0, len(events))


def _next_boundary(text: bytes) -> int:
  """Returns the index at which the first word of `text` ends; without a space, at which a character begins."""
  boundary = _WHITESPACE.search(text) or _CHARACTER.search(text)
  return boundary.start() if boundary else 0


def count(text: Text, num_bytes: int | None = None) -> dict[str, int]:
  """Counts {"words": separated by whitespace, "bytes": all} of the first `num_bytes`, `_COUNT_BYTES` at a time."""
  words, inside, end = 0, False, len(text) if num_bytes is None else min(num_bytes, len(text))
  for start in range(0, end, _COUNT_BYTES):
    part = text[start : min(start + _COUNT_BYTES, end)]
    words += len(_WORDS.findall(part)) - (inside and not part[:1].isspace())  # the part before ended in a word
    inside = not part[-1:].isspace()
  return {"words": words, "bytes": end}
