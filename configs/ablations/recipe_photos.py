"""What is each part of the recipe for small models worth, on photographs?

The recipe of configs/photos32.py: Muon, rotary positions over row, column and channel beside learned tables, and
Fourier features of each sub-pixel's value. Then the options that text gains from, added to it: two convolution taps,
normalized queries and keys, output projections that start at zero.

Here: photographs of 32x32 pixels, 3 layers of width 64, 512 latents of 3,072 inputs, 100 steps of 8 pictures; the
paper's model has learned tables only, and Adam. Muon and Adam have two learning rates each, the recipe three. Each run
had one core that it partly shared, so compare FLOPs rather than seconds.

Result: within 100 steps Adam hardly begins to learn. Muon ends 11% below it at the better of two rates for each, which
is the higher one for both. Features of values lower the loss by 17%, rotary positions by 2%, both by 21%, and twice the
learning rate by another 7%. The options that help on text do not help here: normalized queries and keys change nothing,
taps cost 1.1%, zero initialization 4%. A plain Transformer of 512 inputs ends 1.4% below the recipe at the same rate,
with 43% fewer FLOPs: the context of the whole picture does not pay within 100 steps.
"""

from configs import photos32

VARIANTS = {
  "adam": "the paper's: Adam, rate 4e-3, learned tables of row, column and channel",
  "adam-low": "the same with rate 2e-3",
  "muon": "Muon, rate 8e-3",
  "muon-low": "the same with rate 4e-3",
  "rotary": "muon, and rotary positions over row, column and channel",
  "values": "muon, and features of values",
  "all": "muon with both: configs/photos32.py",
  "all-low": "the same with rate 4e-3",
  "all-high": "the same with rate 1.6e-2",
  "taps": "all, and model.conv_taps=2",
  "qk-norm": "all, and model.qk_norm",
  "zero-init": "all, and model.zero_init",
  "transformer": "all, with as many inputs as latents, 512: a plain Transformer",
}
_RATES = {"adam": 4e-3, "adam-low": 2e-3, "muon-low": 4e-3, "all-low": 4e-3, "all-high": 1.6e-2}
_OPTIONS = {"taps": {"conv_taps": 2}, "qk-norm": {"qk_norm": True}, "zero-init": {"zero_init": True}}
_PLAIN = ("adam", "adam-low", "muon", "muon-low")


def get_config(variant="all"):
  config = photos32.get_config()
  config.model.update(_OPTIONS.get(variant, {}))
  if variant in _PLAIN or variant == "values":
    config.model.update(position_encoding="learned", rotary_axes=())
  if variant in _PLAIN or variant == "rotary":
    config.model.value_features = 0
  if variant == "transformer":
    config.model.max_context = 512
  config.train.update(steps=100, checkpoint_every=100)
  config.train.optimizer.update(learning_rate=_RATES.get(variant, 8e-3), warmup_steps=12)
  if variant.startswith("adam"):
    config.train.optimizer.update(name="adam", b2=0.999)
  config.eval.update(every=50, max_sequences=32, num_samples=0)
  return config
