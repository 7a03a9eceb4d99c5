"""Reads the arrays and plain containers of a pickle (a .dill file is one) without running what is in it.

A pickle is a program: the standard reader calls any function that it names. This one knows how NumPy, JAX, Haiku and
dill write arrays and dictionaries; everything else, such as optimizer state, becomes an inert object.
"""

import pickle
from typing import Any, BinaryIO

import numpy as np
from ml_dtypes import bfloat16


def load(file: BinaryIO) -> Any:
  """The pickled object; raises whatever a damaged or foreign file makes the reader raise."""
  return _Unpickler(file).load()


class _Unpickler(pickle.Unpickler):
  """Rebuilds arrays and plain containers, and nothing else: what is unknown becomes an `_Inert` object."""

  def find_class(self, module: str, name: str):
    numpy_parts = {
      "ndarray": np.ndarray,
      "dtype": np.dtype,
      "_reconstruct": _empty_array,
      "_frombuffer": _array_from_buffer,
    }
    if module.split(".")[0] == "numpy" and name in numpy_parts:
      return numpy_parts[name]
    if name == "bfloat16":
      return bfloat16
    if name in ("_reconstruct_array", "reconstruct_device_array", "_create_array"):  # JAX's arrays, and dill's
      return _array_with_state
    if name == "FlatMapping":  # Haiku's dictionary
      return _FlatMapping
    # dill makes classes by functions of its own, and the pickle then makes objects of them.
    return _inert_class if module.startswith("dill") else _Inert


def _inert_class(*unused, **unused_too):
  return _Inert


def _empty_array(subtype, shape, kind):
  del subtype, kind
  return np.ndarray(shape, np.int8)


def _array_from_buffer(buffer, dtype, shape, order):
  return np.frombuffer(buffer, dtype).reshape(shape, order=order)


def _array_with_state(make, arguments, state, *unused):
  """An array in the form that JAX and dill pickle it: how to make an empty one, then its state."""
  array = make(*arguments)
  if isinstance(array, np.ndarray):
    array.__setstate__(state)
  return array


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
