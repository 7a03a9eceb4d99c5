"""How a square RGB picture is laid out as events (paper, section 5.2), and how a file becomes such a picture.

A picture of S x S pixels is 1 + S*S*3 events: SOS, then its sub-pixels in one of `ORDERS`. There is no EOS, since the
length never varies. Every event has a position (x, y, channel): SOS is at (1, 1, 1), sub-pixels count from (2, 2, 2).
"""

import functools
import io

import numpy as np
import PIL.Image
import PIL.ImageOps

from perceiver_ar_jax.config import IMAGE_ORDERS
from perceiver_ar_jax.data import NUM_SPECIAL, SOS
from perceiver_ar_jax.data.documents import Document, Unreadable

ORDERS = IMAGE_ORDERS  # pixel_raster: r, g, b of each pixel in turn; rgb_planes: all of r, then all of g, then all of b
_AXES = dict(zip(ORDERS, ((0, 1, 2), (2, 0, 1)), strict=True))  # of a picture [height, width, channel], slowest first
VOCAB_SIZE = 256 + NUM_SPECIAL
SUFFIXES = tuple(
  ".png .apng .jpg .jpeg .jpe .jfif .webp .avif .jp2 .j2k .jpx .bmp .dib .gif .tif .tiff .ppm .pgm .pbm .pnm .pfm .tga"
  " .dds .qoi .pcx .sgi .psd".split()
)
"""Endings of pictures in a folder. Other formats are not tried: some start programs, such as Ghostscript for EPS."""
_BACKGROUND = "white"  # background of transparent pixels, whose own colors are not meant to be visible


def document(image_SxSxC: np.ndarray, order: str) -> Document:
  """Returns the document of a picture uint8[size, size, 3]."""
  values_N = np.transpose(image_SxSxC, _AXES[order]).reshape(-1).astype(np.int32)
  events_N = np.concatenate([[SOS], values_N + NUM_SPECIAL], dtype=np.int32)
  return Document(events_N, positions=positions(len(image_SxSxC), order))


def load(content: bytes, name: str, size: int) -> np.ndarray:
  """Returns the picture uint8[size, size, 3] in an image file: upright, its central square, shrunk by averaging areas.

  Transparent parts show white. Of an animation, the first frame is read. Raises Unreadable, with `name`, if Pillow
  cannot read it, or if it is gray with more than 8 bits per pixel: such files do not say which value is white.
  """
  endings = PIL.Image.registered_extensions()
  formats = [endings[ending] for ending in SUFFIXES if endings.get(ending) in PIL.Image.OPEN]  # of the installed Pillow
  try:
    with PIL.Image.open(io.BytesIO(content), formats=formats) as image:
      if image.mode.startswith(("I", "F")):
        raise ValueError(f"mode {image.mode} has more than 8 bits per pixel: convert it")
      image.draft("RGB", (size, size))  # JPEG decoders can shrink while they decode, which saves most of the time
      image = PIL.ImageOps.exif_transpose(image)
      if image.has_transparency_data:
        image = image.convert("RGBA")
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, _BACKGROUND), image)
    return np.asarray(PIL.ImageOps.fit(image.convert("RGB"), (size, size), method=PIL.Image.Resampling.BOX))
  except Exception as error:  # Decoders raise nearly every class for damaged files.
    reason = "" if isinstance(error, PIL.UnidentifiedImageError) else f" ({str(error) or type(error).__name__})"
    raise Unreadable(f"{name} is not an image that can be read{reason}") from error


@functools.lru_cache(maxsize=4)
def positions(size: int, order: str) -> np.ndarray:
  """Returns the positions (x, y, channel) of every event, SOS first: int32[1 + size*size*3, 3]."""
  y, x, channel = (index.transpose(_AXES[order]).reshape(-1) for index in np.indices((size, size, 3), np.int32))
  return np.concatenate([np.ones((1, 3), np.int32), np.stack([x, y, channel], axis=1) + 2])


def to_image(events_N: np.ndarray, size: int, order: str) -> np.ndarray:
  """Returns the picture uint8[size, size, 3] of size*size*3 sub-pixel events (else ValueError), with or without SOS."""
  values_N = np.asarray(events_N)[-(size * size * 3) :] - NUM_SPECIAL
  if values_N.size != size * size * 3:
    raise ValueError(f"{values_N.size} sub-pixels do not make a picture of {size}x{size}x3.")
  values_N = np.clip(values_N, 0, 255).astype(np.uint8)  # a sampled PAD, EOS or SOS becomes black
  axes = _AXES[order]
  return np.transpose(values_N.reshape([(size, size, 3)[axis] for axis in axes]), np.argsort(axes))
