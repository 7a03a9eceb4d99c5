"""Photographs of 64x64 pixels from installed packages: configs/photos32.py with four times the context.

Reproduces no published result: 12,288 sub-pixels, as many as in the paper's ImageNet experiment, on a laptop.
Measured: 4.045 bits/dim on the validation crops (PNG 4.926, lossless WebP 4.041); without convolution taps and
normalized queries and keys, at twice the rate, 4.224.
Cost: 0.53M parameters, 43 minutes on one core of a machine with AVX-512, whose other core was busy.
"""

from configs import photos32


def get_config():
  config = photos32.get_config()
  config.model.update(max_context=12_288, num_latents=256, latent_width=96, position_sizes=(66, 66, 5))
  config.data.update(task="photos64", min_crop=257)
  config.train.update(steps=6000, batch_size=4, checkpoint_every=500)
  config.train.optimizer.learning_rate = 6e-3
  config.eval.update(batch_size=4, every=2000)
  return config
