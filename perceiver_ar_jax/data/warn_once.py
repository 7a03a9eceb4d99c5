"""Warnings on standard error, each written once however often it occurs, and their counts."""

import collections
import sys
import threading

import tqdm

_lock = threading.Lock()  # rows of batches are made in several threads
_messages: dict[str | None, dict[str, str]] = collections.defaultdict(dict)
"""kind -> subject -> message, in order."""


def warn_once(kind: str | None, message: str, subject: str | None = None) -> None:
  """Writes `message` and the number of warnings of its kind, unless its subject has had one.

  Args:
    kind: what is counted, such as "skipped"; None: nothing.
    message: a sentence, without its full stop if it is counted.
    subject: what the warning is about, such as a file; None: the message itself.
  """
  with _lock:
    messages = _messages[kind]
    if (subject or message) in messages:
      return
    messages[subject or message] = message
    suffix = f" ({len(messages)} {kind} so far)." if kind else ""
  tqdm.tqdm.write(message + suffix, file=sys.stderr)  # keeps a progress bar in one piece


def inform_once(message: str, subject: str | None = None) -> None:
  """Writes `message`, unless it, or another message about `subject`, was written before."""
  warn_once(None, message, subject)


def count(kind: str) -> int:
  """Returns the number of subjects that had a warning of this kind."""
  return len(_messages[kind])


def newest_messages(kind: str, limit: int) -> list[str]:
  """Returns the newest messages of a kind, at most `limit` of them."""
  with _lock:
    return list(_messages[kind].values())[-limit:]


def reset() -> None:
  """Forgets all warnings."""
  with _lock:
    _messages.clear()
