"""The folder of one run: that it can be written, and that it belongs to the config and the run about to use it."""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
from etils import epath

from perceiver_ar_jax.config import Config, InputError, reading, writing
from perceiver_ar_jax.training.owner import Owner, write_atomically

# A run may resume with other values of these; any other change would make it another experiment.
RESUMABLE = (
  "train.steps",
  "train.microbatches",
  "train.optimizer.learning_rate",
  "train.optimizer.end_learning_rate",
  "train.optimizer.clip_norm",
  "train.log_every",
  "train.checkpoint_every",
  "train.keep_checkpoints",
  "train.profile_at",
  "train.on_nonfinite",
  "train.max_skipped",
  "eval.",
  "sample.",
  "attention_map.",
  "mesh.",
  "compilation_cache",
  "plan.",
  "data.data_dir",  # where the data is; the pipeline itself checks that it is the same data
  "data.cache_dir",
  "data.files",
  "data.validation_files",
  "data.sentencepiece",
  "model.attention",
  "model.logits_chunk",
  "model.remat",
)
# Trained weights keep their meaning under other values of these.
SAME_WEIGHTS = (
  "model.num_latents",
  "model.segment",
  "model.memory",
  "model.dropout",
  "model.latent_dropout",
  "model.cross_attend_dropout",
  "model.attention",
  "model.logits_chunk",
  "model.remat",
  "model.dtype",
  "data.",
  "train.",
  "eval.",
  "sample.",
  "attention_map.",
  "mesh.",
  "compilation_cache",
  "plan.",
  "seed",
)
_DATA = ("data.task", "data.files", "data.split_by", "data.validation_files", "data.validation_fraction")


@contextlib.contextmanager
def own(config: Config, workdir: epath.Path) -> Iterator[Callable[[], None]]:
  """A context in which `workdir` is prepared for `config` and belongs to this run; process 0 owns it for all.

  Yields a function that raises InputError once another run has taken the workdir over.

  Raises:
    InputError: as `prepare`, or another run owns the workdir.
    TransientError: as `prepare`.
  """
  with _writing(workdir):
    workdir.mkdir(parents=True, exist_ok=True)
  with contextlib.nullcontext() if jax.process_index() else Owner(workdir) as owner:
    prepare(config, workdir)
    yield owner.check if owner else lambda: None


def prepare(config: Config, workdir: epath.Path) -> None:
  """Creates the folder and writes config.json.

  Raises:
    InputError: it cannot be written, or contains checkpoints of another experiment.
    TransientError: it cannot be written, and may be later, such as on a full disk.
  """
  path = workdir / "config.json"
  with _writing(workdir):
    workdir.mkdir(parents=True, exist_ok=True)
    probe = workdir / f".writable-{jax.process_index()}-{os.getpid()}"
    probe.write_text("")
    probe.unlink()
    checkpoints = workdir / "checkpoints"
    if path.exists() and checkpoints.exists() and any(step.name.isdigit() for step in checkpoints.iterdir()):
      changed = _differences(config, load_config(workdir), ignored=RESUMABLE)
      if changed:
        raise InputError(
          f"--workdir={workdir} contains the checkpoints of another config: {'; '.join(changed)}. Give another"
          " --workdir, or resume with the settings in its config.json."
        )
    if jax.process_index() == 0:
      write_atomically(path, config.to_json())


def _writing(workdir: epath.Path) -> contextlib.AbstractContextManager:
  return writing(f"--workdir={workdir}", "give a folder that you may write to")


def check_model(config: Config, workdir: epath.Path) -> None:
  """Raises InputError unless the weights in `workdir` mean the same in the model of `config`.

  Prints a line if the data differ from those of training.
  """
  saved = load_config(workdir)
  changed_data = [name for name, value in flatten(config).items() if name in _DATA and flatten(saved)[name] != value]
  if changed_data and jax.process_index() == 0:
    print(
      f"Not the data that {workdir} was trained on: {', '.join(changed_data)} differ. (Without --config, the run's own"
      " settings are used.)"
    )
  changed = _differences(config, saved, ignored=SAME_WEIGHTS)
  if changed:
    raise InputError(
      f"--workdir={workdir} contains another model: {'; '.join(changed)}. Use the config it was trained with."
    )


def load_config(workdir: epath.Path) -> Config:
  """Returns the config that a run wrote; raises InputError where it is missing or invalid."""
  path = workdir / "config.json"
  if not path.exists():
    raise InputError(f"--workdir={workdir} contains no run (no config.json): train first, or check the path.")
  with reading(path, "give this user access"):
    text = path.read_text()
  try:
    return Config.from_json(text)
  except (ValueError, TypeError, AttributeError) as error:
    raise InputError(f"{path} cannot be read ({error}): restore it, or use another --workdir.") from error


def _differences(config: Config, saved: Config, ignored: tuple[str, ...]) -> list[str]:
  new, old = flatten(config), flatten(saved)
  return [
    f"{name} is {old[name]!r} there and {new[name]!r} here"
    for name in new
    if new[name] != old[name] and not name.startswith(ignored)
  ]


def flatten(config: Config) -> dict[str, Any]:
  """Returns every setting by its dotted name, such as train.steps."""
  return dict(_flatten(dataclasses.asdict(config)))


def _flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
  for name, value in tree.items():
    if isinstance(value, dict):
      yield from _flatten(value, f"{prefix}{name}.")
    else:
      yield prefix + name, value
