"""Benchmarks of the production step, of generation and of the data pipeline, of any config."""

import json
import os
import random
import subprocess
import sys

import pytest

from benchmarks import compressors, data, step
from tests import batches, tiny

_REFUSE = """
import runpy, sys

class Refuse:
  def find_spec(self, name, path=None, target=None):
    if name.partition(".")[0] in ("tensorflow", "tensorflow_datasets", "seqio", "clu"):
      raise ImportError(f"{name} must not be imported")

sys.meta_path.insert(0, Refuse())
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""
_SMALL = {"latent_width": 16, "num_layers": 1, "num_latents": 16, "num_cross_heads": 2, "num_self_heads": 2}


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [("step", "--context=64", "--steps=1"), ("generate", "--tokens=20", "--batch=2")])
def test_a_benchmark_needs_neither_tensorflow_nor_seqio(arguments):
  module, *flags = arguments
  settings = [f"--config.model.{name}={value}" for name, value in (_SMALL | {"max_context": 64}).items()]
  command = [f"benchmarks.{module}", "--config=benchmarks/point_a.py", *settings, *flags]
  result = subprocess.run(
    [sys.executable, "-c", _REFUSE, *command], cwd=tiny.ROOT, env=os.environ, capture_output=True, text=True
  )
  assert result.returncode == 0, result.stderr
  assert json.loads(result.stdout)["context"] == 64
  refused = subprocess.run([sys.executable, "-c", _REFUSE, "seqio"], cwd=tiny.ROOT, capture_output=True, text=True)
  assert "seqio must not be imported" in refused.stderr


def test_the_pipeline_is_measured_over_an_epoch(tmp_path):
  files = batches.write(tmp_path, {f"{index}.txt": "tick tock " * 40 for index in range(20)})
  config = tiny.config(data__task="text_files", data__files=str(files), train__batch_size=4)
  result = data.measure(config, 2)
  assert result.pop("task") == "text_files" and result["records"] < 20
  assert min(result.values()) > 0


def test_compressors_know_the_training_split():
  noise = random.Random(0).randbytes(100_000)
  known, unknown = (
    compressors.measure(noise, text) for text in (noise[40_000:60_000], random.Random(1).randbytes(20_000))
  )
  for name in {"xz", "zstd"} & known.keys():
    assert known[name] < 0.5 and 7.9 < unknown[name] < 8.2, name
  assert "xz" in known


def test_a_step_is_measured_at_any_context():
  config = step.at_context(tiny.config(), 64)
  assert config.model.position_sizes == (66,)
  figures = step.measure(config, steps=2, seconds=60)
  assert figures["context"] == 64 and len(figures["all_seconds"]) == 2
  assert figures["targets_per_second"] > 0 and figures["temp_bytes"] > 0
  # Weights, two moments of each, and two counts of steps.
  assert figures["state_bytes"] == 4 * (3 * figures["num_params"] + 2)
