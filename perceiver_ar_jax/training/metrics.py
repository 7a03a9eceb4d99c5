"""Writes the metrics of a run to metrics.jsonl, TensorBoard and the terminal.

metrics.jsonl contains one JSON object per logged step. On a file system, lines are appended as they are logged. Object
stores (gs://) cannot append: there the lines since the last flush become an object metrics-<number>.jsonl, and the
training loop flushes when it saves a checkpoint.
"""

import html
import json
import math
import sys
from collections.abc import Mapping, Sequence

import jax
import numpy as np
import tqdm
from clu import metric_writers
from etils import epath
from tensorboard.plugins.custom_scalar import layout_pb2, metadata

from perceiver_ar_jax.config import writing
from perceiver_ar_jax.training.owner import is_object_store, write_atomically

_FIX = "give this user write access"
_CHARTS = {
  "loss": [("loss", "eval_nats_per_token")],
  "optimizer": [("learning_rate",), ("grad_norm",)],
  "speed": [("tokens_per_second",), ("model_flops_per_second",)],
}
"""TensorBoard's custom scalars: the curves of each chart of each category."""


class MetricsFile:
  """Adds lines to metrics.jsonl.

  Args:
    workdir: folder of the run.
    first_step: lines of later steps, from a run that died after its checkpoint, are dropped.

  Raises:
    InputError, TransientError: as config.writing; so do all methods.
  """

  def __init__(self, workdir: epath.Path, first_step: int):
    self._workdir, self._pending = workdir, []
    paths = _paths(workdir)
    for path in paths:
      lines = path.read_text().splitlines()
      kept = [line for line in lines if (entry := _parse(line)) and entry["step"] <= first_step]
      if kept != lines:
        with writing(path, _FIX):
          write_atomically(path, "".join(f"{line}\n" for line in kept))
    self._number = 1 + max((int(path.stem.partition("-")[2] or -1) for path in paths), default=-1)

  def append(self, step: int, metrics: Mapping[str, float]) -> None:
    """Adds {"step": step, **metrics}; all metrics are finite."""
    self._pending.append(json.dumps({"step": step, **metrics}) + "\n")
    if not is_object_store(self._workdir):
      self.flush()

  def flush(self) -> None:
    """Writes the lines that have been added."""
    if not self._pending:
      return
    text, is_object = "".join(self._pending), is_object_store(self._workdir)
    path = self._workdir / (f"metrics-{self._number:06d}.jsonl" if is_object else "metrics.jsonl")
    with writing(path, _FIX):
      if is_object:
        path.write_text(text)
      else:
        with path.open("a") as file:
          file.write(text)
    self._pending, self._number = [], self._number + is_object


def read_entries(workdir: epath.Path) -> list[dict]:
  """Returns the logged objects of a run, in order; a line that a kill cut short is left out."""
  lines = (line for path in _paths(workdir) for line in path.read_text().splitlines())
  return [entry for line in lines if (entry := _parse(line))]


def _paths(workdir: epath.Path) -> list[epath.Path]:
  whole = workdir / "metrics.jsonl"
  return [*([whole] if whole.exists() else []), *sorted(workdir.glob("metrics-*.jsonl"))]


def _parse(line: str) -> dict | None:
  """Returns the object of a line; None if a kill cut the line short."""
  try:
    entry = json.loads(line)
    return entry if "step" in entry else None
  except (ValueError, TypeError):
    return None


class MetricsLog:
  """A context that writes the metrics of one run, from process 0; other processes write nothing.

  Args:
    workdir: for metrics.jsonl and TensorBoard event files.
    first_step: the step of the checkpoint that the run resumes from; no step is logged twice.
    total_steps: end of the progress bar.
    bits_name: the name of nats / ln 2, such as "bits/dim".
    settings: numbers and words by which TensorBoard's HParams tab compares runs.
  """

  def __init__(
    self,
    workdir: epath.Path,
    *,
    first_step: int,
    total_steps: int,
    bits_name: str,
    settings: Mapping[str, bool | int | float | str],
  ):
    self._writes = jax.process_index() == 0
    self._bits_name = bits_name
    if self._writes:
      self._file = MetricsFile(workdir, first_step)
      self._tensorboard = metric_writers.SummaryWriter(str(workdir))
      self._tensorboard.write_hparams(settings)
      self._tensorboard.write_summaries(
        0,
        {metadata.CONFIG_SUMMARY_TAG: _layout().SerializeToString()},
        {metadata.CONFIG_SUMMARY_TAG: metadata.create_summary_metadata()},
      )
    self._bar = tqdm.tqdm(
      total=total_steps,
      initial=first_step,
      unit="step",
      dynamic_ncols=True,
      mininterval=0.5 if sys.stderr.isatty() else 5.0,
      smoothing=0.05,
      disable=not self._writes,
    )

  def progress(self, loss: float, tokens_per_second: float) -> None:
    """Advances the progress bar by one step."""
    bits = loss / math.log(2)
    self._bar.set_postfix_str(
      f"loss {loss:.4f}, {bits:.3f} {self._bits_name}, {tokens_per_second:,.0f} tokens/s", refresh=False
    )
    self._bar.update()

  def write(self, step: int, metrics: Mapping[str, float]) -> None:
    """Appends {"step": step, **metrics} to metrics.jsonl and the scalars to TensorBoard."""
    if self._writes:
      finite = {name: value for name, value in metrics.items() if math.isfinite(value)}  # JSON has no NaN or infinity
      self._file.append(step, finite)
      self._tensorboard.write_scalars(step, finite)

  def write_samples(self, step: int, samples: Sequence[str | np.ndarray]) -> None:
    """Writes texts and images uint8[height, width, 3] to TensorBoard."""
    for index, sample in enumerate(samples if self._writes else ()):
      if isinstance(sample, str):
        self._tensorboard.write_texts(step, {f"sample/{index}": f"<pre>{html.escape(sample)}</pre>"})
      else:
        self._tensorboard.write_images(step, {f"sample/{index}": sample[None]})

  def flush(self) -> None:
    """Writes the lines that wait for a flush on object stores."""
    if self._writes:
      self._file.flush()

  def print(self, message: str) -> None:
    """Prints a line to standard output without breaking the progress bar."""
    if self._writes:
      with self._bar.external_write_mode(file=sys.stdout):
        print(message, flush=True)

  def __enter__(self) -> "MetricsLog":
    return self

  def __exit__(self, *unused) -> None:
    self._bar.close()
    self.flush()
    if self._writes:
      self._tensorboard.close()


def _layout() -> layout_pb2.Layout:
  """Returns `_CHARTS` in TensorBoard's format, in which names of curves are regular expressions."""
  result = layout_pb2.Layout()
  for title, charts in _CHARTS.items():
    category = result.category.add(title=title)
    for names in charts:
      tags = [f"^{name}$" for name in names]
      category.chart.add(title=", ".join(names), multiline=layout_pb2.MultilineChartContent(tag=tags))
  return result
