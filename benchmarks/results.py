"""Runs every ablation, two sweeps and an attention picture, and writes docs/results.md and the table of README.md.

  python -m benchmarks.results             # hours on 2 cores; resumes where it was interrupted
  python -m benchmarks.results context     # only the named experiments
  python -m benchmarks.results published   # no experiment: only writes the pages, after a change of published.json

Each section contains the command of its experiment; docs/results has the page, plot and numbers of each. The published
numbers, and those measured here beside them, are in docs/results/published.json, which is edited by hand.
"""

import argparse
import json
import pathlib
import shlex
import shutil
import subprocess
import sys

from perceiver_ar_jax.experiments import ablate

_ROOT = pathlib.Path(__file__).parent.parent
_PAGE, _FOLDER, _README = _ROOT / "docs" / "results.md", _ROOT / "docs" / "results", _ROOT / "README.md"
_BEGIN, _END = "<!-- table by python -m benchmarks.results -->\n", "<!-- end of the table -->\n"
_SEEDS = {
  "context": "0,1",
  "baselines_text": "0,1",
  "baselines_copy": "0,1",
  "order": "0",
  "positions": "0",
  "dropout": "0",
  "longer_context": "0",
  "recipe": "0,1",
  "recipe_photos": "0,1",
  "recipe_recall": "0,1",
  "maestro": "0",
}
_SWEEPS = {
  "one_model": (
    "One model of the context ablation with shorter and longer contexts",
    "context",
    "512",
    ["--context=64,128,256,512", "--num_latents=64", "--stride=32"],
  ),
  "latents": (
    "Evaluation-time compute: fewer and more latents than the 128 of training",
    "order",
    "raster-full",
    ["--num_latents=64,128,256,512", "--stride=64", "--config.eval.max_sequences=8"],
  ),
}
"""Title, ablation, variant (its run with seed 0 is scored) and arguments of each sweep."""
_OUTPUT = 1800
_INTRODUCTION = """# Results

Published numbers beside those measured here, then small experiments on a laptop: small models, minutes of training, one
or two seeds, which show trends. Every experiment is a config file that can run at full scale on a pod. This page is
written by `python -m benchmarks.results`."""


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("names", nargs="*", help=", ".join([*_SEEDS, *_SWEEPS, "attention", "published"]))
  parser.add_argument("--maestro", help="folder of MAESTRO v3; without it, the experiment maestro is left out")
  parser.add_argument("--workdir", type=pathlib.Path, default=_ROOT / "runs" / "results", help="all runs")
  arguments = parser.parse_args()
  _FOLDER.mkdir(exist_ok=True)
  names = arguments.names or [*_SEEDS, *_SWEEPS, "attention"]
  if not arguments.maestro:
    names = [name for name in names if name != "maestro"]
  for name in names:
    if name in _SEEDS:
      data = [f"--config.data.data_dir={arguments.maestro}"] if name == "maestro" else []
      workdir = arguments.workdir / name
      config = f"--config=configs/ablations/{name}.py"
      _run("experiments.ablate", config, f"--seeds={_SEEDS[name]}", f"--workdir={workdir}", *data)
      for ending in (".json", ".png"):
        shutil.copy(workdir / f"README{ending}", _FOLDER / f"{name}{ending}")
    elif name in _SWEEPS:
      _, ablation, variant, flags = _SWEEPS[name]
      run = arguments.workdir / ablation / f"{variant}-seed0"
      _run("experiments.sweep", f"--config=configs/ablations/{ablation}.py:{variant}", f"--workdir={run}", *flags)
      for ending in (".json", ".png"):
        (path,) = run.glob(f"sweep-*{ending}")
        shutil.copy(path, _FOLDER / f"{name}{ending}")
  if "attention" in names:
    run = shutil.copytree(_ROOT / "pretrained" / "photos32", arguments.workdir / "photos32", dirs_exist_ok=True)
    _run("main", "--mode=attention", f"--workdir={run}", f"--config.attention_map.outputs=({_OUTPUT},)")
    report = json.loads((run / "attention" / "attention.json").read_text())
    shutil.copy(run / "attention" / report["outputs"][0]["files"][0], _FOLDER / "attention.png")
    (_FOLDER / "attention.json").write_text(json.dumps(report, indent=1) + "\n")
  write_pages()


def write_pages() -> None:
  """Writes docs/results.md, the pages of the ablations and the table of README.md from the numbers in docs/results."""
  before, _, rest = _README.read_text().partition(_BEGIN)
  _README.write_text(before + _BEGIN + published_table("") + _END + rest.partition(_END)[2])
  sections = [_published()] + [_ablation(name) for name in _SEEDS if (_FOLDER / f"{name}.json").exists()]
  sections += [_sweep(name) for name in _SWEEPS if (_FOLDER / f"{name}.json").exists()]
  if (_FOLDER / "attention.json").exists():
    sections.append(_attention())
  _PAGE.write_text("\n\n".join([_INTRODUCTION, *sections]) + "\n")


def _run(module: str, *arguments: str) -> None:
  command = [sys.executable, "-m", f"perceiver_ar_jax.{module}", *arguments]
  print(shlex.join(command), flush=True)
  subprocess.run(command, cwd=_ROOT, check=True)


def published_table(root: str) -> str:
  """Returns the table of published.json in Markdown, with links to configs that start with `root`."""
  lines = ["| config | data | unit | published, or for comparison | measured here |", "|---|---|---|---|---|"]
  for row in json.loads((_FOLDER / "published.json").read_text()):
    configs = ", ".join(f"[{name}]({root}configs/{name}.py)" for name in row["configs"])
    published = "<br>".join(f"{entry['model']}: {_number(entry)}" for entry in row["published"]) or "none"
    measured = "not run" if row["here"]["value"] is None else _number(row["here"])
    lines.append(f"| {configs} | {row['data']} | {row['unit']} | {published} | {measured} |")
  return "\n".join(lines) + "\n"


def _number(entry: dict) -> str:
  """Returns a number and, as far as known, the parameters, steps, seconds and hardware that it took."""
  parameters = f"{entry['parameters']} parameters" if (entry["parameters"] or "").endswith("M") else entry["parameters"]
  known = ", ".join(part for part in (parameters, entry["cost"]) if part)
  return entry["value"] + (f" ({known})" if known else "")


def _published() -> str:
  rows = json.loads((_FOLDER / "published.json").read_text())
  commands = [f"- {row['data']}: `{row['here']['command']}`" for row in rows if row["here"]["command"]]
  entries = [(row["data"], entry) for row in rows for entry in row["published"] if entry["source"]]
  sources = [f"- {data}, {entry['model']} {entry['value']}: {entry['source']}" for data, entry in entries]
  note = "Where a cell has no parameters, seconds or hardware, the source does not state them."
  blocks = ["## Published numbers beside ours", published_table("../") + "\n" + note]
  return "\n\n".join([*blocks, "Commands:", "\n".join(commands), "Sources:", "\n".join(sources)])


def _ablation(name: str) -> str:
  results = json.loads((_FOLDER / f"{name}.json").read_text())
  (_FOLDER / f"{name}.md").write_text(ablate.page(results).replace("README.", f"{name}."))
  title = results["about"].strip().partition("\n")[0]
  return "\n\n".join(
    [
      f"## {title}",
      ablate.table(results["runs"]),
      f"![curves over training FLOPs and seconds](results/{name}.png)",
      f"[Question, result, and loss by context](results/{name}.md). `{results['command']}`, {results['hardware']}.",
    ]
  )


def _sweep(name: str) -> str:
  title, ablation, variant, flags = _SWEEPS[name]
  rows = json.loads((_FOLDER / f"{name}.json").read_text())
  unit = rows[0]["unit"]
  lines = [f"| context | latents | {unit} | FLOPs per token | seconds per token |", "|---|---|---|---|---|"]
  lines += [
    f"| {row['context']:,} | {row['num_latents']:,} | {row[unit]:.4f} | {row['flops_per_token']:.3g} |"
    f" {row['seconds_per_token']:.2g} |"
    for row in rows
  ]
  return "\n\n".join(
    [
      f"## {title}",
      "\n".join(lines),
      f"![the unit over FLOPs and seconds per token](results/{name}.png)",
      f"`python -m perceiver_ar_jax.experiments.sweep --config=configs/ablations/{ablation}.py:{variant}"
      f" {shlex.join(flags)} --workdir=runs/{ablation}/{variant}-seed0` on that run of the ablation, seed 0.",
    ]
  )


def _attention() -> str:
  report = json.loads((_FOLDER / "attention.json").read_text())
  lines = [
    f"- output {entry['output']}: entropy {entry['entropy_nats']:.2f} nats over {entry['inputs']} inputs,"
    f" {entry['share_before_latents']:.1%} of the attention on inputs before the latents"
    for entry in report["outputs"]
  ]
  return "\n\n".join(
    [
      "## The cross-attention on a photograph",
      "![the known part of a held-out picture, and the weight of each pixel](results/attention.png)",
      "\n".join(lines),
      "`--mode=attention` with the weights in pretrained/photos32. The sub-pixel in the red frame is predicted from all"
      " sub-pixels before it. Color intensity is the square root of weight / largest weight.",
    ]
  )


if __name__ == "__main__":
  main()
