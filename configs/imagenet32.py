"""ImageNet at 32x32: configs/imagenet64.py with a quarter of the tokens, for shorter experiments.

Reproduces no published result; the recipe is that of the 64x64 model with a context of 3,072 sub-pixels and half the
  depth. Not measured.
Cost: 392M parameters; one host of accelerators.
Data: the TFDS builder downsampled_imagenet/32x32, prepared in --config.data.data_dir.
"""

from configs import imagenet64


def get_config():
  config = imagenet64.get_config()
  config.model.update(max_context=3072, num_layers=30, position_sizes=(34, 34, 5))
  config.data.task = "imagenet32"
  config.train.update(steps=200_000, batch_size=512)
  config.eval.every = 10_000
  return config
