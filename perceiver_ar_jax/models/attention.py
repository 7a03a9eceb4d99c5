"""The table of attention kernels, how one is chosen, and the reference implementation.

All kernels compute the same attention of q_BxMxHxK over a context, with softmax in float32, by the visibility rule of
keys.py. A query that attends to no key, which only padding does, gets finite values without meaning. A kernel receives
the context as `Keys`, not yet projected, so that it decides how many keys and values exist at a time.

To add a kernel, add a function and an entry of KERNELS; `model.attention` then accepts its name.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from perceiver_ar_jax.config import InputError, ModelConfig, lookup
from perceiver_ar_jax.models import fused, streamed
from perceiver_ar_jax.models.keys import MASKED, Keys, product, scaled, visible

# Scores of one head from which streaming over the context is at least as fast, and smaller; measured on CPUs.
_LARGE = 2**15


def reference(q_BxMxHxK, keys: Keys, valid_BxL, keep_own: bool = False, chunk: int | None = None):
  """Plain einsums, which the other kernels are tested against; keeps B x H x M x L scores. `chunk` is ignored."""
  del chunk
  k_BxLxHxK, v_BxLxHxK = keys.to_arrays()
  weights_BxHxMxL = probabilities(q_BxMxHxK, k_BxLxHxK, valid_BxL, keep_own)
  return jnp.einsum("bhml,blhk->bmhk", weights_BxHxMxL.astype(v_BxLxHxK.dtype), v_BxLxHxK)


def probabilities(q_BxMxHxK, k_BxLxHxK, valid_BxL, keep_own: bool = False):
  """float32 weights_BxHxMxL with which each query attends to each key: they sum to 1, and are 0 for invisible keys."""
  num_queries, num_keys = q_BxMxHxK.shape[1], valid_BxL.shape[1]
  visible_Bx1xMxL = visible(jnp.arange(num_keys), num_queries, num_keys, valid_BxL, keep_own)
  scores_BxHxMxL = product("bmhk,blhk->bhml", scaled(q_BxMxHxK), k_BxLxHxK)
  return jax.nn.softmax(jnp.where(visible_Bx1xMxL, scores_BxHxMxL, MASKED), axis=-1)


class Kernel(NamedTuple):
  """An implementation of attention, and what it needs."""

  attend: Callable[..., jax.Array]
  """(q_BxMxHxK, keys, valid_BxL, keep_own, chunk) -> attended_BxMxHxK."""
  platform: str | None = None
  """The only platform that it runs on ("gpu", "tpu"); None: all."""
  dtype: str | None = None
  """The only compute type that it supports; None: all."""
  shards_context: bool = True
  """Whether the slots of the context may be sharded over devices."""


KERNELS: dict[str, Kernel] = {
  "reference": Kernel(reference),
  "chunked": Kernel(streamed.chunked),
  "streamed": Kernel(streamed.streamed),
  "cudnn": Kernel(fused.cudnn, platform="gpu", dtype="bfloat16", shards_context=False),
  "splash": Kernel(fused.splash, platform="tpu", shards_context=False),
}
AUTO = "auto"


def choose(name: str, num_queries: int, num_keys: int) -> Kernel:
  """The kernel of `model.attention` = `name` for these shapes; AUTO: the fastest that runs everywhere, by shape.

  Raises:
    InputError: an unknown name.
  """
  if name == AUTO:
    name = "streamed" if num_queries * num_keys >= _LARGE else "reference"
  return lookup("model.attention", name, KERNELS, also=(AUTO,))


def check(config: ModelConfig, mesh: Mesh | None = None) -> None:
  """Raises InputError if the config's kernel does not exist or does not run with its dtype or on the mesh."""
  kernel = choose(config.attention, 1, 1)
  general = ", ".join([AUTO, *(name for name, each in KERNELS.items() if each.platform is None)])
  if kernel.dtype not in (None, config.dtype):
    raise InputError(
      f"model.attention={config.attention} computes in {kernel.dtype} only: set model.dtype={kernel.dtype}, or choose"
      " another kernel."
    )
  if mesh is None:
    return
  platform = mesh.devices.flat[0].platform
  if kernel.platform is not None and kernel.platform != platform:
    raise InputError(
      f"model.attention={config.attention} runs on {kernel.platform.upper()}s only, and the devices here are"
      f" {platform.upper()}s: choose one of {general}."
    )
  if not kernel.shards_context and mesh.shape["context"] > 1:
    raise InputError(
      f"model.attention={config.attention} needs all keys on each device, so it does not support"
      f" mesh.context={mesh.shape['context']}: choose one of {general}, or set it to 1."
    )
