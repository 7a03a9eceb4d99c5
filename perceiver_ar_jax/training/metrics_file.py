"""metrics.jsonl: one JSON object per logged step.

On a file system, lines are appended as they come. Object stores (gs://) cannot append, so there the lines since the
last flush become an object of their own, metrics-<number>.jsonl; the training loop flushes when it saves a checkpoint.
`read` reads both.
"""

import json
from collections.abc import Iterable

from etils import epath

from perceiver_ar_jax.config import writing
from perceiver_ar_jax.training.owner import is_object_store, write_atomically

_FIX = "give this user write access"


def read(workdir: epath.Path) -> list[dict]:
  """Returns the logged objects, in order; a line that a kill cut short is left out."""
  return [entry for path in _paths(workdir) for line in _lines(path) if (entry := _parse(line))]


class MetricsFile:
  """Adds lines to the metrics of a run.

  Args:
    workdir: folder of the run.
    first_step: lines of later steps, from a run that died after its checkpoint, are dropped.

  Raises:
    InputError, TransientError: as config.writing; so do all methods.
  """

  def __init__(self, workdir: epath.Path, first_step: int):
    self._workdir, self._pending = workdir, []
    for path in _paths(workdir):
      lines = _lines(path)
      kept = [line for line in lines if _parse(line) and _parse(line)["step"] <= first_step]
      if kept != lines:
        with writing(path, _FIX):
          write_atomically(path, _text(kept))
    self._number = 1 + max((int(path.stem.removeprefix("metrics-")) for path in _parts(workdir)), default=-1)
    self._file = None
    if not is_object_store(workdir):
      self._path = workdir / "metrics.jsonl"
      with writing(self._path, _FIX):
        self._file = self._path.open("a")

  def append(self, step: int, metrics: dict[str, float]) -> None:
    """Adds {"step": step, **metrics}; all metrics are finite."""
    self._pending.append(json.dumps({"step": step, **metrics}))
    if self._file:
      self.flush()

  def flush(self) -> None:
    """Writes what has been added."""
    if not self._pending:
      return
    path = self._path if self._file else self._workdir / f"metrics-{self._number:06d}.jsonl"
    with writing(path, _FIX):
      if self._file:
        self._file.write(_text(self._pending))
        self._file.flush()
      else:
        path.write_text(_text(self._pending))
        self._number += 1
    self._pending = []

  def close(self) -> None:
    self.flush()
    if self._file:
      with writing(self._path, _FIX):
        self._file.close()


def _paths(workdir: epath.Path) -> list[epath.Path]:
  whole = workdir / "metrics.jsonl"
  return [*([whole] if whole.exists() else []), *_parts(workdir)]


def _parts(workdir: epath.Path) -> list[epath.Path]:
  return sorted(workdir.glob("metrics-*.jsonl"))


def _lines(path: epath.Path) -> list[str]:
  return path.read_text().splitlines()


def _text(lines: Iterable[str]) -> str:
  return "".join(line + "\n" for line in lines)


def _parse(line: str) -> dict | None:
  """The object of a line; None for one that a kill cut short."""
  try:
    entry = json.loads(line)
    return entry if "step" in entry else None
  except (ValueError, TypeError):
    return None
