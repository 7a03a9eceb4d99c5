"""Your own pictures, each cut to its central square and shrunk: configs/photos32.py on a folder.

Your files: --config.data.files=folder. Other sizes are two overrides away: --config.data.image_size=S
  --config.model.max_context=S*S*3; --config.data.image_order=rgb_planes takes all red, then green, then blue.
Cost: 0.24M parameters, a laptop.
"""

from configs import photos32


def get_config():
  config = photos32.get_config()
  config.data.update(task="image_files", image_size=32, image_order="pixel_raster")
  return config
