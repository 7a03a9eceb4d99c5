"""The loss of next-token logits (the paper's training recipe: cross-entropy with z-loss): per token, and summed."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


class TokenLosses(NamedTuple):
  """float32[B, M] each, unweighted; the optimized loss is `cross_entropy + z_loss`, in nats."""

  cross_entropy: jax.Array
  z_loss: jax.Array
  correct: jax.Array  # 1 where the likeliest token is the target


def token_losses(logits_BxMxV, targets_BxM, z_loss: float = 0.0, label_smoothing: float = 0.0) -> TokenLosses:
  """Returns the losses of each target.

  The z-loss is `z_loss` * log(Z)^2 with Z the softmax's normalizer; it keeps logits from drifting. Label smoothing
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
    logits_fn: from latents [..., D] to logits [..., V].
    chunk: latents whose logits exist at a time, forward and backward; any number, None: all.
    weights: `z_loss` and `label_smoothing`.
  """
  if chunk is None or chunk >= targets_BxM.shape[1]:
    return token_losses(logits_fn(latents_BxMxD), targets_BxM, **weights)

  @jax.checkpoint
  def score_latent(inputs):
    latent_BxD, target_B = inputs
    return token_losses(logits_fn(latent_BxD), target_B, **weights)

  losses_MxB = jax.lax.map(score_latent, (latents_BxMxD.swapaxes(0, 1), targets_BxM.T), batch_size=chunk)
  return jax.tree.map(jnp.transpose, losses_MxB)


def weighted_sums(losses: TokenLosses, weights_BxM) -> dict[str, jax.Array]:
  """Returns sums over all tokens: `loss` and `z_loss` in nats, `accuracy` (correct tokens), `num_tokens` scored."""
  loss, z_loss, accuracy = ((values_BxM * weights_BxM).sum() for values_BxM in losses)
  return {"loss": loss, "z_loss": z_loss, "accuracy": accuracy, "num_tokens": weights_BxM.sum()}
