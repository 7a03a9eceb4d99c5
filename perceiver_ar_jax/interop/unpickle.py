"""Reads the arrays and plain containers of a pickle (a .dill file is one) without running anything in it.

A pickle is a program for a stack machine, and Python's own machine calls whatever function the program names. The
machine below calls nothing: `pickletools` decodes the instructions, and a name such as numpy's `_reconstruct` selects
one of the builders of this module. All other objects, optimizer state for example, become None.

The work is linear in the size of the file: an object that is referenced several times is visited once, and nothing is
hashed, printed or copied that the file could have nested. The instructions and the bytes of all arrays are bounded.
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
_MAX_ARGUMENTS = 8
"""Arguments that a builder is called with; those below need at most four."""


def load(file: BinaryIO) -> Any:
  """Returns the pickled object as None, numbers, strings, bytes, arrays, dictionaries, lists and tuples.

  Raises:
    Exception: whatever a damaged or foreign file causes; pickle.UnpicklingError for what this module refuses.
  """
  file_bytes = file.seek(0, 2)
  file.seek(0)
  return _Result(file_bytes).convert(_run(file))


class _Name(NamedTuple):
  """A class or function that the pickle names; never looked up."""

  module: str
  name: str


def _to_str(value: Any) -> str:
  if not isinstance(value, str):
    raise pickle.UnpicklingError(f"it has a {type(value).__name__} where a string belongs")
  return value


class _Object:
  """An object without meaning here; it ignores its state and its items."""

  def set_state(self, state) -> None:
    pass


class _DType(_Object):
  """The type of an array's elements, by its code such as f4; its state carries the byte order."""

  def __init__(self, code="", *unused):
    self.code = _to_str(code.name if isinstance(code, _Name) else code)
    self.order = "="

  def set_state(self, state) -> None:
    self.order = _to_str(state[1])

  def resolve(self) -> np.dtype:
    if self.code == "bfloat16":
      return np.dtype(bfloat16)
    if not re.fullmatch("[biuf][0-9]{1,2}", self.code):
      raise pickle.UnpicklingError(f"arrays of type {self.code[:20]!r} are not numbers")
    return np.dtype(self.code).newbyteorder({"<": "<", ">": ">"}.get(self.order, "="))


class _Array(_Object):
  """An array under construction: NumPy pickles an empty one, then its state."""

  value: np.ndarray | None = None

  def __init__(self, *unused):
    pass

  def set_state(self, state) -> None:
    _, shape, dtype, fortran, raw = state
    self.value = _array_from_bytes(raw, dtype, shape, "F" if fortran else "C")


class _Mapping(_Object):
  """Haiku's immutable dictionary, in the forms that its versions pickled."""

  def __init__(self, mapping=None, *unused):
    self.mapping = mapping

  def set_state(self, state) -> None:
    slots = state[1] if isinstance(state, tuple) else state
    self.mapping = slots.get("_mapping") or {}


def _array_from_bytes(raw: bytes, dtype: _DType, shape, order: str) -> np.ndarray:
  return np.frombuffer(raw, dtype.resolve()).reshape(shape, order=order)


def _scalar(dtype: _DType, raw: bytes) -> np.generic:
  return np.frombuffer(raw, dtype.resolve())[0]


def _array_with_state(function, arguments, state, *unused) -> _Array:
  """Returns an array as JAX and dill pickle it: a function that makes an empty one, its arguments, its state."""
  del function, arguments
  array = _Array()
  array.set_state(state)
  return array


_NUMPY = {"dtype": _DType, "_reconstruct": _Array, "_frombuffer": _array_from_bytes, "scalar": _scalar}
_OTHERS = dict.fromkeys(("_reconstruct_array", "reconstruct_device_array", "_create_array"), _array_with_state) | {
  "FlatMapping": _Mapping
}


def _construct(function: Any, arguments: Any) -> Any:
  """Returns what calling a name of the pickle stands for."""
  builder: Callable | None = None
  if isinstance(function, _Name):
    builder = (_NUMPY if function.module.split(".")[0] == "numpy" else _OTHERS).get(function.name)
  if builder is None:
    return _Object()
  if len(arguments) > _MAX_ARGUMENTS:
    raise pickle.UnpicklingError(f"it calls {function.name} with {len(arguments):,} arguments")
  return builder(*arguments)


def _set_items(target: Any, items: list) -> None:
  """Adds keys and values, in turn; leaves out keys that are not strings, as hashing nested tuples can take for ever."""
  if isinstance(target, _Mapping):
    target.mapping = {} if target.mapping is None else target.mapping
    target = target.mapping
  if isinstance(target, dict):
    target.update((key, value) for key, value in zip(items[::2], items[1::2]) if isinstance(key, str))
  elif not isinstance(target, _Object):
    raise pickle.UnpicklingError(f"it sets items of a {type(target).__name__}")


def _append(target: Any, items: list) -> None:
  if isinstance(target, list):
    target.extend(items)
  elif not isinstance(target, _Object):
    raise pickle.UnpicklingError(f"it appends to a {type(target).__name__}")


def _set_state(target: Any, state: Any) -> None:
  if not isinstance(target, _Object):
    raise pickle.UnpicklingError(f"it sets the state of a {type(target).__name__}")
  target.set_state(state)


def _to_dict(items: list) -> dict:
  result: dict = {}
  _set_items(result, items)
  return result


# Instructions by how they change the stack. Those that only push their decoded argument are listed in _PUSHES.
_CONSTANTS: dict[str, Callable[[], Any]] = {
  "NONE": lambda: None,
  "NEWTRUE": lambda: True,
  "NEWFALSE": lambda: False,
  "EMPTY_TUPLE": tuple,
  "EMPTY_LIST": list,
  "EMPTY_DICT": dict,
  "EMPTY_SET": _Object,
}
_REPLACES: dict[str, tuple[int, Callable]] = {  # (number of values taken off the stack, what replaces them)
  "TUPLE1": (1, lambda *values: values),
  "TUPLE2": (2, lambda *values: values),
  "TUPLE3": (3, lambda *values: values),
  "STACK_GLOBAL": (2, lambda module, name: _Name(_to_str(module), _to_str(name))),
  "REDUCE": (2, _construct),
  "NEWOBJ": (2, _construct),
  "NEWOBJ_EX": (3, lambda function, arguments, keywords: _construct(function, arguments)),
  "READONLY_BUFFER": (1, lambda value: value),
}
_REPLACES_MARKED: dict[str, Callable[[list], Any]] = {  # what replaces all values above the mark
  "TUPLE": tuple,
  "LIST": list,
  "DICT": _to_dict,
  "FROZENSET": lambda items: _Object(),
}
_CHANGES: dict[str, tuple[int, Callable]] = {  # (number of values taken off the stack, how the one below changes)
  "SETITEM": (2, lambda target, *items: _set_items(target, list(items))),
  "APPEND": (1, lambda target, item: _append(target, [item])),
  "BUILD": (1, _set_state),
}
_CHANGES_MARKED: dict[str, Callable[[Any, list], None]] = {
  "SETITEMS": _set_items,
  "APPENDS": _append,
  "ADDITEMS": _append,
}
_PUSHES = re.compile("(SHORT_)?(BIN)?(INT[12]?|LONG[14]?|FLOAT|STRING|UNICODE8?|BYTES8?)|BYTEARRAY8")
_STORES = re.compile("MEMOIZE|(LONG_)?(BIN)?PUT")
_FETCHES = re.compile("(LONG_)?(BIN)?GET")


def _run(file: BinaryIO) -> Any:
  """Returns the value that the program leaves on its stack."""
  stack: list = []
  marks: list[list] = []  # the stacks below each mark
  memo: dict[int, Any] = {}

  def pop(count: int) -> list:
    if len(stack) < count:
      raise pickle.UnpicklingError("its stack is empty")
    values = stack[len(stack) - count :]
    del stack[len(stack) - count :]
    return values

  for number, (instruction, argument, _) in enumerate(pickletools.genops(file)):
    if number >= MAX_INSTRUCTIONS:
      raise pickle.UnpicklingError(f"it has more than {MAX_INSTRUCTIONS:,} instructions")
    name = instruction.name
    if name in ("PROTO", "FRAME"):
      continue
    elif name == "STOP":
      (result,) = pop(1)
      return result
    elif _PUSHES.fullmatch(name):
      stack.append(argument)
    elif name in _CONSTANTS:
      stack.append(_CONSTANTS[name]())
    elif name == "GLOBAL":
      stack.append(_Name(*argument.split(" ", 1)))
    elif _STORES.fullmatch(name):
      (memo[len(memo) if argument is None else argument],) = stack[-1:]
    elif _FETCHES.fullmatch(name):
      stack.append(memo[argument])
    elif name == "DUP":
      stack += stack[-1:]
    elif name == "MARK":
      marks.append(stack)
      stack = []
    elif name == "POP" and stack:
      stack.pop()
    elif name in ("POP", "POP_MARK"):
      stack = marks.pop()
    elif name in _REPLACES:
      count, replace = _REPLACES[name]
      stack.append(replace(*pop(count)))
    elif name in _CHANGES:
      count, change = _CHANGES[name]
      target, *values = pop(count + 1)
      change(target, *values)
      stack.append(target)
    elif name in _REPLACES_MARKED or name in _CHANGES_MARKED:
      items, stack = stack, marks.pop()
      if name in _REPLACES_MARKED:
        stack.append(_REPLACES_MARKED[name](items))
      else:
        _CHANGES_MARKED[name](*stack[-1:], items)
    else:
      raise pickle.UnpicklingError(f"it uses the instruction {name}, which is not supported")
  raise pickle.UnpicklingError("it ends early")


class _Result:
  """Turns the machine's values into plain ones, each once, however often it is referenced."""

  def __init__(self, max_array_bytes: int):
    self._free_bytes = max_array_bytes
    self._converted: dict[int, Any] = {}

  def convert(self, value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str, bytes, bytearray, np.generic)):
      return value
    if id(value) not in self._converted:
      self._converted[id(value)] = None  # what an object that contains itself finds there
      self._converted[id(value)] = self._convert_new(value)
    return self._converted[id(value)]

  def _convert_new(self, value: Any) -> Any:
    if isinstance(value, _Mapping):
      return self.convert(value.mapping)
    if isinstance(value, _Array):
      value = value.value
    if isinstance(value, np.ndarray):
      self._free_bytes -= value.nbytes
      if self._free_bytes < 0:
        raise pickle.UnpicklingError("its arrays are larger than the file")
      return value
    if isinstance(value, dict):
      return {key: self.convert(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)) and not isinstance(value, _Name):
      return type(value)(self.convert(item) for item in value)
    return None
