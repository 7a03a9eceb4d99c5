"""Warnings on standard error, each written once however often it occurs, and their counts."""

import collections
import sys
import threading

import tqdm

_lock = threading.Lock()  # rows of batches are made in several threads
_messages: dict[str | None, dict[str, str]] = collections.defaultdict(dict)  # kind -> subject -> message, in order


def warn_once(kind: str | None, message: str, subject: str | None = None) -> None:
  """Writes `message`, unless its subject (None: the message itself) has had a message of its kind.

  With a `kind`, such as "skipped", the number of its messages follows, so `message` has no full stop.
  """
  with _lock:
    messages = _messages[kind]
    if (subject or message) in messages:
      return
    messages[subject or message] = message
    suffix = f" ({len(messages)} {kind} so far)." if kind else ""
  tqdm.tqdm.write(message + suffix, file=sys.stderr)  # keeps a progress bar in one piece


def count(kind: str) -> int:
  """Returns the number of subjects that had a warning of this kind."""
  return len(_messages[kind])


def skip_reasons() -> str:
  """Returns the newest reasons for which records were skipped."""
  newest = list(_messages["skipped"].values())[-3:]
  return "; ".join(message.removeprefix("Skipped: ") for message in newest) or "it is empty"


def reset() -> None:
  _messages.clear()
