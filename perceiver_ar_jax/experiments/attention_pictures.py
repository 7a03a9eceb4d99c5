"""--mode=attention: which inputs a cross-attention attends to, for chosen outputs of one document.

An output is shown in the window in which it is the last to be scored, with the latents of evaluation. The picture is
the image, the piano roll or the text, colored by the mean weight over heads, above a plot of all weights; for other
data only the plot. The weights of all heads are in the .npz file.
"""

import functools
import json
import math
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Rectangle

from perceiver_ar_jax.config import Config, require, writing
from perceiver_ar_jax.data import NUM_SPECIAL, music, splits, windows
from perceiver_ar_jax.data.documents import Document
from perceiver_ar_jax.data.loader import to_global
from perceiver_ar_jax.data.registry import Task
from perceiver_ar_jax.data.tasks import get_tasks
from perceiver_ar_jax.evaluation import evaluate
from perceiver_ar_jax.models.architectures import architecture_of
from perceiver_ar_jax.models.perceiver_ar import attention_map
from perceiver_ar_jax.parallel import sharding
from perceiver_ar_jax.sampling import prompts

_DEFAULT_OUTPUTS = 4
_COLORS = LinearSegmentedColormap.from_list("attention", ["0.9", "#ff7800"])
_ROWS, _COLUMNS = 30, 100
_MAX_BYTES_PER_CHARACTER = 4


def write(config: Config, workdir: epath.PathLike) -> dict:
  """Writes WORKDIR/attention: a picture and the weights of each output, and attention.json, whose content it returns.

  `config.sample.prompt` chooses the document, `config.attention_map` outputs and cross-attention. Raises InputError if
  the run has no checkpoint or its model no cross-attention, a prompt cannot be read, an output is outside of it, or the
  folder cannot be written.
  """
  is_supported, name = architecture_of(config.model).has_cross_attention, config.model.architecture
  require(is_supported, f"--mode=attention is not supported with model.architecture={name}.")
  mesh, step, params = evaluate.restore(config, workdir)
  settings, num_latents = config.attention_map, config.eval.num_latents or config.model.num_latents
  task, document = _document(config)
  outputs = _outputs(settings.outputs, len(document) - 1)
  folder = epath.Path(workdir) / "attention"
  with writing(folder, "make it writable, or copy the run"):
    folder.mkdir(parents=True, exist_ok=True)
  entries = []
  for output, weights_HxL in zip(outputs, compute(config, mesh, params, document, outputs)):
    start, end = max(output - config.model.max_context, 0), output + 1
    window = Window(task, document.read(start, end), document.positions(start, end), start)
    files = [f"{step}-{output}.png", f"{step}-{output}.npz"]
    entry = {"output": output, **_statistics(window, weights_HxL, num_latents), "files": files}
    entries.append(entry)
    if jax.process_index() == 0:
      _save(folder, files, window, weights_HxL)
      share = f"{entry['share_before_latents']:.1%} before the latents: {folder / files[0]}"
      print(f"output {output:,}: entropy {entry['entropy_nats']:.2f} nats over {entry['inputs']:,} inputs, {share}")
  report = {"step": step, "task": task.name, "prompt": config.sample.prompt, "events": len(document)}
  report |= {"cross_attend": settings.cross_attend, "num_latents": num_latents, "outputs": entries}
  if jax.process_index() == 0:
    (folder / "attention.json").write_text(json.dumps(report, indent=2) + "\n")
  return report


def compute(config: Config, mesh: Mesh, params, document: Document, outputs: Sequence[int]) -> list[np.ndarray]:
  """Returns float32 weights_HxL of each output: how much each head attends to each slot of its window, 0 on padding.

  `outputs` are indices of the document's events, in 1..N - 1.
  """
  num_latents, batch_size = config.eval.num_latents or config.model.num_latents, mesh.shape["data"] * mesh.shape["fsdp"]
  dims = document.positions(0, 1).shape[1]
  empty_batch = functools.partial(windows.empty_batch, batch_size, config.model, dims, latents=num_latents)
  layout = sharding.batch_shardings(mesh, {name: array.shape for name, array in empty_batch().items()})
  chosen = {"num_latents": num_latents, "cross_attention": config.attention_map.cross_attend}
  weights_of = functools.partial(attention_map, config.model, **chosen)
  run = jax.jit(weights_of, out_shardings=NamedSharding(mesh, PartitionSpec()))
  result = []
  with jax.set_mesh(mesh):
    for first in range(0, len(outputs), batch_size):
      batch, batch_outputs = empty_batch(), outputs[first : first + batch_size]
      for index, output in enumerate(batch_outputs):
        windows.eval_window(windows.row_of(batch, index), document, output + 1, 1)
      arrays = to_global(batch, batch_size, layout)
      result += list(np.asarray(run(params, arrays["inputs"], arrays.get("positions")))[: len(batch_outputs)])
  return result


def _document(config: Config) -> tuple[Task, Document]:
  prompt = config.sample.prompt
  if prompt in (None, prompts.DATA):
    return next(splits.documents(config, config.eval.split, 1))
  task, _ = get_tasks(config.data, config.model.max_context + 1)[0]
  document = prompts.read(task, prompts.parse(task, prompt))[0]
  require(document.has_targets(), f"sample.prompt={prompt!r} contains nothing to predict: give a longer one.")
  return task, document


def _outputs(chosen: tuple[int, ...], count: int) -> list[int]:
  """Returns the chosen outputs, or by default a few of all `count`."""
  largest, fix = max(chosen, default=0), f"choose from 1..{count}"
  require(largest <= count, f"attention_map.outputs contains {largest}, and the document has {count:,} outputs: {fix}.")
  parts = min(_DEFAULT_OUTPUTS, count)
  return list(dict.fromkeys(chosen)) or [count * part // parts for part in range(1, parts + 1)]


class Window(NamedTuple):
  """The n inputs that an output is predicted from, followed by the output; `start` is the first one's index."""

  task: Task
  events: np.ndarray  # int32[n + 1]
  positions: np.ndarray  # int32[n + 1, P]
  start: int


def _statistics(window: Window, weights_HxL: np.ndarray, num_latents: int) -> dict:
  mean_L = weights_HxL.mean(axis=0, dtype=np.float64)
  positive = mean_L[mean_L > 0]
  return {
    "event": int(window.events[-1]),
    "inputs": len(window.events) - 1,
    "first_input": window.start,
    "entropy_nats": float(-(positive * np.log(positive)).sum()),
    "share_before_latents": float(mean_L[: len(mean_L) - num_latents].sum()),
  }


def _save(folder: epath.Path, names: Sequence[str], window: Window, weights_HxL: np.ndarray) -> None:
  inputs = len(window.events) - 1
  padding = weights_HxL.shape[1] - inputs
  with (folder / names[0]).open("wb") as file, warnings.catch_warnings():
    warnings.simplefilter("ignore")  # characters that the font does not have are drawn as boxes
    picture(window, weights_HxL[:, padding:]).savefig(file, format="png", dpi=100)
  places_L = np.pad(np.arange(window.start, window.start + inputs), (padding, 0), constant_values=-1)
  arrays = {"tokens_L": np.pad(window.events[:-1], (padding, 0)), "places_L": places_L, "weights_HxL": weights_HxL}
  with (folder / names[1]).open("wb") as file:
    np.savez(file, positions_LxP=np.pad(window.positions[:-1], ((padding, 0), (0, 0))), **arrays)


def picture(window: Window, weights_HxN: np.ndarray) -> Figure:
  """Returns a picture of the window, colored by the mean over heads of the weights, above a plot of all weights."""
  weights_N = weights_HxN.mean(axis=0)
  figure = bottom = Figure(figsize=(11, 8), layout="constrained")
  draw = {"image": _draw_image, "music": _draw_roll, "text": _draw_text}.get(window.task.modality)
  if draw:
    top, bottom = figure.subfigures(2, 1, height_ratios=(5, 1))
    draw(top, window, weights_N)
  axes = bottom.subplots()
  axes.vlines(window.start + np.arange(len(weights_N)), 0, weights_N)
  axes.axvline(window.start + len(weights_N), color="red")
  axes.set(xlabel="event (red: the output)", ylabel="mean weight")
  return figure


def _draw_image(figure: SubFigure, window: Window, weights_N: np.ndarray) -> None:
  """Draws the known part of the image and, beside it, the weight of each pixel; frames the output."""
  size = math.isqrt((window.task.length - 1) // 3)
  is_color_N = window.events[:-1] >= NUM_SPECIAL
  x_N, y_N, channel_N = (window.positions[:-1][is_color_N] - 2).T
  pixels_SxSxC = np.full((size, size, 3), 40, np.uint8)  # dark gray: not known yet
  pixels_SxSxC[y_N, x_N, channel_N] = np.clip(window.events[:-1][is_color_N] - NUM_SPECIAL, 0, 255)
  weights_SxS = np.zeros((size, size))
  np.add.at(weights_SxS, (y_N, x_N), weights_N[is_color_N])
  x, y, _ = window.positions[-1] - 2
  inputs, attention = figure.subplots(1, 2)
  inputs.imshow(pixels_SxSxC)
  attention.imshow(weights_SxS, **_scale(weights_SxS))
  for axes in (inputs, attention):
    axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, edgecolor="red"))
    axes.set_axis_off()


def _draw_roll(figure: SubFigure, window: Window, weights_N: np.ndarray) -> None:
  """Draws the piano roll, notes colored by the weights of their begin and end; marks the output."""
  seconds_N = music.steps(window.events[:-1]) / 100
  padded_N, ends_N = np.append(weights_N, 0), np.append(seconds_N, seconds_N[-1])  # event N ends the notes still on
  notes = music.notes_of_events(window.events[:-1])
  notes.sort(key=lambda note: padded_N[note[1]] + padded_N[note[2]])  # the largest weights on top
  pitches, ons, offs = np.array(notes, int).reshape(-1, 3).T
  weights = padded_N[ons] + padded_N[offs]
  axes = figure.subplots()
  axes.hlines(pitches, seconds_N[ons], ends_N[offs], array=weights, linewidth=3, **_scale(weights))
  (pitch,) = music.pitches(window.events[-1:])
  if pitch >= 0:
    axes.plot(seconds_N[-1:], [pitch], "r<")
  else:
    axes.axvline(seconds_N[-1], color="red")
  axes.set(xlabel="seconds", ylabel="pitch")


def _draw_text(figure: SubFigure, window: Window, weights_N: np.ndarray) -> None:
  """Draws the last rows of characters, colored by their weights; frames the output."""
  characters, num_output = _characters(window, weights_N)
  row, column, cells = 0, 0, []
  for character, weight in characters[-_ROWS * _COLUMNS :]:
    cells.append((row, column, character, weight))
    column += 1
    if column == _COLUMNS or character == "\n":
      row, column = row + 1, 0
  first = max(cells[-1][0] - _ROWS + 1, 0)
  weights_RxC = np.zeros((_ROWS, _COLUMNS))
  axes = figure.subplots()
  for row, column, character, weight in cells:
    if row >= first:
      weights_RxC[row - first, column] = weight
      if character.isprintable() and character.strip():
        font = {"family": "monospace", "size": 9, "parse_math": False}
        axes.text(column, row - first, character, ha="center", va="center", **font)
  axes.imshow(weights_RxC, aspect="auto", **_scale(weights_RxC))
  for row, column, *_ in cells[-num_output:]:
    axes.add_patch(Rectangle((column - 0.5, row - first - 0.5), 1, 1, fill=False, edgecolor="red"))
  axes.set_axis_off()


def _scale(weights: np.ndarray) -> dict:
  """Returns the color scale of some weights: intensity is the square root of weight / largest weight."""
  return {"cmap": _COLORS, "norm": PowerNorm(0.5, vmin=0, vmax=max(weights.max(initial=0), 1e-30))}


def _characters(window: Window, weights_N: np.ndarray) -> tuple[list[tuple[str, float]], int]:
  """Returns (character, weight) of the inputs and then the output, and how many are the output's; "" is not text.

  Each character of a subword token has the token's weight; a character of several bytes has the sum of their weights.
  """
  decode = window.task.decode
  result, previous, token, weight = [], window.events[:0], [], 0.0
  for index, (event, event_weight) in enumerate(zip(window.events, np.append(weights_N, 0))):
    token, weight = [*token, event], weight + event_weight
    # Decoded after the previous token, since a subword token alone loses its leading space.
    text = decode(np.append(previous, token))[len(decode(previous)) :]
    if "\ufffd" in text and len(token) < _MAX_BYTES_PER_CHARACTER and index < len(weights_N):
      continue
    characters = [(character, weight) for character in text] or [("", weight)]
    result += characters
    previous, token, weight = np.array(token), [], 0.0
  return result, len(characters)
