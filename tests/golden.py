"""Reads the golden files: arrays that the original release computed once, in float32."""

import json
import pathlib

import numpy as np

FOLDER = pathlib.Path(__file__).parent / "golden"


class Case:
  """One golden file: its arrays, the original constructor's arguments, and its parameters by module path."""

  def __init__(self, name: str):
    with np.load(FOLDER / f"{name}.npz") as file:
      self.arrays = {key: file[key] for key in file.files}
    self.kwargs = json.loads(str(self.arrays["config"])) if "config" in self.arrays else None

  def __getitem__(self, name: str) -> np.ndarray:
    return self.arrays[name]

  def tree(self, prefix: str) -> dict[str, dict[str, np.ndarray]]:
    """{module path: {name: array}} of everything stored under `prefix`/."""
    result = {}
    for key, value in self.arrays.items():
      if key.startswith(prefix + "/"):
        path, name = key[len(prefix) + 1 :].rsplit("/", 1)
        result.setdefault(path, {})[name] = value
    return result


def right_align(array: np.ndarray, lengths: np.ndarray) -> np.ndarray:
  """Rows [B, T, ...] that the reference pads on the right, moved to the end of the row."""
  result = np.zeros_like(array)
  for row, length in enumerate(lengths):
    if length:
      result[row, -length:] = array[row, :length]
  return result
