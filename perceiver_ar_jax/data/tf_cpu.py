"""TensorFlow, hidden from accelerators and quiet, and the libraries that import it: import them from here.

TensorFlow would allocate all memory of every GPU that it sees. The libraries are imported when one of them is first
used, since sampling needs none. So modules must not use them while they are imported themselves: with
`from __future__ import annotations`, type annotations do not.
"""

import os
import sys
import threading
import types
from typing import TYPE_CHECKING

_LOCK = threading.RLock()  # reentrant: registry.py uses seqio as soon as it is imported
_loaded = False


def _load() -> None:
  """Imports the libraries, without the lines that TensorFlow logs meanwhile: it has no setting that hides them."""
  global _loaded
  with _LOCK:
    if _loaded:
      return
    _loaded = True
    stderr = os.dup(2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    try:
      import seqio  # noqa: F401
      import tensorflow as tf
      import tensorflow_datasets as tfds  # noqa: F401

      tf.get_logger().setLevel("ERROR")
      for kind in ("GPU", "TPU"):
        tf.config.set_visible_devices([], kind)
      tf.constant(0)  # some lines are logged at the first operation
    finally:
      os.dup2(stderr, 2)


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
