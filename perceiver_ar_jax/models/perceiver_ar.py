"""The Perceiver AR model (Hawthorne et al., 2022, arXiv 2202.07765, section 3).

Shape letters, here and in every room: B batch, L context, M latents, E embedding width, D latent width,
H heads, K head width, F MLP width, V vocabulary, P position dimensions, N layers. `q_BxMxHxK` is an array
of that shape.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from perceiver_ar_jax.config import ModelConfig
from perceiver_ar_jax.models import attention, attention_kernels
from perceiver_ar_jax.models import positions as positions_lib
from perceiver_ar_jax.parallel import sharding

# Any: what it makes is boxed with the names of its axes, and self.param takes it out of the box.
_table_init: Callable[..., Any] = nn.with_logical_partitioning(
  nn.initializers.truncated_normal(1.0), ("vocab", "width")
)

REMAT_POLICIES = {
  "full": jax.checkpoint_policies.nothing_saveable,
  "dots": jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    jax.checkpoint_policies.save_only_these_names(attention_kernels.SAVED),
  ),
}


class PerceiverAR(nn.Module):
  """Next-token logits for the last `num_latents` slots of a right-aligned sequence.

  `model.apply({"params": params}, tokens_BxL, positions_BxLxP)` with tokens int32, 0 = padding on the left.
  """

  config: ModelConfig

  def setup(self):
    config = self.config
    self.embed = Embed(config)
    self.to_latents = attention.dense(config, config.latent_width, None, ("width", "latent"))
    lengths = runs(config)
    self.cross_attend = [attention.CrossAttend(config) for _ in lengths]
    self.layers = [_scan_layers(config, length) if length else None for length in lengths]
    self.final_norm = attention.layer_norm(None)
    self.to_logits = logits_dense(config)

  def __call__(self, tokens_BxL, positions_BxLxP=None, *, num_latents: int | None = None, deterministic: bool = True):
    """Returns float32 logits_BxMxV for the token after each of the last M slots.

    Args:
      tokens_BxL: int32 token ids, right-aligned, 0 = padding.
      positions_BxLxP: int32, 1-based, 0 on padding; None, or if the config says so: distance
        from the last token (P = 1).
      num_latents: M, at most L; None: the config's.
      deterministic: False applies dropout of every kind and needs the "dropout" random key.

    Raises:
      ValueError: more latents than inputs, or positions of other dimensions than the config's tables.
    """
    return self.logits(self.latents(tokens_BxL, positions_BxLxP, num_latents=num_latents, deterministic=deterministic))

  def latents(self, tokens_BxL, positions_BxLxP=None, *, num_latents: int | None = None, deterministic: bool = True):
    """latents_BxMxD after the last layer, normalised: what `logits` reads. Arguments as for the call."""
    config = self.config
    length = tokens_BxL.shape[1]
    num_latents = num_latents or config.num_latents
    if num_latents > length:
      raise ValueError(f"num_latents={num_latents} exceeds the {length} inputs; the latents are the last of them.")
    if positions_BxLxP is None or not config.positions_from_data:
      positions_BxLxP = positions_lib.terminal_relative(tokens_BxL)
    if not deterministic and config.cross_attend_dropout:
      keep = round((1 - config.cross_attend_dropout) * (length - num_latents))
      tokens_BxL, positions_BxLxP = drop_context(
        self.make_rng("dropout"), tokens_BxL, positions_BxLxP, num_latents, keep
      )
    tokens_BxL, positions_BxLxP = sharding.fill_context(tokens_BxL), sharding.fill_context(positions_BxLxP)
    tokens_BxM, positions_BxMxP = (sharding.last(x, num_latents) for x in (tokens_BxL, positions_BxLxP))
    valid_BxL = tokens_BxL > 0
    valid_BxM, keep_own = tokens_BxM > 0, False
    if not deterministic and config.latent_dropout:
      keep_own = True  # a dropped latent is hidden from the others, not from itself
      valid_BxM &= jax.random.bernoulli(self.make_rng("dropout"), 1 - config.latent_dropout, valid_BxM.shape)

    latents_BxMxD, rotary_BxM = self.start(tokens_BxM, positions_BxMxP)
    cross_keys = self._keys(tokens_BxL, positions_BxLxP)
    for run, layers in enumerate(self.layers):
      latents_BxMxD = self.cross_attend[run](latents_BxMxD, cross_keys[run], rotary_BxM, valid_BxL, deterministic)
      if layers is not None:
        latents_BxMxD, _ = layers(latents_BxMxD, rotary_BxM, valid_BxM, keep_own, deterministic)
    return self.final_norm(latents_BxMxD)

  def _keys(self, tokens_BxL, positions_BxLxP) -> list[attention_kernels.Keys]:
    """The inputs as keys and values of each cross-attend."""
    embed, weights = attention.functional(self.embed, tokens_BxL[:, -1:], positions_BxLxP[:, -1:])
    context = attention.Context(embed, weights, tokens_BxL, positions_BxLxP)
    return [cross_attend.keys(context) for cross_attend in self.cross_attend]

  # The parts of `latents` by themselves, for generation (cache.py).

  def start(self, tokens_BxM, positions_BxMxP):
    """(latents_BxMxD before the first cross-attend, rotary_BxM or None)."""
    latents_BxMxD = self.to_latents(self.embed(tokens_BxM, positions_BxMxP))
    return latents_BxMxD, attention.rotary_positions(self.config, positions_BxMxP)

  def keys_values(self, tokens_BxC, positions_BxCxP):
    """(k_BxCxHxK, v_BxCxHxK) of inputs for each cross-attend."""
    return [keys._replace(shared=False).all() for keys in self._keys(tokens_BxC, positions_BxCxP)]

  def attend_to_context(self, run: int, latents_BxMxD, keys, rotary_BxM, valid_BxC):
    """The latents after the cross-attend before run number `run` of layers; see attention.CrossAttend."""
    return self.cross_attend[run](latents_BxMxD, keys, rotary_BxM, valid_BxC)

  def finish(self, latents_BxMxD):
    """What `latents` returns, of the latents after the last layer."""
    return self.final_norm(latents_BxMxD)

  def logits(self, latents_BxMxD):
    """float32 logits_BxMxV of the latents after the last layer."""
    return self.to_logits(latents_BxMxD).astype(jnp.float32)


def logits_dense(config: ModelConfig) -> nn.Dense:
  """The last layer: float32 logits of each token id; they begin at zero."""
  return attention.dense(
    config,
    config.vocab_size,
    None,
    ("width", "vocab"),
    init=nn.initializers.zeros_init(),
    dot_general=functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32),
  )


class Embed(nn.Module):
  """x_BxLxE in the compute dtype: token embedding plus one absolute encoding per position dimension, or none."""

  config: ModelConfig

  @nn.compact
  def __call__(self, tokens_BxL, positions_BxLxP):
    config = self.config
    width, dtype, encoding = config.input_width, jnp.dtype(config.dtype), config.position_encoding
    table_VxE = self.param("tokens", _table_init, (config.vocab_size, width), jnp.float32)
    x_BxLxE = table_VxE[tokens_BxL].astype(dtype)  # cast last: the gradients of a row add up in float32
    if encoding in ("rotary", "relative"):
      return x_BxLxE
    if positions_BxLxP.shape[-1] != len(config.position_sizes):
      raise ValueError(
        f"positions have {positions_BxLxP.shape[-1]} dimensions, model.position_sizes has"
        f" {len(config.position_sizes)}: {config.position_sizes}."
      )
    for dimension, size in enumerate(config.position_sizes):
      positions_BxL = positions_BxLxP[..., dimension]
      if encoding == "learned":
        table = self.param(f"position_{dimension}", _table_init, (size, width), jnp.float32)
        x_BxLxE += table[positions_BxL].astype(dtype)
      else:
        x_BxLxE += positions_lib.ABSOLUTE[encoding](positions_BxL, size=size, width=width).astype(dtype)
    return x_BxLxE


def attention_map(
  config: ModelConfig, params, tokens_BxL, positions_BxLxP, *, num_latents: int | None = None, cross_attend: int = 0
):
  """float32 weights_BxHxL: how much each head of a cross-attend takes from each input for the last latent.

  They sum to 1 and are 0 on padding. The last latent predicts what comes after the inputs, so it sees all of them.

  Args:
    config: of the model.
    params: of the model.
    tokens_BxL: as for the model's call.
    positions_BxLxP: likewise.
    num_latents: likewise.
    cross_attend: which one, from 0: below len(runs(config)).
  """
  _, state = PerceiverAR(config).apply(
    {"params": params},
    tokens_BxL,
    positions_BxLxP,
    num_latents=num_latents,
    method="latents",
    mutable=[attention.MAPS],
  )
  (weights_BxHxL,) = state[attention.MAPS][f"cross_attend_{cross_attend}"]["attention"]["weights_BxHxL"]
  return weights_BxHxL[..., -tokens_BxL.shape[1] :]  # without what fills the context for the mesh


def drop_context(key: jax.Array, tokens_BxL, positions_BxLxP, num_latents: int, keep: int):
  """(tokens, positions) with a random `keep` of each row's inputs before the latents, in order, and all the latents.

  Cross-attend dropout (paper, section 4 and appendix): dropped inputs are never embedded, so they cost nothing.
  The kept ones are not scaled up.

  Raises:
    ValueError: `keep` exceeds the inputs before the latents.
  """
  rows, length = tokens_BxL.shape
  prefix = length - num_latents
  if not 0 <= keep <= prefix:
    raise ValueError(f"keep={keep} must lie in 0..{prefix}, the inputs before the latents.")
  order_BxP = jnp.argsort(jax.random.bits(key, (rows, prefix)), axis=1)
  latents_M = jnp.broadcast_to(jnp.arange(prefix, length, dtype=order_BxP.dtype), (rows, num_latents))
  slots_BxK = jnp.concatenate([jnp.sort(order_BxP[:, :keep], axis=1), latents_M], axis=1)
  return jnp.take_along_axis(tokens_BxL, slots_BxK, 1), jnp.take_along_axis(positions_BxLxP, slots_BxK[..., None], 1)


def runs(config: ModelConfig) -> list[int]:
  """Numbers of self-attention layers between one cross-attend and the next."""
  ends = sorted({layer + 1 for layer in config.cross_attend_after}) + [config.num_layers]
  return [end - start for start, end in zip([0, *ends], ends)]


def _scan_layers(config: ModelConfig, length: int) -> nn.Module:
  """`length` self-attention layers traced and compiled once; their weights are stacked on axis 0."""
  layer = attention.SelfAttentionLayer
  if config.remat != "none":
    layer = nn.remat(layer, policy=REMAT_POLICIES[config.remat], prevent_cse=False, static_argnums=(4, 5))
  scanned = nn.scan(
    layer,
    variable_axes={"params": 0},
    split_rngs={"params": True, "dropout": True},
    in_axes=(nn.broadcast,) * 4,
    length=length,
    metadata_params={nn.PARTITION_NAME: "layers"},
  )
  return scanned(config)
