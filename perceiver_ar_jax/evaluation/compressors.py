"""What general compressors need for the documents that a model is scored on: numbers to compare the model's with."""

import io
import lzma
from collections.abc import Iterable

import jax
import PIL.Image

from perceiver_ar_jax.data.documents import Document
from perceiver_ar_jax.data.registry import Task

MAX_BYTES = 2**23
"""Only the first documents, up to this many bytes, are compressed, so that a large split costs seconds."""
_PICTURES = {"PNG": {"optimize": True}, "WebP": {"lossless": True, "quality": 100, "method": 6}}


def compress(documents: Iterable[tuple[Task, Document]]) -> dict[str, float]:
  """Returns the bits per byte (sub-pixel) of each compressor; {} for other data than pictures and text.

  PNG and lossless WebP compress each picture to a file, headers included; xz -9 the texts as one, as they are decoded.
  With several processes, it returns {} too.
  """
  if jax.process_count() > 1:  # one that cannot read a document would leave the others waiting in a computation
    return {}
  totals, num_bytes, texts = dict.fromkeys(_PICTURES, 0), 0, []
  for task, document in documents:
    if task.modality not in ("image", "text"):
      return {}
    decoded = task.decode(document.read(0, len(document)))
    if task.modality == "text":
      texts.append(decoded.encode())
      num_bytes += document.counts()["bytes"]  # of the original text, as the model's bits per byte
    else:
      num_bytes += decoded.size
      for name, settings in _PICTURES.items():
        file = io.BytesIO()
        PIL.Image.fromarray(decoded).save(file, name, **settings)
        totals[name] += 8 * file.tell()
    if num_bytes > MAX_BYTES:
      break
  if texts:
    totals = {"xz": 8 * len(lzma.compress(b"".join(texts), preset=9 | lzma.PRESET_EXTREME))}
  return {name: total / num_bytes for name, total in totals.items() if total}
