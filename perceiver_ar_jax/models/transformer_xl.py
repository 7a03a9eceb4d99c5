"""Transformer-XL (Dai et al., 2019, arXiv 1901.02860): a baseline with the same interface as PerceiverAR.

A row is cut into segments, from its end. They are processed in order; each layer attends to the segment itself and to
the cached states of the previous layer on the tokens before it (section 3.2), by content and by distance (section 3.3).

All else is PerceiverAR's: pre-norm layers (the original: post-norm), a plain softmax over the vocabulary (the original:
an adaptive one), and so on. The recurrence starts empty at the first token of a row, where the original continues from
the previous row; so give a row many segments. Each layer has biases u and v of its own.

Shape letters: perceiver_ar.py; S tokens of a segment, C remembered states, T = C + S, G segments.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from perceiver_ar_jax.config import ModelConfig
from perceiver_ar_jax.config.checks import require, require_at_least
from perceiver_ar_jax.models import layers, positions
from perceiver_ar_jax.models.keys import MASKED, product
from perceiver_ar_jax.parallel.sharding import constrain


def check(config: ModelConfig) -> None:
  """Raises InputError for settings that Transformer-XL does not support."""
  zeros: dict[str, Any] = dict.fromkeys(("latent_dropout", "cross_attend_dropout", "conv_taps", "value_features"), 0)
  supported = zeros | {"position_encoding": "relative", "cross_attend_after": (), "rotary_axes": (), "qk_norm": False}
  supported["attention"] = "reference" if config.attention == "reference" else "auto"
  for name, value in supported.items():
    problem = f"model.{name}={getattr(config, name)} is not supported by transformer_xl"
    require(getattr(config, name) == value, f"{problem}: set --config.model.{name}={value}.")
  require_at_least(1, "model", config, "segment", "num_layers")
  require_at_least(0, "model", config, "memory")
  fix = "set the tokens of a segment, such as 256"
  require(config.segment is not None, f"model.segment=None must be at least 1: {fix}.")


def _sizes(config: ModelConfig) -> tuple[int, int]:
  """S, the tokens of a segment, and C, the states that each layer keeps of the tokens before it."""
  assert config.segment  # see `check`
  return config.segment, config.segment if config.memory is None else config.memory


def flops(config: ModelConfig, rows: int, num_latents: int, *, training: bool) -> int:
  """FLOPs of a step over `rows` sequences; see architectures.py. Memory and distances have no backward pass."""
  d, n, (size, memory) = config.latent_width, config.num_layers, _sizes(config)
  constant = n * rows * memory * 2 * 2 * d * d + n * (memory + size) * 2 * d * d  # memory's keys, values; distances
  per_token = 2 * config.input_width * d + n * (4 * 2 * d * d + 2 * 2 * d * config.mlp_widening * d)
  per_token += 3 * n * 2 * (memory + size) * d  # scores by content and by distance; values
  num_segments, segment = -(-config.max_context // size), constant + rows * size * per_token
  forward = num_segments * segment + rows * num_latents * 2 * d * config.vocab_size
  return 3 * forward - num_segments * constant if training else forward


class TransformerXL(nn.Module):
  """Next-token logits for the last `num_latents` slots of a right-aligned sequence, like PerceiverAR."""

  config: ModelConfig

  def setup(self):
    config = self.config
    self.embed = layers.Embed(config)
    self.to_latents = layers.dense(config, config.latent_width, None, ("width", "latent"))
    rngs: Any = {"params": False, "dropout": True}
    axes = (0, 0, nn.broadcast, nn.broadcast)
    self.segments = nn.scan(Segment, variable_broadcast="params", split_rngs=rngs, in_axes=axes)(config)
    self.final_norm = layers.layer_norm(None)
    self.to_logits = layers.logits_dense(config)

  def __call__(self, tokens_BxL, positions_BxLxP=None, *, num_latents: int | None = None, deterministic: bool = True):
    """Returns float32 logits_BxMxV for the token after each of the last M slots; arguments as PerceiverAR's."""
    return self.logits(self.latents(tokens_BxL, positions_BxLxP, num_latents=num_latents, deterministic=deterministic))

  def latents(self, tokens_BxL, positions_BxLxP=None, *, num_latents: int | None = None, deterministic: bool = True):
    """latents_BxMxD: the normalized states of the last M slots, the input of `logits`. Positions are ignored."""
    config, (rows, length) = self.config, tokens_BxL.shape
    num_latents = num_latents or config.num_latents
    if num_latents > length:
      raise ValueError(f"num_latents={num_latents} exceeds the {length} inputs; the latents are the last of them.")
    (size, kept), width = _sizes(config), config.latent_width
    tokens_BxL = jnp.pad(constrain(tokens_BxL, "batch", None), ((0, 0), (-length % size, 0)))

    def cut(x_BxL):
      return x_BxL.reshape(rows, -1, size, *x_BxL.shape[2:]).swapaxes(0, 1)

    x_GxBxSxD, valid_GxBxS = cut(self.to_latents(self.embed(tokens_BxL, None))), cut(tokens_BxL > 0)
    distances_1xT = jnp.arange(kept + size - 1, -1, -1)[None]
    distances_TxD = positions.sinusoidal(distances_1xT, size=kept + size, width=width)[0]
    memory = jnp.zeros((config.num_layers, rows, kept, width), config.dtype), jnp.zeros((rows, kept), bool)
    _, x_GxBxSxD = self.segments(memory, x_GxBxSxD, valid_GxBxS, distances_TxD, deterministic)
    x_BxLxD = x_GxBxSxD.swapaxes(0, 1).reshape(rows, -1, width)
    return self.final_norm(x_BxLxD[:, -num_latents:])

  def logits(self, latents_BxMxD):
    """float32 logits_BxMxV of normalized latents."""
    return self.to_logits(latents_BxMxD).astype(jnp.float32)


class Segment(nn.Module):
  """One segment through all layers, in the (carry, output) form that nn.scan needs."""

  config: ModelConfig

  @nn.compact
  def __call__(self, memory, x_BxSxD, valid_BxS, distances_TxD, deterministic: bool):
    """Returns (the memory after the segment, its states x_BxSxD after the last layer).

    `memory`: input states [N, B, C, D] of each layer on the last C slots, and bool[B, C], which are tokens; `x_BxSxD`:
    embedded tokens; `distances_TxD`: encodings of the distances T - 1 to 0.
    """
    config, size = self.config, x_BxSxD.shape[1]
    memory_NxBxCxD, valid_BxC = memory
    valid_BxT = jnp.concatenate([valid_BxC, valid_BxS], axis=1)
    causal_SxT = jnp.tri(size, valid_BxT.shape[1], valid_BxC.shape[1], dtype=bool)
    visible_BxSxT = causal_SxT[None] & valid_BxT[:, None]
    scanned = layers.scan(RelativeLayer, config, config.num_layers, (0, *(nn.broadcast,) * 3), (5,), name="layers")
    x_BxSxD, memory_NxBxCxD = scanned(x_BxSxD, memory_NxBxCxD, distances_TxD, visible_BxSxT, deterministic)
    return (memory_NxBxCxD, valid_BxT[:, size:]), x_BxSxD


class RelativeLayer(nn.Module):
  """Pre-norm relative attention and a pre-norm MLP, each with dropout and a residual."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x_BxSxD, memory_BxCxD, distances_TxD, visible_BxSxT, deterministic: bool):
    """Returns (x_BxSxD, the layer's memory after this segment, which stops gradients); see Segment."""
    config = self.config
    drop = functools.partial(layers.drop, self, 0.0 if deterministic else config.dropout)
    new_memory_BxCxD = jnp.concatenate([memory_BxCxD, x_BxSxD], axis=1)[:, x_BxSxD.shape[1] :]
    norm = layers.layer_norm("norm_attention")
    attend = RelativeAttention(config, name="attention")
    attended_BxSxD = attend(norm(x_BxSxD), norm(memory_BxCxD), distances_TxD, visible_BxSxT)
    x_BxSxD = constrain(x_BxSxD + drop(attended_BxSxD), "batch", None, None)
    hidden_BxSxD = layers.MLP(config, name="mlp")(layers.layer_norm("norm_mlp")(x_BxSxD))
    x_BxSxD = constrain(x_BxSxD + drop(hidden_BxSxD), "batch", None, None)
    return x_BxSxD, jax.lax.stop_gradient(new_memory_BxCxD)


class RelativeAttention(nn.Module):
  """Multi-head attention to memory and segment by content and distance (section 3.3), projected back to D."""

  config: ModelConfig

  @nn.compact
  def __call__(self, normed_BxSxD, memory_BxCxD, distances_TxD, visible_BxSxT):
    """Returns attended_BxSxD; query s is at slot C + s of T and attends to the slots in `visible_BxSxT`."""
    config = self.config
    width, heads = config.latent_width, config.num_self_heads
    dense = functools.partial(layers.dense, config, width)
    keys_values = layers.KeysValues(config, heads, width, name="keys_values")
    # Projected separately: since the memory has no gradient, the backward product for it is then left out.
    pairs = zip(keys_values(memory_BxCxD), keys_values(normed_BxSxD))
    k_BxTxHxK, v_BxTxHxK = (jnp.concatenate(pair, axis=1) for pair in pairs)
    r_TxHxK = dense("distance", ("width", "heads"), use_bias=False)(distances_TxD).reshape(-1, heads, width // heads)
    query_BxSxD = dense("query", ("width", "heads"))(normed_BxSxD)

    def biased(name):
      zeros: Callable[..., Any] = nn.with_logical_partitioning(nn.initializers.zeros_init(), ("heads",))
      bias_D = self.param(name, zeros, (width,), jnp.float32)
      return (query_BxSxD + bias_D.astype(query_BxSxD.dtype)[None, None]).reshape(*query_BxSxD.shape[:2], heads, -1)

    by_content_BxHxSxT = product("bshk,bthk->bhst", biased("u"), k_BxTxHxK)
    by_distance_BxHxSxT = shift(product("bshk,thk->bhst", biased("v"), r_TxHxK))
    scores_BxHxSxT = (by_content_BxHxSxT + by_distance_BxHxSxT) * (width // heads) ** -0.5
    weights_BxHxSxT = jax.nn.softmax(jnp.where(visible_BxSxT[:, None], scores_BxHxSxT, MASKED), axis=-1)
    attended_BxSxHxK = jnp.einsum("bhst,bthk->bshk", weights_BxHxSxT.astype(v_BxTxHxK.dtype), v_BxTxHxK)
    return dense("out", ("heads", "width"))(attended_BxSxHxK.reshape(query_BxSxD.shape))


def shift(scores_BxHxSxT):
  """Converts scores of distances T - 1 to 0 to scores of the slots at these distances (appendix B of that paper).

  Query s is at slot T - S + s, so its row moves left by S - 1 - s. Values shifted in on the right, for later slots, are
  without meaning.
  """
  rows, heads, size, slots = scores_BxHxSxT.shape
  padded = jnp.pad(scores_BxHxSxT, ((0, 0), (0, 0), (0, 0), (1, 0)))
  return padded.reshape(rows, heads, slots + 1, size)[:, :, 1:].reshape(scores_BxHxSxT.shape)
