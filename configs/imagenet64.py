"""ImageNet at 64x64, sub-pixels in raster order: the paper's main image experiment.

Reproduces: the paper's ImageNet 64x64 model: 60 layers, 1,024 latents, context 12,416 (12,288 sub-pixels, SOS,
  padding), learned (x, y, channel) position tables, batch 2,048, Adam at 3e-4, constant, then cosine over the
  last 50,000 of 750,000 steps; losses summed, gradients clipped at norm 1.
Published: 3.40 bits/dim on the validation split.
Cost: 770M parameters; days on a pod of accelerators (docs/pods.md has plans). A laptop can train it with reduced
  width, depth and batch (docs/data.md), or configs/photos64.py.
Data: the TFDS builder downsampled_imagenet/64x64, prepared in --config.data.data_dir.
"""

from perceiver_ar_jax import config as config_lib


def get_config():
  config = config_lib.defaults()
  config.model.update(
    vocab_size=259,
    max_context=12_416,
    num_latents=1024,
    num_layers=60,
    latent_width=1024,
    num_cross_heads=16,
    num_self_heads=16,
    position_encoding="learned",
    position_sizes=(66, 66, 5),
    dropout=0.1,
    remat="full",
    dtype="bfloat16",
  )
  config.data.task = "imagenet64"
  config.train.update(steps=750_000, batch_size=2048, loss_reduction="sum", log_every=100, checkpoint_every=5000)
  config.train.optimizer.update(
    learning_rate=3e-4, warmup_steps=10_000, schedule="cosine", cosine_steps=50_000, end_learning_rate=0.0
  )
  config.eval.update(batch_size=512, stride=512, every=25_000)
  config.mesh.update(data=1, fsdp=-1)
  return config
