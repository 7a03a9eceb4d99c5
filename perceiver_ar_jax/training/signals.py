"""Signals that end a training run: it stops after a step, with everything saved.

SIGTERM and SIGINT (Ctrl-C) come from people and preemption, SIGUSR1 from batch schedulers that announce a time limit,
SIGHUP from a terminal that closes.
"""

import contextlib
import os
import signal

from perceiver_ar_jax.parallel import distributed

_STDOUT, _STDERR = 1, 2
_HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


class Signals(contextlib.AbstractContextManager):
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
    self.received, is_hangup = number, number == signal.SIGHUP
    signal.signal(number, signal.SIG_IGN if is_hangup else self._handlers_before[number])
    again = "" if is_hangup else " A second one ends the run at once, without saving."
    messages = {_STDERR: f"\n{self.name}: stopping after this step.{again}\n"} | ({_STDOUT: "\n"} if is_hangup else {})
    for stream, message in messages.items():
      try:
        os.write(stream, message.encode())  # print is not reentrant, and a handler runs anywhere
      except OSError:  # the terminal has closed: an error in print would end the run unsaved
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
