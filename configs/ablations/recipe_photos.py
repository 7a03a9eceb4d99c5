"""What is each part of the recipe for small models worth, on photographs?

The recipe of configs/photos32.py: Muon, rotary positions over row, column and channel beside learned tables, Fourier
features of each sub-pixel's value, two convolution taps on the keys and values of the cross-attention, and normalized
queries and keys.

Here: photographs of 32x32 pixels, 3 layers of width 64, 128 latents of 3,072 inputs, 400 steps of 8 pictures; the
paper's model has learned tables only, and Adam. Each run had one core, and the other was busy.

Rates, with one seed, from low to high, each twice the one before: Adam from 4e-3 7.03, 7.12, 7.26; the others from
8e-3: Muon 5.76, 5.48, 5.18, 6.76; rotary 5.18, 4.75, 4.66, 5.44; values 4.93, 4.72, 4.69, 6.57; both 4.38, 4.34, 4.34;
taps 4.14, 3.98, 3.96, 4.57; all 4.15, 3.96, 3.98; Transformer 4.73, 4.33, 4.16, 4.21.

Result: Muon ends 26% below Adam, which hardly begins to learn. Rotary positions gain 11% more, features of values 9%,
both 16%, and taps 9% on top. Normalized queries and keys gain nothing here: their two seeds are as far apart as taps
are from both. (After 1,500 steps they gain 1%: docs/models.md.) A plain Transformer of 512 inputs with the recipe of
all ends 6.8% above taps and 4.2% above all after as many targets, in half of the time. At its FLOPs taps are 2.0%
better than it and all equals it; at its seconds taps are 1.8% better and all is 0.8% worse.

Not in the table, one seed: without taps, normalized queries and keys end at 4.26 (1.6e-2), with zero initialization
too at 4.27 (3.2e-2), zero initialization alone at 4.33, and an average of the weights at a constant rate at 4.34. The
plain Transformer without normalized queries and keys ends at 4.35 (1.6e-2), without taps too at 4.59.
"""

from configs import photos32

VARIANTS = {
  "adam": "the paper's: Adam, learned tables of row, column and channel; rate 8e-3",
  "muon": "the same with Muon; rate 3.2e-2",
  "rotary": "muon, and rotary positions over row, column and channel; rate 3.2e-2",
  "values": "muon, and features of values; rate 3.2e-2",
  "both": "muon with both; rate 1.6e-2",
  "taps": "both, and model.conv_taps=2; rate 3.2e-2",
  "all": "taps, and model.qk_norm; rate 1.6e-2",
  "transformer": "all, with 512 latents of 512 inputs and 2 pictures for each step: a plain Transformer; rate 3.2e-2",
}
_RATES = {"adam": 8e-3, "both": 1.6e-2, "all": 1.6e-2}


def get_config(variant="all"):
  config = photos32.get_config()
  if variant in ("adam", "muon", "values"):
    config.model.update(position_encoding="learned", rotary_axes=())
  if variant in ("adam", "muon", "rotary"):
    config.model.value_features = 0
  config.model.conv_taps = 2 if variant in ("taps", "all", "transformer") else 0
  config.model.qk_norm = variant in ("all", "transformer")
  if variant == "transformer":
    config.model.update(max_context=512, num_latents=512)
    config.data.min_crop = 513
    config.train.batch_size = 2
  config.train.update(steps=400, checkpoint_every=400)
  config.train.optimizer.learning_rate = _RATES.get(variant, 3.2e-2)
  if variant == "adam":
    config.train.optimizer.update(name="adam", b2=0.999)
  config.eval.update(every=200, max_sequences=32, num_samples=0)
  return config
