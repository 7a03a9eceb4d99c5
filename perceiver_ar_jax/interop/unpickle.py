"""Reads the weights of an official checkpoint.dill, which is a pickle, without running code that it names.

A pickle is a program for a stack machine, which calls any function that the program names. Here, a name such as numpy's
`_reconstruct` selects one of the builders of this module, and every other object, of the optimizer's state for example,
is an empty stand-in. Work and memory are linear in the size of the file: values that can be nested are never hashed,
printed, copied or traversed, and arrays are views of the bytes in it.
"""

import mmap
import pickle
import re
from typing import Any

import numpy as np
from ml_dtypes import bfloat16

from perceiver_ar_jax.config import InputError

_MAX_PARAMETERS = 100_000
"""Arrays that a checkpoint may have; the largest published model has hundreds."""


def load(path: str) -> tuple[dict[str, dict[str, np.ndarray]], int]:
  """Returns (parameters by module path, training step) of an official checkpoint.dill without running code from it.

  Raises InputError if the file cannot be read, or is not such a checkpoint.
  """
  try:
    # An mmap allocates no more than it contains, whatever length the pickle announces.
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
      return _params_and_step(_Unpickler(content).load(), max_bytes=len(content))
  except OSError as error:
    raise InputError(f"--checkpoint={path} cannot be read: {error.strerror or error}.") from error
  except Exception as error:  # any error of a damaged or foreign file
    raise InputError(
      f"--checkpoint={path} is not an official checkpoint.dill, whose 'params' map module paths to arrays"
      f" ({type(error).__name__}: {error})."
    ) from error


def _params_and_step(root: Any, max_bytes: int) -> tuple[dict[str, dict[str, np.ndarray]], int]:
  state = _unwrap(root, dict)
  modules = {path: _unwrap(module, dict) for path, module in _unwrap(state.get("params"), dict).items()}
  if sum(map(len, modules.values())) > _MAX_PARAMETERS:  # modules can share one dictionary
    raise pickle.UnpicklingError(f"it has more than {_MAX_PARAMETERS:,} parameters")
  params = {path: {name: _unwrap(module[name], np.ndarray) for name in module} for path, module in modules.items()}
  arrays = {id(array): array.nbytes for module in params.values() for array in module.values()}
  if sum(arrays.values()) > max_bytes:  # of different arrays, which can be views of the same bytes
    raise pickle.UnpicklingError("its arrays are larger than the file")
  return params, int(_unwrap(state.get("global_step", 0), (int, np.integer)))


def _unwrap(value: Any, kind: type | tuple[type, ...]) -> Any:
  """Returns a value of the machine, or the one that a stand-in holds; it must be of this kind."""
  value = value.value if isinstance(value, _Object) else value
  if not isinstance(value, kind):
    raise pickle.UnpicklingError(f"it has a {type(value).__name__} at the wrong place")
  return value


class _Object:
  """A stand-in for an object of the pickle; `value` is what it holds, if that is of use."""

  value: Any = None

  def __init__(self, *unused):
    pass

  def set_state(self, unused) -> None:
    pass

  add = append = set_state

  def __setitem__(self, key, item) -> None:
    pass


class _Dict(dict):
  """A dictionary without the keys that are not strings: nested tuples that share items take forever to hash."""

  def __setitem__(self, key, item) -> None:
    if isinstance(key, str):
      super().__setitem__(key, item)


class _Mapping(_Object):
  """Haiku's immutable dictionary, in the forms that its versions pickled."""

  def __init__(self, mapping=None, *unused):
    self.value = _Dict() if mapping is None else mapping

  def set_state(self, state) -> None:
    slots = state[1] if isinstance(state, tuple) else state
    self.value = slots.get("_mapping") or _Dict()


class _DType(_Object):
  """The type of an array's elements, by its code such as f4; its state contains the byte order."""

  def __init__(self, code="", *unused):
    self.code, self.order = code if isinstance(code, str) else "", ""

  def set_state(self, state) -> None:
    self.order = state[1] if state[1] in ("<", ">") else ""

  def read(self, content: bytes) -> np.ndarray:
    """Returns a view of the bytes as numbers."""
    if self.code == "bfloat16":
      return np.frombuffer(content, bfloat16)
    if not re.fullmatch("[biuf][1248]", self.code):
      raise pickle.UnpicklingError(f"arrays of type {self.code[:20]!r} are not numbers")
    return np.frombuffer(content, self.order + self.code)


class _Array(_Object):
  """An array, or a number: NumPy pickles an empty array, then its state."""

  def __init__(self, *unused, value: np.ndarray | np.generic | None = None):
    self.value = value

  def set_state(self, state) -> "_Array":
    _, shape, dtype, is_fortran, content = state
    self.value = dtype.read(content).reshape(shape, order="F" if is_fortran else "C")
    return self


_NUMPY = {
  "dtype": _DType,
  "_reconstruct": _Array,
  "_frombuffer": lambda content, dtype, shape, order: _Array(value=dtype.read(content).reshape(shape, order=order)),
  "scalar": lambda dtype, content: _Array(value=dtype.read(content)[0]),
}
_OTHERS = {
  **dict.fromkeys(  # arrays of JAX and dill: a function that creates an empty one, its arguments, its state
    ("_reconstruct_array", "reconstruct_device_array", "_create_array"),
    lambda function, arguments, state, *unused: _Array().set_state(state),
  ),
  "FlatMapping": _Mapping,
  "bfloat16": "bfloat16",
}


class _Unpickler(pickle._Unpickler):  # the implementation in Python, because its instructions can be replaced
  """Python's machine, whose only callables are the builders above, and which hashes only strings."""

  def find_class(self, module: str, name: str) -> Any:
    return (_NUMPY if module.partition(".")[0] == "numpy" else _OTHERS).get(name, _Object)

  def _construct(self) -> None:
    arguments, builder = self.stack.pop(), self.stack.pop()
    self.append(builder(*arguments[:8]))  # no builder reads more

  def _set_state(self) -> None:
    state, target = self.stack.pop(), self.stack[-1]
    if not isinstance(target, _Object):
      raise pickle.UnpicklingError(f"it sets the state of a {type(target).__name__}")
    target.set_state(state)

  def _frozenset(self) -> None:
    self.pop_mark()
    self.append(_Object())

  dispatch = pickle._Unpickler.dispatch | {
    pickle.REDUCE[0]: _construct,
    pickle.NEWOBJ[0]: _construct,
    pickle.NEWOBJ_EX[0]: lambda self: self.append(_Object(self.stack.pop(), self.stack.pop(), self.stack.pop())),
    pickle.BUILD[0]: _set_state,
    pickle.EMPTY_DICT[0]: lambda self: self.append(_Dict()),
    pickle.EMPTY_SET[0]: lambda self: self.append(_Object()),
    pickle.FROZENSET[0]: _frozenset,
    pickle.BYTEARRAY8[0]: pickle._Unpickler.load_binbytes8,  # a bytearray would be allocated before it is read
  }
  for _unused in (pickle.DICT, pickle.EXT1, pickle.EXT2, pickle.EXT4):  # would hash anything, or find live objects
    del dispatch[_unused[0]]
