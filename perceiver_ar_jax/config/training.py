"""Settings of the training run and of the devices."""

import dataclasses
import os

from perceiver_ar_jax.config.checks import require, require_at_least, require_choice

MESH_AXES = ("data", "fsdp", "tensor", "context")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
  """The update rule and its learning rate."""

  name: str = "adam"
  """adam, adamw, adafactor, lamb, muon, sgd (with momentum) or sm3."""
  learning_rate: float = 3e-4
  """Peak rate, reached at the end of the warm-up."""
  warmup_steps: int = 0
  """Steps of linear warm-up; the very first update then has rate 0."""
  schedule: str = "constant"
  """After the warm-up: constant, cosine, wsd (stable, then linear decay), steps (`step_boundaries`) or t5 (1/sqrt)."""
  end_learning_rate: float = 0.0
  """Cosine and wsd: the rate at the last step."""
  decay_steps: int | None = None
  """Wsd: length of the final decay, at most the steps after the warm-up; None: a fifth of these."""
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
  """Decoupled weight decay (adamw, lamb, and muon's matrices)."""

  def __post_init__(self):
    require_at_least(1, "train.optimizer", self, "cosine_steps", "decay_steps")
    rates = ("learning_rate", "end_learning_rate", "warmup_steps", "clip_norm", "weight_decay")
    require_at_least(0, "train.optimizer", self, *rates)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
  """The training run."""

  steps: int
  """Optimizer updates."""
  init_from: str | None = None
  """Fine-tuning: the folder of exported weights (interop/export.py) that a new run starts from."""
  batch_size: int
  """Sequences per update over all devices and microbatches."""
  microbatches: int = 1
  """Parts of each batch that are computed one after the other, to save memory; their gradients are added up."""
  loss_reduction: str = "mean"
  """mean over scored tokens, or sum as in the published runs (so that clipping acts on nearly every step)."""
  z_loss: float = 1e-4
  """Weight of log(Z)^2, which keeps logits near zero."""
  label_smoothing: float = 0.0
  """Probability mass spread evenly over the wrong tokens."""
  optimizer: OptimizerConfig = OptimizerConfig()
  """The update rule."""
  ema_decay: float = 0.0
  """Decay per update of an average of the weights, which evaluation, samples and export then use; 0: none."""
  log_every: int = 10
  """Steps between lines of metrics, whose times are means over the steps fetched from the devices with the line."""
  checkpoint_every: int = 1000
  """Steps between checkpoints."""
  keep_checkpoints: int = 3
  """Newest checkpoints kept, next to the best one."""
  profile_at: int | None = None
  """Step at which a jax.profiler trace of 3 steps starts; None: no trace."""
  on_nonfinite: str = "stop"
  """After a loss or gradient that is not finite: stop the run, or skip the update and continue with the next batch."""
  max_skipped: int = 10
  """skip: N updates in a row that are not finite stop the run."""

  def __post_init__(self):
    counts = ("steps", "batch_size", "microbatches", "log_every", "checkpoint_every", "keep_checkpoints")
    if self.init_from is not None:
      object.__setattr__(self, "init_from", os.path.expanduser(self.init_from))
    require_at_least(1, "train", self, *counts, "max_skipped")
    require_at_least(0, "train", self, "z_loss")
    rows, parts = self.batch_size, self.microbatches
    problem = f"train.batch_size={rows} is not divisible by train.microbatches={parts}"
    require(rows % parts == 0, f"{problem}: change either.")
    require_choice("train.loss_reduction", self.loss_reduction, ("mean", "sum"))
    require_choice("train.on_nonfinite", self.on_nonfinite, ("stop", "skip"))
    require(0 <= self.ema_decay < 1, f"train.ema_decay={self.ema_decay} must be in [0, 1).")
    require(0 <= self.label_smoothing < 1, f"train.label_smoothing={self.label_smoothing} must be in [0, 1).")
    warmup, decay = self.optimizer.warmup_steps, self.optimizer.cosine_steps
    is_long = self.optimizer.schedule != "cosine" or warmup + (decay or 1) <= self.steps
    problem = f"train.steps={self.steps} is too short for train.optimizer.warmup_steps={warmup} and"
    require(is_long, f"{problem} cosine_steps={decay or 'the rest'}: lower these, or train longer.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
  """Sizes of the mesh axes; one axis may be -1: all remaining devices."""

  data: int = -1
  """Copies of the model; each trains on its part of the batch. A multiple of the slices of a TPU multislice."""
  fsdp: int = 1
  """Devices over which weights and optimizer state (ZeRO-3) are sharded, and the batch as well."""
  tensor: int = 1
  """Devices over which heads and MLP hidden units are sharded."""
  context: int = 1
  """Devices over which the key/value axis of the cross-attention is sharded."""

  def __post_init__(self):
    sizes = {axis: getattr(self, axis) for axis in MESH_AXES}
    valid = list(sizes.values()).count(-1) <= 1 and all(size == -1 or size >= 1 for size in sizes.values())
    require(valid, f"mesh sizes {sizes} must be positive, and at most one may be -1 (all remaining devices).")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanConfig:
  """What --mode=plan compiles for; training ignores it."""

  topology: str | None = None
  """A slice of TPUs, v5e:16x16, v4:4x4x8, v5p:... or v6e:...; or several, 2xv5e:16x16."""
