"""The mirrored copy task: random bytes and their mirror image; the second half tests how far back a model attends.

Reproduces: the paper's copy task, whose model of 6 layers copies 131,072 tokens without error after about 25,000
  steps (configs/copy131072.py). This file has 32 tokens, so that it learns on a laptop's CPU. Another length L needs
  three settings: --config.model.max_context=L --config.model.position_sizes="(L+2,)" --config.data.min_crop=L/2
Measured: 99.7% of the second half after 500 steps, 99.9% after 1,000.
Cost: 0.1M parameters, two minutes on 2 shared cores.
"""

from perceiver_ar_jax import config as config_lib


def get_config():
  config = config_lib.defaults()
  config.model.update(
    vocab_size=259,
    max_context=32,
    num_latents=16,
    num_layers=1,
    latent_width=64,
    num_cross_heads=4,
    num_self_heads=4,
    position_encoding="sinusoidal",
    position_sizes=(34,),
  )
  config.data.update(task="copy", min_crop=16)
  config.train.update(steps=1000, batch_size=64, log_every=50, checkpoint_every=250)
  config.train.optimizer.update(learning_rate=3e-3, warmup_steps=100, schedule="cosine")
  config.eval.update(batch_size=256, every=250)
  return config
