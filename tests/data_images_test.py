"""Image files: every mode and format becomes the picture it shows, or is refused with a reason."""

import io

import numpy as np
import PIL.Image
import PIL.ImageCms
import PIL.ImageOps
import pytest

from perceiver_ar_jax.data import images
from perceiver_ar_jax.data.documents import Unreadable

GRAY = np.array([[0, 40], [120, 200]], np.uint8)
COLORS = np.array([[[0, 0, 0], [255, 0, 0]], [[0, 255, 0], [20, 40, 255]]], np.uint8)


def encode(picture, file_format="PNG", **options):
  file = io.BytesIO()
  if not isinstance(picture, PIL.Image.Image):
    picture = PIL.Image.fromarray(picture)
  picture.save(file, file_format, **options)
  return file.getvalue()


def load(content, size=2):
  return images.load(content, "a picture", size)


# Values of more than 8 bits


@pytest.mark.parametrize(
  ("values", "file_format"),
  [
    (np.array([[0, 16384], [32768, 65535]], np.uint16), "PNG"),
    (np.array([[0, 16384], [32768, 65535]], ">u2"), "TIFF"),
    (GRAY.astype(np.int32), "TIFF"),
    ((GRAY / 255).astype(np.float32), "TIFF"),
    ((GRAY / 255).astype(np.float32), "PPM"),
  ],
)
def test_gray_of_more_than_8_bits_is_refused_with_the_fix(values, file_format):
  with pytest.raises(Unreadable, match="a picture is not an image that can be read .*more than 8 bits.*: convert it"):
    load(encode(values, file_format))


def test_gray_of_8_bits_is_read():
  assert load(encode(GRAY))[..., 0].tolist() == GRAY.tolist()


# Transparency

HIDDEN = np.array([[[255, 0, 255, 0], [10, 20, 30, 255]], [[10, 20, 30, 255], [255, 0, 255, 0]]], np.uint8)
SHOWN = [[[255, 255, 255], [10, 20, 30]], [[10, 20, 30], [255, 255, 255]]]


@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "WEBP", "TGA", "DDS", "JPEG2000", "QOI"])
def test_colors_under_transparent_pixels_do_not_show(file_format):
  options = {"lossless": True, "exact": True} if file_format == "WEBP" else {}
  assert load(encode(HIDDEN, file_format, **options)).tolist() == SHOWN


def transparent_palette(file_format):
  picture = PIL.Image.fromarray(np.array([[0, 1], [1, 0]], np.uint8), "P")
  picture.putpalette([255, 0, 255, 10, 20, 30])
  return encode(picture, file_format, transparency=0)


@pytest.mark.parametrize(
  "content",
  {
    "palette, PNG": transparent_palette("PNG"),
    "palette, GIF": transparent_palette("GIF"),
    "one color of RGB": encode(HIDDEN[..., :3], transparency=(255, 0, 255)),
  }.values(),
)
def test_a_transparent_color_does_not_show(content):
  assert load(content).tolist() == SHOWN


def test_gray_with_transparency_shows_its_background():
  gray = np.array([[[0, 0], [90, 255]], [[90, 255], [0, 128]]], np.uint8)
  pixels = load(encode(PIL.Image.fromarray(gray, "LA")))
  assert pixels[..., 0].tolist() == [[255, 90], [90, 127]]


# Modes and formats


@pytest.mark.parametrize(
  ("mode", "file_format", "error"),
  [("1", "PNG", 255), ("P", "BMP", 30), ("CMYK", "TIFF", 0), ("YCbCr", "TIFF", 4), ("LAB", "TIFF", 16)],
)
def test_other_modes_are_converted(mode, file_format, error):
  picture = PIL.Image.fromarray(COLORS)
  if mode == "LAB":
    profiles = PIL.ImageCms.createProfile("sRGB"), PIL.ImageCms.createProfile("LAB")
    picture = PIL.ImageCms.profileToProfile(picture, *profiles, outputMode="LAB")
  else:
    picture = picture.convert(mode)
  assert np.abs(load(encode(picture, file_format)).astype(int) - COLORS).max() <= error


FORMATS = {
  **{".png": "PNG", ".jpe": "JPEG", ".jfif": "JPEG", ".webp": "WEBP", ".avif": "AVIF", ".jp2": "JPEG2000"},
  **{".bmp": "BMP", ".dib": "DIB", ".gif": "GIF", ".tiff": "TIFF", ".ppm": "PPM", ".pnm": "PPM", ".tga": "TGA"},
  **{".dds": "DDS", ".qoi": "QOI", ".pcx": "PCX", ".sgi": "SGI"},
}


@pytest.mark.parametrize("ending", FORMATS)
def test_files_of_these_endings_are_read(ending):
  assert ending in images.SUFFIXES
  pixels = np.kron(np.array([[30, 200], [110, 60]], np.uint8)[..., None].repeat(3, 2), np.ones((16, 16, 1), np.uint8))
  assert np.abs(load(encode(pixels, FORMATS[ending])).astype(int) - pixels[::16, ::16]).max() <= 4


def test_of_an_animation_the_first_frame_is_read():
  frames = [PIL.Image.fromarray(np.full((2, 2, 3), value, np.uint8)) for value in (50, 250)]
  for file_format in ("GIF", "PNG", "WEBP", "TIFF"):
    options = {"lossless": True} if file_format == "WEBP" else {}
    content = encode(frames[0], file_format, save_all=True, append_images=frames[1:], **options)
    assert np.unique(load(content)).tolist() == [50], file_format


def test_pictures_are_turned_upright():
  exif = PIL.Image.Exif()
  exif[0x0112] = 6  # to be turned by a quarter
  assert load(encode(PIL.Image.fromarray(COLORS), "TIFF", exif=exif)).tolist() == COLORS[::-1].swapaxes(0, 1).tolist()


# What cannot be read


def test_an_empty_file_is_refused():
  with pytest.raises(Unreadable, match="a picture is not an image that can be read"):
    load(b"")


def test_programs_are_not_started_for_what_is_no_picture_of_pixels():
  with pytest.raises(Unreadable, match="a picture is not an image that can be read"):
    load(encode(COLORS, "EPS"))


def test_a_picture_that_would_fill_the_memory_is_refused(monkeypatch):
  monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 100)
  with pytest.raises(Unreadable, match="decompression bomb"):
    load(encode(np.zeros((15, 15), np.uint8)))


def test_a_damaged_dds_is_refused():
  content = bytearray(encode(COLORS, "DDS"))
  content[80:88] = b"\x04\x00\x00\x00" + b"????"  # an unknown FourCC, for which Pillow raises NotImplementedError
  with pytest.raises(Unreadable, match="is not an image that can be read"):
    load(bytes(content))


@pytest.mark.parametrize("error", [NotImplementedError(), KeyError("tag"), ZeroDivisionError("zero"), RecursionError()])
def test_whatever_a_decoder_raises_is_the_reason(error, monkeypatch):
  def fail(*args):
    raise error

  monkeypatch.setattr(PIL.ImageOps, "exif_transpose", fail)
  with pytest.raises(Unreadable, match=str(error) or type(error).__name__):
    load(encode(COLORS))
