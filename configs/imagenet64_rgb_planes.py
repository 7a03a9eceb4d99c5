"""ImageNet at 64x64, all red, then all green, then all blue sub-pixels: a bad order that long context compensates.

Reproduces: the paper's ablation of the order. The same pixel of the previous plane is 4,096 tokens back, so a
  short context does not contain it.
Published (a smaller model than configs/imagenet64.py; from memory of the paper, to be verified): 3.53 bits/dim at full
  context against 4.63 with 1,024 tokens of it.
Cost and data: as configs/imagenet64.py, from which only the order differs.
"""

from configs import imagenet64


def get_config():
  config = imagenet64.get_config()
  config.data.task = "imagenet64_rgb_planes"
  return config
