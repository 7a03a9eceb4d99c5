"""The Perceiver AR model (Hawthorne et al., 2022, arXiv 2202.07765, section 3).

Shape letters, here and in every room: B batch, L context, M latents, E embedding width, D latent width,
H heads, K head width, F MLP width, V vocabulary, P position dimensions, N layers. `q_BxMxHxK` is an array
of that shape.
"""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn

from perceiver_ar_jax.config import ModelConfig
from perceiver_ar_jax.models import attention, attention_kernels
from perceiver_ar_jax.models import positions as positions_lib
from perceiver_ar_jax.parallel import sharding

_table_init = nn.with_logical_partitioning(nn.initializers.truncated_normal(1.0), ("vocab", "width"))

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
    runs = _runs(config)
    self.cross_attend = [attention.CrossAttend(config) for _ in runs]
    self.layers = [_scan_layers(config, length) if length else None for length in runs]
    self.final_norm = attention.layer_norm(None)
    self.to_logits = attention.dense(
      config,
      config.vocab_size,
      None,
      ("width", "vocab"),
      init=nn.initializers.zeros_init(),
      dot_general=functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32),
    )

  def __call__(self, tokens_BxL, positions_BxLxP=None, *, num_latents: int | None = None, deterministic: bool = True):
    """Returns float32 logits_BxMxV for the token after each of the last M slots.

    Args:
      tokens_BxL: int32 token ids, right-aligned, 0 = padding.
      positions_BxLxP: int32, 1-based, 0 on padding; None, or if the config says so: distance
        from the last token (P = 1).
      num_latents: M, at most L; None: the config's.
      deterministic: False applies dropout of every kind and needs the "dropout" random key.

    Raises:
      ValueError: more latents than inputs, or positions that do not fit the position tables.
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

    latents_BxMxD, _ = self._walk(
      tokens_BxM,
      positions_BxMxP,
      self._keys(tokens_BxL, positions_BxLxP),
      valid_BxL,
      valid_BxM,
      keep_own=keep_own,
      deterministic=deterministic,
    )
    return latents_BxMxD

  def keys_values(self, tokens_BxC, positions_BxCxP):
    """For generation: (k_BxCxHxK, v_BxCxHxK) of inputs for each cross-attend; they hold while the context moves."""
    return tuple(keys.all() for keys in self._keys(tokens_BxC, positions_BxCxP))

  def latents_over(self, tokens_BxM, positions_BxMxP, cross_keys_values, valid_BxC, valid_BxS, cached=None, slot=None):
    """For generation: latents_BxMxD of given tokens over keys and values from `keys_values`, and what to cache.

    Args:
      tokens_BxM: the last M of the C tokens in the context; with `cached`, M = 1.
      positions_BxMxP: their positions.
      cross_keys_values: from `keys_values`.
      valid_BxC: the inputs to see, at most up to each latent's own.
      valid_BxS: the latents to see: M of them, or with `cached` all S that it has room for.
      cached: keys and values of earlier latents, as this function returned them; None: there are none.
      slot: int32[], where in `cached` the new latent goes.
    """
    cross_keys = [attention_kernels.Keys.of(*made) for made in cross_keys_values]
    return self._walk(tokens_BxM, positions_BxMxP, cross_keys, valid_BxC, valid_BxS, cached, slot)

  def _keys(self, tokens_BxL, positions_BxLxP) -> list[attention_kernels.Keys]:
    """The inputs as keys and values of each cross-attend."""
    embed, weights = attention.functional(self.embed, tokens_BxL[:, -1:], positions_BxLxP[:, -1:])
    context = attention.Context(embed, weights, tokens_BxL, positions_BxLxP)
    return [cross_attend.keys(context) for cross_attend in self.cross_attend]

  def _walk(
    self,
    tokens_BxM,
    positions_BxMxP,
    cross_keys: list[attention_kernels.Keys],
    valid_BxL,
    valid_BxM,
    cached=None,
    slot=None,
    keep_own: bool = False,
    deterministic: bool = True,
  ):
    """(latents_BxMxD after the last layer, keys and values of each run of layers)."""
    latents_BxMxD = self.to_latents(self.embed(tokens_BxM, positions_BxMxP))
    rotary_BxM = attention.rotary_positions(self.config, positions_BxMxP)
    made = []
    for run, (cross_attend, layers) in enumerate(zip(self.cross_attend, self.layers, strict=True)):
      latents_BxMxD = cross_attend(latents_BxMxD, cross_keys[run], rotary_BxM, valid_BxL, deterministic)
      made.append(None)
      if layers is not None:
        earlier = None if cached is None else cached[run]
        latents_BxMxD, made[-1] = layers(latents_BxMxD, earlier, rotary_BxM, valid_BxM, slot, keep_own, deterministic)
    return self.final_norm(latents_BxMxD), tuple(made)

  def logits(self, latents_BxMxD):
    """float32 logits_BxMxV of the latents after the last layer."""
    return self.to_logits(latents_BxMxD).astype(jnp.float32)


class Embed(nn.Module):
  """x_BxLxE in the compute dtype: token embedding plus one absolute encoding per position dimension, or none."""

  config: ModelConfig

  @nn.compact
  def __call__(self, tokens_BxL, positions_BxLxP):
    config = self.config
    width, dtype, encoding = config.input_width, jnp.dtype(config.dtype), config.position_encoding
    table_VxE = self.param("tokens", _table_init, (config.vocab_size, width), jnp.float32)
    x_BxLxE = table_VxE[tokens_BxL].astype(dtype)  # cast last: the gradients of a row add up in float32
    if encoding == "rotary":
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


def _runs(config: ModelConfig) -> list[int]:
  """Numbers of self-attention layers between one cross-attend and the next."""
  ends = sorted({layer + 1 for layer in config.cross_attend_after}) + [config.num_layers]
  return [end - start for start, end in zip([0, *ends], ends)]


def _scan_layers(config: ModelConfig, length: int) -> nn.Module:
  """`length` self-attention layers traced and compiled once; their weights are stacked on axis 0."""
  layer = attention.SelfAttentionLayer
  if config.remat != "none":
    layer = nn.remat(layer, policy=REMAT_POLICIES[config.remat], prevent_cse=False, static_argnums=(6, 7))
  scanned = nn.scan(
    layer,
    variable_axes={"params": 0},
    split_rngs={"params": True, "dropout": True},
    in_axes=(0, *[nn.broadcast] * 5),
    length=length,
    metadata_params={nn.PARTITION_NAME: "layers"},
  )
  return scanned(config)
