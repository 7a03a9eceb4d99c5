"""What is each part of the recipe for small models worth, on photographs?

The recipe of configs/photos32.py: Muon, rotary positions over row, column and channel beside learned tables, and
Fourier features of each sub-pixel's value.

Here: photographs of 32x32 pixels, 3 layers of width 64, 128 latents of 3,072 inputs, 400 steps of 8 pictures; the
paper's model has learned tables only, and Adam. Rates: 8e-3 for Adam and 1.6e-2 for Muon. With one seed, half and
double: Adam 7.03, 7.26; Muon 5.76, 5.18; rotary 5.18, 4.66; values 4.93, 4.69; all 4.38, 4.34; Transformer 4.76, 5.21.
So Muon, rotary and values alone gain from higher rates than the table has: it overstates what the others add to them.

Result: Muon ends 21% below Adam, which hardly begins to learn. Rotary positions gain 14% more, features of values 14%,
both 21%. A plain Transformer of 512 inputs with the same recipe is 7.2% worse after as many targets; its steps take a
bit more than half of the time, and after as many seconds it is still worse (last column).

Not in the table, one seed: two convolution taps, as in the recipe for text, lower all from 4.34 to 3.96 at 3.2e-2.
Normalized queries and keys end at 4.26 (1.6e-2), with zero initialization at 4.27 (3.2e-2), and zero initialization
alone, or an average of the weights at a constant rate, gains nothing (4.33, 4.34).
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
