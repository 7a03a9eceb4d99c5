"""--mode=sample and --mode=score: writes samples in common file formats, and the likelihood of given data."""

import contextlib
import dataclasses
import itertools
import json
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath

from perceiver_ar_jax.config import Config, InputError, writing
from perceiver_ar_jax.data import NUM_SPECIAL, codes, midi, render
from perceiver_ar_jax.evaluation import evaluate
from perceiver_ar_jax.parallel import distributed
from perceiver_ar_jax.sampling import prompts
from perceiver_ar_jax.sampling.sampler import Sample, Sampler
from perceiver_ar_jax.training.workdir import write_atomically

_UNSEEN = 128  # gray level of pixels that are not generated yet


def sample(config: Config, workdir: epath.PathLike) -> list[Sample]:
  """Draws samples from the newest checkpoint and writes them to a new folder, WORKDIR/samples/<step>-<number>.

  The folder's samples.json describes them; WORKDIR/samples/samples.json is a copy of the latest call's. Raises
  InputError without a checkpoint, for an invalid prompt or setting, or a folder that cannot be written.
  """
  sampler = Sampler.from_workdir(workdir, config)
  if jax.process_index():
    return sampler()
  folder = _new_folder(epath.Path(workdir) / "samples", sampler.step)  # first: without permission, nothing is computed
  start = time.monotonic()
  try:
    with distributed.progress_bar(unit="token", delay=0.1) as bar:
      for samples in sampler.stream():
        bar.update(sum(sample.num_new for sample in samples) - bar.n)
  except BaseException:
    folder.rmdir()
    raise
  seconds, num_new = time.monotonic() - start, sum(sample.num_new for sample in samples)
  with writing(folder, "free some space, or copy the run"):
    _write_all(folder, samples, sampler, seconds)
  for index, each in enumerate(samples if sampler.task.modality == "text" else ()):
    print(f"--- sample {index}: prompt of {len(each.prompt.events):,} tokens, {each.num_new:,} new\n{each.value}\n")
  drawn = f"{len(samples)} samples of {num_new:,} new tokens in {seconds:.1f} s, compilation included"
  print(f"{drawn} ({num_new / seconds:,.0f} tokens/s): {next(folder.glob('grid.png'), folder)}", flush=True)
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
  for index, each in enumerate(samples):
    write_files(folder, each, f"sample-{index}")
  if (pixels := grid(samples)) is not None:
    render.save_png(pixels, folder / "grid.png")
  names = sorted(path.name for path in folder.iterdir())
  report: dict[str, Any] = {
    "folder": folder.name,
    "step": sampler.step,
    "task": sampler.config.data.task,
    "seed": sampler.config.sample.seed,
    "settings": dataclasses.asdict(sampler.config.sample),
    "seconds": seconds,
    "tokens_per_second": sum(sample.num_new for sample in samples) / seconds,
  }
  # Names of files are relative to the folder of each samples.json.
  for path, prefix in ((folder / "samples.json", ""), (folder.parent / "samples.json", f"{folder.name}/")):
    report["samples"] = [
      {
        "prompt_tokens": len(each.prompt.events),
        "new_tokens": each.num_new,
        "files": [prefix + name for name in names if name.startswith(f"sample-{index}.")],
      }
      for index, each in enumerate(samples)
    ]
    report["files"] = [prefix + name for name in names]
    write_atomically(path, json.dumps(report, indent=2) + "\n")


def write_files(folder: epath.Path, sample: Sample, name: str) -> None:
  """Writes a sample in the formats of its modality, as folder/<name>.*."""
  modality, path = sample.task.modality, folder / name
  if (pixels := picture(sample)) is not None:
    render.save_png(pixels, path.with_suffix(".png"))
  if modality == "text":
    path.with_suffix(".txt").write_bytes(sample.value.encode())
  elif modality in ("music", "rolls"):
    path.with_suffix(".mid").write_bytes(midi.write(sample.value))
  elif modality != "image":
    values = np.asarray(sample.value)  # codes of audio [frames, levels], or values of copies [n]
    if modality == "video":
      height, width = sample.prompt.place(0, sample.prompt.length)[:, 1:].max(axis=0) - 1
      values = codes.to_video(sample.events, height, width)  # [time, height, width]
    with path.with_suffix(".npy").open("wb") as file:
      np.save(file, values)


def picture(sample: Sample, events: np.ndarray | None = None) -> np.ndarray | None:
  """Returns a picture uint8[height, width, 3] of a sample, or of these events of it; None without pictures."""
  events = sample.events if events is None else events
  if sample.task.modality == "image":
    events = np.pad(events, (0, sample.task.length - len(events)), constant_values=_UNSEEN + NUM_SPECIAL)
  return render.picture(sample.task, events)


def grid(samples: list[Sample]) -> np.ndarray | None:
  """Returns a picture of all images, a row for each prompt: the prompt, its samples, the original; None for others."""
  if samples[0].task.modality != "image":
    return None
  if samples[0].prompt.original is None:
    return render.grid([picture(sample) for sample in samples], columns=min(len(samples), 8))
  rows: dict[int, list[Sample]] = {}
  for sample in samples:
    rows.setdefault(id(sample.prompt), []).append(sample)
  cells, longest = [], max(map(len, rows.values()))
  for row in rows.values():
    prompt = row[0].prompt
    cells += [picture(row[0], prompt.events), *map(picture, row), picture(row[0], prompt.original)]
    cells += [np.full_like(cells[0], _UNSEEN)] * (longest - len(row))
  return render.grid(cells, columns=longest + 2)


def preview(sampler: Sampler, params, should_stop: Callable[[], bool]) -> list[str | np.ndarray]:
  """Returns samples of a model in training: pictures, or texts for modalities without pictures."""
  sampler.params = params
  try:
    for samples in sampler.stream():  # noqa: B007, since the newest are used below
      if should_stop():
        break
  finally:
    sampler.params = None  # the next update reuses their memory
  values = ((sample, picture(sample)) for sample in samples)
  return [render.text(sample.task, sample.events) if pixels is None else pixels for sample, pixels in values]


def score(config: Config, workdir: epath.PathLike) -> dict:
  """Prints the likelihood of `sample.prompt` under the newest checkpoint and writes it to WORKDIR/score.json.

  Raises InputError without a checkpoint or a readable prompt, or for a file that cannot be written.
  """
  if config.sample.prompt in (None, prompts.DATA):
    raise InputError("Nothing to score: give --config.sample.prompt=TEXT or @FILE (--mode=eval scores a split).")
  sampler = Sampler.from_workdir(workdir, config)
  prompt = prompts.parse(sampler.task, config.sample.prompt)
  result = sampler.score(prompt) | {"split": "given", "data": config.sample.prompt}
  distributed.log(evaluate.Evaluator.describe(result))  # first: the run may be read-only
  evaluate.Evaluator.write(result, epath.Path(workdir), "score")
  return result
