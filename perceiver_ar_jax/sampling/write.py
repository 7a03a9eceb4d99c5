"""--mode=sample and --mode=score: samples as files that people open, and likelihoods of given data."""

import glob
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from typing import BinaryIO

import jax
import numpy as np
import tqdm
from etils import epath
from jax.sharding import Mesh

from perceiver_ar_jax.config import Config, InputError, writing
from perceiver_ar_jax.data import NUM_SPECIAL, codes, music, render
from perceiver_ar_jax.evaluation import evaluate
from perceiver_ar_jax.sampling import prompts
from perceiver_ar_jax.sampling.sampler import Sample, Sampler

_UNSEEN = 128
"""Grey of what a prompt leaves open in a grid of pictures."""
_SOUND_FONTS = ("/usr/share/sounds/sf2/*.sf2", "/usr/share/soundfonts/*.sf2")


def sample(config: Config, workdir: epath.PathLike, stream: bool = False) -> list[Sample]:
  """Makes samples of the newest checkpoint and writes them to WORKDIR/samples, with samples.json.

  Args:
    config: `sample` says what to make.
    workdir: of the run.
    stream: text only: print each sample as it comes, one after the other.

  Raises:
    InputError: no checkpoint, a prompt or settings that cannot work, or a folder that cannot be written.
  """
  folder = epath.Path(workdir) / "samples"
  sampler = Sampler.from_workdir(workdir, config)
  if stream and sampler.task.modality != "text":
    raise InputError(f"--stream prints text, which the task {sampler.task.name} does not make: leave it out.")
  if jax.process_index() == 0:  # before the work, so that a mistake costs none
    with writing(folder, "free it, or copy the run"):
      folder.mkdir(parents=True, exist_ok=True)
  settings = {"batch_size": 1} if stream else {}
  start = time.monotonic()
  with _Progress(stream) as progress:
    samples = sampler(on_tokens=progress, **settings)
  seconds = time.monotonic() - start
  if jax.process_index() == 0:
    files = write(folder, samples, f"{sampler.step}-{config.sample.seed}")
    report = {
      "step": sampler.step,
      "task": config.data.task,
      "seed": config.sample.seed,
      "settings": json.loads(config.to_json())["sample"],
      "seconds": seconds,
      "tokens_per_second": sum(one.num_new for one in samples) / seconds,
      "samples": [
        {"prompt_tokens": len(one.prompt.events), "new_tokens": one.num_new, "files": names}
        for one, names in zip(samples, files)
      ],
      "files": sorted({name for names in files for name in names} | _grid(folder, samples)),
    }
    (folder / "samples.json").write_text(json.dumps(report, indent=2) + "\n")
    _say(samples, report, folder, stream)
  return samples


def write(folder: epath.Path, samples: list[Sample], name: str) -> list[list[str]]:
  """Writes each sample in the formats of its modality; returns the names of the files of each."""
  return [_write_one(folder, one, f"{name}-{index}") for index, one in enumerate(samples)]


def _write_one(folder: epath.Path, one: Sample, name: str) -> list[str]:
  task, files = one.task, []

  def put(suffix: str, save: Callable[[BinaryIO], object]) -> None:
    with (folder / (name + suffix)).open("wb") as file:
      save(file)
    files.append(name + suffix)

  shown = picture(one)
  if shown is not None:
    put(".png", lambda file: render.save_png(shown, file))
  if task.modality == "text":
    put(".txt", lambda file: file.write(one.value.encode()))
  elif task.modality == "music":
    put(".mid", lambda file: file.write(music.to_midi(one.value)))
    if _synthesise(str(folder / f"{name}.mid"), str(folder / f"{name}.wav")):
      files.append(f"{name}.wav")
  elif task.modality != "image":
    put(".npy", lambda file: np.save(file, _codes(one)))
  return files


def _codes(one: Sample) -> np.ndarray:
  """Codes of audio [frames, levels], of video [time, height, width], values of copies [n]."""
  if one.task.modality == "video":
    height, width = one.prompt.place(0, one.prompt.length)[:, 1:].max(axis=0) - 1
    return codes.to_video(one.events, height, width)
  return np.asarray(one.value)


def picture(one: Sample) -> np.ndarray | None:
  """A picture uint8[height, width, 3] of a sample, what is missing of an image grey; None for what has none."""
  if one.task.modality == "image":
    return _image(one, one.events)
  return render.picture(one.task, one.events, one.prompt.place(0, len(one.events)))


def _image(one: Sample, events: np.ndarray) -> np.ndarray:
  whole = np.full(one.task.length, _UNSEEN + NUM_SPECIAL, np.int32)
  whole[: len(events)] = events
  return render.picture(one.task, whole, one.prompt.place(0, len(whole)))


def grid(samples: list[Sample]) -> np.ndarray | None:
  """Samples of images side by side; completions in a row each prompt: what was given, the samples, the original."""
  if samples[0].task.modality != "image":
    return None
  rows = {}
  for one in samples:
    rows.setdefault(id(one.prompt), []).append(one)
  if samples[0].prompt.original is None:
    pictures = [picture(one) for one in samples]
    return render.grid(pictures, columns=min(len(pictures), 8))
  lines = [
    [_image(row[0], row[0].prompt.events), *map(picture, row), _image(row[0], row[0].prompt.original)]
    for row in rows.values()
  ]
  columns = max(map(len, lines))
  blank = np.full_like(lines[0][0], _UNSEEN)
  return render.grid([one for line in lines for one in line + [blank] * (columns - len(line))], columns=columns)


def _grid(folder: epath.Path, samples: list[Sample]) -> set[str]:
  pixels = grid(samples)
  if pixels is None:
    return set()
  with (folder / "grid.png").open("wb") as file:
    render.save_png(pixels, file)
  return {"grid.png"}


def _synthesise(midi: str, wav: str) -> bool:
  """Plays a MIDI file into a WAV file if a synthesiser is installed; whether it did."""
  fonts = [font for pattern in _SOUND_FONTS for font in sorted(glob.glob(pattern))]
  if shutil.which("fluidsynth") and fonts:
    command = ["fluidsynth", "-ni", "-F", wav, fonts[0], midi]
  elif shutil.which("timidity"):
    command = ["timidity", "-Ow", "-o", wav, midi]
  else:
    return False
  return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True).returncode == 0


class _Progress:
  """A bar over the tokens of all samples, or the text itself as it comes."""

  def __init__(self, stream: bool):
    self._stream, self._bar, self._made, self._before, self._printed = stream, None, 0, 0, ""

  def __enter__(self) -> "_Progress":
    return self

  def __exit__(self, *unused) -> None:
    if self._bar is not None:
      self._bar.close()
    elif self._printed:
      print(flush=True)

  def __call__(self, batch: list[Sample]) -> None:
    made = sum(one.num_new for one in batch)
    if made < self._made:  # the next batch
      self._made = 0
      if self._stream:
        print("\n", flush=True)
        self._printed = ""
    if not self._stream and jax.process_index() == 0:
      if self._bar is None:
        self._bar = tqdm.tqdm(unit="token", dynamic_ncols=True, mininterval=0.5 if sys.stderr.isatty() else 5.0)
      self._bar.update(made - self._made)
    self._made = made
    if self._stream and jax.process_index() == 0:
      text = batch[0].value.removesuffix("\ufffd")  # the rest of a character may be on its way
      if text.startswith(self._printed):
        print(text[len(self._printed) :], end="", flush=True)
        self._printed = text


def _say(samples: list[Sample], report: dict, folder: epath.Path, stream: bool) -> None:
  if samples[0].task.modality == "text" and not stream:
    for index, one in enumerate(samples):
      print(f"--- sample {index}: {len(one.prompt.events):,} tokens given, {one.num_new:,} new\n{one.value}\n")
  print(
    f"{len(samples)} samples of {sum(one.num_new for one in samples):,} new tokens in {report['seconds']:.1f} s,"
    f" compilation included ({report['tokens_per_second']:,.0f} tokens/s): {folder}",
    flush=True,
  )


class Exhibit:
  """Draws a few samples of a model during training: pictures, or texts where the modality has no picture."""

  def __init__(self, config: Config, mesh: Mesh, num_samples: int):
    self._sampler, self._num_samples = Sampler(config, mesh=mesh), num_samples

  def compile(self, params) -> int:
    """Compiles for weights of these shapes; returns the bytes that sampling needs on each device beside them."""
    return self._sampler.bytes_per_device(params, self._num_samples)

  def __call__(self, params, should_stop: Callable[[], bool]) -> list[str | np.ndarray]:
    self._sampler.params = params
    try:
      samples = self._sampler(num_samples=self._num_samples, batch_size=self._num_samples, should_stop=should_stop)
    finally:
      self._sampler.params = None  # the next update reuses their memory
    pictures = [picture(sample) for sample in samples]
    return [
      render.text(sample.task, sample.events) if pixels is None else pixels for sample, pixels in zip(samples, pictures)
    ]


def score(config: Config, workdir: epath.PathLike) -> dict:
  """Prints how likely the newest checkpoint finds `sample.prompt`, then writes WORKDIR/score.json.

  Raises:
    InputError: no checkpoint, nothing to score, nothing that can be read, or a file that cannot be written.
  """
  if config.sample.prompt in (None, prompts.DATA):
    raise InputError(
      "Nothing to score: give a text or a file, --config.sample.prompt=... (--mode=eval scores a split)."
    )
  sampler = Sampler.from_workdir(workdir, config)
  result = sampler.score(config.sample.prompt) | {"split": "given", "data": config.sample.prompt}
  if jax.process_index() == 0:
    path = epath.Path(workdir) / "score.json"
    print(evaluate.Evaluator.describe(result), flush=True)  # first: they are known even if the run is read-only
    with writing(path, "free it, or copy the run"):
      path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"Written to {path}", flush=True)
  return result
