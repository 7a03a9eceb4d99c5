"""Evaluation-time compute: scores one checkpoint with several numbers of latents, strides, contexts and layers.

  python -m perceiver_ar_jax.experiments.sweep --config=configs/text_files.py --workdir=DIR \
    --num_latents=64,128,256,512 --stride=64 --context=2048 --layers=4

Scores every combination (paper, section 5: more latents or layers at evaluation than necessary cost compute and lower
the loss). Axes that are not given keep the value of the config; fewer layers are the first layers; a stride above the
number of latents is lowered to it. Writes sweep-<split>-<step>.json and .png to the workdir: the task's unit against
FLOPs and against seconds per token.
"""

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
from perceiver_ar_jax.config import Config, ModelConfig, require
from perceiver_ar_jax.data import splits
from perceiver_ar_jax.evaluation import evaluate
from perceiver_ar_jax.experiments import plots
from perceiver_ar_jax.models import architectures
from perceiver_ar_jax.models.architectures import architecture_of
from perceiver_ar_jax.models.perceiver_ar import group_depths
from perceiver_ar_jax.parallel import distributed

_AXES = ("num_latents", "stride", "context", "layers")
_COSTS = {"flops_per_token": "FLOPs per token", "seconds_per_token": "seconds per token"}


def main(config: Config) -> int:
  distributed.cache_compiled()
  values = {name: _numbers(name, flags.FLAGS[name].value) for name in _AXES if flags.FLAGS[name].value}
  sweep(config, epath.Path(command_line.WORKDIR.value), values)
  return 0


def _numbers(name: str, words: list[str]) -> list[int]:
  are_valid = all(word.strip().isdigit() and int(word) for word in words)
  require(are_valid, f"--{name}={','.join(words)} must be comma-separated whole numbers of at least 1.")
  return [int(word) for word in words]


def sweep(config: Config, workdir: epath.Path, values: Mapping[str, list[int]]) -> list[dict]:
  """Scores every combination of `values` (numbers by name of an axis) and writes the tables; returns their rows.

  Raises InputError if there is no checkpoint, or a value does not suit the model.
  """
  latents = config.eval.num_latents or config.model.num_latents
  defaults = (latents, config.eval.stride or latents, config.model.max_context, config.model.num_layers)
  trained = dict(zip(_AXES, defaults))
  grid = itertools.product(*(values.get(axis, [trained[axis]]) for axis in _AXES))
  grid = [(num_latents, min(stride, num_latents), *rest) for num_latents, stride, *rest in grid]
  points = [dict(zip(_AXES, point)) for point in dict.fromkeys(grid)]  # without duplicates
  configs = [_config_at(config, point) for point in points]  # validates all points before any is scored
  mesh, step, params = evaluate.restore(config, workdir)
  rows = []
  for point, point_config in zip(points, configs):
    row = point | _score(point_config, mesh, first_layers(point_config.model, params), step)
    rows.append(row)
    settings = ", ".join(f"{axis} {point[axis]:,}" for axis in _AXES)
    costs = f"{row['flops_per_token']:.3g} FLOPs and {row['seconds_per_token']:.2g} seconds per token"
    print(f"{settings}: {row[row['unit']]:.4f} {row['unit']}, {costs}", flush=True)
  if jax.process_index() == 0:
    _write(rows, workdir / f"sweep-{config.eval.split}-{step}", trained)
  return rows


def _config_at(config: Config, point: Mapping[str, int]) -> Config:
  trained, (num_latents, _, context, layers) = config.model, (point[axis] for axis in _AXES)
  require(layers <= trained.num_layers, f"--layers={layers} exceeds the {trained.num_layers} layers of the model.")
  has_any = architecture_of(trained).has_cross_attention or layers == trained.num_layers
  require(has_any, f"--layers={layers} is not supported with {trained.architecture}: leave it out.")
  problem = f"--num_latents={num_latents} exceeds a context of {context}, whose last inputs they are"
  require(num_latents <= context, f"{problem}: lower it, or raise --context.")
  model = dataclasses.replace(
    trained,
    max_context=context,
    num_latents=num_latents,
    num_layers=layers,
    cross_attend_after=tuple(layer for layer in trained.cross_attend_after if layer < layers),
    rotary_max_wavelength=trained.rotary_max_wavelength or trained.max_context,  # must stay as in training
  )
  sample = dataclasses.replace(config.sample, kept_latents=None)
  evaluation = dataclasses.replace(config.eval, num_latents=num_latents, stride=point["stride"])
  return dataclasses.replace(config, model=model, eval=evaluation, sample=sample)


def first_layers(model: ModelConfig, params: Mapping) -> dict:
  """Returns the weights of only those layers and cross-attentions that `model` has."""
  if not architecture_of(model).has_cross_attention:
    return dict(params)
  result = {name: value for name, value in params.items() if not name.startswith(("layers_", "cross_attend_"))}
  for index, num_layers in enumerate(group_depths(model)):
    result[f"cross_attend_{index}"] = params[f"cross_attend_{index}"]
    if num_layers:
      result[f"layers_{index}"] = jax.tree.map(operator.itemgetter(slice(num_layers)), params[f"layers_{index}"])
  return result


def _score(config: Config, mesh, params, step: int) -> dict:
  evaluator = evaluate.Evaluator(config, mesh)
  evaluator(params, step, documents=list(splits.documents(config, config.eval.split, 1))[:1])  # compiles
  start = time.monotonic()
  result = evaluator(params, step)
  seconds = time.monotonic() - start
  window_flops = architectures.eval_flops(config) / config.eval.batch_size
  return {name: value for name, value in result.items() if not name.startswith("by_")} | {
    "flops_per_token": window_flops * result["num_windows"] / result["num_tokens"],
    "seconds": seconds,
    "seconds_per_token": seconds / result["num_tokens"],
  }


def _write(rows: list[dict], path: epath.Path, trained: Mapping[str, int]) -> None:
  """Writes the rows to path.json and plots them in path.png."""
  unit = rows[0]["unit"]
  epath.Path(f"{path}.json").write_text(json.dumps(rows, indent=2) + "\n")
  varied = [axis for axis in _AXES if len({row[axis] for row in rows}) > 1] or list(_AXES[:1])
  # The axis with the most values runs along a curve; each combination of the others is a curve.
  along = max(varied, key=lambda axis: len({row[axis] for row in rows}))
  curves = {}
  for row in rows:
    label = ", ".join(f"{axis} {row[axis]}" for axis in varied if axis != along)
    curves.setdefault(label, []).append(row)
  panels = {
    (title, unit): {label: tuple(zip(*((row[cost], row[unit]) for row in points))) for label, points in curves.items()}
    for cost, title in _COSTS.items()
  }
  title = f"{along.replace('_', ' ')} at evaluation (trained: {trained[along]})"
  point_labels = {label: [str(row[along]) for row in points] for label, points in curves.items()}
  picture = plots.curves(panels, title=title, point_labels=point_labels, log_x=True)
  epath.Path(f"{path}.png").write_bytes(picture)
  print(f"Written to {path}.json and .png", flush=True)


if __name__ == "__main__":
  flags.adopt_module_key_flags(command_line)
  for axis in _AXES:
    flags.DEFINE_list(axis, [], f"Comma-separated values of {axis}.")
  command_line.run(main, required=("workdir",))
