"""Settings of the data."""

import dataclasses
import os

from perceiver_ar_jax.config.checks import require, require_at_least, require_choice

DATA_PATHS = ("data_dir", "files", "validation_files", "sentencepiece")
HELD_OUT_BY_NAME = "(files held out by a hash of their names)"
"""`validation_files` of older runs, which cannot be found any more."""
IMAGE_ORDERS = ("pixel_raster", "rgb_planes")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
  """Which sequences, from where."""

  task: str
  """A task or mixture: perceiver_ar_jax/data/tasks.py lists them; "pg19:3+text_files:1" mixes two by weight."""
  data_dir: str | None = None
  """Folder of prepared TFDS datasets (None: TFDS's own default), or of the unpacked release that the task reads."""
  files: str | None = None
  """Your own files, for text_files, midi_files, image_files, audio_codes, video_codes, piano_rolls: a folder, or a glob
  with **."""
  validation_files: str | None = None
  """The files held out for validation, likewise; None: `validation_fraction` of them."""
  validation_fraction: float = 0.05
  """Fraction of the files held out, at least one of them; or of each text, with split_by=position."""
  split_by: str = "file"
  """text_files: hold out whole files (file), or the last part of each (position)."""
  sentencepiece: str | None = None
  """Text: a SentencePiece model file; None: bytes."""
  sentencepiece_fingerprint: str | None = None
  """Checksum of that file. Do not set it: training records it in config.json and refuses other models from then on."""
  image_size: int = 64
  """image_files: width and height in pixels."""
  image_order: str = "pixel_raster"
  """image_files: pixel_raster (r, g, b of each pixel in turn) or rgb_planes (all r, then all g, then all b)."""
  max_transposition: int = 0
  """Music: training crops are transposed by up to N semitones up or down; 0 in the paper."""
  max_stretch: float = 0.0
  """Music: training crops are slowed down or sped up by up to this fraction; 0 in the paper."""
  codebook_size: int = 1024
  """audio_codes, video_codes: codes of each level, or of the grid, are 0..codebook_size-1."""
  code_levels: int = 8
  """audio_codes: levels of the residual quantizer that are used, the coarse ones first."""
  code_layout: str = "frames_levels"
  """audio_codes: the axes of the arrays, frames_levels or levels_frames, after leading axes of 1; never guessed."""
  recall_pairs: int = 64
  """recall: key/value pairs of a document; the vocabulary has 2 ids for each and 68 more."""
  recall_queries: int = 32
  """recall: keys asked for at the end of a document."""
  train_split: str = "train"
  """Split that training reads."""
  min_crop: int = 1
  """Shortest training crop of a sequence, in events; longer ones keep first tokens from being over-sampled."""
  packing: int = 1
  """Records per training row: short documents fill a row from the right until every latent has a target, each attends
  to itself only, and records left over are dropped. 1: one document per row."""
  shards: int = 1
  """Parts of the training records, each shuffled separately for its share of a batch; hosts read those they need."""
  shuffle_buffer: int = 2048
  """Maximum number of encoded records in the shuffle buffer, and of 32 MiB; every checkpoint contains the buffer."""

  def __post_init__(self):
    for name in DATA_PATHS:
      if getattr(self, name) is not None:
        object.__setattr__(self, name, os.path.expanduser(getattr(self, name)))
    counts = ("min_crop", "packing", "shards", "shuffle_buffer", "image_size", "codebook_size", "code_levels")
    require_at_least(1, "data", self, *counts, "recall_pairs", "recall_queries")
    fraction = self.validation_fraction
    require(0 < fraction < 1, f"data.validation_fraction={fraction} must be between 0 and 1 (or set validation_files).")
    require(0 <= self.max_transposition < 128, f"data.max_transposition={self.max_transposition} must be in 0..127.")
    require(0 <= self.max_stretch < 1, f"data.max_stretch={self.max_stretch} must be in [0, 1).")
    require_choice("data.split_by", self.split_by, ("file", "position"))
    require_choice("data.image_order", self.image_order, IMAGE_ORDERS)
    require_choice("data.code_layout", self.code_layout, ("frames_levels", "levels_frames"))
