"""Codes of neural codecs as events: audio from residual vector quantizers, video from a VQ-GAN. NumPy only.

Audio: `frames` x `levels` codes (SoundStream, EnCodec, DAC, ...) are flattened frame by frame, the coarse level first,
as in the paper. Each level has its own ids: code c of level q is the value q * codebook_size + c. Positions are (frame,
level). Frames count from the first frame of the excerpt, so a table of ceil(context / levels) + 3 rows is large enough.
Video: `time` x `height` x `width` codes are flattened in raster order; positions are (t, y, x).

SOS comes first, at position 1 in all dimensions; codes have positions from 2 on. EOS is not used.
"""

import io
import threading

import numpy as np

from perceiver_ar_jax.data import NUM_SPECIAL, SOS
from perceiver_ar_jax.data.documents import Document, Unreadable

_HEADERS = threading.Lock()  # NumPy parses headers with `ast`, which fails at random in several threads of CPython 3.11


def load_arrays(content: bytes) -> dict[str, np.ndarray]:
  """Returns the arrays of a .npz file by name, or that of a .npy file as "codes"; nothing in the file is executed.

  NumPy, zipfile and zlib raise many types of errors for damaged files.
  """
  with _HEADERS:
    arrays = np.load(io.BytesIO(content), allow_pickle=False)
    arrays = {"codes": arrays} if isinstance(arrays, np.ndarray) else arrays
    return {name: np.asarray(array) for name, array in arrays.items()}


def load(content: bytes, name: str, codebook_size: int) -> np.ndarray:
  """Returns the codes in a .npy file, or in a .npz file with one array or with one called "codes".

  Raises Unreadable, with `name`, if it is not such a file, or if it contains anything but codes 0..codebook_size-1.
  """
  try:
    arrays = load_arrays(content)
    if "codes" not in arrays and len(arrays) != 1:
      raise ValueError(f"it has the arrays {', '.join(arrays)}: name one of them codes")
    codes = arrays["codes"] if "codes" in arrays else next(iter(arrays.values()))
  except Exception as error:
    raise Unreadable(f"{name} is not a .npy or .npz file of codes ({error})") from error
  if not np.issubdtype(codes.dtype, np.integer) or not codes.size:
    raise Unreadable(f"{name} contains {codes.size} numbers of type {codes.dtype}, and codes are integers")
  low, high = codes.min(), codes.max()
  if low < 0 or high >= codebook_size:
    raise Unreadable(f"{name} has codes from {low} to {high}, outside 0..{codebook_size - 1} (data.codebook_size)")
  return codes


def audio_positions(levels: int, start: int, end: int) -> np.ndarray:
  """Returns the positions int32[end - start, 2] of events start..end-1 of `flatten_audio`."""
  indices = np.arange(start, end) - 1
  positions = np.stack([indices // levels - max(start - 1, 0) // levels, indices % levels], axis=-1) + 2
  positions[indices < 0] = 1
  return positions.astype(np.int32)


def flatten_audio(codes_FxQ: np.ndarray, codebook_size: int) -> np.ndarray:
  """Returns int32[1 + frames * levels]: SOS and the codes int[frames, levels] frame by frame."""
  offsets_Q = np.arange(codes_FxQ.shape[1]) * codebook_size + NUM_SPECIAL
  return np.concatenate([[SOS], (codes_FxQ.astype(np.int32) + offsets_Q).reshape(-1)], dtype=np.int32)


def to_audio(events: np.ndarray, levels: int, codebook_size: int) -> np.ndarray:
  """Returns the codes int32[frames, levels] of events: the inverse of `flatten_audio`, for any excerpt.

  Special ids are ignored; codes before the first whole frame and after the last are dropped. An id of the wrong level,
  which a model may sample, is read as the same code of the right level.
  """
  values = to_values(events)
  first = next(iter(np.flatnonzero(values < codebook_size)), len(values))
  end = first + (len(values) - first) // levels * levels
  return (values[first:end] % codebook_size).reshape(-1, levels).astype(np.int32)


def audio_frames(codes: np.ndarray, levels: int, layout: str, name: str) -> np.ndarray:
  """Returns the first `levels` (data.code_levels) levels of a file's codes: int[frames, levels].

  `layout` (data.code_layout) is the order of the array's axes, frames_levels or levels_frames; leading axes of 1 are
  dropped. Raises Unreadable, with `name`, if the array has other dimensions or fewer levels, or contradicts the layout.
  """
  shape = codes.shape
  while codes.ndim > 2 and len(codes) == 1:
    codes = codes[0]
  codes = codes if layout == "frames_levels" else codes.T
  if codes.ndim != 2 or codes.shape[1] < levels or codes.shape[1] > len(codes) >= levels:
    raise Unreadable(
      f"{name} has the shape {shape}, and codes of audio are {layout.replace('_', ' x ')} (data.code_layout), at least"
      f" {levels} levels (data.code_levels) and more frames than levels"
    )
  return codes[:, :levels]


def video_document(codes: np.ndarray, name: str) -> Document:
  """Returns the document of codes int[time, height, width]; raises Unreadable for other dimensions."""
  if codes.ndim != 3:
    raise Unreadable(f"{name} has the shape {codes.shape}, and codes of video are time x height x width")
  events = np.concatenate([[SOS], codes.reshape(-1).astype(np.int32) + NUM_SPECIAL], dtype=np.int32)
  positions = np.argwhere(np.ones(codes.shape, bool)) + 2
  return Document(events, positions=np.concatenate([np.ones((1, 3)), positions]).astype(np.int32))


def to_video(events: np.ndarray, height: int, width: int) -> np.ndarray:
  """Returns the codes int32[time, height, width] of a video's first events; an unfinished last frame is dropped."""
  values = to_values(events)
  frames = len(values) // (height * width)
  return values[: frames * height * width].reshape(frames, height, width).astype(np.int32)


def to_values(events: np.ndarray) -> np.ndarray:
  """Returns the values of events without special ids: of video the codes, flat."""
  values = np.asarray(events)
  return values[values >= NUM_SPECIAL] - NUM_SPECIAL
