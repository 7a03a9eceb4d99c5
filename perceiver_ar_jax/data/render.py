"""Renders events for people: pictures, piano rolls, text."""

from collections.abc import Sequence

import numpy as np
import PIL.Image
from etils import epath

from perceiver_ar_jax.data import NUM_SPECIAL, music, registry

_GAP, _GRAY, _MIN_PIXELS = 2, 128, 128
_MAX_STEPS = 1000  # columns of a piano roll: 10 s


def text(task: registry.Task, events: np.ndarray) -> str:
  """Returns events as text; other modalities as their numbers."""
  if task.modality == "text":
    return task.decode(events)
  if task.modality in ("music", "rolls"):
    return "\n".join(
      f"{note.onset:8.2f} s  {note.offset - note.onset:6.2f} s  pitch {note.pitch:3d}  velocity {note.velocity:3d}"
      for note in task.decode(events)
    )
  return np.array2string(np.asarray(events), threshold=64, edgeitems=24, max_line_width=100)


def picture(task: registry.Task, events: np.ndarray) -> np.ndarray | None:
  """Returns a picture uint8[height, width, 3] of the events int32[n] from a document's start: an image or a piano roll.

  None for other modalities, and for a part of an image.
  """
  if task.modality == "image":
    try:
      pixels = task.decode(events[events >= NUM_SPECIAL])
    except ValueError:  # a crop, not a whole picture
      return None
    factor = max(1, _MIN_PIXELS // max(pixels.shape[:2]))
    return pixels.repeat(factor, axis=0).repeat(factor, axis=1)
  if task.modality in ("music", "rolls"):
    roll_PxT = np.zeros((music.NUM_PITCHES, _MAX_STEPS), np.uint8)
    for note in task.decode(events):
      start, end = (round(time * music.STEPS_PER_SECOND) for time in (note.onset, note.offset))
      roll_PxT[note.pitch, start:end] = note.velocity
    if len(used := np.argwhere(roll_PxT)):
      roll_PxT = roll_PxT[used[:, 0].min() : used[:, 0].max() + 1, : used[:, 1].max() + 1]
    brightness_HxWx1 = np.repeat(roll_PxT[::-1] * 2, 2, axis=0)[..., None] / np.float32(255)
    dark_blue, yellow = np.array([20, 20, 60]), np.array([255, 230, 80])
    return (dark_blue + (yellow - dark_blue) * brightness_HxWx1).astype(np.uint8)
  return None


def grid(pictures: Sequence[np.ndarray], columns: int) -> np.ndarray:
  """Arranges pictures uint8[height, width, 3] in rows of `columns`, in cells as large as the largest."""
  height, width = (max(picture.shape[axis] for picture in pictures) + _GAP for axis in (0, 1))
  rows = -(-len(pictures) // columns)
  sheet = np.full((rows * height + _GAP, min(columns, len(pictures)) * width + _GAP, 3), _GRAY, np.uint8)
  for index, pixels in enumerate(pictures):
    top, left = index // columns * height + _GAP, index % columns * width + _GAP
    sheet[top : top + pixels.shape[0], left : left + pixels.shape[1]] = pixels
  return sheet


def save_png(pixels: np.ndarray, path: epath.Path) -> None:
  """Writes a picture uint8[height, width, 3]."""
  with path.open("wb") as file:
    PIL.Image.fromarray(pixels).save(file, format="PNG")
