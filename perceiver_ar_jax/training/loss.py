"""The loss of next-token logits (the paper's training recipe: cross-entropy with z-loss): per token, and summed."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


class TokenLosses(NamedTuple):
  """float32[B, M] each, unweighted; the optimised loss is `cross_entropy + z_loss`, in nats."""

  cross_entropy: jax.Array
  z_loss: jax.Array
  correct: jax.Array
  """1 where the likeliest token is the target."""


def token_losses(logits_BxMxV, targets_BxM, z_loss: float = 0.0, label_smoothing: float = 0.0) -> TokenLosses:
  """Returns the losses of each target.

  The z-loss is `z_loss` * log(Z)^2 with Z the softmax's normaliser; it keeps logits from drifting. Label smoothing
  moves this much probability to the other V - 1 tokens, less the entropy of the smoothed target, so that a perfect
  model has loss 0.
  """
  logits_BxMxV = logits_BxMxV.astype(jnp.float32)
  num_classes = logits_BxMxV.shape[-1]
  log_z_BxM = jax.nn.logsumexp(logits_BxMxV, axis=-1)
  target_logits_BxM = jnp.take_along_axis(logits_BxMxV, targets_BxM[..., None], axis=-1)[..., 0]
  cross_entropy_BxM = log_z_BxM - target_logits_BxM
  if label_smoothing:
    confidence, rest = 1.0 - label_smoothing, label_smoothing / (num_classes - 1)
    entropy = -(confidence * jnp.log(confidence) + label_smoothing * jnp.log(rest))
    uniform_BxM = num_classes * log_z_BxM - logits_BxMxV.sum(axis=-1)
    cross_entropy_BxM = confidence * cross_entropy_BxM + rest * (uniform_BxM - cross_entropy_BxM) - entropy
  correct_BxM = (logits_BxMxV.argmax(axis=-1) == targets_BxM).astype(jnp.float32)
  return TokenLosses(cross_entropy_BxM, z_loss * jnp.square(log_z_BxM), correct_BxM)


def score(
  logits_fn: Callable, latents_BxMxD, targets_BxM, *, chunk: int | None = None, **weights: float
) -> TokenLosses:
  """Returns the losses of each target, as `token_losses`.

  Args:
    logits_fn: from latents [B, C, D] to logits [B, C, V].
    chunk: latents whose logits exist at a time, forward and backward; any number, None: all.
    weights: `z_loss` and `label_smoothing`.
  """

  def score_chunk(latents_BxCxD, targets_BxC):
    return token_losses(logits_fn(latents_BxCxD), targets_BxC, **weights)

  num_latents = targets_BxM.shape[1]
  if chunk is None or chunk >= num_latents:
    return score_chunk(latents_BxMxD, targets_BxM)

  def split(x_BxM):
    """Returns [chunks, B, chunk, ...], padded with zeros."""
    padded = jnp.pad(x_BxM, ((0, 0), (0, -num_latents % chunk)) + ((0, 0),) * (x_BxM.ndim - 2))
    return padded.reshape(x_BxM.shape[0], -1, chunk, *x_BxM.shape[2:]).swapaxes(0, 1)

  def join(x_NxBxC):
    return x_NxBxC.swapaxes(0, 1).reshape(targets_BxM.shape[0], -1)[:, :num_latents]

  chunks = split(latents_BxMxD), split(targets_BxM)
  return jax.tree.map(join, jax.lax.map(lambda chunk: jax.checkpoint(score_chunk)(*chunk), chunks))


def weighted_sums(losses: TokenLosses, weights_BxM) -> dict[str, jax.Array]:
  """Returns sums over all tokens: `loss` and `z_loss` in nats, `accuracy` (correct tokens), `num_tokens` scored."""
  loss, z_loss, accuracy = ((values_BxM * weights_BxM).sum() for values_BxM in losses)
  return {"loss": loss, "z_loss": z_loss, "accuracy": accuracy, "num_tokens": weights_BxM.sum()}
