"""Reads the arrays and plain containers of a pickle (a .dill file is one) without running code that it names.

A pickle is a program for a stack machine, and Python's own machine imports and calls any function that the program
names. The machine below imports nothing: a name such as numpy's `_reconstruct` selects one of the builders of this
module, and all other objects, optimizer state for example, become None.

The work is linear in the size of the file: shared objects are converted once, and values from the file are never
hashed, printed or copied where they could be nested. The number of instructions and the size of all arrays are bounded.
"""

import pickle
import pickletools
import re
from collections.abc import Callable
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from ml_dtypes import bfloat16

MAX_INSTRUCTIONS = 10_000_000
"""Instructions that a file may have; an official checkpoint has some thousands."""
_INHERITED = """PROTO FRAME STOP MARK POP POP_MARK DUP GET BINGET LONG_BINGET PUT BINPUT LONG_BINPUT MEMOIZE
  NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT
  STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8
  BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8 EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST LIST EMPTY_DICT
  GLOBAL STACK_GLOBAL""".split()
"""Instructions that only move values, or call `find_class`: Python's own implementation is safe."""


def load(file: BinaryIO) -> Any:
  """Returns the pickled object as None, numbers, strings, bytes, arrays, dictionaries, lists and tuples.

  Raises:
    Exception: any error of a damaged or foreign file; pickle.UnpicklingError for content that this module refuses.
  """
  file_bytes = file.seek(0, 2)
  file.seek(0)
  for number, (instruction, *_) in enumerate(pickletools.genops(file)):
    if number >= MAX_INSTRUCTIONS:
      raise pickle.UnpicklingError(f"it has more than {MAX_INSTRUCTIONS:,} instructions")
    if ord(instruction.code) not in _Machine.dispatch:
      raise pickle.UnpicklingError(f"it uses the instruction {instruction.name}, which is not supported")
  file.seek(0)
  return _to_plain(_Machine(file, encoding="latin-1").load(), max_array_bytes=file_bytes)


class _Name(NamedTuple):
  """A class or function that the pickle names; it is never looked up."""

  is_numpy: bool
  name: str


class _Object:
  """An object that the pickle builds, to be returned as `value`; its state and its items are ignored."""

  value: Any = None

  def __init__(self, *unused):
    pass

  def set_state(self, unused) -> None:
    pass

  update = extend = set_state


class _DType(_Object):
  """The type of an array's elements, by its code such as f4; its state contains the byte order."""

  def __init__(self, code="", *unused):
    self.code, self.order = code.name if isinstance(code, _Name) else code, "="

  def set_state(self, state) -> None:
    self.order = state[1] if isinstance(state[1], str) and state[1] in "<>" else "="

  def read(self, content: bytes) -> np.ndarray:
    """Returns a view of the bytes as numbers."""
    if self.code == "bfloat16":
      return np.frombuffer(content, bfloat16)
    if not re.fullmatch("[biuf][0-9]{1,2}", self.code):
      raise pickle.UnpicklingError(f"arrays of type {self.code[:20]!r} are not numbers")
    return np.frombuffer(content, self.order + self.code)


class _Array(_Object):
  """An array: NumPy pickles an empty one, then its state."""

  def set_state(self, state) -> None:
    _, shape, dtype, is_fortran, content = state
    self.value = dtype.read(content).reshape(shape, order="F" if is_fortran else "C")

  @classmethod
  def from_state(cls, function, arguments, state, *unused) -> "_Array":
    """Returns an array as JAX and dill pickle it: a function that creates an empty one, its arguments, its state."""
    array = cls()
    array.set_state(state)
    return array


class _Mapping(_Object):
  """Haiku's immutable dictionary, in the forms that its versions pickled."""

  def __init__(self, mapping=None, *unused):
    self.value = {} if mapping is None else mapping

  def set_state(self, state) -> None:
    slots = state[1] if isinstance(state, tuple) else state
    self.value = slots.get("_mapping") or {}

  def update(self, items: dict) -> None:
    self.value.update(items)


_BUILDERS: dict[_Name, Callable] = {
  _Name(True, "dtype"): _DType,
  _Name(True, "_reconstruct"): _Array,
  _Name(True, "_frombuffer"): lambda content, dtype, shape, order: dtype.read(content).reshape(shape, order=order),
  _Name(True, "scalar"): lambda dtype, content: dtype.read(content)[0],
  _Name(False, "_reconstruct_array"): _Array.from_state,
  _Name(False, "reconstruct_device_array"): _Array.from_state,
  _Name(False, "_create_array"): _Array.from_state,
  _Name(False, "FlatMapping"): _Mapping,
}


def _construct(function: Any, arguments: tuple, *keywords) -> Any:
  """Returns what calling a name of the pickle builds; keyword arguments and all arguments but eight are ignored."""
  builder = _BUILDERS.get(function, _Object) if isinstance(function, _Name) else _Object
  return builder(*arguments[:8])


def _to_dict(*items) -> dict:
  """Returns the dictionary of alternating keys and values; keys that are not strings might take forever to hash."""
  return {key: value for key, value in zip(items[::2], items[1::2]) if isinstance(key, str)}


def _replace(build: Callable, count: int | None = None) -> Callable:
  """Returns the instruction that replaces the `count` top values (None: those above the mark) by build(*values)."""

  def replace(machine: "_Machine") -> None:
    value = build(*machine.take(count))
    machine.append(value)

  return replace


def _change(method: str, kind: type, build: Callable, count: int | None = None) -> Callable:
  """Returns the instruction that calls a method of the value below the `count` top values with build(*values)."""

  def change(machine: "_Machine") -> None:
    argument, target = build(*machine.take(count)), machine.stack[-1]
    if not isinstance(target, (kind, _Object)):
      raise pickle.UnpicklingError(f"it calls {method} of a {type(target).__name__}")
    getattr(target, method)(argument)

  return change


class _Machine(pickle._Unpickler):  # the implementation in Python, because its instructions can be replaced
  """Python's machine without its instructions that call, import, hash or change objects."""

  dispatch = {code: pickle._Unpickler.dispatch[code] for (code,) in (getattr(pickle, name) for name in _INHERITED)} | {
    pickle.REDUCE[0]: _replace(_construct, 2),
    pickle.NEWOBJ[0]: _replace(_construct, 2),
    pickle.NEWOBJ_EX[0]: _replace(_construct, 3),
    pickle.EMPTY_SET[0]: _replace(_Object, 0),
    pickle.FROZENSET[0]: _replace(_Object),
    pickle.DICT[0]: _replace(_to_dict),
    pickle.SETITEM[0]: _change("update", dict, _to_dict, 2),
    pickle.SETITEMS[0]: _change("update", dict, _to_dict),
    pickle.APPEND[0]: _change("extend", list, lambda *items: items, 1),
    pickle.APPENDS[0]: _change("extend", list, lambda *items: items),
    pickle.ADDITEMS[0]: _change("extend", _Object, lambda *items: items),
    pickle.BUILD[0]: _change("set_state", _Object, lambda state: state, 1),
  }

  def find_class(self, module: str, name: str) -> _Name:
    return _Name(module == "numpy" or module.startswith("numpy."), name)

  def take(self, count: int | None) -> list:
    """Removes and returns the `count` top values; None: those above the mark."""
    return self.pop_mark() if count is None else [self.stack.pop() for _ in range(count)][::-1]


def _to_plain(root: Any, max_array_bytes: int) -> Any:
  """Returns the machine's value without objects of this module; shared values are converted once and stay shared."""
  converted: dict[int, Any] = {}
  array_bytes = 0

  def convert(value: Any) -> Any:
    nonlocal array_bytes
    if isinstance(value, (bool, int, float, str, bytes, bytearray, np.generic)):
      return value
    if id(value) in converted:
      return converted[id(value)]
    result = converted[id(value)] = None  # for a value that contains itself
    if isinstance(value, _Object):
      result = convert(value.value)
    elif isinstance(value, dict):
      result = {key: convert(item) for key, item in value.items()}
    elif type(value) in (list, tuple):
      result = type(value)(map(convert, value))
    elif isinstance(value, np.ndarray):
      result, array_bytes = value, array_bytes + value.nbytes
      if array_bytes > max_array_bytes:
        raise pickle.UnpicklingError("its arrays are larger than the file")
    converted[id(value)] = result
    return result

  return convert(root)
