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
from perceiver_ar_jax.models import attention
from perceiver_ar_jax.models import positions as positions_lib

_table_init = nn.with_logical_partitioning(nn.initializers.truncated_normal(1.0), ("vocab", "width"))

REMAT_POLICIES = {
  "full": jax.checkpoint_policies.nothing_saveable,
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class PerceiverAR(nn.Module):
  """Next-token logits for the last `num_latents` slots of a right-aligned sequence.

  `model.apply({"params": params}, tokens_BxL, positions_BxLxP)` with tokens int32, 0 = padding on the left.
  """

  config: ModelConfig

  @nn.compact
  def __call__(self, tokens_BxL, positions_BxLxP=None, *, num_latents: int | None = None, deterministic: bool = True):
    """Returns float32 logits_BxMxV for the token after each of the last M slots.

    Args:
      tokens_BxL: int32 token ids, right-aligned, 0 = padding.
      positions_BxLxP: int32, 1-based, 0 on padding; None, or if the config says so: distance
        from the last token (P = 1).
      num_latents: M, at most L; None: the config's.
      deterministic: False applies dropout and needs the "dropout" random key.

    Raises:
      ValueError: more latents than inputs, or positions that do not fit the position tables.
    """
    config = self.config
    length = tokens_BxL.shape[1]
    num_latents = num_latents or config.num_latents
    if num_latents > length:
      raise ValueError(f"num_latents={num_latents} exceeds the {length} inputs; the latents are the last of them.")
    if positions_BxLxP is None or not config.positions_from_data:
      positions_BxLxP = positions_lib.terminal_relative(tokens_BxL)

    inputs_BxLxE = self._embed(tokens_BxL, positions_BxLxP)
    rotary_BxL = positions_BxLxP[..., 0] if config.position_encoding == "rotary" else None
    rotary_BxM = None if rotary_BxL is None else rotary_BxL[:, -num_latents:]
    valid_BxL = tokens_BxL > 0
    latents_BxMxD = attention.dense(config, config.latent_width, "to_latents", ("width", "latent"))(
      inputs_BxLxE[:, -num_latents:]
    )

    cross_attend = _remat(attention.CrossAttend, config)
    latents_BxMxD = cross_attend(config, deterministic, name="cross_attend")(
      latents_BxMxD, inputs_BxLxE, rotary_BxL, valid_BxL
    )
    done = 0
    for repeat, end in enumerate(_segments(config)):
      suffix = f"_{repeat}" if repeat else ""
      if repeat:
        latents_BxMxD = cross_attend(config, deterministic, name="cross_attend" + suffix)(
          latents_BxMxD, inputs_BxLxE, rotary_BxL, valid_BxL
        )
      if end > done:
        layers = _scan_layers(config, deterministic, end - done, name="layers" + suffix)
        latents_BxMxD, _ = layers(latents_BxMxD, rotary_BxM, valid_BxL[:, -num_latents:])
      done = end

    latents_BxMxD = attention.layer_norm("final_norm")(latents_BxMxD)
    logits = attention.dense(
      config,
      config.vocab_size,
      "logits",
      ("width", "vocab"),
      init=nn.initializers.zeros_init(),
      dot_general=functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32),
    )
    return logits(latents_BxMxD).astype(jnp.float32)

  def _embed(self, tokens_BxL, positions_BxLxP):
    """x_BxLxE in the compute dtype: token embedding plus one absolute table per position dimension."""
    config = self.config
    width, dtype = config.input_width, jnp.dtype(config.dtype)
    table_VxE = self.param("embed", _table_init, (config.vocab_size, width), jnp.float32)
    x_BxLxE = table_VxE.astype(dtype)[tokens_BxL]
    if config.position_encoding == "rotary":
      return x_BxLxE
    if positions_BxLxP.shape[-1] != len(config.position_sizes):
      raise ValueError(
        f"positions have {positions_BxLxP.shape[-1]} dimensions, model.position_sizes has"
        f" {len(config.position_sizes)}: {config.position_sizes}."
      )
    for dimension, size in enumerate(config.position_sizes):
      if config.position_encoding == "learned":
        table = self.param(f"position_{dimension}", _table_init, (size, width), jnp.float32)
      else:
        table = jnp.asarray(positions_lib.TABLES[config.position_encoding](size, width))
      x_BxLxE += table.astype(dtype)[positions_BxLxP[..., dimension]]
    return x_BxLxE


def _segments(config: ModelConfig) -> list[int]:
  """Ends of the runs of self-attention layers; a further cross-attend stands between two runs."""
  return sorted({layer + 1 for layer in config.cross_attend_after}) + [config.num_layers]


def _remat(module: type[nn.Module], config: ModelConfig) -> type[nn.Module]:
  """`module`, keeping for its backward pass only what `config.remat` says."""
  if config.remat == "none":
    return module
  return nn.remat(module, policy=REMAT_POLICIES[config.remat], prevent_cse=False)


def _scan_layers(config: ModelConfig, deterministic: bool, length: int, name: str) -> nn.Module:
  """`length` self-attention layers traced and compiled once; their weights are stacked on axis 0."""
  scanned = nn.scan(
    _remat(attention.SelfAttentionLayer, config),
    variable_axes={"params": 0},
    split_rngs={"params": True, "dropout": True},
    in_axes=nn.broadcast,
    length=length,
    metadata_params={nn.PARTITION_NAME: "layers"},
  )
  return scanned(config, deterministic, name=name)
