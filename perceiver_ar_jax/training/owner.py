"""The owner of a workdir: at most one training run writes to it.

Two mechanisms, since neither is enough alone:

- flock on WORKDIR/.lock decides between processes of one machine, at once and without races. The kernel releases it
  however the owner ends (kill -9 included), so no process ids need to be checked: they are reused, and containers do
  not share them. Object stores have no locks; there the lock file is in the machine's temporary folder.
- A heartbeat decides between machines, since not every shared file system carries flock across them. The owner rewrites
  WORKDIR/owner.json every 10 s. A run that finds the file of another machine watches it for 60 s: a file that changes
  has a living owner, one that does not has a dead one. Clocks of two machines are never compared.

If two machines start at the same moment, the last to write owner.json is the owner, and the other stops before its
first checkpoint (`Owner.check`). A run that ends removes owner.json, so that the next one need not watch it.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
import platform
import tempfile
import threading
import time
import uuid

from etils import epath

from perceiver_ar_jax.config import InputError, TransientError, reading, writing

BEAT_SECONDS = 10
WATCH_SECONDS = 60
_BOOT_ID = pathlib.Path("/proc/sys/kernel/random/boot_id")


class Owner:
  """A context in which this process owns `workdir`, an existing folder.

  Raises:
    InputError: another run owns it, or it cannot be written.
    TransientError: as `writing`.
  """

  def __init__(self, workdir: epath.Path):
    self._workdir = workdir
    self._path = workdir / "owner.json"
    self._self = {"run": uuid.uuid4().hex, "machine": _machine(), "host": platform.node(), "pid": os.getpid()}
    self._beats = 0
    self._ended = threading.Event()
    self._thread = threading.Thread(target=self._keep_beating, daemon=True)

  def __enter__(self) -> "Owner":
    with contextlib.ExitStack() as stack:
      stack.enter_context(self._lock())
      self._watch_other_machine()
      with writing(self._path, "give this user write access"):
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
    with contextlib.suppress(TransientError):  # the file does not say so
      if not self._is_owner():
        raise self._in_use("has been taken over by")

  @contextlib.contextmanager
  def _lock(self):
    with writing(f"--workdir={self._workdir}", "give this user write access"), contextlib.ExitStack() as stack:
      for path in _lock_files(self._workdir):
        file = stack.enter_context(open(path, "a"))
        try:
          fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
          break
        except BlockingIOError:
          raise self._in_use("is in use by") from None
        except OSError:  # a file system without locks: the next file
          continue
      locked = stack.pop_all()
    with locked:
      yield

  def _watch_other_machine(self) -> None:
    owner = self._read()
    if not owner or owner.get("machine") == self._self["machine"]:
      return  # an owner on this machine would hold the lock
    print(
      f"{self._workdir} was last used on {owner.get('host')}, which did not release it. Watching for"
      f" {WATCH_SECONDS} s whether that run is alive.",
      flush=True,
    )
    deadline = time.monotonic() + WATCH_SECONDS
    while time.monotonic() < deadline and (latest := self._read()):
      if latest != owner:
        raise self._in_use("is in use by")
      time.sleep(min(1, BEAT_SECONDS / 2))

  def _in_use(self, what: str) -> InputError:
    owner = self._read() or {}
    who = f"process {owner.get('pid')} on {owner.get('host')}" if owner else "another process"
    return InputError(
      f"--workdir={self._workdir} {what} another training run ({who}). Stop that run or wait for its end, or give"
      " another --workdir. (Evaluation, samples and reports need not wait.)"
    )

  def _read(self) -> dict | None:
    """The contents of owner.json; None where it is missing or is not what an owner writes."""
    with reading(self._path, "give this user access"):
      try:
        contents = json.loads(self._path.read_text()) if self._path.exists() else None
      except (FileNotFoundError, ValueError):  # removed meanwhile, or not JSON
        return None
    return contents if isinstance(contents, dict) else None

  def _is_owner(self) -> bool:
    owner = self._read()
    return owner is None or owner.get("run") == self._self["run"]

  def _beat(self) -> None:
    self._beats += 1
    write_atomically(self._path, json.dumps(self._self | {"beats": self._beats}) + "\n")

  def _keep_beating(self) -> None:
    while not self._ended.wait(BEAT_SECONDS):
      with contextlib.suppress(Exception):  # storage out of reach; training itself reports that
        if not self._is_owner():
          return
        self._beat()


def write_atomically(path: epath.Path, text: str) -> None:
  """Writes a small file: whoever reads it meanwhile, or after a crash, gets the old text or the new one."""
  temporary = path.with_name(f"{path.name}.tmp")
  temporary.write_text(text)
  temporary.replace(path)


def is_object_store(path: epath.Path) -> bool:
  """Whether the path is a URL such as gs://bucket/run, where files can be neither appended to nor locked."""
  return "://" in str(path)


def _lock_files(workdir: epath.Path) -> list[str]:
  """Files to try to lock, in this order."""
  name = hashlib.sha256(str(workdir).encode()).hexdigest()[:16]
  local = os.path.join(tempfile.gettempdir(), f"perceiver_ar_jax-{os.getuid()}-{name}.lock")
  return [local] if is_object_store(workdir) else [os.fspath(workdir / ".lock"), local]


def _machine() -> str:
  """A name of this machine, or container, since it was started: what a lock in its file system may be relied on for."""
  boot = _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else str(uuid.getnode())
  return f"{platform.node()} {boot}"
