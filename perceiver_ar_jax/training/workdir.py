"""The folder of one run: it belongs to one config, and to at most one training run at a time.

flock on WORKDIR/.lock decides: the kernel releases it however the owner ends. Where files cannot be locked (object
stores), or locks are not seen by other machines, the run that started last is the owner: it writes WORKDIR/owner.json,
and the one before stops before its next checkpoint.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import platform
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import jax
from etils import epath
from flax import traverse_util

from perceiver_ar_jax.config import Config, InputError, require, writing
from perceiver_ar_jax.config.config_from_run import WEIGHTS, load_config

_RESUMABLE = tuple(
  "attention_map. eval. mesh. plan. sample. model.attention model.logits_chunk model.remat"
  " train.checkpoint_every train.keep_checkpoints train.log_every train.max_skipped train.microbatches"
  " train.on_nonfinite train.optimizer.clip_norm train.optimizer.decay_steps train.optimizer.end_learning_rate"
  " train.optimizer.learning_rate train.init_from train.profile_at train.steps"
  # Paths of the data, which the pipeline compares with the data before, and of the SentencePiece model, whose
  # fingerprint is compared instead.
  " data.data_dir data.files data.sentencepiece data.validation_files".split()
)
"""Beginnings of the settings that may change when a run resumes; any other change would make it another experiment."""
_SAME_WEIGHTS = tuple(
  "attention_map. data. eval. mesh. plan. sample. seed train. model.attention"
  " model.cross_attend_dropout model.dropout model.dtype model.latent_dropout model.logits_chunk model.memory"
  " model.num_latents model.remat model.segment".split()
)
"""Beginnings of the settings under other values of which trained weights keep their meaning."""
_SAME_INITIAL_WEIGHTS = (*_SAME_WEIGHTS, "model.max_context", "model.zero_init")
"""Likewise for weights that training starts from; the longest wavelength, which depends on max_context, is compared."""
_FINGERPRINT = "data.sentencepiece_fingerprint"  # always compared: it decides what token ids mean


@contextlib.contextmanager
def own(config: Config, workdir: epath.Path) -> Iterator[Callable[[], None]]:
  """A context in which `workdir` has the config.json of `config` and belongs to this run; process 0 owns it for all.

  Yields a function that raises InputError once another run owns the workdir. Raises InputError if another run owns it
  or it contains checkpoints of another experiment, this or TransientError if it cannot be written.
  """
  with writing(f"--workdir={workdir}", "give a folder that you may write to"):
    workdir.mkdir(parents=True, exist_ok=True)
  with contextlib.nullcontext() if jax.process_index() else _locked(workdir):
    path = workdir / "config.json"
    saved = load_config(workdir) if path.exists() and has_checkpoints(workdir) else None
    is_run = saved is not None or not (workdir / WEIGHTS).exists()
    fix = f"to train them, give a new --workdir with --config.train.init_from={workdir}"
    require(is_run, f"--workdir={workdir} contains exported weights: {fix}.")
    config = _with_fingerprint(config, saved)
    changed = saved and _differences(flatten(config), flatten(saved), ignored=_RESUMABLE)
    require(not changed, f"--workdir={workdir} contains the checkpoints of another config: {changed}: give a new one.")
    if jax.process_index():
      yield lambda: None
      return
    # Only now, since a run elsewhere that this one replaces stops: a refused run must not end it.
    owner, run = workdir / "owner.json", uuid.uuid4().hex
    with writing(f"--workdir={workdir}", "give this user write access"):
      write_atomically(owner, json.dumps({"run": run, "host": platform.node(), "pid": os.getpid()}) + "\n")
      write_atomically(path, config.to_json())

    def check() -> None:
      if _read_owner(owner).get("run", run) != run:
        raise _in_use(workdir, "has been taken over by")

    yield check


def check_model(config: Config, workdir: epath.Path) -> None:
  """Raises InputError unless weights, token ids and positions have the same meaning in `config` as in `workdir`."""
  saved = load_config(workdir)
  config = _with_fingerprint(config, saved)
  changed = _differences(flatten(config), flatten(saved), ignored=_SAME_WEIGHTS)
  require(not changed, f"--workdir={workdir} contains another model: {changed}. Use the config it was trained with.")
  if config.data == saved.data:
    return
  from perceiver_ar_jax.data import tasks  # imports TensorFlow

  # With the same SentencePiece model: that of `saved` may have been moved, and its fingerprint is the same.
  moved = dataclasses.replace(saved.data, sentencepiece=config.data.sentencepiece)
  new, old = (tasks.get_tasks(data, config.model.max_context + 1)[0][0] for data in (config.data, moved))
  new, old = ({"modality": task.modality, **task.encoding} for task in (new, old))
  changed = _differences(new, old)
  require(not changed, f"--workdir={workdir} was trained on ids of another meaning: {changed}. Use its data settings.")


def has_checkpoints(workdir: epath.Path) -> bool:
  """Returns whether the workdir contains a checkpoint to resume from."""
  checkpoints = workdir / "checkpoints"
  return checkpoints.exists() and any(step.name.isdigit() for step in checkpoints.iterdir())


def check_initial_weights(config: Config, folder: epath.PathLike) -> None:
  """Raises InputError unless exported weights have the same meaning, and the same SentencePiece model, in `config`."""
  saved = load_config(folder)
  new, old = flatten(_with_fingerprint(config, saved)), flatten(saved)
  if "rotary" in config.model.position_encoding.split("+") and not config.model.rotary_axes:
    wavelength = "model.rotary_max_wavelength"
    for settings in (new, old):
      settings[wavelength] = settings[wavelength] or settings["model.max_context"]  # which None implies
  changed = _differences(new, old, ignored=_SAME_INITIAL_WEIGHTS)
  require(not changed, f"train.init_from={folder} contains weights of another model: {changed}. Use its settings.")


def flatten(config: Config) -> dict[str, Any]:
  """Returns every setting by its dotted name, such as train.steps."""
  return traverse_util.flatten_dict(dataclasses.asdict(config), sep=".")


def _with_fingerprint(config: Config, saved: Config | None) -> Config:
  """Returns `config` with the fingerprint of its SentencePiece model; where its file is missing, with that of `saved`.

  A run of 0.1.0 has none, and only its data position can be compared.
  """
  from perceiver_ar_jax.data import sources  # imports TensorFlow

  data, old = config.data, saved and saved.data
  if data.sentencepiece and old and old.sentencepiece and not old.sentencepiece_fingerprint:
    fingerprint = None
  elif data.sentencepiece and not epath.Path(data.sentencepiece).exists():
    fingerprint = data.sentencepiece_fingerprint or (old and old.sentencepiece_fingerprint)
  else:
    fingerprint = sources.sentencepiece_fingerprint(data)
  return dataclasses.replace(config, data=dataclasses.replace(data, sentencepiece_fingerprint=fingerprint))


def _differences(new: dict, old: dict, ignored: tuple[str, ...] = ()) -> str:
  """Returns the changes, as one text, of all settings that do not begin with one of `ignored`."""
  return "; ".join(
    f"{name} was {old.get(name)!r} and is {new.get(name)!r}"
    for name in old | new
    if old.get(name) != new.get(name) and (name == _FINGERPRINT or not name.startswith(ignored))
  )


@contextlib.contextmanager
def _locked(workdir: epath.Path) -> Iterator[None]:
  """A context with the lock of `workdir`, where files can be locked; raises InputError if another process has it."""
  if is_object_store(workdir):
    yield
    return
  with writing(f"--workdir={workdir}", "give this user write access"):
    file = open(workdir / ".lock", "a")
  with file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise _in_use(workdir, "is in use by") from None
    except OSError:  # a file system without locks
      pass
    yield


def _in_use(workdir: epath.Path, how: str) -> InputError:
  owner = _read_owner(workdir / "owner.json")
  name = f"another training run (process {owner.get('pid')} on {owner.get('host')})"
  return InputError(f"--workdir={workdir} {how} {name}. Stop that run or wait for its end, or give another --workdir.")


def _read_owner(path: epath.Path) -> dict:
  """Returns the contents of owner.json; empty if it is missing or damaged, or cannot be read, which proves nothing."""
  try:
    return dict(json.loads(path.read_text()))
  except (OSError, ValueError, TypeError):
    return {}


def write_atomically(path: epath.Path, text: str) -> None:
  """Writes a small file; readers, at the same time or after a crash, get the old text or the new one."""
  temporary = path.with_name(f"{path.name}.tmp")
  temporary.write_text(text)
  temporary.replace(path)


def is_object_store(path: epath.Path) -> bool:
  """Returns whether the path is a URL such as gs://bucket/run, where files can be neither appended to nor locked."""
  return "://" in str(path)
