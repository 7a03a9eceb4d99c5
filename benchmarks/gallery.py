"""Draws samples of trained models and shows them on a page: photographs, piano rolls with MIDI files, texts.

  python -m benchmarks.gallery                                                    # of every folder in pretrained/
  python -m benchmarks.gallery runs/maestro_v3_small runs/piano_rolls             # of runs or exported weights
  python -m benchmarks.gallery runs/maestro_v3_small --output=/tmp/gallery --held_out

Writes the folder OUTPUT and the page OUTPUT.md, and keeps the sections of models that are not given again. Samples are
not selected: the page shows every sample of the seed. Pictures and texts continue the first held-out documents. Music
starts from nothing, and from four bars that are written down here, so that files of a data set whose terms forbid it do
not get into the repository; --held_out continues held-out performances instead, for listening at home. With fluidsynth
or timidity installed, music is also rendered as .wav files, which git ignores.
"""

import argparse
import dataclasses
import io
import json
import pathlib
import re

import numpy as np
from absl import logging
from matplotlib.figure import Figure

from perceiver_ar_jax.config import InputError
from perceiver_ar_jax.data import SOS, music, render, rolls
from perceiver_ar_jax.models.architectures import num_params
from perceiver_ar_jax.sampling import write
from perceiver_ar_jax.sampling.sampler import Sample, Sampler

_ROOT = pathlib.Path(__file__).parent.parent
_SECONDS, _EVENTS_PER_SECOND, _EVENTS_PER_FRAME = 30, 50, 6
_NUM_PICTURES, _NUM_PIECES, _NUM_TEXTS = 8, 2, 3
_PRELUDE = ((60, 64, 67, 72, 76), (60, 62, 69, 74, 77), (59, 62, 67, 74, 77), (60, 64, 67, 72, 76))
"""Pitches of the first four bars of Bach's prelude BWV 846."""
_INTRODUCTION = """# Gallery

Samples of small models. They are not selected: each section shows every sample of its seed. The command
`python -m benchmarks.gallery` draws those of the weights in the repository, `python -m benchmarks.gallery WORKDIR...`
those of your own runs. Models of data whose terms forbid sharing it are not in the repository; their music starts from
nothing, or from a few bars that do not belong to the data.

The held-out pictures are crops of two photographs: chelsea.png of scikit-image, by Stéfan van der Walt (CC0), and
china.jpg of scikit-learn, by [danielbuechele](https://www.flickr.com/photos/danielbuechele/6061409035)
([CC BY 2.0](https://creativecommons.org/licenses/by/2.0/)). The originals are cropped and reduced; the
completions are the model's."""


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("folders", nargs="*", type=pathlib.Path, help="runs or exported weights; default: pretrained/*")
  parser.add_argument("--output", type=pathlib.Path, default=_ROOT / "docs" / "gallery", help="folder to write")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--temperature", type=float, default=1.0)
  parser.add_argument("--top_p", type=float, default=0.95, help="draw from the likeliest tokens only")
  parser.add_argument(
    "--held_out", action="store_true", help="continue held-out music, which may not be yours to share"
  )
  arguments = parser.parse_args()
  logging.set_verbosity(logging.ERROR)
  arguments.output.mkdir(parents=True, exist_ok=True)
  stored = arguments.output / "samples.json"
  sections = json.loads(stored.read_text()) if stored.exists() else {}
  settings = {"seed": arguments.seed, "temperature": arguments.temperature, "top_p": arguments.top_p}
  for folder in arguments.folders or sorted((_ROOT / "pretrained").iterdir()):
    section = draw(folder, arguments.output, settings, arguments.held_out)
    if section:
      sections[folder.name] = section
      stored.write_text(json.dumps(sections, indent=1) + "\n")
  page_path = arguments.output.with_suffix(".md")
  page_path.write_text(page(sections, arguments.output.name))
  print(f"Written to {page_path}")


def draw(folder: pathlib.Path, output: pathlib.Path, settings: dict, held_out: bool) -> dict | None:
  """Draws samples of one model, writes their files to `output` and returns the section; None if it has none to show."""
  try:
    sampler = Sampler.from_workdir(folder)
    sections = {"image": _photographs, "music": _music, "rolls": _music, "text": _texts}
    if sampler.task.modality not in sections:
      print(f"{folder}: skipped, since samples of the task {sampler.task.name} are numbers")
      return None
    print(f"{folder}: drawing samples", flush=True)
    items = sections[sampler.task.modality](sampler, output, folder.name, settings, held_out)
  except InputError as error:
    print(f"{folder}: skipped. {error}")
    return None
  size = f"{num_params(sampler.config.model) / 1e6:.2f}M parameters after {sampler.step:,} steps"
  values = ", ".join(f"{name} {value:g}" for name, value in settings.items())
  files = sampler.config.data.files
  data = f" ({pathlib.Path(files).name})" if files else ""
  return {"about": f"Task {sampler.task.name}{data}, {size}; {values}.", "items": items}


def page(sections: dict, folder: str) -> str:
  """Returns the page of all sections, whose files are in `folder` beside it."""
  blocks = [_INTRODUCTION]
  for name, section in sections.items():
    blocks += [f"## {name}", section["about"]]
    for item in section["items"]:
      blocks.append(item["caption"] + (f" ([MIDI]({folder}/{item['midi']}))" if "midi" in item else ""))
      blocks += [f"![{name}]({folder}/{item['picture']})"] if "picture" in item else []
      blocks += ["\n".join(f"    {line}".rstrip() for line in item["text"].splitlines())] if "text" in item else []
  return "\n\n".join(blocks) + "\n"


def _photographs(sampler: Sampler, output: pathlib.Path, name: str, settings: dict, held_out: bool) -> list[dict]:
  samples = sampler("data", num_samples=_NUM_PICTURES, batch_size=_NUM_PICTURES, **settings)
  rows = [(sample.prompt.events, sample.events, sample.prompt.original) for sample in samples]
  cells = [write.picture(sample, events) for row in zip(*rows) for sample, events in zip(samples, row)]
  render.save_png(render.grid(cells, columns=_NUM_PICTURES), output / f"{name}.png")
  caption = f"The first {_NUM_PICTURES} held-out pictures: the given halves, their completions, the originals."
  return [{"caption": caption, "picture": f"{name}.png"}]


def _music(sampler: Sampler, output: pathlib.Path, name: str, settings: dict, held_out: bool) -> list[dict]:
  is_rolls = sampler.task.modality == "rolls"
  beginnings = {"": (None, "From nothing")}
  if held_out:
    beginnings["-held-out"] = ("data", "A held-out piece, continued where the background becomes white")
  elif not is_rolls:
    text = "Bach's prelude BWV 846, four bars, continued where the background becomes white"
    beginnings["-prelude"] = (prelude(), text)
  items = []
  for suffix, (prompt, caption) in beginnings.items():
    length = _SECONDS * (4 * _EVENTS_PER_FRAME if is_rolls else _EVENTS_PER_SECOND)
    counts = {"num_samples": _NUM_PIECES, "batch_size": _NUM_PIECES, "length": length, "prompt_tokens": length // 3}
    drawn = sampler(prompt, **counts, **settings)
    for index, sample in enumerate(drawn):
      sample, start = first_seconds(sample)
      file_name = f"{name}{suffix}-{index}"
      write.write_files(output, sample, file_name)  # MIDI, and .wav where it can be rendered
      (output / f"{file_name}.png").write_bytes(piano_roll(sample.value, start))
      number = f"{index + 1} of {_NUM_PIECES}"
      items.append({"caption": f"{caption}, {number}.", "picture": f"{file_name}.png", "midi": f"{file_name}.mid"})
  return items


def _texts(sampler: Sampler, output: pathlib.Path, name: str, settings: dict, held_out: bool) -> list[dict]:
  drawn = sampler("data", num_samples=_NUM_TEXTS, batch_size=_NUM_TEXTS, prompt_tokens=120, length=500, **settings)
  continuations: dict[str, list[str]] = {}
  for sample in drawn:
    given = sample.task.decode(sample.prompt.events)
    continuations.setdefault(given, []).append(_printable(sample.value[len(given) :]))
  items = []
  for given, texts in continuations.items():
    items.append({"caption": f"A held-out document, its first {len(given)} characters:", "text": given})
    items += [{"caption": "continued:", "text": text} for text in texts]
  return items


def _printable(text: str) -> str:
  return re.sub(r"[^\n -~\u00a0-\uffff]", "\ufffd", text)


def prelude() -> np.ndarray:
  """Returns the events of the first four bars of Bach's prelude BWV 846, ten seconds."""
  notes, sixteenth = [], 0.16
  for half_bar, chord in enumerate(chord for chord in _PRELUDE for _ in range(2)):
    for index, pitch in enumerate((*chord, *chord[2:])):
      end = 8 if index < 2 else index + 1  # the two lowest notes are held
      notes.append(music.Note(pitch, 64, sixteenth * (8 * half_bar + index), sixteenth * (8 * half_bar + end)))
  return np.concatenate([[SOS], music.encode(notes)]).astype(np.int32)


def first_seconds(sample: Sample) -> tuple[Sample, float]:
  """Returns a sample of music cut 30 seconds after its prompt, and the time in seconds at which the prompt ends."""
  if sample.task.modality == "rolls":
    seconds = np.cumsum(sample.events == rolls.VOCAB_SIZE - 1) / 4
  else:
    seconds = music.steps(sample.events) / music.STEPS_PER_SECOND
  start = float(seconds[len(sample.prompt.events) - 1])
  end = int(np.searchsorted(seconds, start + _SECONDS, side="right"))
  return dataclasses.replace(sample, events=sample.events[:end]), start


def piano_roll(notes: list[music.Note], start: float) -> bytes:
  """Returns a PNG of notes over seconds, darker for louder ones, on a gray background before `start`."""
  figure = Figure(figsize=(9, 2), layout="constrained")
  axes = figure.subplots()
  axes.axvspan(0, start, color="0.85")
  pitches, velocities, onsets, offsets = np.array(notes, float).reshape(-1, 4).T
  axes.hlines(
    pitches, onsets, offsets, colors=[str(0.7 * (1 - velocity / 127)) for velocity in velocities], linewidth=2
  )
  axes.set(xlabel="seconds", ylabel="pitch", xlim=(0, start + _SECONDS))
  file = io.BytesIO()
  figure.savefig(file, format="png", dpi=80)
  return file.getvalue()


if __name__ == "__main__":
  main()
