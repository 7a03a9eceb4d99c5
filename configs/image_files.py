"""Your own pictures, each cropped to its central square and resized: configs/photos32.py on a folder.

Your files: --config.data.files=folder. Another size S needs three settings: --config.data.image_size=S
  --config.model.max_context=S*S*3 --config.model.position_sizes="(S+2,S+2,5)".
--config.data.image_order=rgb_planes: all red, then all green, then all blue.
Cost: 0.25M parameters, a laptop.
"""

from configs import photos32


def get_config():
  config = photos32.get_config()
  config.data.update(task="image_files", image_size=32, image_order="pixel_raster")
  return config
