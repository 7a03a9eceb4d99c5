"""Floating-point operations of a step, computed from the config alone.

Counted are matrix products, 2 FLOPs per multiply-add, as the mathematics requires them: what the backward pass
recomputes to save memory is excluded, as usual for model FLOPs utilization. Norms, softmax, dropout and the optimizer
are excluded too; in models of practical size they add a few per cent. XLA's own count visits the body of a loop once,
and layers and chunks of the context are loops, so it cannot be used here. Each architecture counts its own products.
"""

from ml_collections import config_dict

from perceiver_ar_jax.config import Config, resolve
from perceiver_ar_jax.models.architectures import architecture_of


def train_step(config: Config) -> int:
  """Returns the FLOPs of one update over all devices: the forward and the backward pass."""
  rows = config.train.batch_size // config.train.microbatches
  step = architecture_of(config.model).flops(config.model, rows, config.model.num_latents, training=True)
  return config.train.microbatches * step


def eval_step(config: Config) -> int:
  """Returns the FLOPs of scoring one batch of windows over all devices."""
  num_latents = config.eval.num_latents or config.model.num_latents
  return architecture_of(config.model).flops(config.model, config.eval.batch_size, num_latents, training=False)


def spend(config: config_dict.ConfigDict, total_flops: float) -> None:
  """Sets `train.steps` to the number of updates that `total_flops` pay for, at least one."""
  config.train.steps = max(int(total_flops / train_step(resolve(config))), 1)
