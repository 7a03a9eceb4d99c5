"""The mirrored copy task at its published length, 131,072 tokens.

Reproduces: the paper's long copy task: 6 layers, 1,024 latents, width 1,024, 16 heads, sinusoidal positions, batch
  4,096 in microbatches, Adam at 3e-4, 1,000 steps of warm-up, cosine, about 25,000 steps; crops of at least 65,536.
Published: perfect copies.
Cost: 90M parameters. The context is streamed, so memory depends on the latents. configs/copy.py
  is the same task at 32 tokens, for a laptop.
"""

from configs import copy


def get_config():
  config = copy.get_config()
  config.model.update(
    max_context=131_072,
    num_latents=1024,
    num_layers=6,
    latent_width=1024,
    num_cross_heads=16,
    num_self_heads=16,
    position_sizes=(131_074,),
    dropout=0.1,
    dtype="bfloat16",
  )
  config.data.min_crop = 65_536
  config.train.update(
    steps=25_000, batch_size=4096, microbatches=16, loss_reduction="sum", log_every=100, checkpoint_every=1000
  )
  config.train.optimizer.update(learning_rate=3e-4, warmup_steps=1000)
  config.eval.update(batch_size=256, every=5000, num_samples=0)
  return config
