"""Reads the arrays and plain containers of a pickle (a .dill file is one) without running what is in it.

A pickle is a program: the standard reader calls any function that it names. This one knows how NumPy, JAX, Haiku and
dill write arrays and dictionaries, and makes arrays from their bytes itself; everything else, such as optimizer state,
becomes an inert object.
"""

import pickle
import re
from typing import Any, BinaryIO

import numpy as np
from ml_dtypes import bfloat16


def load(file: BinaryIO) -> Any:
  """The pickled object; raises whatever a damaged or foreign file makes the reader raise."""
  return _with_arrays(_Unpickler(file).load())


class _Unpickler(pickle.Unpickler):
  def find_class(self, module: str, name: str):
    if module.split(".")[0] == "numpy":
      return _NUMPY.get(name, _Inert)
    if name == "bfloat16":
      return "bfloat16"
    if name in ("_reconstruct_array", "reconstruct_device_array", "_create_array"):  # JAX's arrays, and dill's
      return _array_with_state
    if name == "FlatMapping":  # Haiku's dictionary
      return _FlatMapping
    # dill makes classes by functions of its own, and the pickle then makes objects of them.
    return _inert_class if module.startswith("dill") else _Inert


class _DType:
  """A number's type by its code, such as f4; its state carries the byte order."""

  def __init__(self, code="", *unused):
    self.code, self.order = code, "="

  def __setstate__(self, state):
    self.order = state[1]

  def resolve(self) -> np.dtype:
    if self.code == "bfloat16":
      return np.dtype(bfloat16)
    if not (isinstance(self.code, str) and re.fullmatch("[biuf][0-9]+", self.code)):
      raise pickle.UnpicklingError(f"arrays of type {self.code!r} are not numbers")
    return np.dtype(self.code).newbyteorder({"<": "<", ">": ">"}.get(self.order, "="))


class _Array:
  """An array to be: NumPy pickles an empty one, then its state."""

  value: np.ndarray | None = None

  def __init__(self, *unused):
    pass

  def __setstate__(self, state):
    _, shape, dtype, fortran, raw = state
    self.value = _from_bytes(raw, dtype, shape, "F" if fortran else "C")


class _FlatMapping(dict):
  """Haiku's immutable dictionary, whichever way its version pickled it."""

  def __setstate__(self, state):
    slots = state[1] if isinstance(state, tuple) else state
    self.update(slots.get("_mapping") or {})


class _Inert:
  """Stands for any object that is not needed; it accepts whatever unpickling does to it and does nothing."""

  def __new__(cls, *unused, **unused_too):
    return super().__new__(cls)

  def __init__(self, *unused, **unused_too):
    pass

  def __call__(self, *unused, **unused_too):
    return _Inert()

  def __setstate__(self, state):
    pass

  def __setitem__(self, key, value):
    pass

  def append(self, value):
    pass

  def extend(self, values):
    pass


def _inert_class(*unused, **unused_too):
  return _Inert


def _from_bytes(raw: bytes, dtype: _DType, shape, order: str) -> np.ndarray:
  return np.frombuffer(raw, dtype.resolve()).reshape(shape, order=order)


def _scalar(dtype: _DType, raw: bytes):
  return np.frombuffer(raw, dtype.resolve())[0]


def _array_with_state(make, arguments, state, *unused):
  """An array in the form that JAX and dill pickle it: how to make an empty one, its arguments, its state."""
  del make, arguments
  array = _Array()
  array.__setstate__(state)
  return array


_NUMPY = {"dtype": _DType, "_reconstruct": _Array, "_frombuffer": _from_bytes, "scalar": _scalar}


def _with_arrays(tree):
  """`tree` with its arrays made, through dictionaries, lists and tuples."""
  if isinstance(tree, _Array):
    return tree.value
  if isinstance(tree, dict):
    return {name: _with_arrays(value) for name, value in tree.items()}
  if isinstance(tree, (list, tuple)):
    return [_with_arrays(value) for value in tree]
  return tree
