"""Reads a folder of exported weights; interop/export.py writes it, and its files are listed there.

The file model.safetensors may come from anyone: before any value is read, its header must have exactly the names,
shapes and types of the model of config.json. Layers, which training stacks, are separate in the file and numbered
through all groups between cross-attentions.
"""

import contextlib
import itertools
import re
import tempfile
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from etils import epath
from flax import linen as nn
from flax import traverse_util

from perceiver_ar_jax.config import InputError, ModelConfig, checks, config_from_run, reading, require
from perceiver_ar_jax.models import architectures, perceiver_ar
from perceiver_ar_jax.training.workdir import is_object_store

DTYPES = {"float32": "F32", "bfloat16": "BF16"}
"""Types of exported weights, by their JAX names, and their names in the file. In memory, weights are float32."""
_STACKED = re.compile(r"(?:layers_(\d+)|segments/layers)/(.+)")
_CROSS_ATTENTION = re.compile(r"^cross_attend_(\d+)/")
_AGAIN = "export or download it again"


class Parameter(NamedTuple):
  """One array of the model's parameters, and its arrays in the file: one for each layer if layers are stacked."""

  path: str  # in the tree of parameters, such as layers_0/mlp/up/kernel
  names: tuple[str, ...]  # in the file
  is_stacked: bool
  shape: tuple[int, ...]  # of each array in the file


def parameters(config: ModelConfig) -> list[Parameter]:
  """The parameters of a model; nothing is allocated."""
  starts, result = [0, *itertools.accumulate(perceiver_ar.group_depths(config))], []
  for path, leaf in traverse_util.flatten_dict(nn.meta.unbox(architectures.abstract_params(config)), sep="/").items():
    if stacked := _STACKED.fullmatch(path):
      first, name = starts[int(stacked[1] or 0)], stacked[2].replace("/", ".")
      names = tuple(f"layers.{layer}.{name}" for layer in range(first, first + leaf.shape[0]))
      result.append(Parameter(path, names, True, leaf.shape[1:]))
    else:
      names = (_CROSS_ATTENTION.sub(r"cross_attend.\1.", path).replace("/", "."),)
      result.append(Parameter(path, names, False, leaf.shape))
  return result


def read(config: ModelConfig, folder: epath.PathLike) -> tuple[int, dict]:
  """Returns (step, parameters as a tree of float32 NumPy arrays).

  Raises InputError if they are missing, damaged or not those of `config`, TransientError if they may be read later.
  """
  path, arrays = epath.Path(folder) / config_from_run.WEIGHTS, {}
  require(path.is_file(), f"{folder} contains no {path.name}: give a folder that interop.export wrote.")
  with contextlib.ExitStack() as stack, reading(path, "give this user access"):
    local = path
    if is_object_store(path):
      local = epath.Path(stack.enter_context(tempfile.TemporaryDirectory())) / path.name
      path.copy(local)
    try:
      file = stack.enter_context(safetensors.safe_open(local, framework="np"))
      names = list(file.keys())
      types = {name: (file.get_slice(name).get_dtype(), tuple(file.get_slice(name).get_shape())) for name in names}
      step = (file.metadata() or {}).get("step", "0")
      if not re.fullmatch(r"\d{1,15}", step):
        raise ValueError(f"its step {step[:40]!r} is not a number")
    except (safetensors.SafetensorError, ValueError) as error:
      raise InputError(f"{path} is damaged, or not a safetensors file ({checks.one_line(error)}): {_AGAIN}.") from error
    for each in _check(path, config, types):
      values = [np.asarray(file.get_tensor(name)).astype(np.float32) for name in each.names]
      arrays[each.path] = np.stack(values) if each.is_stacked else values[0]
  return int(step), traverse_util.unflatten_dict(arrays, sep="/")


def restore(config: ModelConfig, folder: epath.PathLike, abstract_params: dict) -> tuple[int, dict]:
  """Returns (step, parameters in the layout of `abstract_params`); raises as `read`."""
  step, params = read(config, folder)
  make = jax.make_array_from_callback  # each device gets its own part
  return step, jax.tree.map(lambda x, leaf: make(leaf.shape, leaf.sharding, x.__getitem__), params, abstract_params)


def load(folder: epath.PathLike) -> tuple[ModelConfig, dict]:
  """Returns (the model's settings, its parameters on the default device); raises as `read`."""
  config = config_from_run.load_config(folder).model
  return config, jax.tree.map(jnp.asarray, read(config, folder)[1])


def _check(path: epath.Path, config: ModelConfig, actual: dict[str, tuple[str, tuple[int, ...]]]) -> list[Parameter]:
  """Returns the parameters of `config`; raises InputError unless they are `actual`, types and shapes in the file."""
  wrong = f"{path} does not fit the model of its config.json: it"
  expected = parameters(config)
  shapes = {name: each.shape for each in expected for name in each.names}
  for problem, names in (("lacks", shapes.keys() - actual.keys()), ("has unknown", actual.keys() - shapes.keys())):
    shown = ", ".join(repr(name[:80])[1:-1] for name in sorted(names)[:3])  # without line ends
    rest = f" and {len(names) - 3} others" if len(names) > 3 else ""
    require(not names, f"{wrong} {problem} parameters {shown}{rest}. Please {_AGAIN}.")
  for name, (dtype, shape) in actual.items():
    problem = f"{wrong}s parameter {name}"
    require(shape == shapes[name], f"{problem} has shape {shape}, and the model's has {shapes[name]}. Please {_AGAIN}.")
    known = " or ".join(DTYPES)
    require(dtype in DTYPES.values(), f"{problem} is of type {dtype} instead of {known}. Please {_AGAIN}.")
  return expected
