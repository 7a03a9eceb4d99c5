"""Point A: a small model with a large context, used to compare implementations.

Batch 2, 256 latents, width 256, 8 heads, 4 layers, widening 4, dropout 0.1, 259 tokens, rotary positions, Adam with
clipping, summed losses. The benchmark sets the context and draws random tokens.
"""

from perceiver_ar_jax import config as config_lib


def get_config():
  config = config_lib.defaults()
  config.model.update(
    vocab_size=259,
    max_context=8192,
    num_latents=256,
    num_layers=4,
    latent_width=256,
    num_cross_heads=8,
    num_self_heads=8,
    position_encoding="rotary",
    dropout=0.1,
  )
  config.data.task = "copy"  # every config names a task; no data is read
  config.train.update(steps=1000, batch_size=2, loss_reduction="sum")
  config.eval.batch_size = 2
  return config
