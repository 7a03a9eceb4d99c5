"""--mode=sample and --mode=score: writes samples in common file formats, and the likelihood of given data."""

import contextlib
import glob
import itertools
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
"""Grey level of pixels that are not generated yet."""
_SOUND_FONTS = ("/usr/share/sounds/sf2/*.sf2", "/usr/share/soundfonts/*.sf2")


def sample(config: Config, workdir: epath.PathLike, stream: bool = False) -> list[Sample]:
  """Draws samples from the newest checkpoint and writes them to a new folder, WORKDIR/samples/<step>-<number>.

  The folder's samples.json describes them; WORKDIR/samples/samples.json is a copy of the latest call's.

  Args:
    config: `sample` has the settings.
    workdir: of the run.
    stream: for tasks of text: draw one sample at a time and print its text as it grows.

  Raises:
    InputError: no checkpoint, an invalid prompt or setting, or a folder that cannot be written.
  """
  sampler = Sampler.from_workdir(workdir, config)
  if stream and sampler.task.modality != "text":
    raise InputError(f"--stream prints text, which the task {sampler.task.name} does not generate: leave it out.")
  folder = None
  if jax.process_index() == 0:  # first: without write permission, nothing is computed
    folder = _new_folder(epath.Path(workdir) / "samples", sampler.step)
  settings = {"batch_size": 1} if stream else {}
  start = time.monotonic()
  try:
    with _SampleProgress(stream) as progress:
      samples = sampler(on_tokens=progress, **settings)
  except BaseException:
    if folder is not None:
      folder.rmdir()
    raise
  seconds = time.monotonic() - start
  if folder is not None:
    with writing(folder, "free some space, or copy the run"):
      _write_all(folder, samples, sampler, seconds)
    _print(samples, seconds, folder, stream)
  return samples


def _new_folder(parent: epath.Path, step: int) -> epath.Path:
  """Creates parent/<step>-<number> with the first free number; concurrent calls get different folders."""
  with writing(parent, "give it write permission, or copy the run"):
    parent.mkdir(parents=True, exist_ok=True)
    for number in itertools.count():
      folder = parent / f"{step}-{number}"
      with contextlib.suppress(FileExistsError):
        folder.mkdir()
        return folder


def _write_all(folder: epath.Path, samples: list[Sample], sampler: Sampler, seconds: float) -> None:
  files = write_files(folder, samples, "sample")
  shared_files = []
  if (pixels := grid(samples)) is not None:
    _write_png(folder / "grid.png", pixels)
    shared_files = ["grid.png"]
  report = {
    "folder": folder.name,
    "step": sampler.step,
    "task": sampler.config.data.task,
    "seed": sampler.config.sample.seed,
    "settings": json.loads(sampler.config.to_json())["sample"],
    "seconds": seconds,
    "tokens_per_second": sum(sample.num_new for sample in samples) / seconds,
  }
  # Names of files are relative to the folder of each samples.json.
  for path, prefix in ((folder / "samples.json", ""), (folder.parent / "samples.json", f"{folder.name}/")):
    report["samples"] = [
      {
        "prompt_tokens": len(sample.prompt.events),
        "new_tokens": sample.num_new,
        "files": [prefix + name for name in names],
      }
      for sample, names in zip(samples, files)
    ]
    report["files"] = sorted(prefix + name for name in {*shared_files, *itertools.chain(*files)})
    temporary = folder / "samples.tmp"
    temporary.write_text(json.dumps(report, indent=2) + "\n")
    temporary.replace(path)


def write_files(folder: epath.Path, samples: list[Sample], name: str) -> list[list[str]]:
  """Writes each sample in the formats of its modality, as <name>-<index>.*; returns the file names of each."""
  return [_write_sample(folder, sample, f"{name}-{index}") for index, sample in enumerate(samples)]


def _write_sample(folder: epath.Path, sample: Sample, name: str) -> list[str]:
  task, files = sample.task, []

  def save(suffix: str, write_to: Callable[[BinaryIO], object]) -> None:
    with (folder / (name + suffix)).open("wb") as file:
      write_to(file)
    files.append(name + suffix)

  if (pixels := picture(sample)) is not None:
    save(".png", lambda file: render.save_png(pixels, file))
  if task.modality == "text":
    save(".txt", lambda file: file.write(sample.value.encode()))
  elif task.modality == "music":
    save(".mid", lambda file: file.write(music.to_midi(sample.value)))
    if _synthesise(str(folder / f"{name}.mid"), str(folder / f"{name}.wav")):
      files.append(f"{name}.wav")
  elif task.modality != "image":
    save(".npy", lambda file: np.save(file, _codes(sample)))
  return files


def _codes(sample: Sample) -> np.ndarray:
  """Returns codes of audio [frames, levels] or of video [time, height, width], or values of copies [n]."""
  if sample.task.modality == "video":
    height, width = sample.prompt.place(0, sample.prompt.length)[:, 1:].max(axis=0) - 1
    return codes.to_video(sample.events, height, width)
  return np.asarray(sample.value)


def picture(sample: Sample) -> np.ndarray | None:
  """Returns a picture uint8[height, width, 3] of a sample, or None for modalities without pictures.

  Pixels that are not generated yet are grey.
  """
  if sample.task.modality == "image":
    return _image(sample, sample.events)
  return render.picture(sample.task, sample.events)


def _image(sample: Sample, events: np.ndarray) -> np.ndarray:
  whole = np.full(sample.task.length, _UNSEEN + NUM_SPECIAL, np.int32)
  whole[: len(events)] = events
  return render.picture(sample.task, whole)


def grid(samples: list[Sample]) -> np.ndarray | None:
  """Returns one picture of all sampled images, or None for other modalities.

  Each prompt has a row: the prompt, its samples, the original.
  """
  if samples[0].task.modality != "image":
    return None
  by_prompt = {}
  for sample in samples:
    by_prompt.setdefault(id(sample.prompt), []).append(sample)
  if samples[0].prompt.original is None:
    pictures = [picture(sample) for sample in samples]
    return render.grid(pictures, columns=min(len(pictures), 8))
  rows = [
    [_image(row[0], row[0].prompt.events), *map(picture, row), _image(row[0], row[0].prompt.original)]
    for row in by_prompt.values()
  ]
  columns = max(map(len, rows))
  blank = np.full_like(rows[0][0], _UNSEEN)
  return render.grid([cell for row in rows for cell in row + [blank] * (columns - len(row))], columns=columns)


def _write_png(path: epath.Path, pixels: np.ndarray) -> None:
  with path.open("wb") as file:
    render.save_png(pixels, file)


def _synthesise(midi: str, wav: str) -> bool:
  """Renders a MIDI file as a WAV file if a synthesiser is installed; returns whether that succeeded."""
  fonts = [font for pattern in _SOUND_FONTS for font in sorted(glob.glob(pattern))]
  if shutil.which("fluidsynth") and fonts:
    command = ["fluidsynth", "-ni", "-F", wav, fonts[0], midi]
  elif shutil.which("timidity"):
    command = ["timidity", "-Ow", "-o", wav, midi]
  else:
    return False
  return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True).returncode == 0


class _SampleProgress:
  """A progress bar over the tokens of all samples, or the text itself as it grows."""

  def __init__(self, stream: bool):
    self._stream, self._bar, self._num_new, self._printed = stream, None, 0, ""

  def __enter__(self) -> "_SampleProgress":
    return self

  def __exit__(self, *unused) -> None:
    if self._bar is not None:
      self._bar.close()
    elif self._printed:
      print(flush=True)

  def __call__(self, batch: list[Sample]) -> None:
    num_new = sum(sample.num_new for sample in batch)
    if num_new < self._num_new:  # another batch started
      self._num_new = 0
      if self._stream:
        print("\n", flush=True)
        self._printed = ""
    if not self._stream and jax.process_index() == 0:
      if self._bar is None:
        self._bar = tqdm.tqdm(unit="token", dynamic_ncols=True, mininterval=0.5 if sys.stderr.isatty() else 5.0)
      self._bar.update(num_new - self._num_new)
    self._num_new = num_new
    if self._stream and jax.process_index() == 0:
      text = batch[0].value.removesuffix("\ufffd")  # the next block may complete the last character
      if text.startswith(self._printed):
        print(text[len(self._printed) :], end="", flush=True)
        self._printed = text


def _print(samples: list[Sample], seconds: float, folder: epath.Path, stream: bool) -> None:
  if samples[0].task.modality == "text" and not stream:
    for index, sample in enumerate(samples):
      print(
        f"--- sample {index}: prompt of {len(sample.prompt.events):,} tokens, {sample.num_new:,} new\n{sample.value}\n"
      )
  num_new = sum(sample.num_new for sample in samples)
  print(
    f"{len(samples)} samples of {num_new:,} new tokens in {seconds:.1f} s, compilation included"
    f" ({num_new / seconds:,.0f} tokens/s): {folder}",
    flush=True,
  )


class PreviewSampler:
  """Draws a few samples of a model during training: pictures, or texts for modalities without pictures."""

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
  """Prints the likelihood of `sample.prompt` under the newest checkpoint and writes it to WORKDIR/score.json.

  Raises:
    InputError: no checkpoint, no readable prompt, or a file that cannot be written.
  """
  if config.sample.prompt in (None, prompts.DATA):
    raise InputError(
      "Nothing to score: give a text or a file, --config.sample.prompt=TEXT or @FILE (--mode=eval scores a split)."
    )
  sampler = Sampler.from_workdir(workdir, config)
  prompt = prompts.parse(sampler.task, config.sample.prompt)
  result = sampler.score(prompt) | {"split": "given", "data": config.sample.prompt}
  if jax.process_index() == 0:
    path = epath.Path(workdir) / "score.json"
    print(evaluate.Evaluator.describe(result), flush=True)  # first: the run may be read-only
    with writing(path, "free it, or copy the run"):
      path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"Written to {path}", flush=True)
  return result
