"""ImageNet at 64x64 with the recipe of configs/photos32.py instead of the paper's; the size is the paper's.

Reproduces no published result; the paper's experiment is configs/imagenet64.py, with 3.40 bits/dim.
Cost: 770M parameters; days on a pod of accelerators.
Data: the TFDS builder downsampled_imagenet/64x64, prepared in --config.data.data_dir.
"""

from configs import imagenet64


def get_config():
  config = imagenet64.get_config()
  config.model.update(
    position_encoding="learned+rotary",
    rotary_axes=((0.25, 4, 256), (0.25, 4, 256), (0.125, 4, 8)),
    value_features=32,
    conv_taps=2,
    qk_norm=True,
  )
  config.train.loss_reduction = "mean"
  config.train.optimizer.name = "muon"
  return config
