"""At equal training FLOPs: Perceiver AR against a plain Transformer and a Transformer-XL, on copying.

Paper (section 5): Perceiver AR copies 131,072 mirrored tokens without error.

Here: 128 tokens, half of them random bytes, then the same mirrored; accuracy is that of the mirrored half. The largest
distance between a token and its twin is 127. Equal width, heads and layers, as many steps as the same training FLOPs
allow, and a constant learning rate, so that the curves are comparable at any FLOPs and seconds. (The task makes its
sequences as long as the context, so a Transformer of a shorter context would have another, easier task.)

Result: Perceiver AR copies; the others have not started to at these FLOPs.
"""

from configs import copy
from perceiver_ar_jax.models import architectures

VARIANTS = {
  "perceiver-ar": "64 latents of 128 inputs",
  "transformer-128": "as many latents as inputs, 128: the full context, with twice the latents",
  "transformer-xl": "segments of 32 and a memory of 32 in each layer",
}


def get_config(variant="perceiver-ar"):
  config = copy.get_config()
  config.model.update(max_context=128, num_latents=64, num_layers=2, position_sizes=(130,))
  config.data.min_crop = 64
  config.train.batch_size = 32
  config.train.optimizer.schedule = "constant"
  if variant == "transformer-128":
    config.model.num_latents = 128
  elif variant == "transformer-xl":
    config.model.update(architecture="transformer_xl", position_encoding="relative", position_sizes=(), segment=32)
    config.model.num_latents = 128
  architectures.spend_flops(config, 3e12)
  config.eval.update(every=max(config.train.steps // 8, 1), batch_size=64, max_sequences=256, num_samples=0, stride=16)
  config.train.checkpoint_every = config.eval.every
  return config
