"""Settings of evaluation, sampling and attention maps."""

import dataclasses
import math

from perceiver_ar_jax.config.checks import require, require_at_least


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
  """Score only the first sequences, at most this many (of each task of a mixture); None: all."""
  max_tokens: int | None = None
  """Score only the first tokens of the split, at most this many (of each task of a mixture). None: all."""
  num_samples: int | None = None
  """Samples that training draws at each evaluation for TensorBoard. None: 2 on a single accelerator or CPU, else 0."""

  def __post_init__(self):
    require_at_least(0, "eval", self, "num_samples")
    counts = ("every", "batch_size", "stride", "num_latents", "max_sequences", "max_tokens")
    require_at_least(1, "eval", self, *counts)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleConfig:
  """Generation, with --mode=sample and at evaluations in training; --mode=score scores the prompt."""

  prompt: str | None = None
  """How samples begin. "data": with the first documents of eval.split. @FILE, or a pattern such as @folder/*.mid: with
  files. Any other value is such a path too, but for tasks of text the text itself unless it looks like a path: begins
  with /, ./, ../ or ~/, contains a / but no space, or ends in .txt or similar. None: no prompt."""
  prompt_tokens: int | None = None
  """Use only the first N tokens of each prompt; None: all of your own files, or half an image, half a context."""
  length: int | None = None
  """New tokens of each sample; None: a whole image, or for other tasks a full context."""
  num_samples: int = 4
  """Number of samples; several prompts are used in turn."""
  batch_size: int = 4
  """Samples drawn at a time."""
  temperature: float = 1.0
  """Divides the logits: below 1 favors likely tokens, above 1 unlikely ones, and 0 always takes the likeliest."""
  top_k: int = 0
  """Draw only from the k likeliest tokens; 0: from all."""
  top_p: float = 1.0
  """Draw from the likeliest tokens that together have this probability."""
  kept_latents: int | None = None
  """Latents kept when the cache is full; None: 7/8 of them. Fewer is faster, and each token attends to fewer."""
  cache: bool = True
  """False: a full pass for every token, which is exact and very slow."""
  seed: int = 0
  """The same seed gives the same samples, whatever the batch size: 0..2^32-1."""

  def __post_init__(self):
    require(self.prompt != "", "sample.prompt is empty: leave it out to sample without a prompt.")
    require(0 <= self.seed < 2**32, f"sample.seed={self.seed} must be in 0..4294967295 (2^32-1).")
    require_at_least(1, "sample", self, "prompt_tokens", "length", "num_samples", "batch_size")
    require(0 <= self.temperature < math.inf, f"sample.temperature={self.temperature} must be 0 or more, and finite.")
    require(0 <= self.top_k < 2**31, f"sample.top_k={self.top_k} must be 1..2147483647, or 0 to draw from all tokens.")
    require(0 < self.top_p <= 1, f"sample.top_p={self.top_p} must be in (0, 1]; 1 draws from all tokens.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionMapConfig:
  """What --mode=attention shows: the inputs that a cross-attention attends to, for outputs of the first document of
  sample.prompt (None: "data")."""

  outputs: tuple[int, ...] = ()
  """The outputs: 1 is the first event that is predicted, the document's second. Empty: a few, spread evenly."""
  cross_attend: int = 0
  """Index of the cross-attention: 0 is the first, and each entry of model.cross_attend_after adds one."""

  def __post_init__(self):
    is_valid = all(isinstance(output, int) and output >= 1 for output in self.outputs)
    require(is_valid, f"attention_map.outputs={self.outputs} must be integers from 1 on, such as (100,2000).")
