"""The owner of a workdir: at most one training run writes to it.

flock on WORKDIR/.lock decides between processes of one machine; the kernel releases it however the owner ends. A
heartbeat decides between machines, since few shared file systems carry flock, and where locks do not exist (object
stores): the owner rewrites WORKDIR/owner.json every 10 s, and a run that finds an owner without a lock here watches the
file for 60 s. If it changes, the owner is alive; clocks are never compared.

If two machines start at the same moment, the last to write owner.json is the owner, and the other stops before its
first checkpoint (`Owner.check`). A run that ends removes owner.json, so that the next one need not watch it.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import platform
import threading
import time
import uuid

from etils import epath

from perceiver_ar_jax.config import InputError, TransientError, reading, writing

BEAT_SECONDS = 10
WATCH_SECONDS = 60


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
