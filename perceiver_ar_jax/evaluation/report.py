"""--mode=report: one HTML file about a run, to look at and to send: curves, evaluations, samples, speed, settings.

It is made of what the run has written (config.json, metrics.jsonl, evaluations, samples) and needs no device.
"""

import base64
import html
import json
import statistics
from collections.abc import Iterable, Sequence

from etils import epath

from perceiver_ar_jax.config import Config, InputError, writing
from perceiver_ar_jax.evaluation import plots
from perceiver_ar_jax.parallel import flops
from perceiver_ar_jax.training import workdir as workdir_lib

_MOST_SAMPLES = 12
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1150px; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse } td, th { padding: .2em .8em; border-bottom: 1px solid #ddd; text-align: left }
pre { background: #f6f6f6; padding: .8em; overflow-x: auto } img, svg { max-width: 100%; height: auto }
figure { display: inline-block; margin: .5em; vertical-align: top } figcaption { color: #666 }
"""


def write(workdir: epath.PathLike) -> epath.Path:
  """Writes WORKDIR/report.html and returns its path.

  Raises:
    InputError: there is no run, it has not logged anything, or the file cannot be written.
  """
  workdir = epath.Path(workdir)
  config, lines = workdir_lib.load_config(workdir), _metrics(workdir)
  steps = [line for line in lines if "loss" in line]
  if not steps:
    raise InputError(f"--workdir={workdir} has logged no step yet: train first, or lower train.log_every.")
  results = [json.loads(path.read_text()) for path in sorted(workdir.glob("eval-*.json"))]
  sections = [
    f"<h1>{html.escape(workdir.name)}: {html.escape(config.data.task)}</h1>",
    _table(_summary(config, steps).items()),
    "<h2>Training</h2>",
    _inline(plots.curves(_panels(steps, [line for line in lines if "eval_nats_per_token" in line]), form="svg")),
    *([f"<h2>Evaluations</h2>{_evaluations(results)}"] if results else []),
    *_samples(workdir),
    f"<h2>Settings</h2><details><summary>config.json</summary><pre>{html.escape(config.to_json())}</pre></details>",
  ]
  title = html.escape(f"{workdir.name} ({config.data.task})")
  head = f'<meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
  path = workdir / "report.html"
  with writing(path, "free it, or copy the run"):
    path.write_text(f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(sections)}</body></html>\n')
  return path


def _metrics(workdir: epath.Path) -> list[dict]:
  path = workdir / "metrics.jsonl"
  result = []
  for line in path.read_text().splitlines() if path.exists() else []:
    try:
      result.append(json.loads(line))
    except ValueError:  # the line that a kill cut short
      continue
  return result


def _summary(config: Config, steps: Sequence[dict]) -> dict[str, str]:
  last, seconds = steps[-1], statistics.median(line["seconds"] for line in steps)
  speed = statistics.median(line["tokens_per_second"] for line in steps)
  model = config.model
  result = {
    "steps": f"{last['step']:,} of {config.train.steps:,}",
    "model": f"{model.architecture}, {flops.num_params(model) / 1e6:,.2f}M parameters, {model.num_layers} layers of"
    f" width {model.latent_width}",
    "context": f"{model.max_context:,} inputs, {model.num_latents:,} latents, batch {config.train.batch_size:,}",
    "training loss": f"{last['loss']:.4f} nats a token",
    "speed": f"{seconds:.3g} s a step, {speed:,.0f} tokens/s (medians of the logged steps)",
    "model FLOPs": f"{flops.train_step(config).useful:.3g} a step",
  }
  shares = [line["model_flops_utilization"] for line in steps if "model_flops_utilization" in line]
  if shares:  # of the steps on devices whose peak is known
    result["utilization"] = f"{statistics.median(shares):.1%} of peak"
  return result


def _panels(steps: Sequence[dict], evaluations: Sequence[dict]) -> dict:
  def curve(lines, name):
    return [line["step"] for line in lines], [line[name] for line in lines]

  losses = {"training": curve(steps, "loss")}
  if evaluations:
    losses["held out"] = curve(evaluations, "eval_nats_per_token")
  return {
    ("step", "nats a token"): losses,
    ("step", "learning rate"): {"learning rate": curve(steps, "learning_rate")},
    ("step", "tokens a second"): {"training": curve(steps, "tokens_per_second")},
  }


def _inline(svg: bytes) -> str:
  """An SVG file as a part of a page, which has no place for the file's own head."""
  return svg[svg.index(b"<svg") :].decode()


def _table(rows: Iterable[Sequence[str]], head: Sequence[str] = ()) -> str:
  lines = ["".join(f"<th>{html.escape(cell)}</th>" for cell in head)] if head else []
  lines += ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
  return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def _evaluations(results: Sequence[dict]) -> str:
  rows = []
  for result in sorted(results, key=lambda result: (result["split"], result["step"])):
    unit, interval = result["unit"], result.get("interval_95")
    ends = "{:.4g} to {:.4g}".format(*interval[result["unit"]]) if interval else ""
    rows.append(
      (result["split"], f"{result['step']:,}", f"{result[unit]:.4f} {unit}", ends, f"{result['nats_per_token']:.4f}")
      + (f"{result['num_latents']:,}", f"{result['stride']:,}", f"{result['num_tokens']:,}")
    )
  head = ("split", "step", "figure", "95% interval", "nats a token", "latents", "stride", "tokens")
  return _table(rows, head)


def _samples(workdir: epath.Path) -> list[str]:
  """Pictures and texts of WORKDIR/samples; what is longer is cut off."""
  folder = workdir / "samples"
  found = sorted(folder.iterdir()) if folder.exists() else []
  shown = []
  for path in [path for path in found if path.suffix in (".png", ".txt")][:_MOST_SAMPLES]:
    if path.suffix == ".png":
      data = base64.b64encode(path.read_bytes()).decode()
      content = f'<img alt="{html.escape(path.name)}" src="data:image/png;base64,{data}">'
    else:
      content = f"<pre>{html.escape(path.read_bytes().decode(errors='replace')[:2000])}</pre>"
    shown.append(f"<figure>{content}<figcaption>{html.escape(path.name)}</figcaption></figure>")
  return ["<h2>Samples</h2>", *shown] if shown else []
