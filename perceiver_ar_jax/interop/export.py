"""Exports trained weights to a folder that other programs read.

  python -m perceiver_ar_jax.interop.export --workdir=RUN --output=FOLDER [--dtype=bfloat16] [--step=N]

The folder contains model.safetensors (parameters under flat names such as layers.0.mlp.up.kernel, each layer separate,
kernels [in, out]; its metadata have the step), config.json (all settings of the run), the SentencePiece model if the
run has one, and a model card. It appears as a whole or not at all. training/pretrained.py reads it.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from etils import epath
from flax import linen as nn
from flax import traverse_util
from safetensors.numpy import save_file

from perceiver_ar_jax.config import Config, InputError, MeshConfig, ModelConfig, config_from_run
from perceiver_ar_jax.config.checks import reading, require, require_choice, writing
from perceiver_ar_jax.data import units
from perceiver_ar_jax.evaluation import evaluate
from perceiver_ar_jax.training import pretrained
from perceiver_ar_jax.training.workdir import is_object_store

_FREE = "give a folder that you may write to, with enough space"
_LOAD = """## Load

    sampler = perceiver_ar_jax.Sampler.from_pretrained("FOLDER")
    config, params = perceiver_ar_jax.training.pretrained.load("FOLDER")  # of the JAX model, PerceiverAR
    model = perceiver_ar_torch.load("FOLDER")  # the PyTorch model, with perceiver_ar_torch.py of the examples
    python -m perceiver_ar_jax.main --workdir=FOLDER --mode=sample  # or score, eval; --config.data.files=... sets paths

To start another run from these weights: `--config.train.init_from=FOLDER`.
"""


def export_run(
  config: Config,
  params: Any,
  folder: epath.PathLike,
  *,
  dtype: str = "float32",
  step: int = 0,
  metrics: Sequence[str] = (),
) -> None:
  """Writes the weights of a run, its settings and its SentencePiece model to `folder`, which is new or empty.

  `params` are as `PerceiverAR(config.model).init` or `load_checkpoint` returns them, `dtype` is float32 or bfloat16,
  `step` is that of training, and `metrics` are lines of the model card. config.json has the mesh and attention kernel
  of no particular machine. Raises InputError if `params` are not those of `config.model`, or `folder` is not empty or
  cannot be written, TransientError if it cannot be written now, such as on a full disk.
  """
  _check_output(folder := epath.Path(folder))
  require_choice("dtype", dtype, pretrained.DTYPES)
  files: dict[str, bytes] = {}
  data, model = config.data, config.model
  if data.sentencepiece:
    from perceiver_ar_jax.data.sources import sentencepiece_fingerprint  # imports TensorFlow

    name = config_from_run.SENTENCEPIECE
    with reading(data.sentencepiece, "set --config.data.sentencepiece to where the file is now"):
      files[name] = epath.Path(data.sentencepiece).read_bytes()
    data = dataclasses.replace(data, sentencepiece=name, sentencepiece_fingerprint=sentencepiece_fingerprint(data))
  here = dataclasses.replace(model, attention=ModelConfig.attention)
  files["config.json"] = dataclasses.replace(config, data=data, model=here, mesh=MeshConfig()).to_json().encode()
  arrays = _arrays(model, params, jnp.dtype(dtype))
  size = f"{sum(x.size for x in arrays.values()):,} parameters ({dtype})"
  card = ["---", "library_name: perceiver_ar_jax", "---", "", f"# {folder.name}", ""]
  card += [f"{model.architecture} with {size}, trained for {step:,} steps with perceiver_ar_jax."]
  card += ["config.json has all settings.", ""]
  if metrics:
    card += ["## Metrics", "", "| split | step | metric | bits per token | accuracy | tokens |", "|---" * 6 + "|"]
    card += [*metrics, ""]
  files["README.md"] = "\n".join([*card, _LOAD]).encode()
  target = epath.Path(os.path.abspath(folder))
  with writing(folder, _FREE):
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as temporary:
      (local := epath.Path(temporary) / target.name).mkdir()  # unlike `temporary`, with the user's permissions
      for name, content in files.items():
        (local / name).write_bytes(content)
      save_file(arrays, os.fspath(local / config_from_run.WEIGHTS), {"format": "perceiver_ar_jax", "step": str(step)})
      shutil.copymode(local / "config.json", local / config_from_run.WEIGHTS)  # which safetensors keeps private
      os.replace(local, target)


def _check_output(folder: epath.Path) -> None:
  """Raises InputError unless `folder` is local, and does not exist or is empty."""
  require(not is_object_store(folder), f"{folder} is not a local folder: give one, and copy it.")
  with writing(folder, _FREE):
    is_free = not folder.exists() or folder.is_dir() and not any(True for _ in folder.iterdir())
    require(is_free, f"{folder} already exists and is not empty: give a new folder.")


def _arrays(model: ModelConfig, params: Any, dtype: np.dtype) -> dict[str, np.ndarray]:
  """The arrays of model.safetensors by name; raises InputError unless `params` are those of `model`."""
  leaves = traverse_util.flatten_dict(nn.meta.unbox(params), sep="/")
  expected = pretrained.parameters(model)
  shapes = {each.path: (len(each.names), *each.shape) if each.is_stacked else each.shape for each in expected}
  if differing := shapes.items() ^ {path: np.shape(leaf) for path, leaf in leaves.items()}.items():
    shown = ", ".join(f"{path} {shape}" for path, shape in sorted(differing)[:4])
    raise InputError(f"The parameters are not those of the model: {shown} differ.")
  arrays: dict[str, np.ndarray] = {}
  for each in expected:
    value = np.ascontiguousarray(jax.device_get(leaves[each.path])).astype(dtype, copy=False)
    arrays |= zip(each.names, value if each.is_stacked else [value])
  return arrays


def _run(config: Config) -> int:
  workdir, folder = epath.Path(flags.FLAGS.workdir), epath.Path(flags.FLAGS.output)
  _check_output(folder)
  model = dataclasses.replace(config.model, attention=ModelConfig.attention)
  here = dataclasses.replace(config, model=model, mesh=MeshConfig())
  _, step, params = evaluate.restore(here, workdir, flags.FLAGS.step)
  metrics = []
  for path in sorted(workdir.glob(f"eval-*-{step}.json")):
    with contextlib.suppress(ValueError, KeyError):  # half a file, or not one of this project
      result = json.loads(path.read_text())
      result["summary"] = units.UNITS[result["unit"]].summary.format_map(result)
      columns = "| {split} | {step} | {summary} | {bits_per_token:.4f} | {accuracy:.4f} | {num_tokens:,} |"
      metrics.append(columns.format_map(result))
  export_run(config, params, folder, dtype=flags.FLAGS.dtype, step=step, metrics=metrics)
  print(f"Wrote the weights of step {step} in {flags.FLAGS.dtype} to {folder}.")
  return 0


if __name__ == "__main__":
  from perceiver_ar_jax import command_line  # here, so that importing this module defines no flags

  flags.DEFINE_string("output", None, "The folder to write: new or empty.")
  flags.DEFINE_enum("dtype", "float32", list(pretrained.DTYPES), "Type of the values in the file.")
  flags.DEFINE_integer("step", None, "Step of the checkpoint; default: the newest.")
  command_line.run(_run, required=("workdir", "output"))
