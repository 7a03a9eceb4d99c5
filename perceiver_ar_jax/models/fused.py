"""Fused attention kernels of vendors: cuDNN on NVIDIA GPUs, and the Pallas splash kernel on TPUs."""

import functools

import jax
import jax.numpy as jnp

from perceiver_ar_jax.config import InputError
from perceiver_ar_jax.models.keys import Keys, scaled, visible
from perceiver_ar_jax.parallel import sharding

_LANES = 128  # the TPU's vector width: splash needs lengths that are multiples of it


def cudnn(q_BxMxHxK, keys: Keys, valid_BxL, keep_own: bool = False, chunk: int | None = None):
  """cuDNN's fused attention, for NVIDIA GPUs in bfloat16; `chunk` is ignored."""
  del chunk
  num_keys = valid_BxL.shape[1]
  mask_Bx1xMxL = visible(jnp.arange(num_keys), q_BxMxHxK.shape[1], num_keys, valid_BxL, keep_own)
  return jax.nn.dot_product_attention(q_BxMxHxK, *keys.to_arrays(), mask=mask_Bx1xMxL, implementation="cudnn")


def splash(q_BxMxHxK, keys: Keys, valid_BxL, keep_own: bool = False, chunk: int | None = None, interpret: bool = False):
  """The Pallas kernel that ships with JAX, for TPUs: blocks that no query attends to are skipped; `chunk` is ignored.

  Padding is expressed by segment ids, so `keep_own` is not supported. `interpret` runs it on any platform, slowly.

  Raises:
    InputError: `keep_own`, that is, latent dropout.
  """
  del chunk
  if keep_own:
    raise InputError(
      "model.attention=splash does not support model.latent_dropout: set that to 0 or use another kernel."
    )
  k_BxLxHxK, v_BxLxHxK = keys.to_arrays()
  layout = sharding.current_spec(("batch", None, "heads", None), q_BxMxHxK.shape)
  attend = functools.partial(_splash, interpret=interpret)
  if layout is not None:  # XLA does not partition a Pallas kernel over devices
    rows = sharding.current_spec(("batch", None), valid_BxL.shape)
    attend = jax.shard_map(attend, in_specs=(layout, layout, layout, rows), out_specs=layout, check_vma=False)
  return attend(scaled(q_BxMxHxK), k_BxLxHxK, v_BxLxHxK, valid_BxL)


def _splash(q_BxMxHxK, k_BxLxHxK, v_BxLxHxK, valid_BxL, interpret: bool):
  from jax.experimental.pallas.ops.tpu import splash_attention

  num_queries, num_keys = q_BxMxHxK.shape[1], k_BxLxHxK.shape[1]
  extra_queries, extra_keys = -num_queries % _LANES, -num_keys % _LANES

  def pad(x, extra):  # on the left, where padding is anyway, so that only the causal offset changes
    return jnp.pad(x, ((0, 0), (extra, 0)) + ((0, 0),) * (x.ndim - 2))

  offset = (num_keys + extra_keys) - (num_queries + extra_queries)
  mask = splash_attention.CausalMask((num_queries + extra_queries, num_keys + extra_keys), offset=offset)
  heads = splash_attention.MultiHeadMask([mask] * q_BxMxHxK.shape[2])
  kernel = splash_attention.make_splash_mha(heads, head_shards=1, q_seq_shards=1, interpret=interpret)

  def attend(q_MxHxK, k_LxHxK, v_LxHxK, valid_L):
    segments = splash_attention.SegmentIds(q=jnp.ones(q_MxHxK.shape[0], jnp.int32), kv=valid_L.astype(jnp.int32))
    out_HxMxK = kernel(*(x.swapaxes(0, 1) for x in (q_MxHxK, k_LxHxK, v_LxHxK)), segment_ids=segments)
    return out_HxMxK.swapaxes(0, 1)

  padded = pad(q_BxMxHxK, extra_queries), pad(k_BxLxHxK, extra_keys), pad(v_BxLxHxK, extra_keys)
  return jax.vmap(attend)(*padded, pad(valid_BxL, extra_keys))[:, extra_queries:]
