"""The folder of one run: it belongs to one config, and to at most one training run at a time.

flock on WORKDIR/.lock decides between processes of one machine; the kernel releases it however the owner ends. A
heartbeat decides between machines, since few shared file systems carry flock, and where locks do not exist (object
stores): the owner rewrites WORKDIR/owner.json every 10 s, and a run that finds an owner without a lock here watches the
file for 60 s. If it changes, the owner is alive; clocks are never compared.

If two machines start at the same moment, the last to write owner.json is the owner, and the other stops before its
first checkpoint (`Owner.check`). A run that ends removes owner.json, so that the next one need not watch it.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib
import platform
import threading
import time
import uuid
from collections.abc import Callable, Iterator

import jax
from etils import epath

from perceiver_ar_jax.config import Config, InputError, TransientError, reading, writing
from perceiver_ar_jax.config.config_from_run import WEIGHTS, flatten, load_config

BEAT_SECONDS = 10
WATCH_SECONDS = 60
_RESUMABLE = tuple(
  "attention_map. compilation_cache eval. mesh. plan. sample. model.attention model.logits_chunk model.remat"
  " train.checkpoint_every train.keep_checkpoints train.log_every train.max_skipped train.microbatches"
  " train.on_nonfinite train.optimizer.clip_norm train.optimizer.decay_steps train.optimizer.end_learning_rate"
  " train.optimizer.learning_rate train.init_from train.profile_at train.steps train.tracker"
  # Paths of the data, which the pipeline compares with the data before, and of the SentencePiece model, whose
  # fingerprint is compared instead.
  " data.data_dir data.files data.sentencepiece data.validation_files".split()
)
"""Beginnings of the settings that may change when a run resumes; any other change would make it another experiment."""
_SAME_WEIGHTS = tuple(
  "attention_map. compilation_cache data. eval. mesh. plan. sample. seed train. model.attention"
  " model.cross_attend_dropout model.dropout model.dtype model.latent_dropout model.logits_chunk model.memory"
  " model.num_latents model.remat model.segment".split()
)
"""Beginnings of the settings under other values of which trained weights keep their meaning."""
_SAME_INITIAL_WEIGHTS = (*_SAME_WEIGHTS, "model.max_context", "model.zero_init")
"""Likewise for weights that training starts from; the longest wavelength, which depends on max_context, is compared."""
_DATA = tuple(f"data.{name}" for name in "task files split_by validation_files validation_fraction".split())
"""Settings that choose the data."""
_FINGERPRINT = "data.sentencepiece_fingerprint"
"""Compared whatever else may change: it decides what token ids mean."""


@contextlib.contextmanager
def own(config: Config, workdir: epath.Path) -> Iterator[Callable[[], None]]:
  """A context in which `workdir` has the config.json of `config` and belongs to this run; process 0 owns it for all.

  Yields a function that raises InputError once another run has taken the workdir over. Raises InputError if another run
  owns it or it contains checkpoints of another experiment, this or TransientError if it cannot be written.
  """
  with writing(f"--workdir={workdir}", "give a folder that you may write to"):
    workdir.mkdir(parents=True, exist_ok=True)
    probe = workdir / f".writable-{jax.process_index()}-{os.getpid()}"
    probe.touch()
    probe.unlink()
  with contextlib.nullcontext() if jax.process_index() else Owner(workdir) as owner:
    path, saved = workdir / "config.json", None
    if path.exists() and has_checkpoints(workdir):
      saved = load_config(workdir)
    elif (workdir / WEIGHTS).exists():
      fix = f"give a new --workdir, with --config.train.init_from={workdir}"
      raise InputError(f"--workdir={workdir} contains exported weights, which training would not resume: {fix}.")
    config = _with_fingerprint(config, saved)
    if saved and (changed := _differences(flatten(config), flatten(saved), ignored=_RESUMABLE)):
      fix = "Use its settings, or another --workdir."
      raise InputError(f"--workdir={workdir} contains the checkpoints of another config: {changed}. {fix}")
    if owner:
      with writing(path, "give this user write access"):
        write_atomically(path, config.to_json())
    yield owner.check if owner else lambda: None


def check_model(config: Config, workdir: epath.Path) -> None:
  """Raises InputError unless the weights of `workdir`, and token ids and positions, have the same meaning in `config`.

  Prints a line if the data differ from the training data.
  """
  saved = load_config(workdir, config)
  config = _with_fingerprint(config, saved)
  new, old = flatten(config), flatten(saved)
  if jax.process_index() == 0 and (data := [name for name in _DATA if new[name] != old[name]]):
    print(
      f"The data differ from the training data of {workdir}: {', '.join(data)} differ. (Without --config, the settings"
      " of the run are used.)"
    )
  if changed := _differences(new, old, ignored=_SAME_WEIGHTS):
    raise InputError(f"--workdir={workdir} contains another model: {changed}. Use the config it was trained with.")
  if config.data == saved.data:
    return
  from perceiver_ar_jax.data import tasks  # imports TensorFlow

  # With the same SentencePiece model: that of `saved` may have been moved, and its fingerprint is the same.
  moved = dataclasses.replace(saved.data, sentencepiece=config.data.sentencepiece)
  new, old = (tasks.get_tasks(data, config.model.max_context + 1)[0][0] for data in (config.data, moved))
  new, old = ({"modality": task.modality, **task.encoding} for task in (new, old))
  if changed := _differences(new, old):
    raise InputError(f"--workdir={workdir} was trained on ids of another meaning: {changed}. Use its data settings.")


def has_checkpoints(workdir: epath.Path) -> bool:
  """Returns whether the workdir contains a checkpoint to resume from."""
  checkpoints = workdir / "checkpoints"
  return checkpoints.exists() and any(step.name.isdigit() for step in checkpoints.iterdir())


def check_initial_weights(config: Config, folder: epath.PathLike) -> None:
  """Raises InputError unless exported weights have the same meaning, and the same SentencePiece model, in `config`."""
  saved = load_config(folder, config)
  new, old = (_with_wavelength(each) for each in (_with_fingerprint(config, saved), saved))
  if changed := _differences(flatten(new), flatten(old), ignored=_SAME_INITIAL_WEIGHTS):
    raise InputError(f"train.init_from={folder} contains weights of another model: {changed}. Use its settings.")


def _with_wavelength(config: Config) -> Config:
  """Returns `config` with the longest wavelength of rotary positions that it implies."""
  model = config.model
  if "rotary" not in model.position_encoding.split("+") or model.rotary_axes:
    return config
  wavelength = model.rotary_max_wavelength or model.max_context
  return dataclasses.replace(config, model=dataclasses.replace(model, rotary_max_wavelength=wavelength))


def _with_fingerprint(config: Config, saved: Config | None) -> Config:
  """Returns `config` with the fingerprint of its SentencePiece model.

  Weights can be used without the model: where its file is missing, the recorded fingerprint stays. A run of 0.1.0 has
  none, and only its data position can be compared.
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


class Owner:
  """A context in which this process owns `workdir`, an existing folder; raises InputError if another run owns it."""

  def __init__(self, workdir: epath.Path):
    self._workdir, self._path = workdir, workdir / "owner.json"
    self._self = {"run": uuid.uuid4().hex, "machine": _machine(), "host": platform.node(), "pid": os.getpid()}
    self._ended, self._stack = threading.Event(), contextlib.ExitStack()
    self._thread = threading.Thread(target=self._keep_beating, daemon=True)

  def __enter__(self) -> "Owner":
    with contextlib.ExitStack() as stack:
      is_locked, owner = self._lock(stack), self._read()
      # An owner on this machine would hold the lock.
      if owner and not (is_locked and owner.get("machine") == self._self["machine"]):
        self._watch(owner)
      self._beat()
      self._thread.start()
      self._stack = stack.pop_all()
    return self

  def __exit__(self, *unused) -> None:
    self._ended.set()
    self._thread.join()
    with self._stack, contextlib.suppress(OSError):
      if self._is_owner():
        self._path.unlink()

  def check(self) -> None:
    """Raises InputError if another run has become the owner."""
    with contextlib.suppress(TransientError):  # the file could not be read, which proves nothing
      if not self._is_owner():
        raise self._in_use("has been taken over by")

  def _lock(self, stack: contextlib.ExitStack) -> bool:
    """Locks the workdir until the stack is closed; returns False where files cannot be locked."""
    if is_object_store(self._workdir):
      return False
    with writing(f"--workdir={self._workdir}", "give this user write access"):
      file = stack.enter_context(open(self._workdir / ".lock", "a"))
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise self._in_use("is in use by") from None
    except OSError:  # a file system without locks
      return False
    return True

  def _watch(self, owner: dict) -> None:
    """Raises InputError if the owner is alive."""
    host, seconds = owner.get("host"), WATCH_SECONDS
    print(f"{self._workdir} was last used on {host}, which did not release it: watching for {seconds} s.", flush=True)
    deadline = time.monotonic() + WATCH_SECONDS
    while time.monotonic() < deadline and (latest := self._read()):
      if latest != owner:
        raise self._in_use("is in use by")
      time.sleep(min(1, BEAT_SECONDS / 2))

  def _in_use(self, how: str) -> InputError:
    owner = self._read() or {}
    return InputError(
      f"--workdir={self._workdir} {how} another training run (process {owner.get('pid')} on {owner.get('host')}). Stop"
      " that run or wait for its end, or give another --workdir."
    )

  def _read(self) -> dict | None:
    """Returns the contents of owner.json; None if it is missing or damaged."""
    with reading(self._path, "give this user access"):
      try:
        return dict(json.loads(self._path.read_text()))
      except (FileNotFoundError, ValueError, TypeError):
        return None

  def _is_owner(self) -> bool:
    owner = self._read()
    return not owner or owner.get("run") == self._self["run"]

  def _beat(self) -> None:
    with writing(self._path, "give this user write access"):
      write_atomically(self._path, json.dumps(self._self | {"time": time.time()}) + "\n")

  def _keep_beating(self) -> None:
    while not self._ended.wait(BEAT_SECONDS):
      with contextlib.suppress(Exception):  # storage out of reach; training itself reports that
        if not self._is_owner():
          return
        self._beat()


def write_atomically(path: epath.Path, text: str) -> None:
  """Writes a small file; readers, at the same time or after a crash, get the old text or the new one."""
  temporary = path.with_name(f"{path.name}.tmp")
  temporary.write_text(text)
  temporary.replace(path)


def is_object_store(path: epath.Path) -> bool:
  """Returns whether the path is a URL such as gs://bucket/run, where files can be neither appended to nor locked."""
  return "://" in str(path)


def _machine() -> str:
  """Returns a name of this machine, or container, that changes when it is restarted."""
  boot = pathlib.Path("/proc/sys/kernel/random/boot_id")
  return f"{platform.node()} {boot.read_text().strip() if boot.exists() else uuid.getnode()}"
