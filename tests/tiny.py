"""A copy experiment that trains in seconds, and its command line, in this process or in another."""

import contextlib
import dataclasses
import functools
import importlib
import io
import json
import os
import pathlib
import runpy
import subprocess
import sys
import warnings
from unittest import mock

import jax
import numpy as np
from absl import app
from absl.testing import flagsaver
from flax import linen as nn

from configs import copy
from perceiver_ar_jax import config as config_lib
from perceiver_ar_jax.models import architectures

ROOT = pathlib.Path(__file__).parent.parent
OVERRIDES = {
  "model.latent_width": 16,
  "model.num_cross_heads": 2,
  "model.num_self_heads": 2,
  "model.num_layers": 2,
  "model.dropout": 0.1,
  "data.shuffle_buffer": 8,
  "train.batch_size": 8,
  "train.steps": 12,
  "train.log_every": 1,
  "train.checkpoint_every": 3,
  "train.optimizer.warmup_steps": 2,
  "train.optimizer.learning_rate": 0.01,
  "eval.every": 100,
  "eval.batch_size": 16,
  "eval.max_sequences": 8,
  "eval.num_samples": 0,
}


def config(**overrides) -> config_lib.Config:
  """The experiment; overrides are dotted names with "__" for the dot: train__steps=3."""
  result = copy.get_config()
  for name, value in (OVERRIDES | {key.replace("__", "."): value for key, value in overrides.items()}).items():
    *path, last = name.split(".")
    section = result
    for part in path:
      section = section[part]
    section[last] = value
  return config_lib.resolve(result)


def random_params(model: config_lib.ModelConfig, seed: int = 0) -> dict:
  """Random values of every parameter, those that start at 0 or 1 included.

  To compile their initialization takes longer than most tests need for all else.
  """
  shapes = nn.meta.unbox(architectures.abstract_params(model))
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda leaf: jax.numpy.array(rng.normal(scale=0.3, size=leaf.shape), "float32"), shapes)


def export_model(model: config_lib.ModelConfig, params, folder, **settings) -> None:
  """Exports parameters of any model with the other settings of the experiment."""
  from perceiver_ar_jax.interop import export  # imports TensorFlow, which most tests do not need

  export.export_run(dataclasses.replace(config(), model=model), params, folder, **settings)


app.define_help_flags()  # absl defines them once per process, so before `run_module` saves the flags


def run_module(module: str, *arguments) -> subprocess.CompletedProcess:
  """The exit code and output of `python -m module arguments`, run in this process; all flags are restored."""
  importlib.import_module("perceiver_ar_jax.command_line")  # first, so that its flags are defined after the context too
  stdout, stderr = io.StringIO(), io.StringIO()
  with (
    flagsaver.flagsaver(),
    mock.patch.object(sys, "argv", [module, *map(str, arguments)]),
    contextlib.redirect_stdout(stdout),
    contextlib.redirect_stderr(stderr),
    warnings.catch_warnings(action="ignore", category=RuntimeWarning),  # a test may have imported the module
  ):
    try:
      runpy.run_module(module, run_name="__main__", alter_sys=True)
      code = 0
    except SystemExit as exit:
      code = exit.code
  return subprocess.CompletedProcess([module, *arguments], code, stdout.getvalue(), stderr.getvalue())


def main(*arguments) -> subprocess.CompletedProcess:
  """The result of the main command in this process."""
  return run_module("perceiver_ar_jax.main", *arguments)


def run(workdir, *arguments, **overrides) -> subprocess.CompletedProcess:
  """The result of the main command on the experiment, in this process."""
  return main(*flags(workdir, **overrides), *arguments)


def flags(workdir, **overrides) -> list[str]:
  """The flags of the experiment."""
  settings = OVERRIDES | {key.replace("__", "."): value for key, value in overrides.items()}
  overriding = (f"--config.{name}={value}" for name, value in settings.items())
  return ["--config=configs/copy.py", f"--workdir={workdir}", *overriding]


def command(workdir, *arguments: str, **overrides) -> list[str]:
  """The command line of the experiment, for a process of its own."""
  return [sys.executable, "-m", "perceiver_ar_jax.main", *flags(workdir, **overrides), *arguments]


def environment(num_devices: int) -> dict[str, str]:
  """The environment of a process with that many virtual CPU devices."""
  devices = f"--xla_force_host_platform_device_count={num_devices}"
  return os.environ | {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {devices}"}


def optimized():
  """A context in which XLA optimizes programs, unlike elsewhere in the tests: for those that run many times."""
  options = {"xla_backend_optimization_level": 1}
  return mock.patch.object(jax, "jit", functools.partial(jax.jit, compiler_options=options))


def python(*arguments: str) -> subprocess.CompletedProcess:
  """The finished process of Python with these arguments, for what needs a clean interpreter."""
  return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300)


def expect_error(result: subprocess.CompletedProcess, *words: str) -> None:
  """Fails unless the command ended with code 1 and one paragraph that contains all `words`, without a traceback."""
  assert result.returncode == 1, result.stderr
  errors = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
  assert len(errors) == 1 and "Traceback" not in result.stderr, result.stderr
  for word in words:
    assert word in errors[0]


def losses(workdir) -> dict[int, float]:
  """{step: loss} of metrics.jsonl; fails if a step is logged twice."""
  result = {}
  for line in (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines():
    entry = json.loads(line)
    if "loss" in entry:
      assert entry["step"] not in result, f"step {entry['step']} is logged twice"
      result[entry["step"]] = entry["loss"]
  return result
