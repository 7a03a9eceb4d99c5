"""Compressors that evaluation compares the model with."""

import lzma

import numpy as np
import PIL.Image
import pytest

from perceiver_ar_jax.config import InputError
from perceiver_ar_jax.data import images, splits, texts
from perceiver_ar_jax.data.tasks import get_tasks
from perceiver_ar_jax.evaluation import evaluate
from tests import tiny


def test_pictures_cost_the_bytes_of_their_files(tmp_path):
  config = tiny.config(data__task="photos32", data__min_crop=1)
  ((task, _),) = get_tasks(config.data, 3073)
  pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
  flat = np.full((32, 32, 3), 7, np.uint8)
  result = evaluate.compress([(task, images.document(x, "pixel_raster")) for x in (pixels, flat)])
  for name, settings in (("PNG", {"optimize": True}), ("WebP", {"lossless": True, "quality": 100, "method": 6})):
    files = []
    for index, x in enumerate((pixels, flat)):
      files.append(tmp_path / f"{index}.{name.lower()}")
      PIL.Image.fromarray(x).save(files[-1], **settings)
      np.testing.assert_array_equal(np.asarray(PIL.Image.open(files[-1]).convert("RGB")), x, err_msg="not lossless")
    assert result[name] == 8 * sum(file.stat().st_size for file in files) / (2 * pixels.size)


def test_texts_are_compressed_as_one(tmp_path):
  config = tiny.config(data__task="text_files", data__files=str(tmp_path))
  ((task, _),) = get_tasks(config.data, 65)
  contents = ["to be or not to be " * 9, "whether ’tis nobler"]
  documents = [(task, texts.ByteTokenizer().document(content.encode())) for content in contents]
  joined = "".join(contents).encode()
  expected = len(lzma.compress(joined, preset=9 | lzma.PRESET_EXTREME))
  assert evaluate.compress(documents) == {"xz": 8 * expected / len(joined)}


def test_the_bytes_of_a_text_are_those_of_its_file(tmp_path):
  config = tiny.config(data__task="text_files", data__files=str(tmp_path))
  ((task, _),) = get_tasks(config.data, 65)
  content = b"caf\xe9 " * 20  # Latin-1: each \xe9 is decoded as U+FFFD, which has three bytes in UTF-8
  compressed = len(lzma.compress(content.decode(errors="replace").encode(), preset=9 | lzma.PRESET_EXTREME))
  document = texts.ByteTokenizer().document(content)
  assert evaluate.compress([(task, document)]) == {"xz": 8 * compressed / len(content)}


def test_several_processes_do_not_compress(monkeypatch):
  """One of them that cannot read a document would leave the others waiting in a computation."""

  def unreadable():
    raise InputError("This process cannot read it.")
    yield

  with pytest.raises(InputError):
    evaluate.compress(unreadable())
  monkeypatch.setattr(evaluate.jax, "process_count", lambda: 2)
  assert evaluate.compress(unreadable()) == {}


def test_other_data_has_no_compressor():
  config = tiny.config(eval__max_sequences=2)
  assert evaluate.compress(splits.eval_documents(config)) == {}
