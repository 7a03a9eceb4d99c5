"""The errors that users see, the checks that raise them, and the classification of the machine's own errors."""

import contextlib
import difflib
import errno
import functools
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

Value = TypeVar("Value")

EXIT_TRANSIENT = 75  # after an error that a restart may fix: EX_TEMPFAIL of sysexits.h
WHEN_STORAGE_IS_BACK = "free some space or restore access, and start the same command again."


class InputError(ValueError):
  """The user's input cannot work; the message is one paragraph that names the value and the fix."""


class TransientError(RuntimeError):
  """Storage or memory failed in a way that may pass, such as a full disk; then the same command resumes."""


def _chain(error: BaseException) -> list[BaseException]:
  """Returns the error and those that it was raised from or while handling."""
  chain = [error]
  for link in chain:
    chain += [cause for cause in (link.__context__, link.__cause__) if cause is not None and cause not in chain]
  return chain


def _kind(types: tuple[type, ...], errnos: str, http_codes: tuple[int, ...], statuses: str) -> Callable[..., bool]:
  """Returns whether an error, or one that it was raised from or while handling, is of a kind.

  A kind is recognized by class, errno, HTTP code, or a text or the name of a status in the message.
  """
  numbers = [getattr(errno, name) for name in errnos.split() if hasattr(errno, name)]
  in_message = rf"(?:\bHTTP|[Ss]tatus)\D{{0,20}}(?:{'|'.join(map(str, http_codes))})\b"
  message = re.compile("|".join([*(re.escape(os.strerror(number)) for number in numbers), in_message, statuses]))

  def is_kind(error: BaseException) -> bool:
    return any(
      isinstance(link, types)
      or getattr(link, "errno", None) in numbers
      or getattr(link, "code", None) in http_codes
      or message.search(str(link))
      for link in _chain(error)
    )

  return is_kind


is_transient = _kind(
  (TransientError, MemoryError, TimeoutError),
  "ENOSPC EDQUOT EFBIG ENOMEM EMFILE ENFILE EAGAIN EBUSY EINTR EIO EREMOTEIO ESTALE ENODEV ENXIO ENOTCONN ESHUTDOWN"
  " ETIMEDOUT ECONNREFUSED ECONNRESET ECONNABORTED EHOSTDOWN EHOSTUNREACH ENETDOWN ENETRESET ENETUNREACH",
  (408, 425, 429, 500, 502, 503, 504),
  r"\bRESOURCE_EXHAUSTED\b|\bUNAVAILABLE\b|\bDEADLINE_EXCEEDED\b|\bABORTED\b"
  "|Service Unavailable|Bad Gateway|Gateway Time-?out|Internal Server Error|Too Many Requests",
)
"""Whether storage or memory failed in a way that may pass."""
is_denied = _kind((PermissionError,), "EACCES EPERM EROFS", (401, 403), r"\bPERMISSION_DENIED\b|\bUNAUTHENTICATED\b")
"""Whether the user may not access a file."""


def is_computation(error: BaseException) -> bool:
  """Whether a computation, or the processes' coordination, failed: out of device memory, or another process died.

  Its status may be one of storage as well, such as UNAVAILABLE. An error with an errno in the same chain is the cause.
  """
  chain = _chain(error)
  is_explained = isinstance(error, (InputError, TransientError)) or any(getattr(link, "errno", None) for link in chain)
  return not is_explained and any(type(link).__name__ in ("JaxRuntimeError", "XlaRuntimeError") for link in chain)


def one_line(error: BaseException) -> str:
  """Returns the first 300 characters of the error's message on one line; its type if it has no message."""
  return " ".join(str(error).split())[:300] or type(error).__name__


def report(error: BaseException) -> int:
  """Prints the error to standard error, in one paragraph or with its traceback; returns the exit code of main.py.

  A full disk gets a paragraph; a computation that fails with the same status (`is_computation`) gets a traceback.
  """
  if isinstance(error, KeyboardInterrupt):
    return 128 + signal.SIGINT
  if not isinstance(error, (InputError, TransientError)):
    if isinstance(error, MemoryError) or is_computation(error) or not is_transient(error):
      sys.excepthook(type(error), error, error.__traceback__)
      return EXIT_TRANSIENT
    error = TransientError(f"{one_line(error)}: {WHEN_STORAGE_IS_BACK}")
  with contextlib.suppress(OSError):  # standard error may be a file on the full disk
    print(f"Error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
  return 1 if isinstance(error, InputError) else EXIT_TRANSIENT


@contextlib.contextmanager
def _accessing(participle: str, path: object, fix: str) -> Iterator[None]:
  """A context in which an OSError becomes a TransientError if it may pass, or else an InputError with path and fix."""
  try:
    yield
  except OSError as error:
    message = f"{path} cannot be {participle} ({error.strerror or error})"
    if is_transient(error):
      raise TransientError(f"{message}: {WHEN_STORAGE_IS_BACK}") from error
    raise InputError(f"{message}: {fix}.") from error


reading, writing = functools.partial(_accessing, "read"), functools.partial(_accessing, "written")


def nearest(name: str, known: Iterable[str]) -> str:
  """Returns a hint for a misspelled name: the closest known name and the whole list."""
  known = sorted(known)
  close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
  return (f"Did you mean {close[0]!r}? " if close else "") + "Known: " + ", ".join(known) + "."


def lookup(field: str, name: str, table: Mapping[str, Value]) -> Value:
  """Returns the entry `name` of a table of implementations; raises InputError listing its names."""
  require(name in table, f"{field}={name!r} is unknown. {nearest(str(name), table)}")
  return table[name]


def require(condition: bool, message: str) -> None:
  """Raises InputError with the message unless the condition holds."""
  if not condition:
    raise InputError(message)


def require_choice(field: str, value: str, known: Iterable[str]) -> None:
  """Raises InputError unless the field's value is a known name."""
  require(value in known, f"{field}={value!r} is unknown. {nearest(value, known)}")


def require_at_least(minimum: int, section: str, config: Any, *names: str) -> None:
  """Raises InputError unless these settings are at least `minimum` (0 or 1), or None where None is the default."""
  for name in names:
    value = getattr(config, name)
    or_none = ", or None" if getattr(type(config), name, minimum) is None else ""
    limit = f"be at least {minimum}{or_none}" if minimum else "not be negative"
    require(value is None or value >= minimum, f"{section}.{name}={value} must {limit}.")
