"""Your own text, as bytes or SentencePiece; by default, the source code of Python's standard library.

Reproduces no published result; the paper's text experiments are configs/pg19.py and configs/wikitext103.py.
Your files: --config.data.files='folder/**/*.txt' (in quotes), or --config.data.files=folder.
Cost: 1.1M parameters, a laptop.
"""

import sysconfig

from perceiver_ar_jax import config as config_lib


def get_config():
  config = config_lib.defaults()
  config.model.update(
    vocab_size=259,
    max_context=2048,
    num_latents=256,
    num_layers=4,
    latent_width=128,
    num_cross_heads=4,
    num_self_heads=4,
    position_encoding="rotary",
  )
  config.data.update(task="text_files", files=f"{sysconfig.get_path('stdlib')}/*.py", min_crop=256)
  config.train.update(steps=1000, batch_size=8, log_every=10, checkpoint_every=250)
  config.train.optimizer.update(learning_rate=3e-3, warmup_steps=100, schedule="cosine")
  config.eval.update(batch_size=8, every=250, max_sequences=8, max_tokens=2_000_000)
  return config
