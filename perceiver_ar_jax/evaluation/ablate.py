"""An ablation: trains and scores every variant of a config file with every seed, and writes a table and a plot.

  python -m perceiver_ar_jax.evaluation.ablate --config=configs/ablations/context.py --workdir=runs/context --seeds=0,1

The file names its VARIANTS; `--config=configs/ablations/context.py:512` is the config of one, for main.py. Each run
is main.py in a process and a folder of its own, WORKDIR/<variant>-seed<seed>, so the same command goes on with what was
stopped and skips what is done. Settings given here, such as --config.train.steps=2000, go to all runs. WORKDIR gets
README.md (what the file's docstring says, the tables, the command), README.png and README.json; with --page=FOLDER/NAME
FOLDER gets NAME.md, NAME.png and NAME.json as well.

The table gives training FLOPs, the seconds that training took (steps times the median duration of a step: evaluation
and compilation are left out), and the task's unit at the end. Where variants cost differently it is also read off the
curves at the FLOPs, and at the seconds, that the cheapest one spent, on the line between the two evaluations around.
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
from perceiver_ar_jax.config import Config, InputError, nearest
from perceiver_ar_jax.evaluation import plots
from perceiver_ar_jax.parallel import flops

flags.adopt_module_key_flags(command_line)
_SEEDS = flags.DEFINE_list("seeds", ["0"], "Seeds of the runs of each variant, with commas between.")
_VARIANTS = flags.DEFINE_list("variants", [], "Only these variants of the file.")
_PAGE = flags.DEFINE_string("page", None, "FOLDER/NAME: write the results there as well.")


def main(config: Config) -> int:
  del config  # resolving it has checked the settings that go to all runs
  path = config_flags.get_config_filename(flags.FLAGS["config"]).split(":")[0]
  settings = [argument for argument in sys.argv[1:] if argument.startswith("--config.")]
  for seed in _SEEDS.value:
    if not seed.isdigit():
      raise InputError(f"--seeds={','.join(_SEEDS.value)} must be whole numbers with commas between.")
  pages = [epath.Path(command_line.WORKDIR.value) / "README"] + ([epath.Path(_PAGE.value)] if _PAGE.value else [])
  ablate(path, epath.Path(command_line.WORKDIR.value), _VARIANTS.value, _SEEDS.value, settings, pages)
  print(pages[0].with_suffix(".md").read_text(), flush=True)
  return 0


def ablate(
  path: str,
  workdir: epath.Path,
  variants: Sequence[str],
  seeds: Sequence[str],
  settings: Sequence[str],
  pages: Sequence[epath.Path],
) -> dict:
  """Runs what is still to run, and writes the results; returns what the .json files hold.

  Args:
    path: the config file; its VARIANTS say what each variant is.
    workdir: of all runs.
    variants: those to run; none: all.
    seeds: of the runs of each.
    settings: flags for all runs, such as --config.train.steps=100.
    pages: paths without ending, to which .md, .png and .json are added.

  Raises:
    InputError: the file has no variants, or not these; or a run failed.
  """
  module = runpy.run_path(path)
  if "VARIANTS" not in module:
    raise InputError(f"--config={path} names no VARIANTS: give a file such as configs/ablations/context.py.")
  known = module["VARIANTS"]
  for variant in variants:
    if variant not in known:
      raise InputError(f"--variants={variant} is unknown. {nearest(variant, known)}")
  command = ["python", "-m", "perceiver_ar_jax.evaluation.ablate", f"--config={path}", f"--seeds={','.join(seeds)}"]
  results = {
    "about": module["__doc__"],
    "command": shlex.join([*command, *settings]),
    "hardware": f"{os.cpu_count()} CPU cores ({platform.machine()})",
    "variants": known,
    "runs": {
      variant: [_run(path, variant, seed, workdir / f"{variant}-seed{seed}", settings) for seed in seeds]
      for variant in variants or known
    },
  }
  for page in pages:
    page.parent.mkdir(parents=True, exist_ok=True)
    _write(results, page)
  return results


def _run(path: str, variant: str, seed: str, folder: epath.Path, settings: Sequence[str]) -> dict:
  """Trains one run to its end, if that is still to do, and returns its figures."""
  command = [sys.executable, "-m", "perceiver_ar_jax.main", f"--config={path}:{variant}", f"--workdir={folder}"]
  if not _done(folder):
    print(f"{variant}, seed {seed}:", flush=True)
    code = subprocess.run([*command, f"--config.seed={seed}", *settings]).returncode
    if code:
      raise InputError(f"The run of {variant} with seed {seed} ended with code {code}; what it said stands above.")
  return _figures(folder)


def _done(folder: epath.Path) -> bool:
  path = folder / "config.json"
  return path.exists() and _result_path(folder, Config.from_json(path.read_text())).exists()


def _result_path(folder: epath.Path, config: Config) -> epath.Path:
  return folder / f"eval-{config.eval.split}-{config.train.steps}.json"


def _figures(folder: epath.Path) -> dict:
  """Of a finished run: what it is, what it cost, how good it became, and the curve there."""
  config = Config.from_json((folder / "config.json").read_text())
  result = json.loads(_result_path(folder, config).read_text())
  lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
  seconds = statistics.median(line["seconds"] for line in lines if "seconds" in line)
  step_flops, unit = flops.train_step(config).useful, result["unit"]
  return {
    "seed": config.seed,
    "num_params": flops.num_params(config.model),
    "context": config.model.max_context,
    "num_latents": config.model.num_latents,
    "batch_size": config.train.batch_size,
    "steps": config.train.steps,
    "step_flops": step_flops,
    "step_seconds": seconds,
    "unit": unit,
    "result": result,
    "curve": [(line["step"], line[f"eval_{unit}"]) for line in lines if f"eval_{unit}" in line],
  }


def _write(results: Mapping, page: epath.Path) -> None:
  runs = results["runs"]
  unit = next(iter(runs.values()))[0]["unit"]
  picture, figures = page.with_suffix(".png"), page.with_suffix(".json")
  figures.write_text(json.dumps(results, indent=1) + "\n")
  panels = {
    (label, f"{unit}, held out"): {variant: _mean_curve(some, cost) for variant, some in runs.items()}
    for label, cost in (("training FLOPs", "step_flops"), ("training seconds", "step_seconds"))
  }
  title, _, about = results["about"].strip().partition("\n\n")
  picture.write_bytes(plots.curves(panels, title=title))
  seeds = len(next(iter(runs.values())))
  spread = f"mean of {seeds} seeds, and the largest distance from it" if seeds > 1 else "one seed"
  page.with_suffix(".md").write_text(
    "\n\n".join(
      [
        f"# {title}",
        about.strip(),
        table(runs),
        f"{unit} on held-out data: {spread}. The last two columns are read off the curves.",
        f"![{unit} against training FLOPs and seconds]({picture.name})",
        _by_context(runs),
        "\n".join(["What each variant is:", "", *(f"- {name}: {what}" for name, what in results["variants"].items())]),
        f"Written by `{results['command']}` on {results['hardware']}; [all figures]({figures.name}).",
      ]
    )
    + "\n"
  )


def _mean_curve(runs: Sequence[Mapping], cost: str) -> tuple[list[float], list[float]]:
  """(cost so far, mean of the unit over seeds) at each evaluation."""
  each = statistics.fmean(run[cost] for run in runs)
  steps = [step for step, _ in runs[0]["curve"]]
  return [step * each for step in steps], [
    statistics.fmean(values) for values in zip(*([value for _, value in run["curve"]] for run in runs))
  ]


def table(runs: Mapping[str, Sequence[Mapping]]) -> str:
  """One line of Markdown a variant: what it is, what it cost, how good it became, by `ablate`'s runs."""
  unit = next(iter(runs.values()))[0]["unit"]
  least = {
    cost: min(statistics.fmean(run[cost] * run["steps"] for run in some) for some in runs.values())
    for cost in ("step_flops", "step_seconds")
  }
  lines = [
    f"| variant | parameters | context | latents | steps | training TFLOP | training s | {unit} | at"
    f" {least['step_flops'] / 1e12:,.3g} TFLOP | at {least['step_seconds']:,.0f} s |",
    "|---|---|---|---|---|---|---|---|---|---|",
  ]
  for variant, some in runs.items():
    first, values = some[0], [run["result"][unit] for run in some]
    mean = statistics.fmean(values)
    value = f"{mean:.4f}" + (f" ± {max(abs(one - mean) for one in values):.4f}" if len(values) > 1 else "")
    spent = {cost: statistics.fmean(run[cost] * run["steps"] for run in some) for cost in least}
    at = [_read_off(_mean_curve(some, cost), budget) for cost, budget in least.items()]
    lines.append(
      f"| {variant} | {first['num_params'] / 1e6:,.2f}M | {first['context']:,} | {first['num_latents']:,} |"
      f" {first['steps']:,} | {spent['step_flops'] / 1e12:,.4g} | {spent['step_seconds']:,.0f} | {value} |"
      + "".join(f" {one} |" for one in at)
    )
  return "\n".join(lines)


def _read_off(curve: tuple[Sequence[float], Sequence[float]], cost: float) -> str:
  """The value at `cost`, between the evaluations around it; - before the first one."""
  costs, values = curve
  if cost < costs[0] * (1 - 1e-9):
    return "-"
  return f"{np.interp(cost, costs, values):.4f}"


def _by_context(runs: Mapping[str, Sequence[Mapping]]) -> str:
  """Nats per token by how many inputs a token was predicted from."""
  found = {
    variant: {
      (bucket["from"], bucket["to"]): bucket["nats_per_token"]
      for bucket in some[0]["result"]["by_context"]
      if bucket["num_tokens"] >= 100
    }
    for variant, some in runs.items()
  }
  columns = sorted({place for places in found.values() for place in places}, key=lambda place: place[0])
  lines = [
    "Nats per token by the inputs that a token was predicted from (first seed; buckets of at least 100 tokens):",
    "",
    "| variant | " + " | ".join(f"{first:,} to {(end or math.inf) - 1:,}" for first, end in columns) + " |",
    "|---" * (len(columns) + 1) + "|",
  ]
  for variant, places in found.items():
    values = (f"{places[place]:.4f}" if place in places else "" for place in columns)
    lines.append(f"| {variant} | " + " | ".join(values) + " |")
  return "\n".join(lines)


if __name__ == "__main__":
  command_line.run(main, required=("workdir",))
