"""An ablation: trains and scores every variant of a config file with every seed, and writes a table and a plot.

  python -m perceiver_ar_jax.experiments.ablate --config=configs/ablations/context.py --workdir=runs/context --seeds=0,1

The file names its VARIANTS; `--config=configs/ablations/context.py:512` is the config of one. Each run is main.py in a
process and a folder of its own, WORKDIR/<variant>-seed<seed>, so the same command resumes what was interrupted and
skips what is complete. Settings given here, such as --config.train.steps=2000, apply to all runs. WORKDIR gets
README.md (the file's docstring, the tables, the command), README.png and README.json.

Training seconds are steps times the median duration of a step. The last columns compare variants of different cost: the
unit at the FLOPs and at the seconds that the cheapest one spent.
"""

import json
import math
import os
import platform
import runpy
import shlex
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence

import numpy as np
from absl import flags
from etils import epath
from ml_collections import config_flags

from perceiver_ar_jax import command_line
from perceiver_ar_jax.config import Config, InputError, require
from perceiver_ar_jax.experiments import plots
from perceiver_ar_jax.models import architectures
from perceiver_ar_jax.training import metrics

flags.adopt_module_key_flags(command_line)
_SEEDS = flags.DEFINE_list("seeds", ["0"], "Comma-separated seeds of the runs of each variant.")

Runs = Mapping[str, Sequence[Mapping]]
"""By variant: a summary of each seed's run."""


def main(config: Config) -> int:
  del config  # resolving it has validated the settings that apply to all runs
  path = config_flags.get_config_filename(flags.FLAGS["config"]).split(":")[0]
  settings = [argument for argument in sys.argv[1:] if argument.startswith("--config.")]
  are_numbers = all(seed.isdigit() for seed in _SEEDS.value)
  require(are_numbers, f"--seeds={','.join(_SEEDS.value)} must be comma-separated whole numbers.")
  workdir = epath.Path(command_line.WORKDIR.value)
  ablate(path, workdir, _SEEDS.value, settings)
  print((workdir / "README.md").read_text(), flush=True)
  return 0


def ablate(path: str, workdir: epath.Path, seeds: Sequence[str], settings: Sequence[str]) -> dict:
  """Runs every variant of the file `path` with every seed, unless complete; writes the results and returns README.json.

  `settings` are flags of all runs, such as --config.train.steps=100. Raises InputError if the file has no VARIANTS, or
  a run failed.
  """
  module, fix = runpy.run_path(path), "give a file such as configs/ablations/context.py"
  require("VARIANTS" in module, f"--config={path} does not define VARIANTS: {fix}.")
  command = ["python", "-m", "perceiver_ar_jax.experiments.ablate", f"--config={path}", f"--seeds={','.join(seeds)}"]
  command.append(f"--workdir=runs/{epath.Path(path).stem}")
  results = {
    "about": module["__doc__"],
    "command": shlex.join([*command, *settings]),
    "hardware": f"{os.cpu_count()} CPU cores ({platform.machine()})",
    "variants": module["VARIANTS"],
    "runs": {
      variant: [_run(path, variant, seed, workdir / f"{variant}-seed{seed}", settings) for seed in seeds]
      for variant in module["VARIANTS"]
    },
  }
  (workdir / "README.json").write_text(json.dumps(results, indent=1) + "\n")
  (workdir / "README.png").write_bytes(plot(results))
  (workdir / "README.md").write_text(page(results))
  return results


def _run(path: str, variant: str, seed: str, folder: epath.Path, settings: Sequence[str]) -> dict:
  """Trains one run unless it is complete, and returns its summary."""
  summary = _summary(folder)
  if summary is None:
    print(f"{variant}, seed {seed}:", flush=True)
    command = [sys.executable, "-m", "perceiver_ar_jax.main", f"--config={path}:{variant}", f"--workdir={folder}"]
    code = subprocess.run([*command, f"--config.seed={seed}", *settings]).returncode
    summary = _summary(folder)
    if code or summary is None:
      raise InputError(f"The run of {variant} with seed {seed} ended with exit code {code}; its message is above.")
  return summary


def _summary(folder: epath.Path) -> dict | None:
  """Returns the size, cost, final evaluation and learning curve of a run; None unless it is complete."""
  if not (folder / "config.json").exists():
    return None
  config = Config.from_json((folder / "config.json").read_text())
  path = folder / f"eval-{config.eval.split}-{config.train.steps}.json"
  if not path.exists():
    return None
  result = json.loads(path.read_text())
  lines = metrics.read_entries(folder)
  unit = result["unit"]
  return {
    "seed": config.seed,
    "num_params": architectures.num_params(config.model),
    "context": config.model.max_context,
    "num_latents": config.model.num_latents,
    "batch_size": config.train.batch_size,
    "steps": config.train.steps,
    "step_flops": architectures.train_flops(config),
    "step_seconds": statistics.median(line["seconds"] for line in lines if "seconds" in line),
    "unit": unit,
    "result": result,
    "curve": [(line["step"], line[f"eval_{unit}"]) for line in lines if f"eval_{unit}" in line],
  }


def plot(results: Mapping) -> bytes:
  """Returns a PNG: the unit against training FLOPs and against training seconds."""
  unit = _unit(results["runs"])
  panels = {
    (label, f"{unit}, held out"): {variant: _mean_curve(runs, cost) for variant, runs in results["runs"].items()}
    for label, cost in (("training FLOPs", "step_flops"), ("training seconds", "step_seconds"))
  }
  return plots.curves(panels, title=results["about"].strip().partition("\n\n")[0])


def page(results: Mapping) -> str:
  """Returns the Markdown page of the results, which links README.png and README.json."""
  runs, unit = results["runs"], _unit(results["runs"])
  title, _, about = results["about"].strip().partition("\n\n")
  seeds = len(next(iter(runs.values())))
  spread = f"mean of {seeds} seeds, and the largest deviation from it" if seeds > 1 else "one seed"
  sections = [
    f"# {title}",
    about.strip(),
    table(runs),
    f"{unit} on held-out data: {spread}. The last two columns are interpolated on the curves.",
    f"![{unit} against training FLOPs and seconds](README.png)",
    _context_table(runs),
    "\n".join(["Variants:", "", *(f"- {name}: {text}" for name, text in results["variants"].items())]),
    f"Written by `{results['command']}` on {results['hardware']}; [all numbers](README.json).",
  ]
  return "\n\n".join(sections) + "\n"


def table(runs: Runs) -> str:
  """Returns a Markdown table with one row per variant: size, cost and final unit."""
  unit = _unit(runs)
  lowest = {cost: min(_total(seeds, cost) for seeds in runs.values()) for cost in ("step_flops", "step_seconds")}
  columns = f"parameters | context | latents | steps | training TFLOPs | training seconds | {unit}"
  budgets = f"at {lowest['step_flops'] / 1e12:,.3g} TFLOPs | at {lowest['step_seconds']:,.0f} s"
  lines = [f"| variant | {columns} | {budgets} |", "|---" * 10 + "|"]
  for variant, seeds in runs.items():
    run, values = seeds[0], [run["result"][unit] for run in seeds]
    mean = statistics.fmean(values)
    spread = f" ± {max(abs(value - mean) for value in values):.4f}" if len(values) > 1 else ""
    tflops, seconds = _total(seeds, "step_flops") / 1e12, _total(seeds, "step_seconds")
    interpolated = [_interpolate(_mean_curve(seeds, cost), budget) for cost, budget in lowest.items()]
    lines.append(
      f"| {variant} | {run['num_params'] / 1e6:,.2f}M | {run['context']:,} | {run['num_latents']:,} |"
      f" {run['steps']:,} | {tflops:,.4g} | {seconds:,.0f} | {mean:.4f}{spread} | {' | '.join(interpolated)} |"
    )
  return "\n".join(lines)


def _unit(runs: Runs) -> str:
  return next(iter(runs.values()))[0]["unit"]


def _total(runs: Sequence[Mapping], cost: str) -> float:
  """Returns the cost of all training steps, averaged over seeds."""
  return statistics.fmean(run[cost] * run["steps"] for run in runs)


def _mean_curve(runs: Sequence[Mapping], cost: str) -> tuple[list[float], list[float]]:
  """Returns (accumulated cost, mean of the unit over seeds) at each evaluation."""
  step_cost = statistics.fmean(run[cost] for run in runs)
  costs = [step * step_cost for step, _ in runs[0]["curve"]]
  return costs, [statistics.fmean(values) for values in zip(*([value for _, value in run["curve"]] for run in runs))]


def _interpolate(curve: tuple[Sequence[float], Sequence[float]], cost: float) -> str:
  """Returns the unit at `cost`, linear between evaluations; "-" before the first one."""
  costs, values = curve
  return "-" if cost < costs[0] * (1 - 1e-9) else f"{np.interp(cost, costs, values):.4f}"


def _context_table(runs: Runs) -> str:
  """Returns a Markdown table: nats per token by the number of inputs that a token was predicted from."""
  losses = {
    variant: {
      (bucket["from"], bucket["to"]): f"{bucket['nats_per_token']:.4f}"
      for bucket in seeds[0]["result"]["by_context"]
      if bucket["num_tokens"] >= 100
    }
    for variant, seeds in runs.items()
  }
  buckets = sorted({bucket for by_bucket in losses.values() for bucket in by_bucket}, key=lambda bucket: bucket[0])
  title = (
    "Nats per token by the number of inputs that a token was predicted from (first seed; at least 100 tokens each):"
  )
  columns = " | ".join(f"{first:,} to {(end or math.inf) - 1:,}" for first, end in buckets)
  lines = [title, "", f"| variant | {columns} |", "|---" * (len(buckets) + 1) + "|"]
  for variant, by_bucket in losses.items():
    lines.append(f"| {variant} | " + " | ".join(by_bucket.get(bucket, "") for bucket in buckets) + " |")
  return "\n".join(lines)


if __name__ == "__main__":
  command_line.run(main, required=("workdir",))
