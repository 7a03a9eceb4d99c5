"""Writes the metrics of a run to metrics.jsonl, TensorBoard, the terminal, and a tracker if one is set.

Lines are appended to metrics.jsonl as they are logged; object stores (gs://) cannot append, so there the whole file is
written at each flush, that is, with each checkpoint.
"""

import contextlib
import functools
import html
import importlib
import json
import math
import os
import secrets
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import numpy as np
import tqdm
from clu import metric_writers
from etils import epath

from perceiver_ar_jax.config import Config, InputError, checks, writing
from perceiver_ar_jax.config.config_from_run import flatten
from perceiver_ar_jax.parallel import distributed
from perceiver_ar_jax.training.workdir import is_object_store, write_atomically


def read_entries(workdir: epath.Path) -> list[dict]:
  """Returns the logged objects of a run, in order; a line that a kill cut short is left out."""
  path, entries = workdir / "metrics.jsonl", []
  for line in path.read_text().splitlines() if path.exists() else ():
    with contextlib.suppress(ValueError):
      entries.append(json.loads(line))
  return [entry for entry in entries if isinstance(entry, dict) and "step" in entry]


def import_tracker(name: str) -> types.ModuleType | None:
  """Returns the package of train.tracker, None for "none"; raises InputError if it is not installed."""
  with contextlib.suppress(ImportError):
    package = importlib.import_module(name) if name != "none" else None
    if package is None or hasattr(package, "init"):  # a folder of this name is imported, too
      return package
  fix = f"pip install -e '.[{name}]', or train with --config.train.tracker=none"
  raise InputError(f"train.tracker={name} needs the package {name}, which is not installed: {fix}.")


@contextlib.contextmanager
def track(package: types.ModuleType | None, workdir: epath.Path, config: Config) -> Iterator[Callable]:
  """A context whose function (step, metrics) sends metrics, from process 0, to the run of WORKDIR/tracker_id.

  Any failure of the tracker ends tracking and not training.
  """
  run, path = None, workdir / "tracker_id"

  def attempt(call: Callable, *arguments, **named):
    nonlocal run
    try:
      return call(*arguments, **named)
    except Exception as error:  # of a service that training does not need
      run, problem = None, f"{type(error).__name__}: {checks.one_line(error)}"
      tqdm.tqdm.write(f"Warning: the tracker failed; training continues without it ({problem}).", file=sys.stderr)

  if package is not None and jax.process_index() == 0:
    with writing(path, "give this user write access"):
      if not path.exists():
        write_atomically(path, secrets.token_hex(4))
      run_id = path.read_text()
    settings = {"config": json.loads(config.to_json()), "resume": "allow", "name": f"{workdir.name}-{run_id}"}
    if package.__name__ == "wandb":  # trackio identifies runs by their names
      folder = None if is_object_store(workdir) else os.fspath(workdir)
      settings |= {"id": run_id, "dir": folder, "allow_val_change": True}
    project = os.environ.get(f"{package.__name__.upper()}_PROJECT", "perceiver_ar_jax")
    run = attempt(package.init, project=project, **settings)
  try:
    yield lambda step, metrics: run and attempt(run.log, metrics, step=step)
  finally:
    run and attempt(run.finish)


class MetricsLog(contextlib.AbstractContextManager):
  """A context that writes the metrics of one run, from process 0; other processes write nothing.

  Lines of metrics.jsonl after `first_step`, the step that the run resumes from, are dropped. `bits_name` is the name of
  nats / ln 2, such as bits/dim. Raises InputError or TransientError, as do its methods, if the file cannot be written.
  """

  def __init__(self, workdir: epath.Path, config: Config, first_step: int, bits_name: str, track: Callable):
    self._writes, self._bits_name, self._track = jax.process_index() == 0, bits_name, track
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
    """Appends {"step": step, **metrics} to metrics.jsonl and the scalars to TensorBoard and the tracker."""
    if self._writes:
      finite = {name: value for name, value in metrics.items() if math.isfinite(value)}  # JSON has no NaN or infinity
      self._lines.append(json.dumps({"step": step, **finite}) + "\n")
      if not self._is_object:
        with self._writing(), self._path.open("a") as file:
          file.write(self._lines.pop())
      self._tensorboard.write_scalars(step, finite)
      self._track(step, finite)

  def write_samples(self, step: int, samples: Sequence[str | np.ndarray]) -> None:
    """Writes texts and images uint8[height, width, 3] to TensorBoard."""
    for index, sample in enumerate(samples if self._writes else ()):
      if isinstance(sample, str):
        self._tensorboard.write_texts(step, {f"sample/{index}": f"<pre>{html.escape(sample)}</pre>"})
      else:
        self._tensorboard.write_images(step, {f"sample/{index}": sample[None]})

  def flush(self) -> None:
    """Writes metrics.jsonl on object stores."""
    if self._writes and self._is_object:
      with self._writing():
        self._path.write_text("".join(self._lines))

  def print(self, message: str) -> None:
    """Prints a line to standard output without breaking the progress bar."""
    if self._writes:
      with self._bar.external_write_mode(file=sys.stdout):
        print(message, flush=True)

  def __exit__(self, *unused) -> None:
    self._bar.close()
    self.flush()
    if self._writes:
      self._tensorboard.close()
