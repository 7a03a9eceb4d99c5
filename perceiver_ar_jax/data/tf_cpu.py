"""TensorFlow, hidden from accelerators and quiet, and the libraries that import it: import them from here.

TensorFlow would allocate all memory of every GPU that it sees. The libraries are imported when one of them is first
used, since sampling needs none. So modules must not use them while they are imported themselves: with
`from __future__ import annotations`, type annotations do not.
"""

import contextlib
import os
import subprocess
import sys
import threading
import types
from collections.abc import Iterator
from typing import TYPE_CHECKING

_START_UP_LINES = r"/^(WARNING: All log messages before absl|[IWE]0000 |[0-9-]+ [0-9:.]+: [IWE] )/d"
"""sed: deletes what TensorFlow's C++ code logs, errors of a missing CUDA included; fatal errors (F) stay."""


@contextlib.contextmanager
def _without_start_up_lines() -> Iterator[None]:
  """A context in which sed filters stderr: TensorFlow has no setting for lines that it logs while it is loaded."""
  try:
    stderr = os.dup(2)
    sed = subprocess.Popen(["sed", "-E", _START_UP_LINES], stdin=subprocess.PIPE, stdout=stderr, start_new_session=True)
  except OSError:  # stderr is closed, or no sed
    yield
    return
  os.dup2(sed.stdin.fileno(), 2)
  sed.stdin.close()
  try:
    yield
  finally:
    os.dup2(stderr, 2)
    os.close(stderr)
    with contextlib.suppress(subprocess.TimeoutExpired):  # a process started meanwhile keeps the pipe open
      sed.wait(timeout=5)


_LOCK = threading.RLock()  # reentrant: registry.py uses seqio as soon as it is imported
_loaded = False


def _load() -> None:
  global _loaded
  with _LOCK:
    if _loaded:
      return
    _loaded = True
    with _without_start_up_lines():
      import seqio  # noqa: F401
      import tensorflow as tf
      import tensorflow_datasets as tfds  # noqa: F401

      tf.get_logger().setLevel("ERROR")
      for kind in ("GPU", "TPU"):
        tf.config.set_visible_devices([], kind)
      tf.constant(0)  # some lines are logged at the first operation


class _Late(types.ModuleType):
  """A module that is imported when one of its attributes is read."""

  def __getattr__(self, name: str):
    _load()
    return getattr(sys.modules[self.__name__], name)


if TYPE_CHECKING:
  import seqio
  import tensorflow as tf
  import tensorflow_datasets as tfds
else:
  seqio, tf, tfds = map(_Late, ("seqio", "tensorflow", "tensorflow_datasets"))
