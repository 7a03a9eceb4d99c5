"""What checks of settings share: the error that users see, and how it is put."""

import contextlib
import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

Value = TypeVar("Value")


class InputError(ValueError):
  """What the user gave cannot work; the message names the value and the fix, in one paragraph."""


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
  require(0 <= value < 2**32, f"{field}={value} must lie in 0..4294967295 (2^32-1).")


@contextlib.contextmanager
def writing(place: object, fix: str) -> Iterator[None]:
  """A context that writes to a place of the user's: an OSError in it becomes an InputError that names place and fix."""
  try:
    yield
  except OSError as error:
    raise InputError(f"{place} cannot be written ({error.strerror or error}): {fix}.") from error


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
