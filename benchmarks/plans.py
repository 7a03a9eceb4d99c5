"""Plans the published experiments for TPUs, and writes the table of docs/pods.md; no TPU is needed.

  python -m benchmarks.plans                      # all plans, about a minute each
  python -m benchmarks.plans imagenet64-v5e-256   # the named plans; the others stay as they are in docs/plans.json
  python -m benchmarks.plans --table              # only the table, from docs/plans.json

Requires the extra [plan]. Each plan is a run of --mode=plan; docs/plans.json collects their plan.json.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

_ROOT = pathlib.Path(__file__).parent.parent
_STORED = _ROOT / "docs" / "plans.json"
_PAGE = _ROOT / "docs" / "pods.md"
_BEGIN, _END = "<!-- plans: written by benchmarks/plans.py -->", "<!-- end of plans -->"
# Books of up to 16k tokens, as the paper describes that model: 60 layers, rotary, SentencePiece.
_BOOKS = ["model.max_context=16384", "model.cross_attend_dropout=0.0", "train.batch_size=1024"]
_BOOKS += ["model.embed_width=1024", "model.cross_attend_width=1024", "model.num_cross_heads=16"]
_MILLION = ["model.max_context=1048576", "model.position_sizes=(1048578,)", "train.batch_size=256"]
_MILLION += ["train.microbatches=1"]

_STREAMED = ["model.attention=streamed"]

PLANS: dict[str, tuple[str, str, list[str]]] = {
  "imagenet64-v5e-256": ("imagenet64", "v5e:16x16", []),
  "imagenet64-v5e-256-streamed": ("imagenet64", "v5e:16x16", _STREAMED),
  "imagenet64-v5e-256-splash": ("imagenet64", "v5e:16x16", ["model.attention=splash"]),
  "imagenet64-2xv5e-256": ("imagenet64", "2xv5e:16x16", ["mesh.data=2", *_STREAMED]),
  "imagenet64-v5e-64": ("imagenet64", "v5e:8x8", _STREAMED),
  "imagenet64-v5e-64-microbatches": ("imagenet64", "v5e:8x8", ["train.microbatches=4", *_STREAMED]),
  "imagenet64-v5e-64-reference": ("imagenet64", "v5e:8x8", ["model.attention=reference"]),
  "imagenet64-v4-128": ("imagenet64", "v4:4x4x4", _STREAMED),
  "imagenet64-v4-256": ("imagenet64", "v4:4x4x8", _STREAMED),
  "imagenet64-v4-512": ("imagenet64", "v4:4x8x8", _STREAMED),
  "imagenet64-v4-1024": ("imagenet64", "v4:8x8x8", ["mesh.data=8", *_STREAMED]),
  "imagenet64-v6e-256": ("imagenet64", "v6e:16x16", _STREAMED),
  "imagenet64-v5p-128": ("imagenet64", "v5p:4x4x4", _STREAMED),
  "imagenet64_modern-v5e-256": ("imagenet64_modern", "v5e:16x16", []),
  "copy131072-v5e-256": ("copy131072", "v5e:16x16", []),
  "copy131072-v5e-256-streamed": ("copy131072", "v5e:16x16", _STREAMED),
  "copy131072-v5e-256-splash": ("copy131072", "v5e:16x16", ["model.attention=splash"]),
  "pg19-v4-256": ("pg19", "v4:4x4x8", _STREAMED),
  "pg19_modern-v4-256": ("pg19_modern", "v4:4x4x8", []),
  "books16k-v4-256": ("pg19", "v4:4x4x8", [*_BOOKS, *_STREAMED]),
  "million-v5e-256": ("copy131072", "v5e:16x16", _MILLION),
  "million-v5e-256-streamed": ("copy131072", "v5e:16x16", [*_MILLION, *_STREAMED]),
}


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("names", nargs="*", help=", ".join(PLANS))
  parser.add_argument("--table", action="store_true", help="only rewrite the table")
  arguments = parser.parse_args()
  if unknown := set(arguments.names) - set(PLANS):
    parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(PLANS)}")
  stored = json.loads(_STORED.read_text()) if _STORED.exists() else {}
  for name in () if arguments.table else arguments.names or PLANS:
    stored[name] = _plan(*PLANS[name])
    ordered = {known: stored[known] for known in PLANS if known in stored}
    _STORED.write_text(json.dumps(ordered, indent=1) + "\n")  # after each plan, so that a later failure loses none
  page = _PAGE.read_text()
  before, after = page[: page.index(_BEGIN) + len(_BEGIN)], page[page.index(_END) :]
  _PAGE.write_text(f"{before}\n{table(stored)}\n{after}")


def table(stored: dict[str, dict]) -> str:
  """Returns the plans as a Markdown table, in the order of PLANS."""
  lines = [
    "| experiment | changed | slice | mesh | microbatches | GiB per chip | of | fits | PFLOPs per step |"
    " compute-bound lower limit, seconds per step |",
    "|---|---|---|---|---|---|---|---|---|---|",
  ]
  for name, (experiment, _, overrides) in PLANS.items():
    if name in stored:
      plan = stored[name]
      mesh = " x ".join(f"{axis} {size}" for axis, size in plan["mesh"].items() if size > 1)
      shown = [text for text in overrides if not text.startswith(("train.microbatches", "mesh."))]
      cells = [
        experiment,
        "<br>".join(text.split(".", 1)[1] for text in shown),
        plan["topology"],
        mesh,
        plan["microbatches"],
        f"{plan['peak_bytes'] / 2**30:.2f}",
        f"{plan['hbm_bytes'] / 2**30:.2f}",
        "yes" if plan["fits"] else "**no**",
        f"{plan['step_flops'] / 1e15:.2f}",
        f"{plan['compute_bound_seconds']:.2f}" if plan["fits"] else "",
      ]
      lines.append(f"| {' | '.join(map(str, cells))} |")
  return "\n".join(lines)


def _plan(experiment: str, topology: str, overrides: list[str]) -> dict:
  with tempfile.TemporaryDirectory() as workdir:
    command = [sys.executable, "-m", "perceiver_ar_jax.main", "--mode=plan", f"--config=configs/{experiment}.py"]
    command += [f"--workdir={workdir}", f"--config.plan.topology={topology}"]
    finished = subprocess.run([*command, *(f"--config.{text}" for text in overrides)], cwd=_ROOT)
    path = pathlib.Path(workdir) / "plan.json"
    if not path.exists():
      sys.exit(f"{experiment} on {topology}: no plan, exit code {finished.returncode}")
    return json.loads(path.read_text()) | {"overrides": overrides}


if __name__ == "__main__":
  main()
