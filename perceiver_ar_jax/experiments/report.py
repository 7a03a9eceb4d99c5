"""--mode=report: one HTML file about a run, to read and to send: summary, loss, evaluations, samples, settings.

Made from the files of the run (config.json, metrics.jsonl, evaluations, samples); needs no device. All other curves of
training are in TensorBoard.
"""

import base64
import html
import json
import statistics
from collections.abc import Iterable, Sequence

from etils import epath

from perceiver_ar_jax.config import Config, config_from_run, require, writing
from perceiver_ar_jax.experiments import plots
from perceiver_ar_jax.models.architectures import num_params
from perceiver_ar_jax.training import metrics

_MAX_SAMPLES = 12
_MAX_CHARACTERS = 2000
_STYLE = """body { font: 15px/1.5 sans-serif; max-width: 1150px; margin: 2em auto; padding: 0 1em }
td, th { padding: .2em .8em; text-align: left } pre { background: #f6f6f6; padding: .8em; overflow-x: auto }
img { max-width: 100%; height: auto } figure { display: inline-block; margin: .5em; vertical-align: top }"""


def write(workdir: epath.PathLike) -> epath.Path:
  """Writes WORKDIR/report.html and returns its path.

  Raises InputError if the workdir contains no run, the run has not logged a step, or the file cannot be written.
  """
  workdir = epath.Path(workdir)
  config, entries = config_from_run.load_config(workdir), metrics.read_entries(workdir)
  steps = [entry for entry in entries if "loss" in entry]
  require(bool(steps), f"--workdir={workdir} has not logged a step yet: train first, or lower train.log_every.")
  results = [json.loads(path.read_text()) for path in sorted(workdir.glob("eval-*.json"))]
  sections = {
    "Loss": _loss_plot(entries),
    "Evaluations": _evaluations(results) if results else "",
    "Samples": _samples(workdir / "samples"),
    "Settings": f"<details><summary>config.json</summary><pre>{html.escape(config.to_json())}</pre></details>",
  }
  body = "".join(f"<h2>{heading}</h2>{content}" for heading, content in sections.items() if content)
  title = html.escape(f"{workdir.name}: {config.data.task}")
  head = f'<meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
  body = f"<h1>{title}</h1>{_table(_summary(config, steps))}{body}"
  path = workdir / "report.html"
  with writing(path, "make it writable, or copy the run"):
    path.write_text(f'<!doctype html><html lang="en"><head>{head}</head><body>{body}</body></html>\n')
  return path


def _summary(config: Config, steps: Sequence[dict]) -> list[tuple[str, str]]:
  def median(name):
    return statistics.median(line[name] for line in steps)

  model, speed = config.model, f"{median('seconds'):.3g} seconds per step, {median('tokens_per_second'):,.0f} tokens/s"
  if "model_flops_utilization" in steps[-1]:  # the peak of the devices is known
    speed += f", {median('model_flops_utilization'):.1%} of peak FLOPs"
  return [
    ("steps", f"{steps[-1]['step']:,} of {config.train.steps:,}"),
    ("model", f"{num_params(model) / 1e6:,.2f}M parameters, {model.num_layers} layers of {model.latent_width}"),
    ("batch", f"{config.train.batch_size:,} x {model.max_context:,} inputs, {model.num_latents:,} latents"),
    ("training loss", f"{steps[-1]['loss']:.4f} nats per token"),
    ("speed (medians)", speed),
  ]


def _loss_plot(lines: Sequence[dict]) -> str:
  names = {"training": "loss", "held out": "eval_nats_per_token"}
  points = {label: [(line["step"], line[name]) for line in lines if name in line] for label, name in names.items()}
  curves = {label: tuple(zip(*pairs)) for label, pairs in points.items() if pairs}
  return _image(plots.curves({("step", "nats per token"): curves}))


def _image(png: bytes) -> str:
  return f'<img src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def _table(rows: Iterable[Sequence[str]], head: Sequence[str] = ()) -> str:
  lines = ["".join(f"<th>{html.escape(cell)}</th>" for cell in head)] if head else []
  lines += ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
  return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def _evaluations(results: Sequence[dict]) -> str:
  rows = []
  for result in sorted(results, key=lambda result: (result["split"], result["step"])):
    unit, interval = result["unit"], result.get("interval_95")
    ends = "{:.4g} to {:.4g}".format(*interval[unit]) if interval else ""
    counts = [f"{result[name]:,}" for name in ("num_latents", "stride", "num_tokens")]
    rows.append([f"{result['split']}, step {result['step']:,}", f"{result[unit]:.4f} {unit}", ends, *counts])
  return _table(rows, ("evaluation", "result", "95% interval", "latents", "stride", "tokens"))


def _samples(folder: epath.Path) -> str:
  """Returns pictures and texts, which are truncated; empty if there are no samples."""
  paths = [path for path in sorted(folder.iterdir()) if path.suffix in (".png", ".txt")] if folder.exists() else []
  figures = []
  for path in paths[:_MAX_SAMPLES]:
    if path.suffix == ".png":
      content = _image(path.read_bytes())
    else:
      content = f"<pre>{html.escape(path.read_bytes().decode(errors='replace')[:_MAX_CHARACTERS])}</pre>"
    figures.append(f"<figure>{content}<figcaption>{html.escape(path.name)}</figcaption></figure>")
  return "".join(figures)
