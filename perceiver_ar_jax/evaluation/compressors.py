"""What general compressors need for the documents that a model is scored on: numbers to compare the model's with."""

import io
import itertools
import lzma
from collections.abc import Iterable

import PIL.Image

from perceiver_ar_jax.data.documents import Document
from perceiver_ar_jax.data.registry import Task

MAX_DOCUMENTS = 1000
"""Only the first documents are compressed, so that a large split costs seconds."""


def compress(documents: Iterable[tuple[Task, Document]]) -> dict[str, float]:
  """Returns bits per unit of the first MAX_DOCUMENTS documents, by compressor; {} for other data.

  Pictures: `png_bits_per_dim` and `webp_bits_per_dim` (lossless), one file per picture, headers included. Text:
  `xz_bits_per_byte`, all documents as one.
  """
  totals, num_values, texts = {"png": 0, "webp": 0}, 0, []
  for task, document in itertools.islice(documents, MAX_DOCUMENTS):
    if task.modality not in ("image", "text"):
      return {}
    decoded = task.decode(document.read(0, len(document)))
    if task.modality == "text":
      texts.append(decoded.encode())
      continue
    num_values += decoded.size
    picture = PIL.Image.fromarray(decoded)
    for name, settings in (("png", {"optimize": True}), ("webp", {"lossless": True, "quality": 100, "method": 6})):
      file = io.BytesIO()
      picture.save(file, name, **settings)
      totals[name] += 8 * file.tell()
  if num_values:
    return {f"{name}_bits_per_dim": total / num_values for name, total in totals.items()}
  text = b"".join(texts)
  return {"xz_bits_per_byte": 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text)} if text else {}
