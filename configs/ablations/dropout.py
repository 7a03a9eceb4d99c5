"""What does leaving inputs out of the context in training (cross-attention dropout) cost and save?

Paper (appendix): large models on small data (PG-19, WikiText-103, MAESTRO) drop 70 to 97% of the inputs before the
latents, against overfitting. Here dropped inputs are never embedded, so they cost no compute.

Here: the source code of Python's standard library (as in context.py), 256 latents of 4,096 inputs, 600 steps: too short
to overfit, so this shows the price in loss and the saving in FLOPs and seconds.
"""

from configs.ablations import context

VARIANTS = {
  "0": "no input is dropped",
  "0.5": "half of the inputs before the latents are dropped, at random for each row",
  "0.9": "nine in ten are dropped",
}


def get_config(variant="0"):
  config = context.text(4096, steps=600)
  config.model.cross_attend_dropout = float(variant)
  return config
