"""The Perceiver AR model (Hawthorne et al., 2022, arXiv 2202.07765, section 3).

Shape letters, here and in every module: B batch, L context, M latents, E embedding width, D latent width,
H heads, K head width, F MLP width, V vocabulary, P position dimensions, N layers. `q_BxMxHxK` is an array
of that shape.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from perceiver_ar_jax.config import ModelConfig, require
from perceiver_ar_jax.models import layers, positions
from perceiver_ar_jax.parallel import sharding


class PerceiverAR(nn.Module):
  """Next-token logits for the last `num_latents` slots of a right-aligned sequence.

  `model.apply({"params": params}, tokens_BxL, positions_BxLxP)` with tokens int32, 0 = padding on the left.
  """

  config: ModelConfig

  def setup(self):
    config = self.config
    self.embed = layers.Embed(config)
    self.to_latents = layers.dense(config, config.latent_width, None, ("width", "latent"))
    depths = group_depths(config)
    self.cross_attend = [layers.CrossAttention(config) for _ in depths]
    self.layers = [
      layers.scan(layers.SelfAttentionLayer, config, depth, (nn.broadcast,) * 4, (4, 5)) if depth else None
      for depth in depths
    ]
    self.final_norm = layers.layer_norm(None)
    self.to_logits = layers.logits_dense(config)
    self.value_logits = layers.ValueLogits(config) if config.value_features else None

  def __call__(
    self, tokens_BxL, positions_BxLxP=None, *, num_latents: int | None = None, deterministic=True, segments_BxL=None
  ):
    """Returns float32 logits_BxMxV for the token after each of the last M slots.

    Args:
      tokens_BxL: int32 token ids, right-aligned, 0 = padding.
      positions_BxLxP: int32, 1-based, 0 on padding; None, or with positions_from_data=False: distance
        from the last token (P = 1).
      num_latents: M, at most L; None: the config's.
      deterministic: False applies dropout of every kind and needs the "dropout" random key.
      segments_BxL: int32, the number of each token's document in a row of several, from 1 on, 0 on padding: tokens
        attend to their own document only. None: one document per row.

    Raises:
      ValueError: more latents than inputs, or positions whose dimensions do not fit the config.
    """
    settings = {"num_latents": num_latents, "deterministic": deterministic, "segments_BxL": segments_BxL}
    return self.logits(self.latents(tokens_BxL, positions_BxLxP, **settings))

  def latents(
    self, tokens_BxL, positions_BxLxP=None, *, num_latents: int | None = None, deterministic=True, segments_BxL=None
  ):
    """latents_BxMxD after the last layer and the final norm: the input of `logits`. Arguments as for the call."""
    config = self.config
    length = tokens_BxL.shape[1]
    num_latents = num_latents or config.num_latents
    if num_latents > length:
      raise ValueError(f"num_latents={num_latents} exceeds the {length} inputs; the latents are the last of them.")
    if positions_BxLxP is None or not config.positions_from_data:
      positions_BxLxP = positions.terminal_relative(tokens_BxL, segments_BxL)
    inputs = tokens_BxL, positions_BxLxP, segments_BxL
    if not deterministic and config.cross_attend_dropout:
      keep = round((1 - config.cross_attend_dropout) * (length - num_latents))
      inputs = drop_context(self.make_rng("dropout"), inputs, num_latents, keep)
    inputs = tokens_BxL, positions_BxLxP, segments_BxL = jax.tree.map(sharding.pad_context, inputs)
    newest = jax.tree.map(lambda x: sharding.last_slots(x, num_latents), inputs)
    tokens_BxM, positions_BxMxP, segments_BxM = newest
    valid_BxL = tokens_BxL > 0 if segments_BxL is None else segments_BxL
    valid_BxM, keep_own = tokens_BxM > 0 if segments_BxM is None else segments_BxM, False
    if not deterministic and config.latent_dropout:
      keep_own = True  # a dropped latent is hidden from the others, not from itself
      kept_BxM = jax.random.bernoulli(self.make_rng("dropout"), 1 - config.latent_dropout, valid_BxM.shape)
      valid_BxM = valid_BxM & kept_BxM if segments_BxM is None else jnp.where(kept_BxM, segments_BxM, -segments_BxM)

    latents_BxMxD = self.initial_latents(tokens_BxM, positions_BxMxP)
    for cross_attend, layers_of_group in zip(self.cross_attend, self.layers, strict=True):
      keys = cross_attend.keys(self.embed, *inputs)
      latents_BxMxD = cross_attend(latents_BxMxD, keys, positions_BxMxP, valid_BxL, deterministic)
      if layers_of_group is not None:
        latents_BxMxD, _ = layers_of_group(latents_BxMxD, positions_BxMxP, valid_BxM, keep_own, deterministic)
    return self.final_norm(latents_BxMxD)

  # Parts of `latents`, for generation with a KV cache (decode_cache.py).

  def initial_latents(self, tokens_BxM, positions_BxMxP):
    """latents_BxMxD before the first cross-attention."""
    return self.to_latents(self.embed(tokens_BxM, positions_BxMxP))

  def cross_keys_values(self, tokens_BxC, positions_BxCxP, halo: int = 0):
    """(k_BxCxHxK, v_BxCxHxK) of inputs for each cross-attention, without the first `halo` inputs.

    `halo` is conv_taps if the inputs begin with that many from before, or 0 at the start of a sequence.
    """
    keys = [each.keys(self.embed, tokens_BxC, positions_BxCxP)._replace(sharded=False) for each in self.cross_attend]
    return [each.project(each.weights, each.inputs) if halo else each.to_arrays() for each in keys]

  def logits(self, latents_BxMxD):
    """float32 logits_BxMxV of normalized latents."""
    logits_BxMxV = self.to_logits(latents_BxMxD).astype(jnp.float32)
    return logits_BxMxV + self.value_logits(latents_BxMxD) if self.value_logits else logits_BxMxV


def check(config: ModelConfig) -> None:
  """Raises InputError for settings that Perceiver AR does not support; those of its parts are checked by them."""
  for name in ("segment", "memory"):
    value = getattr(config, name)
    require(value is None, f"model.{name}={value} is a setting of transformer_xl, not of perceiver_ar: leave it out.")
  is_relative = config.position_encoding == "relative"
  require(not is_relative, "model.position_encoding=relative is supported by transformer_xl only: choose another.")
  positions.check(config)


def flops(config: ModelConfig, rows: int, num_latents: int, *, training: bool) -> int:
  """FLOPs of a step over `rows` sequences: forward, and in training a backward pass at twice the forward cost.

  See architectures.py. Shape letters as above, and C for the width of the cross-attention.
  """
  num_before = config.max_context - num_latents
  length = num_latents + round((1 - config.cross_attend_dropout) * num_before) if training else config.max_context
  d, e, c = config.latent_width, config.input_width, config.cross_width
  mlp = 2 * 2 * d * config.mlp_widening * d
  cross_attention = 2 * 2 * d * c + 2 * 2 * length * c + mlp  # query and output; scores and values
  layer = 4 * 2 * d * d + 2 * 2 * num_latents * d + mlp
  per_latent = 2 * e * d + config.num_cross_attends * cross_attention + config.num_layers * layer
  per_latent += 2 * d * config.vocab_size + 2 * config.value_features * (d + config.vocab_size)
  projected = config.vocab_size if layers.projects_by_id(config, length) else rows * length
  forward = rows * num_latents * per_latent + config.num_cross_attends * projected * 2 * 2 * e * c
  return 3 * forward if training else forward


def attention_map(
  config: ModelConfig, params, tokens_BxL, positions_BxLxP, *, num_latents: int | None = None, cross_attention: int = 0
):
  """float32 weights_BxHxL with which each head of a cross-attention attends to each input, for the last latent.

  They sum to 1 and are 0 on padding. Arguments as for the model's call; `cross_attention`: its index, the first is 0.
  """
  _, state = PerceiverAR(config).apply(
    {"params": params}, tokens_BxL, positions_BxLxP, num_latents=num_latents, method="latents", mutable=[layers.MAPS]
  )
  (weights_BxHxL,) = state[layers.MAPS][f"cross_attend_{cross_attention}"]["attention"]["weights_BxHxL"]
  return weights_BxHxL[..., -tokens_BxL.shape[1] :]  # without the padding that pad_context added


def drop_context(key: jax.Array, inputs, num_latents: int, keep: int):
  """A tree of [B, L, ...]: a random `keep` of each row's slots before the latents, in order, and all latents.

  Cross-attention dropout (paper, section 4 and appendix): dropped inputs are never embedded, so they cost nothing.
  The kept ones are not scaled up.

  Raises:
    ValueError: `keep` exceeds the number of inputs before the latents.
  """
  rows, length = jax.tree.leaves(inputs)[0].shape[:2]
  num_before = length - num_latents
  if not 0 <= keep <= num_before:
    raise ValueError(f"keep={keep} must be in 0..{num_before}, the number of inputs before the latents.")
  order_BxP = jnp.argsort(jax.random.bits(key, (rows, num_before)), axis=1)
  latents_M = jnp.broadcast_to(jnp.arange(num_before, length, dtype=order_BxP.dtype), (rows, num_latents))
  slots_BxK = jnp.concatenate([jnp.sort(order_BxP[:, :keep], axis=1), latents_M], axis=1)
  return jax.tree.map(lambda x: jnp.take_along_axis(x, jnp.expand_dims(slots_BxK, range(2, x.ndim)), 1), inputs)


def group_depths(config: ModelConfig) -> list[int]:
  """Numbers of self-attention layers after each cross-attention: a cross-attention precedes each group of layers."""
  ends = sorted({layer + 1 for layer in config.cross_attend_after}) + [config.num_layers]
  return [end - start for start, end in zip([0, *ends], ends)]
