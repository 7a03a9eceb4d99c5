"""What is each part of the recipe for small models worth, on text?

The recipe of configs/text_files.py and others: Muon with a long linear decay (wsd), two convolution taps on the keys
and values of the cross-attention, normalized queries and keys, and output projections that start at zero.

Here: the source code of Python's standard library (as in context.py), 3 layers of width 128, 64 latents of 128 inputs,
400 steps of 2,048 targets; evaluation windows advance by 32 tokens. Each run had one core, and the other was busy.

Rates, with one seed, from low to high, each twice the one before: Adam from 2e-3 1.880, 1.849, 1.900; Muon from 4e-3
1.679, 1.671, 1.691; taps likewise 1.672, 1.644, 1.657; zero initialization likewise 1.676, 1.668, 1.687; normalized
queries and keys from 8e-3 1.653, 1.646, 1.647; all from 8e-3 1.622, 1.556, 1.516, 1.502, 1.550; average from 1.6e-2
1.522, 1.493, 1.482, 1.528; Transformer of 64 from 1.6e-2 1.631, 1.619, 1.641; of 128 likewise 1.639, 1.631, 1.664;
Transformer-XL from 4e-3 1.711, 1.704, 1.716.
The table has the best rate of each.

Result: Muon ends 10% below Adam. Taps gain 1.6% more, normalized queries and keys 1.4%, zero initialization 0.1%. All
together they also allow eight times the rate, and gain 10%. An average of the weights at a constant rate is 1.1% better
than the decay of the rate. Plain Transformers of 64 and 128 inputs with the same recipe are 8.2% and 9.2% worse after
as many targets, in about as many seconds, and Transformer-XL with what it supports of the recipe is 13% worse; its
steps take a sixth less time.
Longer trainings need lower rates: the 1,700 steps of `recipe.py:long` end at 1.392 with 3.2e-2 and 1.417 with 1.6e-2;
6.4e-2 was 1.2% behind 3.2e-2 after 850 steps.
"""

from configs.ablations import context

VARIANTS = {
  "adam": "the paper's: Adam, cosine, none of the options; rate 4e-3",
  "muon": "Muon, wsd with decay over the second half, none of the options; rate 8e-3",
  "taps": "muon with model.conv_taps=2; rate 8e-3",
  "qk-norm": "muon with model.qk_norm; rate 1.6e-2",
  "zero-init": "muon with model.zero_init; rate 8e-3",
  "all": "muon with all three options; rate 6.4e-2",
  "average": "all with a constant rate of 6.4e-2, evaluated with an average of the weights, train.ema_decay=0.98",
  "transformer-64": "all, with 64 latents of 64 inputs: a plain Transformer; rate 3.2e-2",
  "transformer-128": "all, with 128 latents of 128 inputs and half the rows: a plain Transformer; rate 3.2e-2",
  "transformer-xl": "muon with zero-init, segments of 64, a memory of 64 in each layer, 4 segments per row; rate 8e-3",
}
_RATES = {"adam": 4e-3, "muon": 8e-3, "taps": 8e-3, "qk-norm": 1.6e-2, "zero-init": 8e-3, "all": 6.4e-2}
_RATES |= {"average": 6.4e-2, "transformer-64": 3.2e-2, "transformer-128": 3.2e-2, "transformer-xl": 8e-3}
_OPTIONS = {"taps": {"conv_taps": 2}, "qk-norm": {"qk_norm": True}, "zero-init": {"zero_init": True}}
_WITHOUT = ("adam", "muon", *_OPTIONS)


def get_config(variant="all"):
  config = context.text(128, steps=400)
  config.model.update(num_latents=64, num_layers=3, num_cross_heads=2, num_self_heads=2)
  config.data.min_crop = 65
  config.train.update(batch_size=32, checkpoint_every=200)
  config.eval.update(batch_size=32, stride=32, every=100)
  config.train.optimizer.update(learning_rate=_RATES.get(variant, 3.2e-2), warmup_steps=20)
  if variant != "adam":
    config.train.optimizer.update(name="muon", schedule="wsd", decay_steps=200, b2=0.98, end_learning_rate=0.0)
  for options in [_OPTIONS.get(variant, {})] if variant in _WITHOUT else _OPTIONS.values():
    config.model.update(options)
  if variant == "average":
    config.train.ema_decay = 0.98
    config.train.optimizer.schedule = "constant"
  if variant == "transformer-64":
    config.model.max_context = 64
  if variant == "transformer-128":
    config.model.num_latents = 128
    config.data.min_crop = 129
    config.train.batch_size = 16
  if variant == "transformer-xl":
    config.model.update(architecture="transformer_xl", position_encoding="relative", segment=64, conv_taps=0)
    config.model.update(max_context=256, num_latents=256, rotary_max_wavelength=None, qk_norm=False)
    config.data.min_crop = 257
    config.train.batch_size = 8
  if variant == "long":  # no variant of the ablation: 9 minutes on one core
    config.train.update(steps=1700, checkpoint_every=850)
    config.train.optimizer.update(warmup_steps=50, decay_steps=1000)
    config.eval.update(every=850)
  return config
