"""Attention as people look at it: what a model sees before an output, hot where the output takes from.

A panel is a picture of a window's inputs with one weight each; the shade is the root of a weight's share of the
largest one, so that small weights show too. Each modality has its own in `PANELS`; what is not there is a plot.
"""

import math
from typing import NamedTuple

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

from perceiver_ar_jax.data import NUM_SPECIAL, music, render
from perceiver_ar_jax.data.registry import Task

_MARK = (255, 40, 40)
_UNSEEN = 40
_MAX_HEADS = 8
_WIDTH = 1000
_PLOT_HEIGHT = 48
_TITLE_HEIGHT = 18
_SMALLEST_IMAGE = 256
_ROW_HEIGHT = 4
"""Pixels of one pitch."""
_CELL = 8, 15
_LAST_CHARACTERS = 4000
_LONGEST_CHARACTER = 4


class Window(NamedTuple):
  """The n inputs that an output is predicted from, and the output."""

  task: Task
  events: np.ndarray
  """int32[n + 1]: the inputs, then the output."""
  positions: np.ndarray
  """int32[n + 1, P]"""
  start: int
  """The number of the first input in its document."""


def picture(window: Window, weights_HxN: np.ndarray) -> np.ndarray:
  """uint8[height, width, 3]: a panel of the mean over heads and, where they are few, one of each head.

  Args:
    window: what is attended to.
    weights_HxN: of each head for each input; rows sum to 1.
  """
  heads = len(weights_HxN)
  maps = {f"mean of {heads} heads" if heads > 1 else "the only head": weights_HxN.mean(axis=0)}
  if 1 < heads <= _MAX_HEADS:
    maps |= {f"head {head}": weights_N for head, weights_N in enumerate(weights_HxN)}
  panel = PANELS.get(window.task.modality, _plot_of_inputs)
  panels = [
    _titled(
      f"{name}: at most {weights_N.max():.3f}, on event {window.start + weights_N.argmax():,}", panel(window, weights_N)
    )
    for name, weights_N in maps.items()
  ]
  if window.task.modality == "image":
    panels.insert(0, _titled("inputs, output framed", panel(window, np.zeros(len(window.events) - 1))))
    return render.grid(panels, columns=3)
  height, width, _ = panels[0].shape
  return render.grid(panels, columns=max(1, round(math.sqrt(len(panels) * height / width))))


def _image(window: Window, weights_N: np.ndarray) -> np.ndarray:
  """The picture as far as it is known, in grey under the heat of its pixels (all three sub-pixels together)."""
  size = math.isqrt((window.task.length - 1) // 3)
  is_colour_N = window.events[:-1] >= NUM_SPECIAL
  x_N, y_N, channel_N = (window.positions[:-1][is_colour_N] - 2).T
  pixels_SxSxC = np.full((size, size, 3), _UNSEEN, np.uint8)
  pixels_SxSxC[y_N, x_N, channel_N] = np.clip(window.events[:-1][is_colour_N] - NUM_SPECIAL, 0, 255)
  if weights_N.any():
    heat_SxS = np.zeros((size, size))
    np.add.at(heat_SxS, (y_N, x_N), weights_N[is_colour_N])
    pixels_SxSxC = _heated(pixels_SxSxC.mean(axis=-1, keepdims=True).repeat(3, axis=-1) * 0.5, _shade(heat_SxS))
  factor = max(1, _SMALLEST_IMAGE // size)
  enlarged = np.pad(pixels_SxSxC.repeat(factor, axis=0).repeat(factor, axis=1), ((1, 1), (1, 1), (0, 0)))
  x, y, _ = (window.positions[-1] - 2) * factor
  _frame(enlarged, x, y, factor + 2, factor + 2)
  return enlarged


def _roll(window: Window, weights_N: np.ndarray) -> np.ndarray:
  """The piano roll, notes hot by their beginning and end; below, the weights of all events over time."""
  inputs_N, output = window.events[:-1], window.events[-1:]
  steps_N = music.steps(inputs_N)
  column_N = steps_N * (_WIDTH - 1) // max(steps_N[-1], 1)
  notes = music.notes_of_events(inputs_N)
  pitches = [pitch for pitch, _, _ in notes] + [pitch for pitch in music.pitches(output) if pitch >= 0]
  low, high = min(pitches, default=60) - 1, max(pitches, default=60) + 1
  rows = _ROW_HEIGHT * (high - low + 1)
  roll = np.full((rows, _WIDTH + 8, 3), render.colours(np.zeros(1)), np.uint8)
  padded_N = np.append(weights_N, 0)
  weighted = sorted((padded_N[on] + padded_N[off], pitch, on, off) for pitch, on, off in notes)
  shades = _shade(np.array([weight for weight, *_ in weighted]))
  for shade, (_, pitch, on, off) in zip(shades, weighted):  # the heaviest on top
    begin = column_N[on]
    end = max(column_N[off] if off < len(inputs_N) else _WIDTH, begin + 2)
    top = _ROW_HEIGHT * (high - pitch)
    roll[top : top + _ROW_HEIGHT - 1, begin:end] = _heated(np.full(3, 110), shade)
  (pitch,) = music.pitches(output)
  top = _ROW_HEIGHT * (high - pitch) if pitch >= 0 else 0
  roll[top : top + _ROW_HEIGHT if pitch >= 0 else rows, _WIDTH + 2 :] = _MARK
  over_time = np.bincount(column_N // 2, weights_N, minlength=_WIDTH // 2)  # bars wide enough to see
  return _stacked(roll, _plot(over_time))


def _page(window: Window, weights_N: np.ndarray) -> np.ndarray:
  """The newest text with each character's heat behind it, the predicted one framed; below, a plot of all inputs."""
  width, height = _CELL
  characters, num_output = _characters(window, weights_N)
  largest = max(weight for _, weight in characters)
  characters = characters[-_LAST_CHARACTERS:]
  shades = _shade(np.array([weight for _, weight in characters]), largest)
  columns, row, column, places = _WIDTH // width, 0, 0, []
  for character, _ in characters:
    places.append((row, column))
    column += 1
    if column == columns or character == "\n":
      row, column = row + 1, 0
  page = np.full(((places[-1][0] + 1) * height + 2, _WIDTH + 2, 3), 250, np.uint8)
  for shade, (row, column) in zip(shades, places):
    page[row * height : (row + 1) * height, column * width : (column + 1) * width] = _heated(np.full(3, 250), shade)
  image = PIL.Image.fromarray(page)
  draw, font = PIL.ImageDraw.Draw(image), PIL.ImageFont.load_default(11)
  for (character, _), (row, column) in zip(characters, places):
    if character.isprintable() and not character.isspace():
      draw.text(((column + 0.5) * width, row * height + 12), character, (0, 0, 0), font, anchor="ms")
  page = np.array(image)
  for row, column in places[-num_output:]:
    _frame(page, column * width, row * height, width, height)
  return _stacked(page, _plot_of_inputs(window, weights_N))


def _characters(window: Window, weights_N: np.ndarray) -> tuple[list[tuple[str, float]], int]:
  """(character, weight) of the inputs and, last, of the output, and how many are the output's; "" is no text.

  The characters of one piece have all of its weight, and a character of several bytes their sum.
  """
  decode = window.task.decode
  result, before, part, weight = [], window.events[:0], [], 0.0
  for index, (event, more) in enumerate(zip(window.events, np.append(weights_N, 0))):
    part, weight = [*part, event], weight + more
    # With the part before, since a piece alone has lost the space that it begins with.
    text = decode(np.append(before, part))[len(decode(before)) :]
    if "\ufffd" in text and len(part) < _LONGEST_CHARACTER and index < len(weights_N):
      continue
    shown = [(character, weight) for character in text] or [("", weight)]
    result += shown
    before, part, weight = np.array(part), [], 0.0
  return result, len(shown)


def _plot_of_inputs(window: Window, weights_N: np.ndarray) -> np.ndarray:
  """Weight over place, the oldest input at the left, the output marked at the right."""
  del window
  return _plot(weights_N)


def _plot(weights_N: np.ndarray) -> np.ndarray:
  count = len(weights_N)
  bars = np.bincount(np.arange(count) * _WIDTH // count, weights_N, minlength=_WIDTH)
  if count < _WIDTH:
    bars = weights_N[np.arange(_WIDTH) * count // _WIDTH]
  heights = np.rint(bars / max(bars.max(), 1e-30) * _PLOT_HEIGHT)
  is_bar = np.arange(_PLOT_HEIGHT)[::-1, None] < heights
  plot = render.colours(np.where(is_bar, 255, 0))
  return np.concatenate([plot, np.full((_PLOT_HEIGHT, 2, 3), _MARK, np.uint8)], axis=1)


PANELS = {"image": _image, "music": _roll, "text": _page}


def _shade(weights: np.ndarray, largest: float | None = None) -> np.ndarray:
  """0..1: the root of each weight's share of the largest."""
  largest = weights.max(initial=0) if largest is None else largest
  return np.sqrt(np.minimum(weights / max(largest, 1e-30), 1))


def _heated(colours: np.ndarray, shade: np.ndarray) -> np.ndarray:
  """The colours [..., 3], the more of them hot the larger the shade [...] is."""
  shade = np.asarray(shade)[..., None]
  return (colours * (1 - shade) + np.array([255, 150, 0]) * shade).astype(np.uint8)


def _frame(pixels: np.ndarray, left: int, top: int, width: int, height: int) -> None:
  """Draws a frame of one pixel into the picture."""
  box = pixels[top : top + height, left : left + width]
  box[[0, -1]] = box[:, [0, -1]] = _MARK


def _stacked(*pictures: np.ndarray) -> np.ndarray:
  """Pictures below one another."""
  width = max(one.shape[1] for one in pictures)
  return np.concatenate([np.pad(one, ((0, 4), (0, width - one.shape[1]), (0, 0))) for one in pictures])


def _titled(title: str, pixels: np.ndarray) -> np.ndarray:
  strip = PIL.Image.new("RGB", (pixels.shape[1], _TITLE_HEIGHT))
  PIL.ImageDraw.Draw(strip).text((3, 2), title, (255, 255, 255), PIL.ImageFont.load_default(12))
  return np.concatenate([np.array(strip), pixels])
