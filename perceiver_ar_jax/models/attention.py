"""The table of attention kernels, how one is chosen, the reference implementation, and kernels of vendors.

All kernels compute the same attention of q_BxMxHxK over a context, with softmax in float32, by the visibility rule of
keys.py. A query that attends to no key, which only padding does, gets finite values without meaning. A kernel receives
the context as `Keys`, not yet projected, so that it decides how many keys and values exist at a time.

To add a kernel, add a function and an entry of KERNELS; `model.attention` then accepts its name.
"""

import functools
import math
import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from perceiver_ar_jax.config import ModelConfig, lookup, require
from perceiver_ar_jax.models import streamed
from perceiver_ar_jax.models.keys import MASKED, Keys, product, query_segments, scaled, visible
from perceiver_ar_jax.parallel import sharding

# Scores of one head from which streaming over the context is at least as fast, and smaller; measured on CPUs.
_LARGE = 2**15
_LANES = 128  # the TPU's vector width: splash needs lengths that are multiples of it
_MAX_BLOCK = 512  # queries and keys of a block of splash, whose default, 128, is for short sequences
# NVIDIA GPUs with cuDNN's fused attention, Ampere and later: A100, L4, H200, GB200, RTX A6000, GeForce RTX 4090, ...
_CUDNN_KINDS = re.compile("NVIDIA (A|L|H|B|GH|GB|RTX|GeForce RTX [3-9])")


def reference(q_BxMxHxK, keys: Keys, valid_BxL, keep_own: bool = False, chunk: int | None = None):
  """Plain einsums, which the other kernels are tested against; keeps B x H x M x L scores. `chunk` is ignored."""
  k_BxLxHxK, v_BxLxHxK = keys.to_arrays()
  weights_BxHxMxL = probabilities(q_BxMxHxK, k_BxLxHxK, valid_BxL, keep_own)
  return jnp.einsum("bhml,blhk->bmhk", weights_BxHxMxL.astype(v_BxLxHxK.dtype), v_BxLxHxK)


def probabilities(q_BxMxHxK, k_BxLxHxK, valid_BxL, keep_own: bool = False):
  """float32 weights_BxHxMxL with which each query attends to each key: they sum to 1, and are 0 for invisible keys."""
  num_queries, num_keys = q_BxMxHxK.shape[1], valid_BxL.shape[1]
  segments_BxM = query_segments(valid_BxL, num_queries)
  visible_Bx1xMxL = visible(jnp.arange(num_keys), num_queries, num_keys, valid_BxL, keep_own, segments_BxM)
  scores_BxHxMxL = product("bmhk,blhk->bhml", scaled(q_BxMxHxK), k_BxLxHxK)
  return jax.nn.softmax(jnp.where(visible_Bx1xMxL, scores_BxHxMxL, MASKED), axis=-1)


def auto(q_BxMxHxK, keys: Keys, valid_BxL, keep_own: bool = False, chunk: int = 512):
  """The kernel of `choose` for these shapes and the devices of the mesh in use (without one, of any platform)."""
  device = jax.sharding.get_abstract_mesh().abstract_device  # not this process's own: it may compile for others
  sharded = keys.sharded and sharding.mesh_axes(("slots",), valid_BxL.shape[1:]) != [()]
  kind, shape, num_keys = device.device_kind if device else "", q_BxMxHxK.shape[1:], valid_BxL.shape[1]
  name = choose(kind, q_BxMxHxK.dtype, shape, num_keys, keep_own, sharded, chunk)
  return KERNELS[name].attend(q_BxMxHxK, keys, valid_BxL, keep_own, chunk)


def choose(kind: str, dtype, shape_MxHxK, num_keys: int, keep_own: bool, sharded: bool, chunk: int) -> str:
  """The name of the kernel that `auto` stands for; `kind`: jax.Device.device_kind, or "" for any device."""
  num_queries, heads, width = shape_MxHxK
  if num_queries * num_keys < _LARGE:
    return "reference"
  if kind.startswith("TPU") and num_queries == num_keys and not keep_own and not sharded:
    return "splash"
  # Bytes per row: of keys, values, the mask and its unused gradient, and of the scores of a chunk and their gradients.
  stored, streamed_bytes = 4 * num_keys * (heads * width + num_queries), 8 * num_queries * heads * chunk
  fits = width <= 128 and width % 8 == num_queries % 2 == num_keys % 2 == 0 and stored <= streamed_bytes
  return "cudnn" if _CUDNN_KINDS.match(kind) and dtype == jnp.bfloat16 and fits and not sharded else "streamed"


def cudnn(q_BxMxHxK, keys: Keys, valid_BxL, keep_own: bool = False, chunk: int | None = None):
  """cuDNN's fused attention, for NVIDIA GPUs in bfloat16; `chunk` is ignored."""

  def attend(q_BxMxHxK, k_BxLxHxK, v_BxLxHxK, valid_BxL):
    num_queries, num_keys = q_BxMxHxK.shape[1], valid_BxL.shape[1]
    segments_BxM = query_segments(valid_BxL[:, -num_queries:], num_queries)  # here, no device has a part of the slots
    mask_Bx1xMxL = visible(jnp.arange(num_keys), num_queries, num_keys, valid_BxL, keep_own, segments_BxM)
    return jax.nn.dot_product_attention(q_BxMxHxK, k_BxLxHxK, v_BxLxHxK, mask=mask_Bx1xMxL, implementation="cudnn")

  return _on_each_device(attend, q_BxMxHxK, keys, valid_BxL)


def _on_each_device(attend: Callable[..., jax.Array], q_BxMxHxK, keys: Keys, valid_BxL):
  """`attend` (q, k, v, valid) for the rows and heads of each device: XLA does not partition kernels of vendors."""
  if not jax.sharding.get_abstract_mesh().empty:
    layout = sharding.spec(("batch", None, "heads", None), q_BxMxHxK.shape)
    rows = sharding.spec(("batch", None), valid_BxL.shape)
    attend = jax.shard_map(attend, in_specs=(layout, layout, layout, rows), out_specs=layout, check_vma=False)
  return attend(q_BxMxHxK, *keys.to_arrays(), valid_BxL)


def splash(q_BxMxHxK, keys: Keys, valid_BxL, keep_own: bool = False, chunk: int | None = None, interpret: bool = False):
  """The Pallas kernel that ships with JAX, for TPUs: blocks that no query attends to are skipped; `chunk` is ignored.

  Padding and documents are expressed by segment ids, so latent dropout is refused. `interpret` runs it on any platform,
  slowly.
  """
  require(not keep_own, "model.attention=splash does not support model.latent_dropout: set that to 0.")
  return _on_each_device(functools.partial(_splash, interpret=interpret), scaled(q_BxMxHxK), keys, valid_BxL)


def _splash(q_BxMxHxK, k_BxLxHxK, v_BxLxHxK, valid_BxL, interpret: bool):
  from jax.experimental.pallas.ops.tpu import splash_attention

  num_queries, num_keys = q_BxMxHxK.shape[1], k_BxLxHxK.shape[1]
  extra_queries, extra_keys = -num_queries % _LANES, -num_keys % _LANES

  def pad(x, extra):  # on the left, where padding is anyway, so that only the causal offset changes
    return jnp.pad(x, ((0, 0), (extra, 0)) + ((0, 0),) * (x.ndim - 2))

  offset = (num_keys + extra_keys) - (num_queries + extra_queries)
  mask = splash_attention.CausalMask((num_queries + extra_queries, num_keys + extra_keys), offset=offset)
  heads = splash_attention.MultiHeadMask([mask] * q_BxMxHxK.shape[2])
  queries, slots = (math.gcd(length, _MAX_BLOCK) for length in mask.shape)
  blocks = splash_attention.BlockSizes(queries, slots, None, queries, slots, None, queries, slots)
  make = functools.partial(splash_attention.make_splash_mha, heads, head_shards=1, q_seq_shards=1, interpret=interpret)
  kernel = make(block_sizes=blocks, residual_checkpoint_name=streamed.SAVED)

  def attend(q_MxHxK, k_LxHxK, v_LxHxK, valid_L):
    num_padded = q_MxHxK.shape[0]
    own_M = jnp.ones(num_padded, jnp.int32) if valid_L.dtype == bool else valid_L[-num_padded:]
    segments = splash_attention.SegmentIds(q=own_M, kv=valid_L.astype(jnp.int32))
    out_HxMxK = kernel(*(x.swapaxes(0, 1) for x in (q_MxHxK, k_LxHxK, v_LxHxK)), segment_ids=segments)
    return out_HxMxK.swapaxes(0, 1)

  padded = pad(q_BxMxHxK, extra_queries), pad(k_BxLxHxK, extra_keys), pad(v_BxLxHxK, extra_keys)
  return jax.vmap(attend)(*padded, pad(valid_BxL, extra_keys))[:, extra_queries:]


class Kernel(NamedTuple):
  """An implementation of attention, and what it needs."""

  attend: Callable[..., jax.Array]  # (q_BxMxHxK, keys, valid_BxL, keep_own, chunk) -> attended_BxMxHxK
  platform: str | None = None  # the only platform that it runs on ("gpu", "tpu"); None: all
  dtype: str | None = None  # the only compute type that it supports; None: all
  shards_context: bool = True  # whether the slots of the context may be sharded over devices


KERNELS: dict[str, Kernel] = {
  "auto": Kernel(auto),
  "reference": Kernel(reference),
  "chunked": Kernel(streamed.chunked),
  "streamed": Kernel(streamed.streamed),
  "cudnn": Kernel(cudnn, platform="gpu", dtype="bfloat16", shards_context=False),
  "splash": Kernel(splash, platform="tpu", shards_context=False),
}


def kernel_of(config: ModelConfig) -> Kernel:
  """The config's kernel; raises InputError for an unknown name."""
  return lookup("model.attention", config.attention, KERNELS)


def check(config: ModelConfig, mesh: Mesh | None = None) -> None:
  """Raises InputError if the config's kernel does not exist or does not run with its dtype or on the mesh."""
  kernel = kernel_of(config)
  general = ", ".join(name for name, each in KERNELS.items() if each.platform is None)
  setting, dtype = f"model.attention={config.attention}", kernel.dtype
  require(dtype in (None, config.dtype), f"{setting} computes in {dtype} only: set model.dtype={dtype}.")
  if mesh is None:
    return
  actual, needed, shards = mesh.devices.flat[0].platform, kernel.platform or "", mesh.shape["context"]
  problem = f"{setting} runs on {needed.upper()}s only, and these are {actual.upper()}s"
  require(needed in ("", actual), f"{problem}: choose one of {general}.")
  problem = f"{setting} needs all keys on each device: set mesh.context={shards} to 1"
  require(kernel.shards_context or shards == 1, f"{problem}, or choose one of {general}.")
