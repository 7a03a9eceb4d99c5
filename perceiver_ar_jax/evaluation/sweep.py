"""Compute chosen at evaluation: scores one checkpoint with other latents, strides, contexts and layers than it had.

  python -m perceiver_ar_jax.evaluation.sweep --config=configs/text_files.py --workdir=DIR \
    --num_latents=64,128,256,512 --stride=64 --context=2048 --layers=4

Every combination is scored (paper, section 5: more latents or layers at evaluation than needed cost compute and buy
likelihood). What is left out is as the config has it; a layer count keeps the first layers; a stride is lowered to the
latents where it exceeds them. Other settings, such as --config.eval.max_sequences=20, are flags as for main.py. It
writes sweep-<split>-<step>.json, .csv and .png to the workdir: the task's unit against FLOPs and against seconds a
token, both for scoring alone.
"""

import csv
import dataclasses
import itertools
import json
import operator
import time
from collections.abc import Mapping

import jax
from absl import flags
from etils import epath

from perceiver_ar_jax import command_line
from perceiver_ar_jax.config import Config, InputError, ModelConfig
from perceiver_ar_jax.data import records
from perceiver_ar_jax.evaluation import evaluate, plots
from perceiver_ar_jax.models.perceiver_ar import group_depths
from perceiver_ar_jax.parallel import distributed, flops

_AXES = ("num_latents", "stride", "context", "layers")


def main(config: Config) -> int:
  distributed.cache_compiled(config.compilation_cache)
  values = {name: _numbers(name, flags.FLAGS[name].value) for name in _AXES if flags.FLAGS[name].value}
  sweep(config, epath.Path(command_line.WORKDIR.value), values)
  return 0


def _numbers(name: str, words: list[str]) -> list[int]:
  if not all(word.strip().isdigit() and int(word) for word in words):
    raise InputError(f"--{name}={','.join(words)} must be whole numbers of at least 1 with commas between.")
  return [int(word) for word in words]


def sweep(config: Config, workdir: epath.Path, values: Mapping[str, list[int]]) -> list[dict]:
  """Scores every combination of `values` (names of _AXES -> numbers) and writes the tables; returns their rows.

  Raises:
    InputError: no checkpoint; or a value that the model or the data has no room for.
  """
  own = {
    "num_latents": config.eval.num_latents or config.model.num_latents,
    "stride": config.eval.stride or config.eval.num_latents or config.model.num_latents,
    "context": config.model.max_context,
    "layers": config.model.num_layers,
  }
  points = [dict(zip(_AXES, point)) for point in itertools.product(*(values.get(name, [own[name]]) for name in _AXES))]
  points = [point | {"stride": min(point["stride"], point["num_latents"])} for point in points]
  points = list({tuple(point.items()): point for point in points}.values())
  configs = [_at(config, point) for point in points]  # all of them first: a mistake is told before anything is scored
  mesh, step, params = evaluate.restore(config, workdir)
  rows = []
  for point, changed in zip(points, configs):
    rows.append(point | _score(changed, mesh, first_layers(changed.model, params), step))
    unit = rows[-1]["unit"]
    print(
      ", ".join(f"{name} {point[name]:,}" for name in _AXES)
      + f": {rows[-1][unit]:.4f} {unit}, {rows[-1]['flops_per_token']:.3g} FLOPs and"
      f" {rows[-1]['seconds_per_token']:.2g} s a token",
      flush=True,
    )
  if jax.process_index() == 0:
    _write(rows, workdir, f"sweep-{config.eval.split}-{step}", own)
  return rows


def _at(config: Config, point: Mapping[str, int]) -> Config:
  """The config that scores one point."""
  old = config.model
  if point["layers"] > old.num_layers:
    raise InputError(f"--layers={point['layers']} exceeds the {old.num_layers} layers that the model has.")
  if old.architecture != "perceiver_ar" and point["layers"] != old.num_layers:
    raise InputError(f"--layers={point['layers']}: a {old.architecture} is scored with all its layers only.")
  if point["num_latents"] > point["context"]:
    raise InputError(
      f"--num_latents={point['num_latents']} exceeds a context of {point['context']}, whose last inputs they are: lower"
      " it, or raise --context."
    )
  model = dataclasses.replace(
    old,
    max_context=point["context"],
    num_latents=point["num_latents"],
    num_layers=point["layers"],
    cross_attend_after=tuple(layer for layer in old.cross_attend_after if layer < point["layers"]),
    rotary_max_wavelength=old.rotary_max_wavelength or old.max_context,  # a part of what was trained
  )
  sample = dataclasses.replace(config.sample, kept_latents=None)
  evaluation = dataclasses.replace(config.eval, num_latents=point["num_latents"], stride=point["stride"])
  return dataclasses.replace(config, model=model, eval=evaluation, sample=sample)


def first_layers(model: ModelConfig, params: Mapping) -> dict:
  """The weights of a model cut down to the layers and cross-attends that `model` still has."""
  if model.architecture != "perceiver_ar":
    return dict(params)
  lengths = group_depths(model)
  result = {name: value for name, value in params.items() if not name.startswith(("layers_", "cross_attend_"))}
  for run, length in enumerate(lengths):
    result[f"cross_attend_{run}"] = params[f"cross_attend_{run}"]
    if length:
      first = operator.itemgetter(slice(length))
      result[f"layers_{run}"] = jax.tree.map(first, params[f"layers_{run}"])
  return result


def _score(config: Config, mesh, params, step: int) -> dict:
  """The figures of one point, and what they cost."""
  evaluator = evaluate.Evaluator(config, mesh)
  evaluator(params, step, documents=itertools.islice(records.documents(config, config.eval.split, 1), 1))  # compiles
  start = time.monotonic()
  result = evaluator(params, step)
  seconds = time.monotonic() - start
  result = {name: value for name, value in result.items() if not name.startswith("by_")}
  window_flops = flops.eval_step(config).useful / config.eval.batch_size
  return result | {
    "flops_per_token": window_flops * result["num_windows"] / result["num_tokens"],
    "seconds": seconds,
    "seconds_per_token": seconds / result["num_tokens"],
  }


def _write(rows: list[dict], workdir: epath.Path, name: str, own: Mapping[str, int]) -> None:
  unit = rows[0]["unit"]
  (workdir / f"{name}.json").write_text(json.dumps(rows, indent=2) + "\n")
  columns = [*_AXES, unit, "nats_per_token", "accuracy", "num_tokens", "num_windows"]
  columns += ["flops_per_token", "seconds", "seconds_per_token"]
  with (workdir / f"{name}.csv").open("w") as file:
    writer = csv.DictWriter(file, list(dict.fromkeys(columns)), extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
  varied = [axis for axis in _AXES if len({row[axis] for row in rows}) > 1] or list(_AXES[:1])
  # The axis with the most values runs along a curve; each combination of the others is a curve.
  along = max(varied, key=lambda axis: len({row[axis] for row in rows}))
  curves = {}
  for row in rows:
    label = ", ".join(f"{axis} {row[axis]}" for axis in varied if axis != along)
    curves.setdefault(label, []).append(row)
  panels = {"flops_per_token": "FLOPs a token", "seconds_per_token": "seconds a token"}
  marked = {label: [str(row[along]) for row in points] for label, points in curves.items()}
  picture = plots.curves(
    {
      (title, unit): {
        label: ([row[cost] for row in points], [row[unit] for row in points]) for label, points in curves.items()
      }
      for cost, title in panels.items()
    },
    title=f"{along.replace('_', ' ')} at evaluation (trained: {own[along]})",
    marks=marked,
    log_x=True,
  )
  (workdir / f"{name}.png").write_bytes(picture)
  print(f"Written to {workdir / name}.json, .csv and .png", flush=True)


if __name__ == "__main__":
  flags.adopt_module_key_flags(command_line)
  for axis in _AXES:
    flags.DEFINE_list(axis, [], f"Values of {axis}, with commas between.")
  command_line.run(main, required=("workdir",))
