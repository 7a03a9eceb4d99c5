"""The loss of next-token logits (paper's training recipe: cross-entropy with z-loss): per token, and summed up."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


class TokenLosses(NamedTuple):
  """Per target, unweighted, in nats; the optimised loss is the sum of both."""

  cross_entropy: jax.Array
  z_loss: jax.Array


def token_losses(logits_BxMxV, targets_BxM, *, z_loss: float, label_smoothing: float) -> TokenLosses:
  """float32[B, M] losses of each target.

  The z-loss is `z_loss` * log(Z)^2 with Z the softmax's normaliser; it keeps logits from drifting. Label
  smoothing moves that much probability to the other V - 1 tokens, less the entropy of the smoothed target,
  so that a perfect model has loss 0.
  """
  logits_BxMxV = logits_BxMxV.astype(jnp.float32)
  num_classes = logits_BxMxV.shape[-1]
  log_z_BxM = jax.nn.logsumexp(logits_BxMxV, axis=-1)
  target_logits_BxM = jnp.take_along_axis(logits_BxMxV, targets_BxM[..., None], axis=-1)[..., 0]
  cross_entropy_BxM = log_z_BxM - target_logits_BxM
  if label_smoothing:
    confidence, other = 1.0 - label_smoothing, label_smoothing / (num_classes - 1)
    entropy = -(confidence * jnp.log(confidence) + label_smoothing * jnp.log(other))
    uniform_BxM = num_classes * log_z_BxM - logits_BxMxV.sum(axis=-1)
    cross_entropy_BxM = confidence * cross_entropy_BxM + other * (uniform_BxM - cross_entropy_BxM) - entropy
  return TokenLosses(cross_entropy_BxM, z_loss * jnp.square(log_z_BxM))


class Scored(NamedTuple):
  """Per target, unweighted: float32[B, M] each."""

  cross_entropy: jax.Array
  z_loss: jax.Array
  right: jax.Array
  """1 where the likeliest token is the target."""


def score(
  logits_fn: Callable[[jax.Array], jax.Array],
  latents_BxMxD,
  targets_BxM,
  *,
  z_loss: float = 0.0,
  label_smoothing: float = 0.0,
  chunk: int | None = None,
) -> Scored:
  """What each target costs, and whether it was guessed.

  Args:
    logits_fn: from latents [B, C, D] to logits [B, C, V].
    chunk: latents whose logits exist at a time, forward and backward; None: all. Any number does.
  """

  def of(latents_BxCxD, targets_BxC):
    logits_BxCxV = logits_fn(latents_BxCxD)
    losses = token_losses(logits_BxCxV, targets_BxC, z_loss=z_loss, label_smoothing=label_smoothing)
    return Scored(*losses, (logits_BxCxV.argmax(axis=-1) == targets_BxC).astype(jnp.float32))

  num_latents = targets_BxM.shape[1]
  if chunk is None or chunk >= num_latents:
    return of(latents_BxMxD, targets_BxM)

  def split(x_BxM):
    """[chunks, B, chunk, ...], filled up with zeros."""
    filled = jnp.pad(x_BxM, ((0, 0), (0, -num_latents % chunk)) + ((0, 0),) * (x_BxM.ndim - 2))
    return filled.reshape(x_BxM.shape[0], -1, chunk, *x_BxM.shape[2:]).swapaxes(0, 1)

  def join(x_NxBxC):
    return x_NxBxC.swapaxes(0, 1).reshape(targets_BxM.shape[0], -1)[:, :num_latents]

  scored = jax.lax.map(lambda part: jax.checkpoint(of)(*part), (split(latents_BxMxD), split(targets_BxM)))
  return jax.tree.map(join, scored)


def summed(scored: Scored, weights_BxM) -> dict[str, jax.Array]:
  """Weighted sums over all tokens: `loss` and `z_loss` in nats, `accuracy` (right guesses), `num_tokens` scored."""
  return {
    "loss": (scored.cross_entropy * weights_BxM).sum(),
    "z_loss": (scored.z_loss * weights_BxM).sum(),
    "accuracy": (scored.right * weights_BxM).sum(),
    "num_tokens": weights_BxM.sum(),
  }
