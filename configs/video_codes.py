"""Codes of a video tokenizer (a VQ-GAN on DMLab, Minecraft, ...), from .npy or .npz files of time x height x width.

Reproduces no result of the paper; others report a Perceiver AR as their baseline on such codes (DMLab 64x64: FVD 96).
Your files: --config.data.files=folder --config.data.codebook_size=1024, and --config.model.vocab_size set to
  codebook_size + 3; --config.model.position_sizes="(T + 2, H + 2, W + 2)" for the longest video.
Cost: 117M parameters; days on one accelerator.
"""

from perceiver_ar_jax import config as config_lib


def get_config():
  config = config_lib.defaults()
  config.model.update(
    vocab_size=1027,
    max_context=16_384,
    num_latents=1024,
    num_layers=8,
    latent_width=1024,
    num_cross_heads=16,
    num_self_heads=16,
    position_encoding="learned",
    position_sizes=(66, 18, 18),
    dropout=0.1,
    dtype="bfloat16",
  )
  config.data.update(task="video_codes", codebook_size=1024, min_crop=1024)
  config.train.update(steps=200_000, batch_size=32, log_every=100, checkpoint_every=2000)
  config.train.optimizer.update(learning_rate=3e-4, warmup_steps=5000, schedule="cosine")
  config.eval.update(batch_size=16, every=5000)
  return config
