"""The folder of one run: checks that it can be written, and that it belongs to the config and the run that use it."""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator

import jax
from etils import epath

from perceiver_ar_jax.config import Config, InputError, writing
from perceiver_ar_jax.config.config_from_run import flatten, load_config
from perceiver_ar_jax.training.owner import Owner, write_atomically

_RESUMABLE = tuple(
  "attention_map. compilation_cache eval. mesh. plan. sample. model.attention model.logits_chunk model.remat"
  " train.checkpoint_every train.keep_checkpoints train.log_every train.max_skipped train.microbatches"
  " train.on_nonfinite train.optimizer.clip_norm train.optimizer.end_learning_rate train.optimizer.learning_rate"
  " train.profile_at train.steps"
  # Paths of the data, which the pipeline compares with the data before, and of the SentencePiece model, whose
  # fingerprint `prepare` compares.
  " data.cache_dir data.data_dir data.files data.sentencepiece data.validation_files".split()
)
"""Beginnings of the settings that may change when a run resumes; any other change would make it another experiment."""
_SAME_WEIGHTS = tuple(
  "attention_map. compilation_cache data. eval. mesh. plan. sample. seed train. model.attention"
  " model.cross_attend_dropout model.dropout model.dtype model.latent_dropout model.logits_chunk model.memory"
  " model.num_latents model.remat model.segment".split()
)
"""Beginnings of the settings under other values of which trained weights keep their meaning."""
_DATA = tuple(f"data.{name}" for name in "task files split_by split_rule validation_files validation_fraction".split())
"""Settings that choose the data."""


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
    probe.touch()
    probe.unlink()
    checkpoints, fingerprint = workdir / "checkpoints", _sentencepiece_fingerprint(config)
    if path.exists() and checkpoints.exists() and any(step.name.isdigit() for step in checkpoints.iterdir()):
      saved = load_config(workdir)
      changed = _differences(config, saved, ignored=_RESUMABLE) + _other_sentencepiece(config, saved)
      fingerprint = saved.data.sentencepiece_fingerprint  # None in an old run, whose data position has it
      if changed:
        raise InputError(
          f"--workdir={workdir} contains the checkpoints of another config: {'; '.join(changed)}. Give another"
          " --workdir, or resume with the settings in its config.json."
        )
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, sentencepiece_fingerprint=fingerprint))
    if jax.process_index() == 0:
      write_atomically(path, config.to_json())


def _writing(workdir: epath.Path) -> contextlib.AbstractContextManager:
  return writing(f"--workdir={workdir}", "give a folder that you may write to")


def check_model(config: Config, workdir: epath.Path) -> None:
  """Raises InputError unless the weights of `workdir`, and token ids and positions, have the same meaning in `config`.

  Prints a line if the data differ from the training data.
  """
  saved = load_config(workdir)
  changed_data = [name for name, value in flatten(config).items() if name in _DATA and flatten(saved)[name] != value]
  if changed_data and jax.process_index() == 0:
    print(
      f"The data differ from the training data of {workdir}: {', '.join(changed_data)} differ. (Without --config, the"
      " settings of the run are used.)"
    )
  changed = _differences(config, saved, ignored=_SAME_WEIGHTS)
  if changed:
    raise InputError(
      f"--workdir={workdir} contains another model: {'; '.join(changed)}. Use the config it was trained with."
    )
  changed = _other_encoding(config, saved) + _other_sentencepiece(config, saved)
  if changed:
    raise InputError(
      f"--workdir={workdir} was trained on token ids or positions with another meaning: {'; '.join(changed)}. Use the"
      " data settings that it was trained with."
    )


def _other_encoding(config: Config, saved: Config) -> list[str]:
  """Returns the differences in the meaning of ids and positions, apart from the SentencePiece model."""
  from perceiver_ar_jax.data import tasks  # imports TensorFlow

  if config.data == saved.data:
    return []
  # With the same SentencePiece model: that of `saved` may have been moved, and its fingerprint is compared separately.
  old_data = dataclasses.replace(saved.data, sentencepiece=config.data.sentencepiece)
  new, old = (
    {"modality": task.modality, **task.encoding}
    for task in (tasks.get_tasks(data, config.model.max_context + 1)[0][0] for data in (config.data, old_data))
  )
  names = [name for name in old | new if old.get(name) != new.get(name)]
  return [f"{name} was {old.get(name)!r} and is {new.get(name)!r}" for name in names]


def _sentencepiece_fingerprint(config: Config) -> str | None:
  from perceiver_ar_jax.data import sources  # imports TensorFlow

  path = config.data.sentencepiece
  # Reading text raises an error if the file is missing; weights alone can be used without it.
  return sources.sentencepiece_fingerprint(config.data) if path and epath.Path(path).exists() else None


def _other_sentencepiece(config: Config, saved: Config) -> list[str]:
  old_path, path = saved.data.sentencepiece, config.data.sentencepiece
  if (old_path is None) != (path is None):
    return [f"data.sentencepiece was {old_path!r} and is {path!r}"]
  old, new = saved.data.sentencepiece_fingerprint, _sentencepiece_fingerprint(config)
  if None in (old, new) or old == new:
    return []
  return [f"data.sentencepiece was {old_path!r} ({old}) and is {path!r} ({new})"]


def _differences(config: Config, saved: Config, ignored: tuple[str, ...]) -> list[str]:
  new, old = flatten(config), flatten(saved)
  return [
    f"{name} is {old[name]!r} there and {new[name]!r} here"
    for name in new
    if new[name] != old[name] and not name.startswith(ignored)
  ]
