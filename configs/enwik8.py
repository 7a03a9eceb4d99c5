"""enwik8: the first 100 MB of an English Wikipedia dump as bytes, split 90 / 5 / 5; likelihood of bytes.

Reproduces no result of the paper; this is the usual benchmark of byte-level models.
Cost: 41M parameters; days on one accelerator. A laptop can train it with reduced width and depth.
Data: the unpacked file enwik8 in --config.data.data_dir.
"""

from perceiver_ar_jax import config as config_lib


def get_config():
  config = config_lib.defaults()
  config.model.update(
    vocab_size=259,
    max_context=8192,
    num_latents=1024,
    num_layers=12,
    latent_width=512,
    num_cross_heads=8,
    num_self_heads=8,
    position_encoding="rotary",
    cross_attend_dropout=0.5,
    dropout=0.1,
    dtype="bfloat16",
  )
  config.data.update(task="enwik8", min_crop=1024)
  config.train.update(steps=100_000, batch_size=32, log_every=100, checkpoint_every=2000)
  config.train.optimizer.update(learning_rate=3e-4, warmup_steps=2000, schedule="cosine")
  config.eval.update(batch_size=32, stride=512, every=5000)
  return config
