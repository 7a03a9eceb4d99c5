"""Writes the metrics of a run to metrics.jsonl, TensorBoard and the terminal."""

import contextlib
import functools
import html
import json
import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from clu import metric_writers
from etils import epath

from perceiver_ar_jax.config import Config, writing
from perceiver_ar_jax.parallel import distributed
from perceiver_ar_jax.training.workdir import flatten, is_object_store, write_atomically


def read_entries(workdir: epath.Path) -> list[dict]:
  """Returns the logged objects of a run, in order; a line that a kill cut short is left out."""
  path, entries = workdir / "metrics.jsonl", []
  for line in path.read_text().splitlines() if path.exists() else ():
    with contextlib.suppress(ValueError):
      entries.append(json.loads(line))
  return [entry for entry in entries if isinstance(entry, dict) and "step" in entry]


class MetricsLog(contextlib.AbstractContextManager):
  """A context that writes the metrics of one run, from process 0; other processes write nothing.

  Lines of metrics.jsonl after `first_step`, the step that the run resumes from, are dropped. `bits_name` is the name of
  nats / ln 2, such as bits/dim. Raises InputError or TransientError, as do its methods, if the file cannot be written.
  """

  def __init__(self, workdir: epath.Path, config: Config, first_step: int, bits_name: str):
    self._writes, self._bits_name = jax.process_index() == 0, bits_name
    self._path, self._is_object = workdir / "metrics.jsonl", is_object_store(workdir)
    self._writing = functools.partial(writing, self._path, "give this user write access")
    if self._writes:
      self._lines = [json.dumps(entry) + "\n" for entry in read_entries(workdir) if entry["step"] <= first_step]
      with self._writing():
        write_atomically(self._path, "".join(self._lines))
      self._tensorboard = metric_writers.SummaryWriter(str(workdir))
      settings = {name: value for name, value in flatten(config).items() if name.startswith(("model.", "train."))}
      self._tensorboard.write_hparams({name: x for name, x in settings.items() if isinstance(x, int | float | str)})
    self._bar = distributed.progress_bar(total=config.train.steps, initial=first_step, unit="step", smoothing=0.05)

  def progress(self, loss: float, tokens_per_second: float) -> None:
    """Advances the progress bar by one step."""
    bits = f"{loss / math.log(2):.3f} {self._bits_name}"
    self._bar.set_postfix_str(f"loss {loss:.4f}, {bits}, {tokens_per_second:,.0f} tokens/s", refresh=False)
    self._bar.update()

  def write(self, step: int, metrics: Mapping[str, float]) -> None:
    """Appends {"step": step, **metrics} to metrics.jsonl and the scalars to TensorBoard."""
    if self._writes:
      finite = {name: value for name, value in metrics.items() if math.isfinite(value)}  # JSON has no NaN or infinity
      self._lines.append(json.dumps({"step": step, **finite}) + "\n")
      if not self._is_object:
        with self._writing(), self._path.open("a") as file:
          file.write(self._lines.pop())
      self._tensorboard.write_scalars(step, finite)

  def write_samples(self, step: int, samples: Sequence[str | np.ndarray]) -> None:
    """Writes texts and images uint8[height, width, 3] to TensorBoard."""
    for index, sample in enumerate(samples if self._writes else ()):
      if isinstance(sample, str):
        self._tensorboard.write_texts(step, {f"sample/{index}": f"<pre>{html.escape(sample)}</pre>"})
      else:
        self._tensorboard.write_images(step, {f"sample/{index}": sample[None]})

  def flush(self) -> None:
    """Writes the whole metrics.jsonl on object stores (gs://), where lines cannot be appended as they are logged."""
    if self._writes and self._is_object:
      with self._writing():
        self._path.write_text("".join(self._lines))

  def __exit__(self, *unused) -> None:
    self._bar.close()
    self.flush()
    if self._writes:
      self._tensorboard.close()
