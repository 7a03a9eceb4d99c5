"""Perceiver AR in JAX/Flax: a long-context autoregressive model for TPU and GPU pods."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # read once, when TensorFlow loads, whoever loads it first

from perceiver_ar_jax.config import ModelConfig
from perceiver_ar_jax.models.perceiver_ar import PerceiverAR

__all__ = ["ModelConfig", "PerceiverAR"]
__version__ = "0.1.0"
