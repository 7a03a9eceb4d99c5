"""With the recipe for small models, does a longer context lower the loss, at equal latents?

As context.py, but with the recipe of recipe.py, whose convolution taps let a latent find an input by those before it:
64 latents, 400 steps of 2,048 targets for each context, rate 3.2e-2; evaluation windows advance by 32 tokens. At full
scale: configs/pg19_modern.py with --config.model.max_context.

Result: 512 inputs end 2.9% below 128 inputs (1.516 with the same rate and seed), at 1.25 times the seconds per step.
2,048 inputs are 3.1% above 512. A gain from 512 to 2,048 inputs is not seen in a training this short.
"""

from configs.ablations import recipe

VARIANTS = {
  "512": "64 latents of 512 inputs",
  "2048": "64 latents of 2,048 inputs",
}


def get_config(variant="512"):
  config = recipe.get_config("all")
  config.model.max_context = int(variant)
  config.train.optimizer.learning_rate = 3.2e-2
  return config
