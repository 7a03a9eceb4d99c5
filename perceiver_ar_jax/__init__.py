"""Perceiver AR in JAX/Flax: a long-context autoregressive model for TPU and GPU pods.

PerceiverAR, ModelConfig      the model, a flax.linen module, and its settings
load_checkpoint(workdir)      the config, step and weights of a trained run
Sampler.from_workdir(workdir) generates and scores with a trained run; from_pretrained(folder) with exported weights
tasks                         the registry of datasets: names(), get_tasks(), and add() for new ones
"""

import os

from etils import epy

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # read when XLA or TensorFlow is loaded

from perceiver_ar_jax.config import ModelConfig

# Imported on first use: the model needs no TensorFlow, and a command that only prints help needs no JAX.
with epy.lazy_api_imports(globals()):
  from perceiver_ar_jax.data import tasks
  from perceiver_ar_jax.evaluation.evaluate import load_checkpoint
  from perceiver_ar_jax.models.perceiver_ar import PerceiverAR
  from perceiver_ar_jax.sampling.sampler import Sampler

__all__ = ["ModelConfig", "PerceiverAR", "Sampler", "load_checkpoint", "tasks"]
__version__ = "0.1.0"
