"""Photographs of 32x32 pixels, embedded in an installed package: what `make train` runs.

Reproduces nothing published: it shows the whole path, from real pixels to bits per sub-pixel, on a laptop.
"""

from perceiver_ar_jax import config as config_lib


def get_config():
  config = config_lib.defaults()
  config.model.update(
    vocab_size=259,
    max_context=3072,
    num_latents=384,
    num_layers=4,
    latent_width=192,
    num_cross_heads=4,
    num_self_heads=4,
    position_encoding="learned",
    position_sizes=(34, 34, 5),
  )
  config.data.update(task="photos32")
  config.train.update(steps=600, batch_size=8, checkpoint_every=100)
  config.train.optimizer.update(learning_rate=1e-3, warmup_steps=50, schedule="cosine", end_learning_rate=1e-4)
  config.eval.update(batch_size=8, every=200)
  return config
