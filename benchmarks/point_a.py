"""A small model whose step is mostly context: the point at which implementations are compared.

Batch 2, 256 latents, width 256, 8 heads, 4 layers, widening 4, dropout 0.1, 259 tokens, rotary positions, Adam with
clipping, summed losses. The benchmark sets the context; batches are random tokens.
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
  config.data.task = "copy"  # named only because every experiment has one; nothing is read
  config.train.update(steps=1000, batch_size=2, loss_reduction="sum")
  config.eval.batch_size = 2
  return config
