"""A copy experiment that trains in seconds, and the command line that runs it in a process of its own."""

import json
import os
import pathlib
import subprocess
import sys

from configs import copy
from perceiver_ar_jax import config as config_lib

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


def command(workdir, *arguments: str, **overrides) -> list[str]:
  """The command line of the same experiment."""
  settings = OVERRIDES | {key.replace("__", "."): value for key, value in overrides.items()}
  return [
    sys.executable,
    "-m",
    "perceiver_ar_jax.main",
    "--config=configs/copy.py",
    f"--workdir={workdir}",
    *(f"--config.{name}={value}" for name, value in settings.items()),
    *arguments,
  ]


def environment(num_devices: int = 1) -> dict[str, str]:
  """This process's environment, with that many virtual CPU devices."""
  flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={num_devices}"
  return os.environ | {"XLA_FLAGS": flags}


def run(workdir, *arguments: str, num_devices: int = 1, **overrides) -> subprocess.CompletedProcess:
  """The finished process of `command`."""
  _, *rest = command(workdir, *arguments, **overrides)
  return python(*rest, num_devices=num_devices)


def python(*arguments: str, num_devices: int = 1) -> subprocess.CompletedProcess:
  """The finished process of Python with these arguments, run in the project's folder, its output captured as text."""
  return subprocess.run(
    [sys.executable, *arguments], cwd=ROOT, env=environment(num_devices), capture_output=True, text=True, timeout=300
  )


def expect_error(result: subprocess.CompletedProcess, *words: str) -> None:
  """Fails unless the process ended with code 1 and one paragraph that holds all `words`, without a traceback."""
  assert result.returncode == 1, result.stderr
  errors = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
  assert len(errors) == 1 and "Traceback" not in result.stderr, result.stderr
  for word in words:
    assert word in errors[0]


def losses(workdir) -> dict[int, float]:
  """{step: loss} of metrics.jsonl; fails if a step is there twice."""
  result = {}
  for line in (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines():
    entry = json.loads(line)
    if "loss" in entry:
      assert entry["step"] not in result, f"step {entry['step']} is logged twice"
      result[entry["step"]] = entry["loss"]
  return result
