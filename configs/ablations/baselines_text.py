"""At equal training FLOPs: Perceiver AR against a plain Transformer and a Transformer-XL, on text.

Paper (section 5): on Books, 60 layers of Perceiver AR with a context of 8,192 beat a 42-layer Transformer-XL (word
perplexity 12.66 against 13.25) and train faster. Another paper's byte-level comparison at equal compute has the
opposite result on PG-19 (Transformer 1.057 bits per byte, Perceiver AR 1.104) and about equal results on Stories.

Here: the source code of Python's standard library (as in context.py); equal width, heads and layers, as many steps as
the same training FLOPs allow, and a constant learning rate, so that the curves are comparable at any FLOPs and seconds.

With the recipe for small models the order is reversed, at the best of three or more learning rates for each: see
recipe.py.
"""

from configs.ablations import context
from perceiver_ar_jax.models import architectures

VARIANTS = {
  "perceiver-ar": "256 latents of 2,048 inputs",
  "transformer": "as many latents as inputs, 256: the same depth, a shorter context",
  "transformer-512": "as many latents as inputs, 512: twice the context, half the rows",
  "transformer-xl": "segments of 256 and a memory of 256 in each layer, four segments per row",
}


def get_config(variant="perceiver-ar"):
  config = context.text(2048, steps=600)
  config.train.optimizer.update(schedule="constant", learning_rate=1e-3)
  if variant == "transformer":
    config.model.max_context = 256
  elif variant == "transformer-512":
    config.model.update(max_context=512, num_latents=512)
    config.train.batch_size = 2
  elif variant == "transformer-xl":
    config.model.update(architecture="transformer_xl", position_encoding="relative", segment=256)
    config.model.update(max_context=1024, num_latents=1024, rotary_max_wavelength=None)
    config.train.batch_size = 2
  architectures.spend_flops(config, 8e12)
  config.eval.every = max(config.train.steps // 4, 1)
  config.train.checkpoint_every = config.eval.every
  return config
