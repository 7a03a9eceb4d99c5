"""The model's settings. Names of kernels, encodings and the like are checked by the module whose table has them."""

import dataclasses

from perceiver_ar_jax.config.checks import require, require_at_least, require_choice


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
  """The architecture (paper, section 3 and appendix), or a baseline to compare it with."""

  architecture: str = "perceiver_ar"
  """perceiver_ar or transformer_xl (models/architectures.py), which has no cross-attention."""
  vocab_size: int
  """Number of token ids, PAD 0, EOS 1 and SOS 2 included (259 for bytes and color values)."""
  max_context: int
  """L: the maximum number of input tokens; shorter inputs are padded on the left."""
  num_latents: int
  """M: the number of last inputs that become latents and predict tokens; L = M is a plain Transformer."""
  num_layers: int
  """Self-attention layers after the cross-attention."""
  latent_width: int
  """D: width of the latents and of every layer."""
  embed_width: int | None = None
  """Width of the input embedding; None: `latent_width`."""
  num_cross_heads: int
  """Heads of the cross-attention."""
  cross_attend_width: int | None = None
  """Width of the cross-attention's queries, keys and values, all heads together; None: `latent_width`."""
  num_self_heads: int
  """Heads of the self-attention layers."""
  mlp_widening: int = 4
  """Hidden width of each MLP block, in multiples of `latent_width`."""
  activation: str = "squared_relu"
  """MLP non-linearity: squared_relu or gelu (tanh form)."""
  position_encoding: str
  """sinusoidal, fourier or learned tables, rotary, or both: learned+rotary. transformer_xl: relative."""
  position_sizes: tuple[int, ...] = ()
  """Rows of the table of each position dimension: its largest position + 1. Empty for rotary and relative."""
  positions_from_data: bool = True
  """False: count positions back from the last token instead of taking the task's own."""
  rotary_fraction: float = 0.5
  """Rotary: the leading fraction of each head that is rotated."""
  rotary_max_wavelength: int | None = None
  """Rotary: longest wavelength in positions, divided by 2 pi; None: `max_context`."""
  rotary_axes: tuple[tuple[float, float, float], ...] = ()
  """Rotary over several position dimensions: for each, (fraction of a head, shortest, longest wavelength in positions).
  (): one dimension, by the two settings above."""
  segment: int | None = None
  """transformer_xl: tokens of a segment, which attend to each other; the context is cut into segments from its end."""
  memory: int | None = None
  """transformer_xl: number of tokens before a segment whose states each layer keeps; None: `segment`."""
  conv_taps: int = 0
  """Cross-attention: taps of a causal convolution of keys and values, by which an input is found by those before it."""
  qk_norm: bool = False
  """RMS normalization of each head's queries and keys, with a learned scale, before they are rotated."""
  zero_init: bool = False
  """Attention and MLP blocks start with output projections of zero, so each block is the identity at first."""
  value_features: int = 0
  """Fourier features in the embedding and logits of ids that are scalars, such as pixels: neighbors become similar."""
  cross_attend_after: tuple[int, ...] = ()
  """Layers after which a further cross-attention to the inputs follows, each with its own weights."""
  dropout: float = 0.0
  """Rate on the outputs of attention and MLP blocks, in training."""
  latent_dropout: float = 0.0
  """Fraction of latents that the other latents do not attend to in self-attention, in training."""
  cross_attend_dropout: float = 0.0
  """Fraction of the inputs before the latents that are left out of the context, in training; they cost nothing."""
  attention: str = "auto"
  """The attention kernel; all give the same result: reference (einsums), chunked (scores of one chunk of keys at a
  time), streamed (the context too: constant memory), cudnn (NVIDIA GPUs), splash (TPUs), auto: by device and shape."""
  attention_chunk: int = 512
  """Slots per chunk of chunked and streamed attention."""
  logits_chunk: int | None = None
  """Latents per chunk of logits in training and evaluation, to save memory with large vocabularies; None: all."""
  remat: str = "dots"
  """Self-attention layers keep for the backward pass: none = everything, dots = matrix products and other expensive
  values, full = nothing."""
  dtype: str = "float32"
  """Compute type; weights, softmax, norms and loss stay float32."""

  def __post_init__(self):
    counts = ("max_context", "num_latents", "latent_width", "num_cross_heads", "num_self_heads", "mlp_widening")
    optional_counts = ("embed_width", "cross_attend_width", "rotary_max_wavelength", "logits_chunk")
    require_at_least(1, "model", self, *counts, "attention_chunk", *optional_counts)
    require_at_least(0, "model", self, "num_layers", "conv_taps", "value_features")
    require(self.vocab_size > 3, f"model.vocab_size={self.vocab_size} must exceed 3: ids 0, 1, 2 are PAD, EOS, SOS.")
    latents, context = self.num_latents, self.max_context
    require(latents <= context, f"model.num_latents={latents} exceeds model.max_context={context}: change either.")
    cross = "cross_attend_width" if self.cross_attend_width else "latent_width"
    for width, heads in ((cross, "num_cross_heads"), ("latent_width", "num_self_heads")):
      size, count = getattr(self, width), getattr(self, heads)
      require(size % count == 0, f"model.{width}={size} is not divisible by model.{heads}={count}: change either.")
    sizes = self.position_sizes
    is_valid = all(isinstance(size, int) and size >= 1 for size in sizes)
    require(is_valid, f"model.position_sizes={sizes} must be integers of at least 1, one for each dimension.")
    require_choice("model.dtype", self.dtype, ("float32", "bfloat16"))
    for name in ("dropout", "latent_dropout", "cross_attend_dropout"):
      require(0 <= getattr(self, name) < 1, f"model.{name}={getattr(self, name)} must be in [0, 1).")
    require(0 <= self.rotary_fraction <= 1, f"model.rotary_fraction={self.rotary_fraction} must be in [0, 1].")
    axes, form = self.rotary_axes, "(fraction of a head, shortest, longest wavelength) for each position dimension"
    is_valid = all(len(axis) == 3 and axis[0] >= 0 and 0 < axis[1] <= axis[2] for axis in axes)
    is_valid = is_valid and sum(axis[0] for axis in axes) <= 1
    require(is_valid, f"model.rotary_axes={axes} must have {form}, with fractions that sum to at most 1.")
    features, taps, layers = self.value_features, self.conv_taps, self.cross_attend_after
    require(features % 2 == 0, f"model.value_features={features} must be even: sines and cosines.")
    is_valid = not (taps and self.cross_attend_dropout)
    require(is_valid, f"model.conv_taps={taps} needs all inputs: set model.cross_attend_dropout to 0.")
    is_known = all(layer in range(self.num_layers) for layer in layers)
    require(is_known, f"model.cross_attend_after={layers} names a layer outside 0..{self.num_layers - 1}.")

  @property
  def input_width(self) -> int:
    """E: width of the input embedding."""
    return self.embed_width or self.latent_width

  @property
  def position_dims(self) -> int:
    """P: dimensions of a position, as the tables or the rotary axes need them."""
    return len(self.position_sizes) or len(self.rotary_axes) or 1

  @property
  def num_cross_attends(self) -> int:
    """Number of cross-attentions: the first, and one after each layer in `cross_attend_after`."""
    return 1 + len(set(self.cross_attend_after))

  @property
  def cross_width(self) -> int:
    """Width of the cross-attention's queries, keys and values."""
    return self.cross_attend_width or self.latent_width
