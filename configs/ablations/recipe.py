"""What is each part of the recipe for small models worth, on text?

The recipe of configs/text_files.py and others: Muon with a long linear decay (wsd), two convolution taps on the keys
and values of the cross-attention, normalized queries and keys, and output projections that start at zero.

Here: the source code of Python's standard library (as in context.py), 3 layers of width 128, 64 latents of 128 inputs,
200 steps of 2,048 targets. Two learning rates for each optimizer; the options were added at Muon's higher rate. Each
run had one core; other programs ran beside them, most of all beside the last, whose seconds mean nothing.

Result: Muon ends 13% below Adam at the better of two rates for each, which is the higher one for both, so that still
higher ones were not ruled out. Each option gains 0.5 to 1%, all together 1.9%. A plain Transformer of 64 inputs is 1.0%
worse after as many steps, and 0.2% after as many FLOPs.
"""

from configs.ablations import context

VARIANTS = {
  "adam": "the paper's: Adam, rate 4e-3, cosine, none of the options",
  "adam-low": "the same with rate 2e-3",
  "muon": "Muon, rate 8e-3, wsd with decay over the second half, none of the options",
  "muon-low": "the same with rate 4e-3",
  "taps": "muon with model.conv_taps=2",
  "qk-norm": "muon with model.qk_norm",
  "zero-init": "muon with model.zero_init",
  "all": "muon with all three options",
  "transformer": "all, with as many inputs as latents, 64: a plain Transformer",
}
_OPTIONS = {"taps": {"conv_taps": 2}, "qk-norm": {"qk_norm": True}, "zero-init": {"zero_init": True}}


def get_config(variant="all"):
  config = context.text(128, steps=200)
  config.model.update(num_latents=64, num_layers=3, num_cross_heads=2, num_self_heads=2)
  config.data.min_crop = 65
  config.train.update(batch_size=32, checkpoint_every=200)
  config.eval.update(batch_size=32, stride=64, every=100)
  rate = {"adam": 4e-3, "adam-low": 2e-3, "muon-low": 4e-3}.get(variant, 8e-3)
  config.train.optimizer.update(learning_rate=rate, warmup_steps=20)
  if not variant.startswith("adam"):
    config.train.optimizer.update(name="muon", schedule="wsd", decay_steps=100, b2=0.98, end_learning_rate=0.0)
  for options in _OPTIONS.values() if variant in ("all", "transformer", "long") else [_OPTIONS.get(variant, {})]:
    config.model.update(options)
  if variant == "transformer":
    config.model.max_context = 64
    config.data.min_crop = 64
  if variant == "long":  # no variant of the ablation: 22 minutes on one shared core
    config.train.update(steps=1700, checkpoint_every=850)
    config.train.optimizer.update(warmup_steps=50, decay_steps=1000)
    config.eval.update(stride=32, every=850)
  return config
