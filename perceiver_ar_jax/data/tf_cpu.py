"""TensorFlow, hidden from accelerators and quiet, and the libraries that import it: import them from here.

At its first operation, TensorFlow allocates all memory of every GPU that it sees, which leaves none for JAX.
"""

import contextlib
import os
import subprocess
from collections.abc import Iterator

_START_UP_LINES = r"/^(WARNING: All log messages before absl|[IWE]0000 |[0-9-]+ [0-9:.]+: [IWE] )/d"
"""sed: deletes what TensorFlow's C++ code logs, errors of a missing CUDA included; fatal errors (F) stay."""


@contextlib.contextmanager
def _without_start_up_lines() -> Iterator[None]:
  """A context in which sed filters stderr: TensorFlow has no setting for lines that it logs while it is loaded.

  The filter is a process, so that the last words of a process that crashes still reach the terminal.
  """
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


with _without_start_up_lines():
  import seqio
  import tensorflow as tf
  import tensorflow_datasets as tfds

  tf.get_logger().setLevel("ERROR")
  for _kind in ("GPU", "TPU"):
    tf.config.set_visible_devices([], _kind)
  tf.constant(0)  # some lines are logged at the first operation

__all__ = ["seqio", "tf", "tfds"]
