"""How a square RGB picture is laid out as events (paper, section 5.2), and how a file becomes such a picture.

A picture of S x S pixels is 1 + S*S*3 events: SOS, then its sub-pixels in one of `ORDERS`. No EOS, as the length
never varies. Every event has a position (x, y, channel): SOS is at (1, 1, 1), sub-pixels count from (2, 2, 2).
"""

import functools
import io

import numpy as np
import PIL.Image
import PIL.ImageOps

from perceiver_ar_jax.config import IMAGE_ORDERS
from perceiver_ar_jax.data import NUM_SPECIAL, SOS
from perceiver_ar_jax.data.documents import Document, Unreadable

ORDERS = IMAGE_ORDERS
"""pixel_raster: r, g, b of each pixel in turn; rgb_planes: all of r, then all of g, then all of b."""

VOCAB_SIZE = 256 + NUM_SPECIAL


def num_events(size: int) -> int:
  """Events of a picture of `size` x `size` pixels, SOS included."""
  return 1 + size * size * 3


def document(image_SxSxC: np.ndarray, order: str) -> Document:
  """The document of a picture uint8[size, size, 3]."""
  size = len(image_SxSxC)
  if order == "rgb_planes":
    image_SxSxC = np.transpose(image_SxSxC, (2, 0, 1))
  events_N = np.empty(num_events(size), np.int32)
  events_N[0] = SOS
  np.add(image_SxSxC.reshape(-1), NUM_SPECIAL, out=events_N[1:], dtype=np.int32)
  return Document(events_N, positions=positions(size, order))


def load(content: bytes, name: str, size: int) -> np.ndarray:
  """The picture uint8[size, size, 3] in an image file: upright, its central square, shrunk by averaging areas.

  Raises:
    Unreadable: it is no image that Pillow reads; `name` is for the message.
  """
  try:
    with PIL.Image.open(io.BytesIO(content)) as image:
      image.draft("RGB", (size, size))  # JPEG decoders can shrink on the way, which saves most of the time
      image = PIL.ImageOps.exif_transpose(image)
      if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow would cut off at 255
        image = PIL.Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
      image = image.convert("RGB")
  except PIL.UnidentifiedImageError as error:
    raise Unreadable(f"{name} is no image that can be read") from error
  except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError) as error:
    raise Unreadable(f"{name} is no image that can be read ({error})") from error
  return np.asarray(PIL.ImageOps.fit(image, (size, size), method=PIL.Image.Resampling.BOX))


@functools.lru_cache(maxsize=4)
def positions(size: int, order: str) -> np.ndarray:
  """Positions (x, y, channel) of every event, SOS first: int32[1 + size*size*3, 3]."""
  y, x, channel = np.meshgrid(np.arange(size), np.arange(size), np.arange(3), indexing="ij")
  positions_SxSxCxP = np.stack([x, y, channel], axis=-1) + 2
  if order == "rgb_planes":
    positions_SxSxCxP = np.transpose(positions_SxSxCxP, (2, 0, 1, 3))
  return np.concatenate([np.ones((1, 3)), positions_SxSxCxP.reshape(-1, 3)]).astype(np.int32)


def to_image(events_N: np.ndarray, size: int, order: str) -> np.ndarray:
  """The picture uint8[size, size, 3] of the sub-pixel events, SOS left off or not.

  Ids that are no colour (a sampled PAD, EOS or SOS) become black.

  Raises:
    ValueError: there are not size*size*3 sub-pixels.
  """
  values_N = np.asarray(events_N)[-(size * size * 3) :] - NUM_SPECIAL
  if values_N.size != size * size * 3:
    raise ValueError(f"{values_N.size} sub-pixels do not make a picture of {size}x{size}x3.")
  values_N = np.clip(values_N, 0, 255).astype(np.uint8)
  if order == "rgb_planes":
    return np.transpose(values_N.reshape(3, size, size), (1, 2, 0))
  return values_N.reshape(size, size, 3)
