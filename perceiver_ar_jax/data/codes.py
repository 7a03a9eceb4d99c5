"""Codes of neural codecs as events: audio from residual vector quantizers, video from a VQ-GAN. NumPy only.

Audio: `frames` x `levels` codes (SoundStream, EnCodec, DAC, ...) are flattened frame by frame, the coarse level first,
as in the paper. Each level has its own ids: code c of level q is the value q * codebook_size + c. Positions are (frame,
level). Frames count from the first frame of the excerpt, so a table of ceil(context / levels) + 3 rows is large enough.
Video: `time` x `height` x `width` codes are flattened in raster order; positions are (t, y, x).

SOS comes first, at position 1 in all dimensions; codes have positions from 2 on. EOS is not used.
"""

import io
import math
import threading
import zipfile

import numpy as np

from perceiver_ar_jax.data import NUM_SPECIAL, SOS
from perceiver_ar_jax.data.documents import Document, Unreadable

_MAX_BYTES = 2**31  # the largest array read from a compressed file, which may be a thousandth of this
HEADERS = threading.Lock()  # NumPy parses headers with `ast`, which fails at random in several threads of CPython 3.11


def load(content: bytes, name: str, codebook_size: int) -> np.ndarray:
  """Returns the codes in a .npy file, or in a .npz file with one array or with one called "codes".

  Nothing in the file is executed, and no more memory is allocated than its content takes. Raises Unreadable, with
  `name`, if it is not such a file, its numbers are not integers, or codes are outside 0..codebook_size-1.
  """
  try:
    codes = _array(content)
  except Exception as error:  # zipfile, zlib and NumPy raise many types of errors for damaged files
    raise Unreadable(f"{name} is not a .npy or .npz file of codes ({error})") from error
  if not np.issubdtype(codes.dtype, np.integer):
    raise Unreadable(f"{name} contains {codes.dtype}, and codes are integers")
  if codes.size == 0:
    raise Unreadable(f"{name} contains no codes")
  low, high = codes.min(), codes.max()
  if low < 0 or high >= codebook_size:
    raise Unreadable(f"{name} has codes from {low} to {high}, outside 0..{codebook_size - 1} (data.codebook_size)")
  return codes


def _array(content: bytes) -> np.ndarray:
  """Returns the array of a .npy or .npz file, without a copy."""
  if content[:2] == b"PK":
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
      sizes = {entry.filename.removesuffix(".npy"): entry.file_size for entry in archive.infolist()}
      if "codes" not in sizes and len(sizes) != 1:
        raise ValueError(f"it has the arrays {', '.join(sizes)}: name one of them codes")
      name = "codes" if "codes" in sizes else next(iter(sizes))
      if sizes[name] > _MAX_BYTES:
        raise ValueError(f"its codes take {sizes[name]:,} bytes, more than {_MAX_BYTES:,}: split it into several files")
      content = archive.read(f"{name}.npy")
  file = io.BytesIO(content)
  version = np.lib.format.read_magic(file)
  read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
  with HEADERS:
    shape, is_fortran, dtype = read_header(file)
  if min(shape, default=0) < 0:
    raise ValueError(f"it has the shape {shape}")
  return np.frombuffer(content, dtype, math.prod(shape), file.tell()).reshape(shape, order="F" if is_fortran else "C")


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
  axes, shape = layout.replace("_", " x "), codes.shape
  while codes.ndim > 2 and len(codes) == 1:
    codes = codes[0]
  if codes.ndim != 2:
    raise Unreadable(f"{name} has the shape {shape}, and codes of audio are {axes} (data.code_layout={layout})")
  codes, opposite = (codes, "levels_frames") if layout == "frames_levels" else (codes.T, "frames_levels")
  num_frames, num_levels = codes.shape
  if num_levels < levels:
    problem = f"is {num_levels:,} levels, fewer than data.code_levels={levels}: lower it, or"
  elif num_levels > num_frames >= levels:
    problem = f"would be {num_levels:,} levels of only {num_frames:,} frames:"
  else:
    return codes[:, :levels]
  raise Unreadable(f"{name} has the shape {shape}, which as {axes} {problem} set data.code_layout={opposite}")


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
