"""Which position encoding suits text?

Paper (section 3 and appendix): rotary positions for text and music, learned or sinusoidal tables for images and the
copy task; no table compares them.

Here: the source code of Python's standard library (as in context.py), 256 latents of 1,024 inputs, positions counted
from the start of each window.
"""

from configs.ablations import context

VARIANTS = {
  "rotary": "queries and keys are rotated by their position, half of each head",
  "sinusoidal": "a fixed table added to the embedding",
  "fourier": "a fixed table of Fourier features added to the embedding",
  "learned": "a learned table added to the embedding",
}


def get_config(variant="rotary"):
  config = context.text(1024, steps=600)
  config.model.position_encoding = variant
  if variant != "rotary":
    config.model.update(position_sizes=(1025,), rotary_max_wavelength=None)
  return config
