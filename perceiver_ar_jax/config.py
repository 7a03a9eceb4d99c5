"""The experiment's settings: frozen, documented, validated dataclasses.

A config file builds an `ml_collections.ConfigDict` from `defaults()`, so that every field below can be
overridden on the command line (`--config.train.steps=100`); `resolve` turns it into a `Config`. This room
owns names, types, defaults and every check that needs the settings alone. What depends on the machine (how
many devices there are, which data is on disk) is checked where it is first known.
"""

import dataclasses
import difflib
import json
import types
import typing
from typing import Any

from ml_collections import config_dict


class InputError(ValueError):
  """What the user gave cannot work; the message names the value and the fix, in one paragraph."""


def nearest(name: str, known: typing.Iterable[str]) -> str:
  """A hint for a misspelt name: the closest known one and the whole list."""
  known = sorted(known)
  close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
  return (f"Did you mean {close[0]!r}? " if close else "") + "Known: " + ", ".join(known) + "."


def _require(condition: bool, message: str) -> None:
  if not condition:
    raise InputError(message)


def _choice(field: str, value: str, known: tuple[str, ...]) -> None:
  _require(value in known, f"{field}={value!r} is unknown. {nearest(value, known)}")


ARCHITECTURES = ("perceiver_ar", "transformer_xl")
ACTIVATIONS = ("squared_relu", "gelu")
ATTENTION_KERNELS = ("auto", "reference", "chunked", "streamed", "cudnn", "splash")
DTYPES = ("float32", "bfloat16")
POSITION_ENCODINGS = ("sinusoidal", "fourier", "learned", "rotary", "relative")
REMAT_POLICIES = ("none", "dots", "full")
OPTIMIZERS = ("adam", "adamw", "adafactor", "lamb", "sgd", "sm3")
SCHEDULES = ("constant", "cosine", "steps", "t5")
LOSS_REDUCTIONS = ("mean", "sum")
ON_NONFINITE = ("stop", "skip")
TEXT_SPLITS = ("file", "position")
MESH_AXES = ("data", "fsdp", "tensor", "context")
IMAGE_ORDERS = ("pixel_raster", "rgb_planes")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
  """The architecture (paper, section 3 and appendix), or a baseline to compare it with."""

  architecture: str = "perceiver_ar"
  """perceiver_ar or transformer_xl. What tells of the cross-attend or of latents in self-attention is no setting of
  transformer_xl, whose latents are the last outputs."""
  vocab_size: int
  """Number of token ids, PAD 0, EOS 1 and SOS 2 included (259 for bytes and colour values)."""
  max_context: int
  """L: the most input tokens the model reads at once; shorter inputs are padded on the left."""
  num_latents: int
  """M: how many of the last inputs become latents, and so predict; L = M is a plain Transformer."""
  num_layers: int
  """Self-attention layers after the cross-attend."""
  latent_width: int
  """D: width of the latents and of every layer."""
  embed_width: int | None = None
  """Width of the input embedding; None: `latent_width`."""
  num_cross_heads: int
  """Heads of the cross-attend."""
  cross_attend_width: int | None = None
  """Width of the cross-attend's queries, keys and values, all heads together; None: `latent_width`."""
  num_self_heads: int
  """Heads of the self-attention layers."""
  mlp_widening: int = 4
  """Hidden width of each MLP block, in multiples of `latent_width`."""
  activation: str = "squared_relu"
  """MLP non-linearity: squared_relu or gelu (tanh form)."""
  position_encoding: str
  """sinusoidal, fourier or learned tables added to the embedding, or rotary inside attention; transformer_xl: relative,
  distances inside attention, whatever positions the task has."""
  position_sizes: tuple[int, ...] = ()
  """Rows of the table of each position dimension: its largest position + 1. Empty for rotary and relative."""
  positions_from_data: bool = True
  """False: count positions back from the last token instead of taking the task's own."""
  rotary_fraction: float = 0.5
  """Rotary: the leading part of each head that is rotated."""
  rotary_max_wavelength: int | None = None
  """Rotary: longest wavelength in positions; None: `max_context`."""
  segment: int | None = None
  """transformer_xl: tokens that attend to each other at a time; the context is cut into such runs, from its end."""
  memory: int | None = None
  """transformer_xl: how many tokens before a segment each layer remembers the states of; None: as many as a segment."""
  cross_attend_after: tuple[int, ...] = ()
  """Layers after which the inputs are attended to once more, each time with own weights."""
  dropout: float = 0.0
  """Rate on the outputs of attention and MLP blocks, in training."""
  latent_dropout: float = 0.0
  """Rate of latents that the other latents do not see in self-attention, in training."""
  cross_attend_dropout: float = 0.0
  """Rate of inputs before the latents that are left out of the context altogether, in training; they cost nothing."""
  attention: str = "auto"
  """How attention is computed, with the same result: reference (plain einsums), chunked (scores of one chunk of keys at
  a time), streamed (the context embedded and projected in chunks too, so that memory does not grow with it), cudnn
  (NVIDIA GPUs, bfloat16), splash (TPUs), or auto: by shape."""
  attention_chunk: int = 512
  """Slots that chunked and streamed attention work on at a time."""
  logits_chunk: int | None = None
  """Latents whose logits exist at a time in training and evaluation, for large vocabularies; None: all."""
  remat: str = "dots"
  """What a self-attention layer keeps for the backward pass: none = everything, dots = matrix products and what else is
  dear to compute again, full = nothing."""
  dtype: str = "float32"
  """Compute type; weights, softmax, norms and loss stay float32."""

  def __post_init__(self):
    for name in ("max_context", "num_latents", "latent_width", "num_cross_heads", "num_self_heads"):
      _require(getattr(self, name) >= 1, f"model.{name}={getattr(self, name)} must be at least 1.")
    for name in ("mlp_widening", "attention_chunk"):
      _require(getattr(self, name) >= 1, f"model.{name}={getattr(self, name)} must be at least 1.")
    _require(
      self.logits_chunk is None or self.logits_chunk >= 1, f"model.logits_chunk={self.logits_chunk} must be at least 1."
    )
    _require(self.num_layers >= 0, f"model.num_layers={self.num_layers} must not be negative.")
    _require(self.vocab_size > 3, f"model.vocab_size={self.vocab_size} must exceed 3: ids 0, 1, 2 are PAD, EOS, SOS.")
    _require(
      self.num_latents <= self.max_context,
      f"model.num_latents={self.num_latents} exceeds model.max_context={self.max_context}: latents are the last"
      " inputs, so lower num_latents or raise max_context.",
    )
    cross = "cross_attend_width" if self.cross_attend_width else "latent_width"
    for width, heads in ((cross, "num_cross_heads"), ("latent_width", "num_self_heads")):
      _require(
        getattr(self, width) % getattr(self, heads) == 0,
        f"model.{width}={getattr(self, width)} is not divisible by model.{heads}={getattr(self, heads)}: choose a"
        " width that is a multiple of the number of heads.",
      )
    for name in ("embed_width", "cross_attend_width", "rotary_max_wavelength"):
      value = getattr(self, name)
      _require(value is None or value >= 1, f"model.{name}={value} must be at least 1, or None.")
    _require(
      all(isinstance(size, int) and size >= 1 for size in self.position_sizes),
      f"model.position_sizes={self.position_sizes} must be whole numbers of at least 1, one for each dimension.",
    )
    _require(
      self.position_encoding != "fourier" or self.input_width % 2 == 0,
      f"Fourier positions need an even embedding width, not {self.input_width}: change model.embed_width.",
    )
    _choice("model.architecture", self.architecture, ARCHITECTURES)
    _choice("model.activation", self.activation, ACTIVATIONS)
    _choice("model.position_encoding", self.position_encoding, POSITION_ENCODINGS)
    _choice("model.attention", self.attention, ATTENTION_KERNELS)
    _choice("model.remat", self.remat, REMAT_POLICIES)
    _choice("model.dtype", self.dtype, DTYPES)
    for name in ("dropout", "latent_dropout", "cross_attend_dropout"):
      _require(0 <= getattr(self, name) < 1, f"model.{name}={getattr(self, name)} must lie in [0, 1).")
    _require(
      self.attention != "cudnn" or self.dtype == "bfloat16",
      "model.attention=cudnn computes in half precision only: set model.dtype=bfloat16, or take another kernel.",
    )
    _require(0 <= self.rotary_fraction <= 1, f"model.rotary_fraction={self.rotary_fraction} must lie in [0, 1].")
    _require(
      all(0 <= layer < self.num_layers for layer in self.cross_attend_after),
      f"model.cross_attend_after={self.cross_attend_after} names a layer outside 0..{self.num_layers - 1}.",
    )
    if self.architecture == "transformer_xl":
      self._check_transformer_xl()
      return
    _require(
      self.position_encoding != "relative",
      "model.position_encoding=relative is transformer_xl's alone: take sinusoidal, fourier, learned or rotary, or set"
      " --config.model.architecture=transformer_xl.",
    )
    for name in ("segment", "memory"):
      _require(
        getattr(self, name) is None,
        f"model.{name}={getattr(self, name)} is a setting of transformer_xl: leave it out, or set"
        " --config.model.architecture=transformer_xl.",
      )
    if self.position_encoding != "rotary" and not self.positions_from_data:
      _require(
        len(self.position_sizes) == 1 and self.position_sizes[0] >= self.max_context,
        f"model.position_sizes={self.position_sizes} must be one size of at least model.max_context={self.max_context},"
        " since positions are counted from the last token.",
      )
    if self.position_encoding != "rotary":
      _require(
        bool(self.position_sizes),
        f"model.position_sizes is empty, but {self.position_encoding} positions need a table: give one size (largest"
        f" position + 1) for each position dimension, such as ({self.max_context + 1},).",
      )

  def _check_transformer_xl(self) -> None:
    _require(
      self.position_encoding == "relative",
      f"model.position_encoding={self.position_encoding} cannot go with transformer_xl, where a state has another"
      " position in each segment that looks back at it: set --config.model.position_encoding=relative.",
    )
    _require(
      self.segment is not None and self.segment >= 1,
      f"model.segment={self.segment} must be at least 1 for transformer_xl: set how many tokens attend to each other"
      " at a time, such as --config.model.segment=256.",
    )
    _require(self.memory is None or self.memory >= 0, f"model.memory={self.memory} must not be negative.")
    _require(self.num_layers >= 1, f"model.num_layers={self.num_layers} must be at least 1 for transformer_xl.")
    for name in ("cross_attend_after", "latent_dropout", "cross_attend_dropout"):
      _require(
        not getattr(self, name),
        f"model.{name}={getattr(self, name)} has no meaning for transformer_xl: set it to {getattr(type(self), name)}.",
      )
    _require(
      self.attention in ("auto", "reference"),
      f"model.attention={self.attention} is no way of transformer_xl, whose scores depend on distances: take auto.",
    )

  @property
  def remembered(self) -> int:
    """transformer_xl: states that each layer keeps of what is before a segment."""
    assert self.segment  # checked, as are all settings of transformer_xl
    return self.segment if self.memory is None else self.memory

  def segments(self, length: int, num_latents: int) -> tuple[int, int]:
    """transformer_xl: segments (run for the states that they leave alone, that hold latents) of a row of `length`.

    Each layer looks back by the memory once, so that segments further back than all of them reach are left out.
    """
    assert self.segment
    whole, predicting = -(-length // self.segment), -(-num_latents // self.segment)
    reached = self.num_layers * -(-self.remembered // self.segment)
    return min(whole - predicting, reached), predicting

  @property
  def input_width(self) -> int:
    """E: width of the input embedding."""
    return self.embed_width or self.latent_width

  @property
  def cross_width(self) -> int:
    """Width of the cross-attend's queries, keys and values."""
    return self.cross_attend_width or self.latent_width


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
  """Which of them are held out, likewise; None: `validation_fraction` of them."""
  validation_fraction: float = 0.05
  """Share of the files held out, chosen by their names, but at least one; or of each text, with split_by=position."""
  split_by: str = "file"
  """text_files: hold out whole files (file), or the last part of each (position)."""
  sentencepiece: str | None = None
  """Text: a SentencePiece model file; None: bytes."""
  image_size: int = 64
  """image_files: pixels a side."""
  image_order: str = "pixel_raster"
  """image_files: pixel_raster (r, g, b of each pixel in turn) or rgb_planes (all r, then all g, then all b)."""
  max_transposition: int = 0
  """Music: training crops are shifted by up to so many semitones either way; the paper shifts none."""
  max_stretch: float = 0.0
  """Music: training crops are slowed down or sped up by up to this share; the paper's are not."""
  codebook_size: int = 1024
  """audio_codes, video_codes: codes of each level, or of the grid, are 0..codebook_size-1."""
  code_levels: int = 8
  """audio_codes: levels of the residual quantiser that are used, the coarse ones first."""
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
    for name in (
      "min_crop",
      "shards",
      "shuffle_buffer",
      "image_size",
      "codebook_size",
      "code_levels",
    ):
      _require(getattr(self, name) >= 1, f"data.{name}={getattr(self, name)} must be at least 1.")
    _require(
      0 < self.validation_fraction < 1,
      f"data.validation_fraction={self.validation_fraction} must lie between 0 and 1; to hold out certain files, set"
      " data.validation_files.",
    )
    _require(0 <= self.max_transposition < 128, f"data.max_transposition={self.max_transposition} must lie in 0..127.")
    _require(0 <= self.max_stretch < 1, f"data.max_stretch={self.max_stretch} must lie in [0, 1).")
    _choice("data.split_by", self.split_by, TEXT_SPLITS)
    _choice("data.image_order", self.image_order, IMAGE_ORDERS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
  """The update rule and its learning rate."""

  name: str = "adam"
  """adam, adamw, adafactor, lamb, sgd (with momentum) or sm3."""
  learning_rate: float = 3e-4
  """Peak rate, reached at the end of the warm-up."""
  warmup_steps: int = 0
  """Steps of linear warm-up; the very first update then has rate 0."""
  schedule: str = "constant"
  """After the warm-up: constant, cosine (down to `end_learning_rate`), steps (`step_boundaries`) or t5 (1/sqrt)."""
  end_learning_rate: float = 0.0
  """Cosine: the rate at the last step."""
  cosine_steps: int | None = None
  """Cosine: decay over only this many final steps, constant before; None: from the end of the warm-up."""
  step_boundaries: tuple[float, ...] = (0.5, 0.8, 0.95)
  """Steps: multiply by `step_factor` at these fractions of the training steps, counted after the warm-up."""
  step_factor: float = 0.1
  """Steps: the factor."""
  clip_norm: float = 1.0
  """Largest global gradient norm; 0: no clipping."""
  b1: float = 0.9
  """Decay of the first moment; for sgd and sm3 the momentum."""
  b2: float = 0.999
  """Decay of the second moment (adam, adamw, lamb)."""
  eps: float = 1e-8
  """Added to the root of the second moment (adam, adamw, lamb)."""
  weight_decay: float = 0.0
  """Decoupled weight decay (adamw, lamb)."""

  def __post_init__(self):
    _choice("train.optimizer.name", self.name, OPTIMIZERS)
    _choice("train.optimizer.schedule", self.schedule, SCHEDULES)
    for name in ("learning_rate", "end_learning_rate", "warmup_steps", "clip_norm", "weight_decay"):
      _require(getattr(self, name) >= 0, f"train.optimizer.{name}={getattr(self, name)} must not be negative.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
  """The training run."""

  steps: int
  """Optimizer updates."""
  batch_size: int
  """Sequences per update over all devices and microbatches."""
  microbatches: int = 1
  """Split each batch into this many parts and add up their gradients, to save memory."""
  loss_reduction: str = "mean"
  """mean over scored tokens, or sum as in the published runs (so that clipping acts on nearly every step)."""
  z_loss: float = 1e-4
  """Weight of log(Z)^2, which keeps logits near zero."""
  label_smoothing: float = 0.0
  """Probability mass spread evenly over the wrong tokens."""
  optimizer: OptimizerConfig = OptimizerConfig()
  """The update rule."""
  log_every: int = 10
  """Steps between lines of metrics."""
  checkpoint_every: int = 1000
  """Steps between checkpoints."""
  keep_checkpoints: int = 3
  """Newest checkpoints kept, next to the best one."""
  profile_at: int | None = None
  """Step at which a jax.profiler trace of 3 steps starts; None: no trace."""
  on_nonfinite: str = "stop"
  """What a loss or gradient that is not finite does: stop the run, or skip the update and go on with the next batch."""
  max_skipped: int = 10
  """skip: so many updates in a row that are not finite stop the run all the same."""

  def __post_init__(self):
    for name in (
      "steps",
      "batch_size",
      "microbatches",
      "log_every",
      "checkpoint_every",
      "keep_checkpoints",
      "max_skipped",
    ):
      _require(getattr(self, name) >= 1, f"train.{name}={getattr(self, name)} must be at least 1.")
    _require(
      self.batch_size % self.microbatches == 0,
      f"train.batch_size={self.batch_size} is not divisible by train.microbatches={self.microbatches}: make the batch"
      " a multiple of it.",
    )
    _choice("train.loss_reduction", self.loss_reduction, LOSS_REDUCTIONS)
    _choice("train.on_nonfinite", self.on_nonfinite, ON_NONFINITE)
    _require(0 <= self.label_smoothing < 1, f"train.label_smoothing={self.label_smoothing} must lie in [0, 1).")
    _require(self.z_loss >= 0, f"train.z_loss={self.z_loss} must not be negative.")
    warmup, decay = self.optimizer.warmup_steps, self.optimizer.cosine_steps or 1
    _require(
      self.optimizer.schedule != "cosine" or warmup + decay <= self.steps,
      f"train.steps={self.steps} leaves no room for train.optimizer.warmup_steps={warmup} and then a cosine over"
      f" train.optimizer.cosine_steps={self.optimizer.cosine_steps or 'the rest'}: lower these"
      " (--config.train.optimizer.warmup_steps=0) or train longer.",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
  """Scoring held-out sequences, in training and with --mode=eval."""

  split: str = "validation"
  """Split that is scored."""
  every: int = 1000
  """Steps between evaluations in training."""
  stride: int | None = None
  """New tokens scored by each window, at most `num_latents`; None: `num_latents`. Smaller: more context, more time."""
  num_latents: int | None = None
  """Latents at evaluation; None: the model's."""
  batch_size: int
  """Windows per step over all devices."""
  max_sequences: int | None = None
  """Score only the first so many sequences; None: all."""
  num_samples: int = 2
  """Samples that training makes at each evaluation, by the settings of `sample`, for TensorBoard; 0: none."""

  def __post_init__(self):
    _require(self.every >= 1, f"eval.every={self.every} must be at least 1.")
    _require(self.num_samples >= 0, f"eval.num_samples={self.num_samples} must not be negative.")
    _require(self.batch_size >= 1, f"eval.batch_size={self.batch_size} must be at least 1.")
    for name in ("stride", "num_latents", "max_sequences"):
      value = getattr(self, name)
      _require(value is None or value >= 1, f"eval.{name}={value} must be at least 1.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleConfig:
  """Generation, with --mode=sample and at evaluations in training; and what --mode=score scores."""

  prompt: str | None = None
  """What samples begin with: a file (or a glob of several) of the task's kind, a text for tasks of text, or "data": the
  first documents of eval.split. None: nothing."""
  prompt_tokens: int | None = None
  """Use only the first so many tokens of each prompt; None: half of a picture or a copy, of other data half a context,
  and all of one's own text, music or codes."""
  length: int | None = None
  """New tokens of each sample; None: a whole picture, or else as many as fill the context."""
  num_samples: int = 4
  """How many samples; several prompts take turns."""
  batch_size: int = 4
  """Samples made at a time."""
  temperature: float = 1.0
  """Logits are divided by it; below 1 is safer, above 1 wilder, and 0 always takes the likeliest token."""
  top_k: int = 0
  """Draw from the so many likeliest tokens only; 0: from all."""
  top_p: float = 1.0
  """Draw from the likeliest tokens that together have this probability."""
  kept_latents: int | None = None
  """Latents kept when there is no room for another; None: 7/8 of them. Fewer is faster, and each token sees fewer."""
  cache: bool = True
  """False: a whole pass for every token, which is exact and very slow."""
  seed: int = 0
  """The same seed gives the same samples, however many are made at a time."""

  def __post_init__(self):
    _require(
      self.prompt is None or bool(self.prompt), "sample.prompt is empty: leave it out to sample without a prompt."
    )
    for name in ("prompt_tokens", "length", "num_samples", "batch_size"):
      value = getattr(self, name)
      _require(value is None or value >= 1, f"sample.{name}={value} must be at least 1.")
    _require(
      0 <= self.temperature < float("inf"),
      f"sample.temperature={self.temperature} must be 0 (always the likeliest token) or more; 1 is the model's own.",
    )
    _require(self.top_k >= 0, f"sample.top_k={self.top_k} must be at least 1, or 0 to draw from all tokens.")
    _require(0 < self.top_p <= 1, f"sample.top_p={self.top_p} must lie in (0, 1]; 1 draws from all tokens.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionMapConfig:
  """What --mode=attention shows: which inputs a cross-attend takes from for some outputs of one document."""

  prompt: str = "data"
  """The document: a file of the task's kind, a text for tasks of text, or "data": the first document of eval.split. Of
  several files the first."""
  outputs: tuple[int, ...] = ()
  """The outputs: 1 is the first event that is predicted, the document's second. Empty: a few, spread evenly."""
  cross_attend: int = 0
  """Which cross-attend: 0 is the first, and each entry of model.cross_attend_after adds one."""

  def __post_init__(self):
    _require(bool(self.prompt), 'attention_map.prompt is empty: give a file or a text, or leave it out for "data".')
    _require(
      all(isinstance(output, int) and output >= 1 for output in self.outputs),
      f"attention_map.outputs={self.outputs} must be whole numbers from 1 on, 1 being the first event that is"
      ' predicted: --config.attention_map.outputs="(100,2000)".',
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
  """How devices are arranged; one axis may be -1: all the devices that the others leave."""

  data: int = -1
  """Copies of the model, each with its part of the batch."""
  fsdp: int = 1
  """Devices that share weights and optimizer state (ZeRO-3) and also split the batch."""
  tensor: int = 1
  """Devices that share heads and MLP hidden units."""
  context: int = 1
  """Devices that share the long key/value axis of the cross-attend."""
  across_slices: str = "data"
  """The axis that reaches across the slices of a TPU multislice, which a slow network joins; others stay within."""

  def __post_init__(self):
    sizes = {axis: getattr(self, axis) for axis in MESH_AXES}
    _choice("mesh.across_slices", self.across_slices, MESH_AXES)
    _require(
      sum(size == -1 for size in sizes.values()) <= 1 and all(size == -1 or size >= 1 for size in sizes.values()),
      f"mesh sizes {sizes} must be positive, and at most one may be -1 (all remaining devices).",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanConfig:
  """What --mode=plan looks at; training ignores it."""

  topology: str | None = None
  """The chips to plan for: a slice of TPUs, v5e:16x16, v4:4x4x8, v5p:..., v6e:... or its usual name, such as v4-128;
  several of them, 2xv5e:16x16; or nodes of GPUs, h100:4x8, a100:8."""
  search: bool = False
  """Try meshes, microbatches and remat policies, and rank those that fit."""
  max_compiles: int = 8
  """search: the most candidates to compile, about a minute each for a large model."""

  def __post_init__(self):
    _require(self.max_compiles >= 1, f"plan.max_compiles={self.max_compiles} must be at least 1.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """One experiment."""

  seed: int = 0
  """Seed of weights, dropout, shuffling and crops."""
  compilation_cache: str | None = "~/.cache/perceiver_ar_jax"
  """Folder in which compiled programs wait for the next start, of any run; JAX_COMPILATION_CACHE_DIR precedes it. None:
  every start compiles."""
  model: ModelConfig
  data: DataConfig
  train: TrainConfig
  eval: EvalConfig
  sample: SampleConfig = SampleConfig()
  attention_map: AttentionMapConfig = AttentionMapConfig()
  mesh: MeshConfig = MeshConfig()
  plan: PlanConfig = PlanConfig()

  def __post_init__(self):
    _require(
      self.train.batch_size % self.data.shards == 0,
      f"data.shards={self.data.shards} does not divide train.batch_size={self.train.batch_size}: each of the parts of"
      " the data gives equally many rows of a batch, so choose a divisor.",
    )
    _require(
      self.model.architecture != "transformer_xl" or self.mesh.context == 1,
      f"mesh.context={self.mesh.context} splits the cross-attend's inputs, and transformer_xl has no cross-attend: set"
      " --config.mesh.context=1, and spread rows over data or fsdp.",
    )
    kept = self.sample.kept_latents
    _require(
      kept is None or 1 <= kept <= self.model.num_latents,
      f"sample.kept_latents={kept} must lie in 1..{self.model.num_latents}, the model's latents.",
    )
    cross_attends = 1 + len(set(self.model.cross_attend_after))
    _require(
      0 <= self.attention_map.cross_attend < cross_attends,
      f"attention_map.cross_attend={self.attention_map.cross_attend} must lie in 0..{cross_attends - 1}: the model has"
      f" {cross_attends}, the first and those of model.cross_attend_after={self.model.cross_attend_after}.",
    )
    latents = self.eval.num_latents or self.model.num_latents
    stride = self.eval.stride or latents
    _require(
      latents <= self.model.max_context,
      f"eval.num_latents={latents} exceeds model.max_context={self.model.max_context}: lower it.",
    )
    _require(
      stride <= latents,
      f"eval.stride={stride} exceeds the {latents} latents at evaluation, so tokens would be left out: lower"
      " eval.stride or raise eval.num_latents.",
    )

  def to_json(self) -> str:
    """The resolved settings as indented JSON, keys in the order of declaration."""
    return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

  @classmethod
  def from_json(cls, text: str) -> "Config":
    """The inverse of `to_json`; raises InputError for unknown or wrong settings."""
    return _build(cls, json.loads(text), prefix="")


def defaults() -> config_dict.ConfigDict:
  """A ConfigDict with every field at its default; those without one are None, for the config file to fill."""
  return _defaults(Config)


def resolve(config: config_dict.ConfigDict) -> Config:
  """The validated, frozen `Config` of a filled `ConfigDict`; raises InputError for what cannot work."""
  return _build(Config, config.to_dict(preserve_field_references=False), prefix="")


def _field_type(hint: Any) -> tuple[type, bool]:
  """(the plain type, whether None is allowed) of a field's annotation."""
  optional = isinstance(hint, types.UnionType)
  if optional:
    (hint,) = (arg for arg in typing.get_args(hint) if arg is not types.NoneType)
  return typing.get_origin(hint) or hint, optional


def _defaults(cls: type) -> config_dict.ConfigDict:
  result = config_dict.ConfigDict()
  hints = typing.get_type_hints(cls)
  for field in dataclasses.fields(cls):
    kind, _ = _field_type(hints[field.name])
    if dataclasses.is_dataclass(kind):
      result[field.name] = _defaults(kind)
    elif field.default in (dataclasses.MISSING, None):
      result[field.name] = config_dict.placeholder(kind)
    else:
      result[field.name] = field.default
  return result


def _build(cls: type, values: dict[str, Any], prefix: str) -> Any:
  """A `cls` of the plain `values`, recursively; unknown and missing keys are named with their full path."""
  hints = typing.get_type_hints(cls)
  fields = {field.name: field for field in dataclasses.fields(cls)}
  for name in values:
    _require(name in fields, f"Unknown config key {prefix + name!r}. {nearest(name, fields)}")
  arguments = {}
  for name, field in fields.items():
    kind, optional = _field_type(hints[name])
    value = values.get(name)
    if value == "None" and optional:  # what a flag makes of --config.data.sentencepiece=None
      value = None
    if dataclasses.is_dataclass(kind):
      arguments[name] = _build(kind, value or {}, f"{prefix}{name}.")
    elif value is None:
      missing = field.default is dataclasses.MISSING
      _require(not missing, f"config.{prefix}{name} is not set: add --config.{prefix}{name}=... or set it in the file.")
      _require(optional or name not in values, f"config.{prefix}{name} must not be None.")
      arguments[name] = field.default
    else:
      arguments[name] = _convert(kind, value, prefix + name)
  return cls(**arguments)


def _convert(kind: type, value: Any, path: str) -> Any:
  if kind is tuple and isinstance(value, (list, tuple)):
    return tuple(value)
  if kind is float and isinstance(value, int) and not isinstance(value, bool):
    return float(value)
  _require(type(value) is kind, f"config.{path}={value!r} must be of type {kind.__name__}.")
  return value
