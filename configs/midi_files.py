"""Your own MIDI files as Music Transformer events: configs/maestro_v3.py reduced to a laptop.

Your files: --config.data.files='folder/**/*.mid' (in quotes), or --config.data.files=folder. Percussion is dropped.
Cost: 1.1M parameters, a laptop.
"""

from configs import maestro_v3


def get_config():
  config = maestro_v3.get_config()
  config.model.update(
    max_context=2048,
    num_latents=256,
    num_layers=4,
    latent_width=128,
    num_self_heads=4,
    cross_attend_dropout=0.0,
    dropout=0.1,
    dtype="float32",
  )
  config.data.update(task="midi_files", min_crop=256, max_transposition=3, max_stretch=0.05)
  config.train.update(steps=1000, batch_size=8, log_every=10, checkpoint_every=250)
  config.train.optimizer.update(learning_rate=3e-3, warmup_steps=100, schedule="cosine")
  config.eval.update(batch_size=8, stride=256, every=250, max_sequences=8)
  return config
