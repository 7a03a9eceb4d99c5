"""Does the order of an image's sub-pixels matter, once the context is long enough?

Paper (table on ImageNet 64x64 orders): with the full context, raster order reaches 3.54 bits/dim and color planes (all
red, then all green, then all blue) 3.53; with a context of 1,024 of the 12,289 sub-pixels, 3.55 and 4.63: the same
pixel of the previous plane is thousands of sub-pixels back.

Here: photographs of 32x32 pixels from installed packages, with planes of 1,024 sub-pixels, the model of
configs/photos32.py and 400 steps at a rate of 1.6e-2. At full scale: configs/imagenet64.py and
configs/imagenet64_rgb_planes.py with and without --config.model.max_context=1024.

Result: not seen at this scale. Planes are 8.1% worse than raster order with the full context, and 8.0% worse with 512
inputs, half a plane; the full context is 0.9% better than 512 inputs in raster order and 0.7% better in planes. The
convolution taps see the other channels of a pixel in raster order, and its left neighbors in planes. Without taps and
normalized queries and keys, with 256 latents and after 120 steps, planes were 5.2% better than raster order.
"""

from configs import photos32

VARIANTS = {
  "raster-full": "r, g, b of each pixel in turn; context 3,072, the whole image",
  "planes-full": "all red, all green, all blue; context 3,072",
  "raster-512": "r, g, b of each pixel in turn; context 512, five rows",
  "planes-512": "all red, all green, all blue; context 512, half a plane",
}


def get_config(variant="raster-full"):
  order, context = variant.split("-")
  config = photos32.get_config()
  config.model.max_context = 3072 if context == "full" else 512
  config.data.task = "photos32" if order == "raster" else "photos32_rgb_planes"
  config.train.update(steps=400, checkpoint_every=400)
  config.train.optimizer.learning_rate = 1.6e-2
  config.eval.update(stride=128, every=200, max_sequences=32, num_samples=0)
  return config
