"""The errors that users see, checks that raise them, and which errors of the machine they stand for."""

import contextlib
import difflib
import errno
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

Value = TypeVar("Value")

EXIT_TRANSIENT = 75
"""Exit code after an error that a restart may fix (EX_TEMPFAIL of sysexits.h); exit code 1 means bad input."""

_TRANSIENT_ERRNO = {
  getattr(errno, name)
  for name in (
    "ENOSPC EDQUOT EFBIG ENOMEM EMFILE ENFILE EAGAIN EBUSY EINTR EIO EREMOTEIO ESTALE ENODEV ENXIO ENOTCONN ESHUTDOWN"
    " ETIMEDOUT ECONNREFUSED ECONNRESET ECONNABORTED EHOSTDOWN EHOSTUNREACH ENETDOWN ENETRESET ENETUNREACH"
  ).split()
  if hasattr(errno, name)
}
WHEN_STORAGE_IS_BACK = "free some space or restore access, and start the same command again."

_DENIED_ERRNO = {errno.EACCES, errno.EPERM, errno.EROFS}
_TRANSIENT_HTTP = {408, 425, 429, 500, 502, 503, 504}


def _words(numbers: set[int], *statuses: str) -> re.Pattern:
  return re.compile("|".join([*(re.escape(os.strerror(number)) for number in numbers), *statuses]))


# TensorStore, XLA and TensorFlow put the name of a status or the text of an errno into the message.
_TRANSIENT_WORDS = _words(
  _TRANSIENT_ERRNO,
  *(r"\bRESOURCE_EXHAUSTED\b", r"\bUNAVAILABLE\b", r"\bDEADLINE_EXCEEDED\b", r"\bABORTED\b"),
  *("Service Unavailable", "Bad Gateway", "Gateway Time-?out", "Internal Server Error", "Too Many Requests"),
  r"(?:\bHTTP|[Ss]tatus)\D{0,20}(?:408|425|429|50[0234])\b",
)
_DENIED_WORDS = _words(
  _DENIED_ERRNO, r"\bPERMISSION_DENIED\b", r"\bUNAUTHENTICATED\b", r"(?:\bHTTP|[Ss]tatus)\D{0,20}40[13]\b"
)


class InputError(ValueError):
  """The user's input cannot work; the message is one paragraph that names the value and the fix."""


class TransientError(RuntimeError):
  """Storage or memory failed in a way that may pass, such as a full disk; the message is one paragraph.

  Nothing is lost: the same command resumes once the cause is gone.
  """


def causes(error: BaseException) -> Iterator[BaseException]:
  """Yields the error, and those it was raised from or while handling."""
  seen: set[int] = set()
  pending: list[BaseException | None] = [error]
  while pending:
    current = pending.pop()
    if current is not None and id(current) not in seen:
      seen.add(id(current))
      yield current
      pending += [current.__context__, current.__cause__]


def is_transient(error: BaseException) -> bool:
  """Returns whether storage or memory failed in a way that may pass: by type, errno, HTTP code or message."""
  return any(map(_is_transient, causes(error)))


def _is_transient(error: BaseException) -> bool:
  if isinstance(error, (TransientError, MemoryError, TimeoutError)):
    return True
  number, code = getattr(error, "errno", None), getattr(error, "code", None)
  return number in _TRANSIENT_ERRNO or code in _TRANSIENT_HTTP or bool(_TRANSIENT_WORDS.search(str(error)))


def is_denied(error: BaseException) -> bool:
  """Returns whether the user may not access a file."""
  return any(isinstance(cause, PermissionError) or _DENIED_WORDS.search(str(cause)) for cause in causes(error))


def one_line(error: BaseException, limit: int = 300) -> str:
  """The error's message on one line, at most `limit` characters of it; its type if it has none."""
  return " ".join(str(error).split())[:limit] or type(error).__name__


def for_user(error: BaseException) -> InputError | TransientError | None:
  """The error as one that a paragraph explains to the user; None for one that needs a traceback.

  Whatever was being written, a full disk or a file system out of reach is a TransientError. Computations that fail
  with the same status names (out of memory, a peer that died) are not.
  """
  if isinstance(error, (InputError, TransientError)):
    return error
  if type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError", "MemoryError") or not is_transient(error):
    return None
  return TransientError(f"{one_line(error)}: {WHEN_STORAGE_IS_BACK}")


def nearest(name: str, known: Iterable[str]) -> str:
  """A hint for a misspelt name: the closest known one and the whole list."""
  known = sorted(known)
  close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
  return (f"Did you mean {close[0]!r}? " if close else "") + "Known: " + ", ".join(known) + "."


def require(condition: bool, message: str) -> None:
  """Raises InputError with the message unless the condition holds."""
  if not condition:
    raise InputError(message)


def require_seed(field: str, value: int) -> None:
  """Raises InputError unless the field's value is a seed that random keys and generators tell apart."""
  require(0 <= value < 2**32, f"{field}={value} must be in 0..4294967295 (2^32-1).")


def writing(path: object, fix: str) -> contextlib.AbstractContextManager:
  """A context that writes to a path that the user chose.

  Raises:
    TransientError: a full disk or another error that may pass.
    InputError: any other OSError; the message names the path and the fix.
  """
  return _accessing(path, "written", fix)


def reading(path: object, fix: str) -> contextlib.AbstractContextManager:
  """A context that reads from a path that the user chose; raises like `writing`."""
  return _accessing(path, "read", fix)


@contextlib.contextmanager
def _accessing(path: object, participle: str, fix: str) -> Iterator[None]:
  try:
    yield
  except OSError as error:
    message = f"{path} cannot be {participle} ({error.strerror or error})"
    if is_transient(error):
      raise TransientError(f"{message}: {WHEN_STORAGE_IS_BACK}") from error
    raise InputError(f"{message}: {fix}.") from error


def lookup(field: str, name: str, table: Mapping[str, Value], also: Sequence[str] = ()) -> Value:
  """The entry `name` of a table of implementations; `also` are further names to list in the message.

  Raises:
    InputError: the table has no such entry; the message names the setting and the known names.
  """
  require(name in table, f"{field}={name!r} is unknown. {nearest(name, [*also, *table])}")
  return table[name]


def choice(field: str, value: str, known: tuple[str, ...]) -> None:
  """Raises InputError unless the field's value is one of the known ones."""
  require(value in known, f"{field}={value!r} is unknown. {nearest(value, known)}")
