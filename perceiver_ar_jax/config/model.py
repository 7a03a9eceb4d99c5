"""The architecture."""

import dataclasses

from perceiver_ar_jax.config.checks import choice, require

ARCHITECTURES = ("perceiver_ar", "transformer_xl")
ACTIVATIONS = ("squared_relu", "gelu")
ATTENTION_KERNELS = ("auto", "reference", "chunked", "streamed", "cudnn", "splash")
DTYPES = ("float32", "bfloat16")
POSITION_ENCODINGS = ("sinusoidal", "fourier", "learned", "rotary", "relative")
REMAT_POLICIES = ("none", "dots", "full")


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
    counts = ("max_context", "num_latents", "latent_width", "num_cross_heads", "num_self_heads")
    for name in (*counts, "mlp_widening", "attention_chunk"):
      require(getattr(self, name) >= 1, f"model.{name}={getattr(self, name)} must be at least 1.")
    require(self.num_layers >= 0, f"model.num_layers={self.num_layers} must not be negative.")
    require(self.vocab_size > 3, f"model.vocab_size={self.vocab_size} must exceed 3: ids 0, 1, 2 are PAD, EOS, SOS.")
    require(
      self.num_latents <= self.max_context,
      f"model.num_latents={self.num_latents} exceeds model.max_context={self.max_context}: latents are the last"
      " inputs, so lower num_latents or raise max_context.",
    )
    cross = "cross_attend_width" if self.cross_attend_width else "latent_width"
    for width, heads in ((cross, "num_cross_heads"), ("latent_width", "num_self_heads")):
      require(
        getattr(self, width) % getattr(self, heads) == 0,
        f"model.{width}={getattr(self, width)} is not divisible by model.{heads}={getattr(self, heads)}: choose a"
        " width that is a multiple of the number of heads.",
      )
    for name in ("embed_width", "cross_attend_width", "rotary_max_wavelength", "logits_chunk"):
      value = getattr(self, name)
      require(value is None or value >= 1, f"model.{name}={value} must be at least 1, or None.")
    require(
      all(isinstance(size, int) and size >= 1 for size in self.position_sizes),
      f"model.position_sizes={self.position_sizes} must be whole numbers of at least 1, one for each dimension.",
    )
    require(
      self.position_encoding != "fourier" or self.input_width % 2 == 0,
      f"model.position_encoding=fourier needs an even embedding width, not {self.input_width}: change"
      " model.embed_width.",
    )
    choice("model.architecture", self.architecture, ARCHITECTURES)
    choice("model.activation", self.activation, ACTIVATIONS)
    choice("model.position_encoding", self.position_encoding, POSITION_ENCODINGS)
    choice("model.attention", self.attention, ATTENTION_KERNELS)
    choice("model.remat", self.remat, REMAT_POLICIES)
    choice("model.dtype", self.dtype, DTYPES)
    for name in ("dropout", "latent_dropout", "cross_attend_dropout"):
      require(0 <= getattr(self, name) < 1, f"model.{name}={getattr(self, name)} must lie in [0, 1).")
    require(
      self.attention != "cudnn" or self.dtype == "bfloat16",
      "model.attention=cudnn computes in half precision only: set model.dtype=bfloat16, or take another kernel.",
    )
    require(0 <= self.rotary_fraction <= 1, f"model.rotary_fraction={self.rotary_fraction} must lie in [0, 1].")
    require(
      all(layer in range(self.num_layers) for layer in self.cross_attend_after),
      f"model.cross_attend_after={self.cross_attend_after} names a layer outside 0..{self.num_layers - 1}, those that"
      f" model.num_layers={self.num_layers} makes.",
    )
    if self.architecture == "transformer_xl":
      self._check_transformer_xl()
      return
    require(
      self.position_encoding != "relative",
      "model.position_encoding=relative is transformer_xl's alone: take sinusoidal, fourier, learned or rotary, or set"
      " --config.model.architecture=transformer_xl.",
    )
    for name in ("segment", "memory"):
      require(
        getattr(self, name) is None,
        f"model.{name}={getattr(self, name)} is a setting of transformer_xl: leave it out, or set"
        " --config.model.architecture=transformer_xl.",
      )
    if self.position_encoding != "rotary" and not self.positions_from_data:
      require(
        len(self.position_sizes) == 1 and self.position_sizes[0] >= self.max_context,
        f"model.position_sizes={self.position_sizes} must be one size of at least model.max_context={self.max_context},"
        " since positions are counted from the last token.",
      )
    if self.position_encoding != "rotary":
      require(
        bool(self.position_sizes),
        f"model.position_sizes is empty, but {self.position_encoding} positions need a table: give one size (largest"
        f" position + 1) for each position dimension, such as ({self.max_context + 1},).",
      )

  def _check_transformer_xl(self) -> None:
    require(
      self.position_encoding == "relative",
      f"model.position_encoding={self.position_encoding} cannot go with transformer_xl, where a state has another"
      " position in each segment that looks back at it: set --config.model.position_encoding=relative.",
    )
    require(
      self.segment is not None and self.segment >= 1,
      f"model.segment={self.segment} must be at least 1 for transformer_xl: set how many tokens attend to each other"
      " at a time, such as --config.model.segment=256.",
    )
    require(self.memory is None or self.memory >= 0, f"model.memory={self.memory} must not be negative.")
    require(self.num_layers >= 1, f"model.num_layers={self.num_layers} must be at least 1 for transformer_xl.")
    for name in ("cross_attend_after", "latent_dropout", "cross_attend_dropout"):
      require(
        not getattr(self, name),
        f"model.{name}={getattr(self, name)} has no meaning for transformer_xl: set it to {getattr(type(self), name)}.",
      )
    require(
      self.attention in ("auto", "reference"),
      f"model.attention={self.attention} cannot be had with transformer_xl, whose scores depend on distances: set"
      " --config.model.attention=auto.",
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
  def num_cross_attends(self) -> int:
    """Cross-attends: the first, and one after each layer that `cross_attend_after` names."""
    return 1 + len(set(self.cross_attend_after))

  @property
  def cross_width(self) -> int:
    """Width of the cross-attend's queries, keys and values."""
    return self.cross_attend_width or self.latent_width
