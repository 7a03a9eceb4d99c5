"""Damaged and random files of every kind: reading them raises nothing but Unreadable."""

import io
import warnings

import numpy as np
import PIL.Image
import pytest

from perceiver_ar_jax.config import DataConfig
from perceiver_ar_jax.data import NUM_SPECIAL, images, tasks, texts
from perceiver_ar_jax.data.documents import Unreadable


def mutate(content, random):
  """`content` with bytes changed, cut out, doubled, or zeroed."""
  content = bytearray(content)
  for _ in range(random.integers(1, 6)):
    start = int(random.integers(0, max(min(len(content), 10 ** random.integers(1, 6)), 1)))
    length = int(random.integers(1, 9))
    match random.integers(5):
      case 0:
        content[start : start + length] = random.bytes(length)
      case 1:
        del content[start : start + length]
      case 2:
        content[start:start] = content[start : start + length]
      case 3:
        content[start : start + length] = bytes([random.choice([0, 127, 255])]) * length
      case 4:
        del content[max(start, 1) :]
  return bytes(content)


# Images


def image_files():
  """{name: content} of one small picture in many formats and modes."""
  random = np.random.default_rng(0)
  picture = PIL.Image.fromarray(random.integers(0, 256, (12, 16, 4), np.uint8), "RGBA")
  formats = "PNG JPEG WEBP AVIF JPEG2000 BMP DIB GIF TIFF PPM TGA DDS QOI PCX SGI PSD".split()
  variants = [(name, mode, {}) for name in formats for mode in ("L", "RGB", "RGBA", "P", "1", "F", "I;16")]
  variants += [("JPEG", "RGB", {"progressive": True}), ("JPEG", "CMYK", {}), ("GIF", "P", {"save_all": True})]
  variants += [("TIFF", "RGB", {"compression": name}) for name in ("tiff_lzw", "tiff_deflate", "jpeg", "packbits")]
  variants += [("DDS", "RGBA", {"pixel_format": name}) for name in ("DXT1", "DXT5", "BC5")]
  exif = PIL.Image.Exif()
  exif[0x0112] = 6
  variants += [(name, "RGB", {"exif": exif}) for name in ("JPEG", "PNG", "WEBP", "TIFF")]
  contents = {}
  for name, mode, options in variants:
    file = io.BytesIO()
    try:
      gray = picture.convert("L") if mode == "I;16" else picture
      gray.convert(mode).save(file, name, **options)
    except (OSError, KeyError, ValueError):  # a mode that the format lacks
      continue
    contents[name, mode, *options] = file.getvalue()
  return contents


def test_damaged_images_are_read_or_unreadable():
  random, contents = np.random.default_rng(1), image_files()
  assert {name for name, *_ in contents} >= {"PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM", "JPEG2000", "DDS"}
  outcomes = {True: 0, False: 0}
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    for kind, content in contents.items():
      for _ in range(60):
        damaged = mutate(content, random)
        try:
          pixels = images.load(damaged, "a.png", 5)
          assert pixels.shape == (5, 5, 3) and pixels.dtype == np.uint8, f"{kind}: {damaged!r}"
          outcomes[True] += 1
        except Unreadable as error:
          assert str(error).startswith("a.png "), f"{kind}: {damaged!r}"
          outcomes[False] += 1
  assert min(outcomes.values()) > 100, f"read and refused: {outcomes}; the damage is too small or too large"


# Texts


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory):
  import sentencepiece

  path = tmp_path_factory.mktemp("model") / "small.model"
  with path.open("wb") as file:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(["ba ko ri mu te", "sha lo né vi du", "猫 ba ko"] * 20),
      model_writer=file,
      vocab_size=300,
      byte_fallback=True,
      hard_vocab_limit=False,
      minloglevel=2,
    )
  return str(path)


TEXT_HEADS = (
  *(b"\xff\xfe", b"\xfe\xff", b"\xef\xbb\xbf", b"\x1f\x8b", b"BZh"),
  *(b"PK\x03\x04", b"\x28\xb5\x2f\xfd", b"%PDF-"),
)
"""How UTF-16, a byte order mark and compressed files begin."""


def text_contents():
  random = np.random.default_rng(2)
  ordinary = "ba ko né 猫 \t\r\n".encode() * 20
  heads = [*TEXT_HEADS, b"", b"\0", b"\0" * 5000, b"\xc3", b"\x80" * 9, b" " * 70, b"x" * 200]
  yield from heads
  for _ in range(60):
    yield random.bytes(random.integers(1, 400))
    yield mutate(ordinary, random)
    yield heads[random.integers(len(heads))] + mutate(ordinary, random)


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_any_bytes_are_a_text(kind, sentencepiece_model, tmp_path, monkeypatch):
  monkeypatch.setattr(texts, "_COUNT_BYTES", 64)
  random = np.random.default_rng(3)
  model = sentencepiece_model if kind == "sentencepiece" else None
  ((task, _),) = tasks.get_tasks(DataConfig(task="text_files", files=str(tmp_path), sentencepiece=model), 12)
  for number, content in enumerate(text_contents()):
    path = tmp_path / f"{number}.txt"
    path.write_bytes(content)
    record = {"path": str(path).encode(), "offset": 0, "size": len(content), "part": 0}
    document = task.document(record)
    assert document.has_targets() == bool(content)
    if not content:
      continue
    events, positions, _ = document.crop(random.random(), 30, 3)
    assert 0 < len(events) <= 30 and positions.shape == (len(events), 1), repr(content)
    whole = task.document(record)
    events = whole.read(0, len(whole))
    assert len(events) == len(whole) and events.max(initial=0) < task.vocab_size, repr(content)
    assert whole.counts() == {"words": len(content.split()), "bytes": len(content)}, repr(content)
    text = task.decode(events)
    if model is None:
      assert text == content.decode(errors="replace"), repr(content)
      assert (events[1:-1] >= NUM_SPECIAL).all()
