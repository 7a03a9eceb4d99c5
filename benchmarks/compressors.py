"""Bits per byte of compressors that have read the training split, on the text that an evaluation scores.

  python -m benchmarks.compressors --config=configs/text_files.py

xz -9: what the held-out text adds to a file that begins with the training split, all of which is in its dictionary.
zstd -19 (the program, where it is installed): the held-out text with the training split as its reference. So both know
the text that the model was trained on; the compressors that an evaluation prints do not. Of a training split of over
60 MB, the last 60 MB are used. Prints one JSON object.
"""

import json
import lzma
import pathlib
import shutil
import subprocess
import tempfile

from perceiver_ar_jax import command_line
from perceiver_ar_jax.config import Config, InputError
from perceiver_ar_jax.data import splits

_REFERENCE_BYTES = 60_000_000  # below the dictionary of xz -9, 64 MiB


def main(config: Config) -> int:
  train = _text(splits.documents(config, config.data.train_split))
  held_out = _text(splits.eval_documents(config))
  print(json.dumps(measure(train[-_REFERENCE_BYTES:], held_out)), flush=True)
  return 0


def measure(train: bytes, held_out: bytes) -> dict[str, float]:
  """Returns {compressor: bits per byte of `held_out`, given `train`}, and the numbers of bytes."""
  added = _xz(train + held_out) - _xz(train)
  result = {"train_bytes": len(train), "held_out_bytes": len(held_out), "xz": 8 * added / len(held_out)}
  if shutil.which("zstd"):
    with tempfile.TemporaryDirectory() as folder:
      reference, text = pathlib.Path(folder) / "train", pathlib.Path(folder) / "held_out"
      reference.write_bytes(train)
      text.write_bytes(held_out)
      command = ["zstd", "--quiet", "-19", "--long=27", f"--patch-from={reference}", "--stdout", str(text)]
      result["zstd"] = 8 * len(subprocess.run(command, check=True, capture_output=True).stdout) / len(held_out)
  return result


def _xz(content: bytes) -> int:
  return len(lzma.compress(content, preset=9 | lzma.PRESET_EXTREME))


def _text(documents) -> bytes:
  parts = []
  for task, document in documents:
    if task.modality != "text":
      raise InputError(f"The task {task.name} is not text: give a config such as configs/text_files.py.")
    parts.append(task.decode(document.read(0, len(document))).encode())
  return b"".join(parts)


if __name__ == "__main__":
  command_line.run(main, required=())
