"""Writes the metrics of a run to metrics.jsonl, TensorBoard and the terminal."""

import html
import math
import sys
from collections.abc import Mapping, Sequence

import numpy as np
import tqdm
from clu import metric_writers
from etils import epath
from tensorboard.plugins.custom_scalar import layout_pb2, metadata

from perceiver_ar_jax.training import metrics_file

_CHARTS = {
  "loss": [("loss", "eval_nats_per_token")],
  "optimizer": [("learning_rate",), ("grad_norm",)],
  "speed": [("tokens_per_second",), ("model_flops_per_second",)],
}
"""TensorBoard's custom scalars: the curves of each chart of each category."""


class NoLog:
  """The log of processes that write nothing."""

  def progress(self, loss: float, tokens_per_second: float) -> None: ...

  def write(self, step: int, metrics: dict[str, float]) -> None: ...

  def write_samples(self, step: int, samples: Sequence[str | np.ndarray]) -> None: ...

  def flush(self) -> None: ...

  def say(self, message: str) -> None: ...

  def __enter__(self) -> "NoLog":
    return self

  def __exit__(self, *unused) -> None: ...


class MetricsLog:
  """Writes the metrics of one run; a resumed run continues from its checkpoint, so that no step is logged twice.

  Args:
    workdir: for metrics.jsonl (training/metrics_file.py) and TensorBoard event files.
    first_step: lines of later steps, from a run that died after its checkpoint, are dropped.
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
    self._file = metrics_file.MetricsFile(workdir, first_step)
    self._tensorboard = metric_writers.SummaryWriter(str(workdir))
    self._tensorboard.write_hparams(settings)
    self._tensorboard.write_summaries(
      0,
      {metadata.CONFIG_SUMMARY_TAG: _layout().SerializeToString()},
      {metadata.CONFIG_SUMMARY_TAG: metadata.create_summary_metadata()},
    )
    self._bits_name = bits_name
    self._bar = tqdm.tqdm(
      total=total_steps,
      initial=first_step,
      unit="step",
      dynamic_ncols=True,
      mininterval=0.5 if sys.stderr.isatty() else 5.0,
      smoothing=0.05,
    )

  def progress(self, loss: float, tokens_per_second: float) -> None:
    """Advances the progress bar by one step."""
    bits = loss / math.log(2)
    self._bar.set_postfix_str(
      f"loss {loss:.4f}, {bits:.3f} {self._bits_name}, {tokens_per_second:,.0f} tokens/s", refresh=False
    )
    self._bar.update()

  def write(self, step: int, metrics: dict[str, float]) -> None:
    """Appends {"step": step, **metrics} to metrics.jsonl and the scalars to TensorBoard."""
    finite = {name: value for name, value in metrics.items() if math.isfinite(value)}  # JSON has no NaN or infinity
    self._file.append(step, finite)
    self._tensorboard.write_scalars(step, finite)

  def write_samples(self, step: int, samples: Sequence[str | np.ndarray]) -> None:
    """Writes texts and pictures uint8[height, width, 3] to TensorBoard."""
    for index, sample in enumerate(samples):
      if isinstance(sample, str):
        self._tensorboard.write_texts(step, {f"sample/{index}": f"<pre>{html.escape(sample)}</pre>"})
      else:
        self._tensorboard.write_images(step, {f"sample/{index}": sample[None]})

  def flush(self) -> None:
    """Writes what object stores get in parts."""
    self._file.flush()

  def say(self, message: str) -> None:
    """Prints a line to standard output without breaking the progress bar."""
    with self._bar.external_write_mode(file=sys.stdout):
      print(message, flush=True)

  def __enter__(self) -> "MetricsLog":
    return self

  def __exit__(self, *unused) -> None:
    self._bar.close()
    self._file.close()
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
