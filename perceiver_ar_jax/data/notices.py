"""What a pipeline tells its user while it goes on: each message once, with a running count of its kind."""

import collections
import sys

import tqdm

_SEEN: dict[str, dict[str, None]] = collections.defaultdict(dict)  # in order
_TIMES = collections.Counter()


def notice(kind: str, message: str) -> None:
  """Writes `message` to standard error unless it was written before; `kind` says what is counted, as in "skipped"."""
  seen = _SEEN[kind]
  _TIMES[kind] += 1
  if message not in seen:
    seen[message] = None
    tqdm.tqdm.write(f"{message} ({len(seen)} {kind} so far).", file=sys.stderr)  # leaves a progress bar in one piece


def last(kind: str) -> str:
  """The newest message of a kind; empty if there was none."""
  return next(reversed(_SEEN[kind]), "")


def newest(kind: str, limit: int) -> list[str]:
  """Returns the newest messages of a kind, at most `limit` of them."""
  return list(_SEEN[kind])[-limit:]


def count(kind: str) -> int:
  """How often something of a kind was noticed, repetitions included."""
  return _TIMES[kind]


def once(message: str, subject: str | None = None) -> None:
  """Writes `message` to standard error, unless it, or another message about `subject`, was written before."""
  seen = _SEEN["once"]
  if (subject or message) not in seen:
    seen[subject or message] = None
    tqdm.tqdm.write(message, file=sys.stderr)
