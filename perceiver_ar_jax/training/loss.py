"""The loss of next-token logits, per token (paper's training recipe: cross-entropy with z-loss)."""

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
