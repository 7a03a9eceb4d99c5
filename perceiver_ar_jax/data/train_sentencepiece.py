"""Trains a SentencePiece model on the training split of any text task.

  python -m perceiver_ar_jax.data.train_sentencepiece --config=configs/text_files.py --output=subwords.model

The same data and settings give the same model. Tokenization is lossless but for U+2581, by which SentencePiece
represents a space: no normalization, spaces are kept, and characters outside the vocabulary are encoded as bytes.
"""

import dataclasses
import io
import re
from collections.abc import Iterator

import tqdm
from absl import flags
from etils import epath

from perceiver_ar_jax import command_line
from perceiver_ar_jax.config import Config, InputError, writing
from perceiver_ar_jax.data import splits, tasks, texts

_OUTPUT = flags.DEFINE_string("output", None, "Where to write the model; the name usually ends in .model.")
_VOCAB_SIZE = flags.DEFINE_integer("vocab_size", 32_000, "Subword tokens, all 256 bytes included.", lower_bound=300)
_MAX_LINES = 2_000_000  # longer texts are sampled at random
_STRETCH_BYTES = 2**16
_LINES = re.compile(rb"[^\n]{1,4000}\n?|\n")  # SentencePiece leaves lines of over 4,192 bytes out


def main(config: Config) -> int:
  import sentencepiece

  config = dataclasses.replace(config, data=dataclasses.replace(config.data, sentencepiece=None))
  task, _ = tasks.get_tasks(config.data, config.model.max_context + 1)[0]
  if task.modality != "text":
    raise InputError(f"The task {task.name} has no text to train on: give a config such as configs/text_files.py.")
  path, model = epath.Path(_OUTPUT.value), io.BytesIO()
  with writing(f"--output={path}", "give another"):  # now, rather than after the training
    path.parent.mkdir(parents=True, exist_ok=True)
  sentencepiece.set_random_generator_seed(0)
  try:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=_lines(config),
      model_writer=model,
      vocab_size=_VOCAB_SIZE.value,
      input_sentence_size=_MAX_LINES,
      shuffle_input_sentence=True,
      model_type="unigram",
      normalization_rule_name="identity",
      remove_extra_whitespaces=False,
      add_dummy_prefix=False,
      allow_whitespace_only_pieces=True,
      byte_fallback=True,
      bos_id=-1,
      eos_id=-1,
      unk_id=0,
      num_threads=16,  # the result depends on it, so it must not depend on the machine
      minloglevel=2,
    )
  except RuntimeError as error:  # names the largest size that the text allows
    raise InputError(f"SentencePiece cannot train --vocab_size={_VOCAB_SIZE.value} on this text: {error}") from error
  with writing(f"--output={path}", "give another"):
    path.write_bytes(model.getvalue())
  size = texts.SubwordTokenizer(_OUTPUT.value).vocab_size
  print(f"Wrote {path}. Train with --config.data.sentencepiece={path} --config.model.vocab_size={size}")
  return 0


def _lines(config: Config) -> Iterator[bytes]:
  with tqdm.tqdm(unit="B", unit_scale=True, desc="Reading") as bar:
    for _, document in splits.documents(config, config.data.train_split):
      for start in range(0, len(document.text), _STRETCH_BYTES):
        stretch = document.text[start : start + _STRETCH_BYTES]
        bar.update(len(stretch))
        yield from _LINES.findall(stretch)


if __name__ == "__main__":
  command_line.run(main, required=("output",))
