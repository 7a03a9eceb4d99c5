"""A mixture: half of the training crops from PG-19's books, half from your own text files, all as bytes.

Reproduces no published result. Tasks with the same vocabulary can be mixed: --config.data.task=pg19:3+enwik8:1
Data: the TFDS builder pg19 in --config.data.data_dir; text files as in configs/text_files.py.
Cost: 0.9M parameters, a laptop.
"""

from configs import text_files


def get_config():
  config = text_files.get_config()
  config.data.task = "books_and_code"
  return config
