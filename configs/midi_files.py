"""Your own MIDI files as Music Transformer events: configs/maestro_v3_small.py with width 128.

Your files: --config.data.files='folder/**/*.mid' (in quotes), or --config.data.files=folder. Percussion is dropped.
Cost: 1.1M parameters, a laptop.
"""

from configs import maestro_v3_small


def get_config():
  config = maestro_v3_small.get_config()
  config.model.latent_width = 128
  config.data.update(task="midi_files", max_transposition=3, max_stretch=0.05)
  config.train.update(steps=1000, checkpoint_every=250)
  config.train.optimizer.decay_steps = 500
  config.eval.update(every=250, max_sequences=8, max_tokens=None, num_samples=None)
  return config
