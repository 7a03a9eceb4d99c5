"""What is each part of the recipe for small models worth, on photographs?

The recipe of configs/photos32.py: Muon, rotary positions over row, column and channel beside learned tables, and
Fourier features of each sub-pixel's value. Then the options that text gains from, added to it: two convolution taps,
normalized queries and keys, output projections that start at zero.

Here: photographs of 32x32 pixels, 3 layers of width 64, 128 latents of 3,072 inputs, 400 steps of 8 pictures; the
paper's model has learned tables only, and Adam. Learning rates of each are doubled until the loss rises.
"""

from configs import photos32

VARIANTS = {
  "adam": "the paper's: Adam, rate 8e-3, learned tables of row, column and channel",
  "muon": "Muon, rate 1.6e-2",
  "rotary": "muon, and rotary positions over row, column and channel",
  "values": "muon, and features of values",
  "all": "muon with both",
  "all-low": "the same with rate 8e-3",
  "all-high": "the same with rate 3.2e-2",
  "zero-init": "all, and model.zero_init",
  "transformer-128": "all, with 128 latents of 128 inputs: a plain Transformer",
  "transformer-512": "all, with 512 latents of 512 inputs and 2 pictures for each step, so as many targets",
}
_RATES = {"adam": 8e-3, "low": 8e-3, "high": 3.2e-2}
_PLAIN = ("adam", "muon")


def get_config(variant="all"):
  name, _, rate = variant.partition("-")
  config = photos32.get_config()
  config.model.zero_init = variant == "zero-init"
  if name in _PLAIN or variant == "values":
    config.model.update(position_encoding="learned", rotary_axes=())
  if name in _PLAIN or variant == "rotary":
    config.model.value_features = 0
  if name == "transformer":
    config.model.update(max_context=int(rate), num_latents=int(rate))
    config.data.min_crop = int(rate) + 1
    config.train.batch_size = 1024 // int(rate)
  config.train.update(steps=400, checkpoint_every=400)
  config.train.optimizer.update(learning_rate=_RATES.get(variant, _RATES.get(rate, 1.6e-2)), warmup_steps=30)
  if name == "adam":
    config.train.optimizer.update(name="adam", b2=0.999)
  config.eval.update(every=200, max_sequences=32, num_samples=0)
  return config
