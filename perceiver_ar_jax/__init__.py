"""Perceiver AR in JAX/Flax: a long-context autoregressive model for TPU and GPU pods.

PerceiverAR, ModelConfig      the model, a flax.linen module, and its settings
load_checkpoint(workdir)      the config, step and weights of a trained run
Sampler.from_workdir(workdir) generates and scores with a trained run; from_pretrained(folder) with exported weights
tasks                         the registry of datasets: names(), get_tasks(), and add() for new ones
"""

import importlib
import os
from typing import TYPE_CHECKING

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # read when XLA or TensorFlow is loaded

from perceiver_ar_jax.config import ModelConfig

if TYPE_CHECKING:
  from perceiver_ar_jax.data import tasks
  from perceiver_ar_jax.evaluation.evaluate import load_checkpoint
  from perceiver_ar_jax.models.perceiver_ar import PerceiverAR
  from perceiver_ar_jax.sampling.sampler import Sampler

__all__ = ["ModelConfig", "PerceiverAR", "Sampler", "load_checkpoint", "tasks"]
__version__ = "0.1.0"

# Imported on first use: the model needs no TensorFlow, and a command that only prints help needs no JAX.
_MODULES = {
  "PerceiverAR": "models.perceiver_ar",
  "Sampler": "sampling.sampler",
  "load_checkpoint": "evaluation.evaluate",
  "tasks": "data.tasks",
}


def __getattr__(name: str):
  if name not in _MODULES:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  module = importlib.import_module(f"perceiver_ar_jax.{_MODULES[name]}")
  return module if name == "tasks" else getattr(module, name)


def __dir__() -> list[str]:
  return sorted({*globals(), *__all__})
