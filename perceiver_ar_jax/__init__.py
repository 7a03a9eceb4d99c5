"""Perceiver AR in JAX/Flax: a long-context autoregressive model for TPU and GPU pods."""
