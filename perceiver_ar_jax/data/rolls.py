"""Piano rolls as events: the four polyphonic benchmarks of Boulanger-Lewandowski et al. (2012, arXiv 1206.6392).

A frame becomes the keys that are down, in ascending order, and an end-of-frame event; SOS comes first. So the
likelihood of a frame is the product of those of its events. As in the evaluation of TCNs (Bai et al., 2018, arXiv
1803.01271), frames 2..T are scored, given all frames before.
"""

import io
import itertools
from collections.abc import Mapping

import numpy as np
import scipy.io

from perceiver_ar_jax.data import NUM_SPECIAL, SOS, codes, music
from perceiver_ar_jax.data.documents import Document, Unreadable

NUM_KEYS, LOWEST_PITCH = 88, 21
SUFFIXES = (".mat", ".npz")
VOCAB_SIZE = NUM_SPECIAL + NUM_KEYS + 1
_END_OF_FRAME = VOCAB_SIZE - 1
_SPLITS = {"train": "train", "validation": "valid", "test": "test"}
_SECONDS_PER_FRAME, _VELOCITY = 0.25, 80


def load(content: bytes, name: str) -> Mapping[str, list[np.ndarray]]:
  """Returns the rolls [T, 88] of each split in a file.

  A .mat file has the variables traindata, validdata and testdata, each a list of rolls. A .npz file has arrays whose
  names begin with train, valid or test: rolls [T, 88], or several of equal length [N, T, 88]. Raises Unreadable.
  """
  try:
    if name.endswith(".mat"):
      arrays = scipy.io.loadmat(io.BytesIO(content))
      arrays = {key: list(value.ravel()) for key, value in arrays.items() if key.endswith("data")}
    else:
      with codes.HEADERS, np.load(io.BytesIO(content), allow_pickle=False) as file:
        arrays = {key: list(file[key]) if file[key].ndim == 3 else [file[key]] for key in file.files}
  except MemoryError:
    raise
  except Exception as error:  # the parsers raise errors of many kinds
    raise Unreadable(f"{name} cannot be read as piano rolls: {type(error).__name__}: {error}") from error
  rolls = {
    split: [roll for key in sorted(arrays) if key.startswith(prefix) for roll in arrays[key]]
    for split, prefix in _SPLITS.items()
  }
  if not any(rolls.values()):
    raise Unreadable(f"{name} contains no arrays whose names begin with train, valid or test.")
  for roll in itertools.chain(*rolls.values()):
    if not isinstance(roll, np.ndarray) or roll.shape[1:] != (NUM_KEYS,) or roll.dtype.kind not in "buif":
      raise Unreadable(f"{name} must contain piano rolls of {NUM_KEYS} columns, one row per frame.")
  return rolls


def document(roll_TxK: np.ndarray) -> Document:
  """Returns the events of a roll, of which those of the first frame are not scored."""
  frames_N, keys_N = np.nonzero(np.pad(roll_TxK, ((0, 0), (0, 1)), constant_values=1))
  return Document(
    np.concatenate([[SOS], keys_N + NUM_SPECIAL]).astype(np.int32),
    count=lambda events: {"frames": max(int((events == _END_OF_FRAME).sum()) - 1, 0)},
    scored=np.concatenate([[False], frames_N > 0]),
  )


def transpose(events_N: np.ndarray, semitones: int) -> np.ndarray:
  """Returns events with all keys moved, unless one of them would leave the keyboard."""
  is_key = (events_N >= NUM_SPECIAL) & (events_N < _END_OF_FRAME)
  moved_N = np.where(is_key, events_N + semitones, events_N)
  keys = moved_N[is_key]
  fits = not len(keys) or (keys.min() >= NUM_SPECIAL and keys.max() < _END_OF_FRAME)
  return moved_N if fits else events_N


def decode(events_N: np.ndarray) -> list[music.Note]:
  """Returns the notes of events, at four frames per second; a key that stays down is one note."""
  events_N = np.asarray(events_N, np.int64)
  keys_N, frames_N = events_N - NUM_SPECIAL, np.cumsum(events_N == _END_OF_FRAME)
  is_key_N = (keys_N >= 0) & (keys_N < NUM_KEYS)
  roll_KxT = np.zeros((NUM_KEYS, frames_N.max(initial=0) + 3), np.int8)  # with a frame of silence at each end
  roll_KxT[keys_N[is_key_N], frames_N[is_key_N] + 1] = 1
  starts, ends = (np.argwhere(np.diff(roll_KxT) == change).tolist() for change in (1, -1))
  notes = [
    music.Note(LOWEST_PITCH + key, _VELOCITY, start * _SECONDS_PER_FRAME, end * _SECONDS_PER_FRAME)
    for (key, start), (_, end) in zip(starts, ends)
  ]
  return sorted(notes, key=lambda note: (note.onset, note.pitch))
