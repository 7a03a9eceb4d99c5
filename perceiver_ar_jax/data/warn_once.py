"""Warnings on standard error, each written once however often it occurs, and their counts."""

import collections
import sys
import threading

import tqdm

_lock = threading.Lock()  # rows of batches are made in several threads
_messages: dict[str, dict[str, str]] = collections.defaultdict(dict)
"""kind -> subject -> message, in order."""


def warn_once(kind: str, message: str, subject: str | None = None) -> None:
  """Writes `message` and the number of warnings of its kind, unless its subject has had one.

  Args:
    kind: what is counted, such as "skipped".
    message: a sentence without its full stop.
    subject: what the warning is about, such as a file; None: the message itself.
  """
  with _lock:
    messages = _messages[kind]
    if (subject or message) in messages:
      return
    messages[subject or message] = message
    count = len(messages)
  tqdm.tqdm.write(f"{message} ({count} {kind} so far).", file=sys.stderr)  # keeps a progress bar in one piece


def count(kind: str) -> int:
  """Returns the number of subjects that had a warning of this kind."""
  with _lock:
    return len(_messages[kind])


def last_message(kind: str) -> str:
  """Returns the newest message of a kind, empty if there was none."""
  with _lock:
    return next(reversed(_messages[kind].values()), "")


def reset() -> None:
  """Forgets all warnings."""
  with _lock:
    _messages.clear()
