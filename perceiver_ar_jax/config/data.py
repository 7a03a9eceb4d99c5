"""The data."""

import dataclasses
import os

from perceiver_ar_jax.config.checks import choice, require

DATA_PATHS = ("data_dir", "cache_dir", "files", "validation_files", "sentencepiece")
TEXT_SPLITS = ("file", "position")
IMAGE_ORDERS = ("pixel_raster", "rgb_planes")
SPLIT_RULES = ("path", "name")
CODE_LAYOUTS = ("frames_levels", "levels_frames")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
  """Which sequences, from where."""

  task: str
  """A task or mixture: perceiver_ar_jax/data/tasks.py lists them; "pg19:3+text_files:1" mixes two on the spot."""
  data_dir: str | None = None
  """Folder of prepared TFDS datasets (None: TFDS's own default), or of the unpacked release that the task reads."""
  cache_dir: str | None = None
  """Folder that launch/cache_tasks.sh filled: read ready-made events there instead of making them."""
  files: str | None = None
  """The user's own files, for text_files, midi_files, image_files, audio_codes and video_codes: a folder, or a glob in
  which ** crosses folders."""
  validation_files: str | None = None
  """The files held out for validation, likewise; None: `validation_fraction` of them."""
  validation_fraction: float = 0.05
  """Fraction of the files held out, at least one of them; or of each text, with split_by=position."""
  split_rule: str = "path"
  """How files to hold out are chosen: by a hash of their paths relative to `files` (path), or of their names alone
  (name), the rule of older runs, whose config.json lacks this setting. A run keeps its rule."""
  split_by: str = "file"
  """text_files: hold out whole files (file), or the last part of each (position)."""
  sentencepiece: str | None = None
  """Text: a SentencePiece model file; None: bytes."""
  sentencepiece_fingerprint: str | None = None
  """Checksum of that file. Do not set it: training records it in config.json, and later refuses other models."""
  image_size: int = 64
  """image_files: pixels a side."""
  image_order: str = "pixel_raster"
  """image_files: pixel_raster (r, g, b of each pixel in turn) or rgb_planes (all r, then all g, then all b)."""
  max_transposition: int = 0
  """Music: training crops are transposed by up to N semitones up or down; the paper's are not."""
  max_stretch: float = 0.0
  """Music: training crops are slowed down or sped up by up to this fraction; the paper's are not."""
  codebook_size: int = 1024
  """audio_codes, video_codes: codes of each level, or of the grid, are 0..codebook_size-1."""
  code_levels: int = 8
  """audio_codes: levels of the residual quantiser that are used, the coarse ones first."""
  code_layout: str = "frames_levels"
  """audio_codes: the axes of the arrays: frames_levels, or levels_frames as codecs that return [batch, levels, frames]
  have them. It is never guessed. Leading axes of 1 are dropped."""
  train_split: str = "train"
  """Split that training reads."""
  min_crop: int = 1
  """Shortest training crop of a sequence, in events; longer ones keep first tokens from being over-sampled."""
  shards: int = 1
  """Parts that the training records are divided into, each read and shuffled by itself for its share of every batch.
  The data's order depends on it and not on the number of hosts; a host reads the parts that its rows come from."""
  shuffle_buffer: int = 2048
  """How many encoded records the shuffle holds at most, and 32 MiB of them; they travel in every checkpoint."""

  def __post_init__(self):
    for name in DATA_PATHS:
      if getattr(self, name) is not None:
        object.__setattr__(self, name, os.path.expanduser(getattr(self, name)))
    for name in ("min_crop", "shards", "shuffle_buffer", "image_size", "codebook_size", "code_levels"):
      require(getattr(self, name) >= 1, f"data.{name}={getattr(self, name)} must be at least 1.")
    require(
      0 < self.validation_fraction < 1,
      f"data.validation_fraction={self.validation_fraction} must lie between 0 and 1; to hold out certain files, set"
      " data.validation_files.",
    )
    require(0 <= self.max_transposition < 128, f"data.max_transposition={self.max_transposition} must lie in 0..127.")
    require(0 <= self.max_stretch < 1, f"data.max_stretch={self.max_stretch} must lie in [0, 1).")
    choice("data.split_by", self.split_by, TEXT_SPLITS)
    choice("data.split_rule", self.split_rule, SPLIT_RULES)
    choice("data.image_order", self.image_order, IMAGE_ORDERS)
    choice("data.code_layout", self.code_layout, CODE_LAYOUTS)
