"""Codes of neural codecs as events: audio from residual vector quantisers, video from a VQ-GAN; NumPy only.

Audio: `frames` x `levels` codes (SoundStream, EnCodec, DAC, ...) are flattened frame by frame, coarse level first, as
in the paper's audio experiments. Each level has ids of its own: code c of level q is the value q * codebook_size + c.
Positions are (frame, level); frames count from the first one of whatever is read, since recordings have no common
origin, and so a table of context / levels (rounded up) + 3 rows is large enough.

Video: `time` x `height` x `width` codes are flattened in raster order; positions are (t, y, x).

SOS comes first, at position 1 in all dimensions; codes count from 2. No EOS: excerpts end where their file does.
"""

import io

import numpy as np

from perceiver_ar_jax.data import NUM_SPECIAL, SOS
from perceiver_ar_jax.data.documents import Document, Unreadable


def audio_vocab_size(levels: int, codebook_size: int) -> int:
  """Number of ids, PAD, EOS and SOS included."""
  return levels * codebook_size + NUM_SPECIAL


def audio_groups(levels: int, codebook_size: int) -> np.ndarray:
  """bool[levels, vocabulary]: the ids of each level."""
  ids = np.arange(audio_vocab_size(levels, codebook_size)) - NUM_SPECIAL
  return (ids >= 0) & (ids // codebook_size == np.arange(levels)[:, None])


def load(content: bytes, name: str, codebook_size: int) -> np.ndarray:
  """The codes in a .npy file, or in a .npz file that has one array or one called "codes".

  Args:
    content: the file's bytes.
    name: the file's name, for messages.
    codebook_size: codes must lie in 0..codebook_size-1.

  Raises:
    Unreadable: it is no such file, holds something else than whole numbers, or codes out of range.
  """
  try:
    codes = np.load(io.BytesIO(content), allow_pickle=False)
    if not isinstance(codes, np.ndarray):
      names = codes.files
      codes = codes["codes" if "codes" in names else _only(names)]
  except Exception as error:  # NumPy lets zipfile's and zlib's many kinds of errors through
    raise Unreadable(f"{name} is no .npy or .npz file of codes ({error})") from error
  if not np.issubdtype(codes.dtype, np.integer):
    raise Unreadable(f"{name} holds {codes.dtype}, and codes are whole numbers")
  if codes.size == 0:
    raise Unreadable(f"{name} holds no codes")
  if codes.min() < 0 or codes.max() >= codebook_size:
    raise Unreadable(
      f"{name} has codes from {codes.min()} to {codes.max()}, outside 0..{codebook_size - 1} (data.codebook_size)"
    )
  return codes


def _only(names: list[str]) -> str:
  if len(names) != 1:
    raise ValueError(f"it has the arrays {', '.join(names)}: call one of them codes")
  return names[0]


class AudioDocument(Document):
  """The document of the events of codes, as `flatten_audio` makes them."""

  def __init__(self, events: np.ndarray, levels: int):
    super().__init__(events)
    self._levels = levels

  def positions(self, start: int, end: int) -> np.ndarray:
    first_frame = max(start - 1, 0) // self._levels
    places = np.arange(start, end) - 1
    positions = np.stack([places // self._levels - first_frame, places % self._levels], axis=-1) + 2
    positions[places < 0] = 1
    return positions.astype(np.int32)


def flatten_audio(codes_FxQ: np.ndarray, codebook_size: int) -> np.ndarray:
  """SOS and the codes int[frames, levels] of any width frame by frame: int32[1 + frames * levels]."""
  offsets_Q = np.arange(codes_FxQ.shape[1]) * codebook_size + NUM_SPECIAL
  return np.concatenate([[SOS], (codes_FxQ.astype(np.int32) + offsets_Q).reshape(-1)], dtype=np.int32)


def to_audio(events: np.ndarray, levels: int, codebook_size: int) -> np.ndarray:
  """The codes int32[frames, levels] of events: the inverse of `flatten_audio`, for any stretch of events.

  Specials are left out; codes before the first whole frame and after the last are dropped. An id of a level whose turn
  it is not (a model may sample one) counts as the same code of the level whose turn it is.
  """
  values = np.asarray(events)
  values = values[values >= NUM_SPECIAL] - NUM_SPECIAL
  starts = np.flatnonzero(values // codebook_size == 0)
  values = values[starts[0] if len(starts) else len(values) :]
  values = values[: len(values) // levels * levels]
  return (values % codebook_size).reshape(-1, levels).astype(np.int32)


def audio_frames(codes: np.ndarray, levels: int, name: str) -> np.ndarray:
  """Codes as int[frames, levels]: the first `levels` ones of a file in either orientation.

  An array of frames x levels or levels x frames is recognised by its shape, the shorter side being levels; a leading
  axis of 1 (a batch) is dropped.

  Raises:
    Unreadable: it has other dimensions, or fewer levels.
  """
  shape = codes.shape
  while codes.ndim > 2 and codes.shape[0] == 1:
    codes = codes[0]
  if codes.ndim != 2:
    raise Unreadable(f"{name} has the shape {shape}; codes of audio are frames x levels, or levels x frames")
  if codes.shape[0] < codes.shape[1] and codes.shape[1] != levels or codes.shape[0] == levels != codes.shape[1]:
    codes = codes.T
  if codes.shape[1] < levels:
    raise Unreadable(f"{name} has {codes.shape[1]} levels, fewer than data.code_levels={levels}")
  return codes[:, :levels]


def video_document(codes: np.ndarray, name: str) -> Document:
  """The document of codes int[time, height, width]; raises Unreadable for other dimensions."""
  if codes.ndim != 3:
    raise Unreadable(f"{name} has the shape {codes.shape}; codes of video are time x height x width")
  positions = np.stack(np.meshgrid(*map(np.arange, codes.shape), indexing="ij"), axis=-1).reshape(-1, 3) + 2
  return Document(
    np.concatenate([[SOS], codes.reshape(-1).astype(np.int32) + NUM_SPECIAL], dtype=np.int32),
    positions=np.concatenate([np.ones((1, 3)), positions]).astype(np.int32),
  )


def to_video(events: np.ndarray, height: int, width: int) -> np.ndarray:
  """The codes int32[time, height, width] of a video's first events, without specials and a last frame in part."""
  values = np.asarray(events)
  values = values[values >= NUM_SPECIAL] - NUM_SPECIAL
  frames = len(values) // (height * width)
  return values[: frames * height * width].reshape(frames, height, width).astype(np.int32)
