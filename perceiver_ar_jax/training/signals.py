"""Signals that end a training run: it stops after a step, with everything saved.

SIGTERM and SIGINT (Ctrl-C) come from people and preemption, SIGUSR1 from batch schedulers that announce a time limit,
SIGHUP from a terminal that closes.
"""

import os
import signal

from perceiver_ar_jax.parallel import distributed

_STDOUT, _STDERR = 1, 2
_HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


class Signals:
  """A context that remembers the first of these signals; a second one has its usual effect.

  A second SIGHUP is ignored: a shell whose terminal closes sends one in addition to the kernel's. SIGHUP remains
  ignored where the run was started with it ignored (nohup).
  """

  def __init__(self):
    self.received = 0
    """The signal that this process received."""
    self.agreed = 0
    """The signal that any process received, as of the last call of `agree`."""
    self._maximum = distributed.DelayedMaximum()

  def agree(self, wait: bool = False) -> int:
    """Updates and returns `agreed`; all processes call it at the same steps, so they stop at the same step.

    Without `wait`, it includes the signals received before the previous call.
    """
    self.agreed = self.agreed or (distributed.maximum if wait else self._maximum)(self.received)
    return self.agreed

  @property
  def name(self) -> str:
    """Name of the signal, such as SIGTERM."""
    return signal.Signals(self.agreed or self.received).name

  def __enter__(self) -> "Signals":
    self._terminals = [stream for stream in (_STDOUT, _STDERR) if os.isatty(stream)]
    self._handlers_before = {
      number: signal.signal(number, self._remember)
      for number in _HANDLED
      if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN
    }
    return self

  def __exit__(self, *unused) -> None:
    for number, handler in self._handlers_before.items():
      signal.signal(number, handler)

  def _remember(self, number: int, frame) -> None:
    del frame
    self.received = number
    signal.signal(number, signal.SIG_IGN if number == signal.SIGHUP else self._handlers_before[number])
    again = "" if number == signal.SIGHUP else " A second one ends the run at once, without saving."
    # print is not reentrant, and a handler runs anywhere.
    _write(_STDERR, f"\n{self.name}: stopping after this step.{again}\n")
    if number == signal.SIGHUP:
      _silence_closed(self._terminals)


def _write(stream: int, text: str) -> bool:
  """Writes to a file descriptor; returns whether that succeeded."""
  try:
    return os.write(stream, text.encode()) >= 0
  except OSError:
    return False


def _silence_closed(terminals: list[int]) -> None:
  """Redirects output to a terminal that has closed to os.devnull: an error in print would end the run unsaved."""
  for stream in terminals:
    if not _write(stream, "\n"):
      devnull = os.open(os.devnull, os.O_WRONLY)
      os.dup2(devnull, stream)
      os.close(devnull)
