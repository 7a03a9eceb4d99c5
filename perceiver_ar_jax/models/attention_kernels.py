"""Ways to compute the same attention, in one table: `KERNELS[name](q, keys, valid, keep_own, chunk)`.

All give the attention of q_BxMxHxK over a context, with softmax in float32. Query m stands on slot L - M + m and
sees key l iff l <= L - M + m and valid_BxL[l]; with `keep_own` it also sees its own slot, valid or not. A query
that sees no key at all, which only padding does, gets finite values of no meaning.

A kernel receives the context as `Keys`, not yet projected, so that it may choose how much of it exists at a time.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, PartitionSpec

from perceiver_ar_jax.config import InputError
from perceiver_ar_jax.parallel import sharding

SAVED = "saved"
"""Checkpoint name of what a layer should keep for its backward pass: small, and dear to compute again."""

_MASKED = -1e30  # finite, so that a row with every key masked does not become NaN
# Scores of one head from which walking over the context is at least as fast, and smaller; measured on CPU.
_LARGE = 2**15
_LANES = 128  # the TPU's vector width: splash wants lengths to be multiples of it

_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


class Keys(NamedTuple):
  """A context whose keys and values are made on demand, from any run of its slots."""

  make: Callable[[Any, Any], tuple[jax.Array, jax.Array]]
  """(weights, source of C slots) -> k_BxCxHxK, v_BxCxHxK; a pure function without tracers of its own."""
  weights: Any
  """A tree of float arrays, the same for every slot."""
  source: Any
  """A tree of arrays [B, L, ...]."""
  shared: bool = False
  """Whether the slots are spread over the mesh ("slots" in sharding.RULES)."""

  @classmethod
  def of(cls, k_BxLxHxK, v_BxLxHxK, *, shared: bool = False) -> "Keys":
    """Keys and values that are there already."""
    return cls(_given, (), (k_BxLxHxK, v_BxLxHxK), shared)

  def all(self) -> tuple[jax.Array, jax.Array]:
    """(k_BxLxHxK, v_BxLxHxK) of the whole context."""
    k_BxLxHxK, v_BxLxHxK = self.make(self.weights, self.source)
    if self.shared:
      k_BxLxHxK, v_BxLxHxK = (sharding.constrain(x, "batch", "slots", None, None) for x in (k_BxLxHxK, v_BxLxHxK))
    return k_BxLxHxK, v_BxLxHxK


class Cached(NamedTuple):
  """Keys and values of generation, N = B * H: one query reads this layout fast, and new slots are written in place.

  Rows and heads share an axis: given a head axis of 1, XLA's CPU compiler copies the whole cache for every token.
  """

  k_NxSxK: jax.Array
  v_NxSxK: jax.Array

  @classmethod
  def of(cls, k_BxSxHxK, v_BxSxHxK) -> "Cached":
    """From keys and values as layers make them."""
    return cls(*(x.swapaxes(1, 2).reshape(-1, x.shape[1], x.shape[3]) for x in (k_BxSxHxK, v_BxSxHxK)))

  def keys(self, num_rows: int) -> Keys:
    """As a whole pass wants them; B = `num_rows`."""
    return Keys.of(*(x.reshape(num_rows, -1, *x.shape[1:]).swapaxes(1, 2) for x in self))

  def put(self, new: "Cached", slot) -> "Cached":
    """With those of one slot, S = 1, in the place of slot int32[]."""
    return Cached(*(jax.lax.dynamic_update_slice_in_dim(old, one, slot, axis=1) for old, one in zip(self, new)))

  def attend(self, q_Bx1xHxK, valid_BxS):
    """Attention of one query to all valid slots."""
    rows, _, heads, width = q_Bx1xHxK.shape
    q_NxK = _scaled(q_Bx1xHxK).reshape(rows * heads, width)
    scores_NxS = _product("nk,nsk->ns", q_NxK, self.k_NxSxK)
    scores_NxS = jnp.where(jnp.repeat(valid_BxS, heads, axis=0), scores_NxS, _MASKED)
    weights_NxS = jax.nn.softmax(scores_NxS, axis=-1).astype(q_Bx1xHxK.dtype)
    return jnp.einsum("ns,nsk->nk", weights_NxS, self.v_NxSxK).reshape(q_Bx1xHxK.shape)


def _given(weights, source):
  del weights
  return source


def reference(q_BxMxHxK, keys: Keys, valid_BxL, keep_own: bool = False, chunk: int | None = None):
  """Plain einsums: the truth. Keeps scores of size B x H x M x L; `chunk` does not matter."""
  del chunk
  k_BxLxHxK, v_BxLxHxK = keys.all()
  weights_BxHxMxL = probabilities(q_BxMxHxK, k_BxLxHxK, valid_BxL, keep_own)
  return jnp.einsum("bhml,blhk->bmhk", weights_BxHxMxL.astype(v_BxLxHxK.dtype), v_BxLxHxK)


def probabilities(q_BxMxHxK, k_BxLxHxK, valid_BxL, keep_own: bool = False):
  """float32 weights_BxHxMxL by which each query sees each key: they sum to 1, and are 0 where it does not see."""
  scores_BxHxMxL = _product("bmhk,blhk->bhml", _scaled(q_BxMxHxK), k_BxLxHxK)
  scores_BxHxMxL = jnp.where(_seen(q_BxMxHxK, valid_BxL, keep_own), scores_BxHxMxL, _MASKED)
  return jax.nn.softmax(scores_BxHxMxL, axis=-1)


def streamed(q_BxMxHxK, keys: Keys, valid_BxL, keep_own: bool = False, chunk: int = 512):
  """Walks over the context: projects `chunk` slots, attends with a running softmax, forgets them; again backward.

  Nothing as long as the context is ever kept but its source, so memory does not grow with the context (running
  softmax: Milakov & Gimelshein, 2018; recomputed backward pass: FlashAttention). Any chunk size does. Only
  the last M slots need a causal mask; the walk over those before them has none. Where slots are spread over devices,
  each walks over its own, and what they merge is as large as the latents, whatever the context.
  """
  rows, slots = sharding.current_axes(("batch", "slots" if keys.shared else None), valid_BxL.shape)
  place = _Place(valid_BxL.shape[1], slots)
  walk = functools.partial(_walk, keys.make, chunk, keep_own, place)
  if rows or slots:
    # Each device walks with its own rows over its own slots, and gradients of the weights are added up over devices
    # once, at the end: left to the compiler, they would be after every chunk.
    whole = jax.tree.map(lambda _: PartitionSpec(), keys.weights)
    split = jax.tree.map(lambda _: PartitionSpec(rows or None, slots or None), keys.source)
    latents, valid = PartitionSpec(rows or None), PartitionSpec(rows or None, slots or None)
    walk = jax.shard_map(
      walk,
      in_specs=(latents, whole, split, valid),
      out_specs=latents,
      axis_names={*rows, *slots},
      check_vma=False,
    )
  return walk(q_BxMxHxK, keys.weights, keys.source, valid_BxL)


def chunked(q_BxMxHxK, keys: Keys, valid_BxL, keep_own: bool = False, chunk: int = 512):
  """`streamed` over keys and values that are projected at once and kept: more memory, less to recompute."""
  return streamed(q_BxMxHxK, Keys.of(*keys.all(), shared=keys.shared), valid_BxL, keep_own, chunk)


def cudnn(q_BxMxHxK, keys: Keys, valid_BxL, keep_own: bool = False, chunk: int | None = None):
  """cuDNN's fused attention, for NVIDIA GPUs in bfloat16; `chunk` does not matter."""
  del chunk
  seen = _seen(q_BxMxHxK, valid_BxL, keep_own)
  return jax.nn.dot_product_attention(q_BxMxHxK, *keys.all(), mask=seen, implementation="cudnn")


def splash(q_BxMxHxK, keys: Keys, valid_BxL, keep_own: bool = False, chunk: int | None = None, interpret: bool = False):
  """The Pallas kernel that ships with JAX, for TPUs: blocks that no query sees are skipped; `chunk` does not matter.

  Padding is told apart by segment ids, so it cannot `keep_own`. `interpret` runs it on any platform, slowly.
  """
  del chunk
  if keep_own:
    raise InputError("model.attention=splash cannot apply model.latent_dropout: set that to 0 or use another kernel.")
  k_BxLxHxK, v_BxLxHxK = keys.all()
  layout = sharding.current_spec(("batch", None, "heads", None), q_BxMxHxK.shape)
  attend = functools.partial(_splash, interpret=interpret)
  if layout is not None:  # a Pallas kernel is not split over devices by itself
    rows = sharding.current_spec(("batch", None), valid_BxL.shape)
    attend = jax.shard_map(attend, in_specs=(layout, layout, layout, rows), out_specs=layout, check_vma=False)
  return attend(_scaled(q_BxMxHxK), k_BxLxHxK, v_BxLxHxK, valid_BxL)


def auto(q_BxMxHxK, keys: Keys, valid_BxL, keep_own: bool = False, chunk: int = 512):
  """The fastest of the kernels that run everywhere, by shape, as measured on CPUs (docs/benchmarks.md)."""
  large = q_BxMxHxK.shape[1] * valid_BxL.shape[1] >= _LARGE
  return (streamed if large else reference)(q_BxMxHxK, keys, valid_BxL, keep_own, chunk)


KERNELS = {
  "auto": auto,
  "reference": reference,
  "chunked": chunked,
  "streamed": streamed,
  "cudnn": cudnn,
  "splash": splash,
}
SPREADING = ("auto", "reference", "chunked", "streamed")
"""Kernels that can attend to slots which are spread over devices."""
_PLATFORMS = {"cudnn": "gpu", "splash": "tpu"}


def check_platform(name: str, mesh: Mesh) -> None:
  """Raises InputError if the kernel cannot run on the mesh's devices, or not with this mesh."""
  platform = mesh.devices.flat[0].platform
  needed = _PLATFORMS.get(name, platform)
  if needed != platform:
    raise InputError(
      f"model.attention={name} runs on a {needed.upper()} only, and the devices here are {platform.upper()}s: take"
      " auto, reference, chunked or streamed."
    )
  if name not in SPREADING and mesh.shape["context"] > 1:
    raise InputError(
      f"model.attention={name} needs all keys on each device, so it cannot run with"
      f" mesh.context={mesh.shape['context']}: take auto, reference, chunked or streamed, or set it to 1."
    )


def _scaled(q_BxMxHxK):
  return q_BxMxHxK * q_BxMxHxK.shape[-1] ** -0.5


def _seen(q_BxMxHxK, valid_BxL, keep_own: bool):
  """bool[B, 1, M, L]: which keys each query sees."""
  num_queries, num_keys = q_BxMxHxK.shape[1], valid_BxL.shape[1]
  return _seen_run(jnp.arange(num_keys), num_queries, num_keys, valid_BxL, keep_own)


def _seen_run(slots_C, num_queries: int, num_keys: int, valid_BxC, keep_own: bool):
  """bool[B, 1, M, C]: which of the keys on these slots each query sees."""
  own_M = jnp.arange(num_keys - num_queries, num_keys)[:, None]
  seen_BxMxC = (slots_C[None] <= own_M)[None] & valid_BxC[:, None, :]
  if keep_own:
    seen_BxMxC |= (slots_C[None] == own_M)[None]
  return seen_BxMxC[:, None]


# The walk. Each step takes one run of slots; `causal` runs may hold some of the last M slots, the others may not.


class _Place(NamedTuple):
  """Which slots of the context a walk is over."""

  num_keys: int
  """L, over all devices."""
  axes: tuple[str, ...]
  """Mesh axes that the slots are spread over, inside shard_map; (): all slots are here."""

  def first(self, here: int):
    """The number of the first of the `here` slots that are on this device."""
    return jax.lax.axis_index(self.axes) * here if self.axes else 0

  def merge(self, top, total, out):
    """The running softmax over all devices' slots, from each device's."""
    if not self.axes:
      return top, total, out
    highest = jax.lax.pmax(top, self.axes)
    shrink = jnp.exp(top - highest)
    return highest, *jax.lax.psum((total * shrink, out * shrink[..., None]), self.axes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _walk(make, chunk, keep_own, place, q, weights, source, valid):
  return _forward(make, chunk, keep_own, place, q, weights, source, valid)[0]


def _forward(make, chunk, keep_own, place, q_BxMxHxK, weights, source, valid_BxL):
  q_BxHxMxK = _scaled(q_BxMxHxK).swapaxes(1, 2)
  bias = functools.partial(_bias, valid_BxL, place, q_BxMxHxK.shape[1], keep_own)

  def attend(carry, first, size, causal):
    top_BxHxM, total_BxHxM, out_BxHxMxK = carry
    k_BxHxCxK, v_BxHxCxK = (x.swapaxes(1, 2) for x in make(weights, _run(source, first, size)))
    bias_Bx1xMxC = bias(first, size, causal)
    scores_BxHxMxC = _product("bhmk,bhck->bhmc", q_BxHxMxK, k_BxHxCxK) + bias_Bx1xMxC
    # The run's own softmax first, then its share: compilers fuse this, but not a maximum that runs along.
    run_top_BxHxM = scores_BxHxMxC.max(axis=-1)
    p_BxHxMxC = jnp.exp(scores_BxHxMxC - run_top_BxHxM[..., None])
    run_out_BxHxMxK = _product("bhmc,bhck->bhmk", p_BxHxMxC.astype(v_BxHxCxK.dtype), v_BxHxCxK)
    new_top = jnp.maximum(top_BxHxM, run_top_BxHxM)
    shrink, run_shrink = jnp.exp(top_BxHxM - new_top), jnp.exp(run_top_BxHxM - new_top)
    total_BxHxM = total_BxHxM * shrink + p_BxHxMxC.sum(axis=-1) * run_shrink
    return new_top, total_BxHxM, out_BxHxMxK * shrink[..., None] + run_out_BxHxMxK * run_shrink[..., None]

  rows = q_BxHxMxK.shape[:3]
  start = jnp.full(rows, _MASKED), jnp.zeros(rows), jnp.zeros(q_BxHxMxK.shape)
  top, total, out = place.merge(*_for_each_run(attend, start, place, *_lengths(valid_BxL, q_BxMxHxK), chunk))
  out_BxMxHxK = checkpoint_name((out / total[..., None]).swapaxes(1, 2).astype(q_BxMxHxK.dtype), SAVED)
  log_total_BxHxM = checkpoint_name(top + jnp.log(total), SAVED)
  return out_BxMxHxK, (q_BxMxHxK, weights, source, valid_BxL, out_BxMxHxK, log_total_BxHxM)


def _backward(make, chunk, keep_own, place, residuals, grad_BxMxHxK):
  q_BxMxHxK, weights, source, valid_BxL, out_BxMxHxK, log_total_BxHxM = residuals
  if place.axes:  # shard_map hands each device an equal part of the gradient of what all of them hold
    grad_BxMxHxK = jax.lax.psum(grad_BxMxHxK, place.axes)
  bias = functools.partial(_bias, valid_BxL, place, q_BxMxHxK.shape[1], keep_own)
  q_BxHxMxK, grad_BxHxMxK = _scaled(q_BxMxHxK).swapaxes(1, 2), grad_BxMxHxK.swapaxes(1, 2)
  inner_BxHxM = _product("bmhk,bmhk->bhm", grad_BxMxHxK, out_BxMxHxK)
  dtype = q_BxMxHxK.dtype

  def attend(carry, first, size, causal):
    grad_q_BxHxKxM, grad_weights, grad_source = carry
    (k, v), pull_back = jax.vjp(make, weights, _run(source, first, size))
    k_BxHxCxK, v_BxHxCxK = k.swapaxes(1, 2), v.swapaxes(1, 2)
    bias_Bx1xMxC = bias(first, size, causal)
    # Keys stand before queries, and the gradient of queries is summed up transposed: no product below then has to
    # turn its large operand around, which on CPUs costs more than the product.
    scores_BxHxCxM = _product("bhck,bhmk->bhcm", k_BxHxCxK, q_BxHxMxK) + bias_Bx1xMxC.swapaxes(2, 3)
    p_BxHxCxM = jnp.exp(scores_BxHxCxM - log_total_BxHxM[:, :, None])
    grad_p_BxHxCxM = _product("bhck,bhmk->bhcm", v_BxHxCxK, grad_BxHxMxK)
    grad_scores_BxHxCxM = (p_BxHxCxM * (grad_p_BxHxCxM - inner_BxHxM[:, :, None])).astype(dtype)
    grad_q_BxHxKxM += _product("bhck,bhcm->bhkm", k_BxHxCxK, grad_scores_BxHxCxM)
    grad_k_BxHxCxK = _product("bhcm,bhmk->bhck", grad_scores_BxHxCxM, q_BxHxMxK)
    grad_v_BxHxCxK = _product("bhcm,bhmk->bhck", p_BxHxCxM.astype(dtype), grad_BxHxMxK)
    of_weights, of_source = pull_back(
      (grad_k_BxHxCxK.swapaxes(1, 2).astype(k.dtype), grad_v_BxHxCxK.swapaxes(1, 2).astype(v.dtype))
    )
    grad_weights = jax.tree.map(jnp.add, grad_weights, of_weights)
    return grad_q_BxHxKxM, grad_weights, _put_run(grad_source, of_source, first)

  zeros = functools.partial(jax.tree.map, lambda x: jnp.zeros(x.shape, x.dtype) if _is_float(x) else _no_gradient(x))
  start = jnp.zeros(q_BxHxMxK.swapaxes(2, 3).shape), zeros(weights), zeros(source)
  lengths = _lengths(valid_BxL, q_BxMxHxK)
  grad_q_BxHxKxM, grad_weights, grad_source = _for_each_run(attend, start, place, *lengths, chunk)
  grad_q_BxMxHxK = grad_q_BxHxKxM.transpose(0, 3, 1, 2)
  return _scaled(grad_q_BxMxHxK).astype(dtype), grad_weights, grad_source, _no_gradient(valid_BxL)


_walk.defvjp(_forward, _backward)


def _lengths(valid_BxL, q_BxMxHxK) -> tuple[int, int]:
  """(slots here, queries)."""
  return valid_BxL.shape[1], q_BxMxHxK.shape[1]


def _for_each_run(step, carry, place: _Place, here: int, num_queries: int, chunk: int):
  """The carry after `step(carry, first, size, causal)` for every run of the slots that are here, in order."""
  whole, rest = divmod(here, chunk)
  before = place.num_keys - num_queries - place.first(here)  # slots here that every query may see, if valid
  if rest:
    carry = step(carry, 0, rest, bool(place.axes) or rest > before)
  # Bounds that differ between devices: one program serves them all, and only runs near the end are masked.
  clip = jnp.clip if place.axes else np.clip
  seen_by_all = clip((before - rest) // chunk, 0, whole)
  for start, end, causal in ((0, seen_by_all, False), (seen_by_all, whole, True)):
    if whole and (place.axes or start < end):
      carry = jax.lax.fori_loop(start, end, functools.partial(_step_at, step, rest, chunk, causal), carry)
  return carry


def _step_at(step, start: int, chunk: int, causal: bool, index, carry):
  return step(carry, start + index * chunk, chunk, causal)


def _run(tree, first, size: int):
  """`size` slots of a tree of [B, L, ...] from slot `first` on."""
  return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, first, size, axis=1), tree)


def _put_run(tree, parts, first):
  """`tree` with `parts` in the place of the run that starts at `first`; what has no gradient stays as it is."""

  def put(x, part):
    return jax.lax.dynamic_update_slice_in_dim(x, part, first, axis=1) if _is_float(x) else x

  return jax.tree.map(put, tree, parts)


def _bias(valid_BxL, place: _Place, num_queries: int, keep_own: bool, first, size: int, causal: bool):
  """float32[B, 1, M or 1, C] to add to the scores of a run: 0 where a query sees the key, very low where not."""
  valid_BxC = _run(valid_BxL, first, size)
  if causal:
    slots_C = place.first(valid_BxL.shape[1]) + first + jnp.arange(size)
    seen = _seen_run(slots_C, num_queries, place.num_keys, valid_BxC, keep_own)
  else:
    seen = valid_BxC[:, None, None, :]
  return jnp.where(seen, 0.0, _MASKED)


def _is_float(x) -> bool:
  return jnp.issubdtype(x.dtype, jnp.floating)


def _no_gradient(x) -> np.ndarray:
  """JAX's cotangent of integers and booleans."""
  return np.zeros(x.shape, jax.dtypes.float0)


def _splash(q_BxMxHxK, k_BxLxHxK, v_BxLxHxK, valid_BxL, interpret: bool):
  from jax.experimental.pallas.ops.tpu import splash_attention

  num_queries, num_keys = q_BxMxHxK.shape[1], k_BxLxHxK.shape[1]
  more_queries, more_keys = -num_queries % _LANES, -num_keys % _LANES

  def fill(x, more):  # in front, where padding stands anyway, so that the causal offset is the only thing that moves
    return jnp.pad(x, ((0, 0), (more, 0)) + ((0, 0),) * (x.ndim - 2))

  offset = (num_keys + more_keys) - (num_queries + more_queries)
  mask = splash_attention.CausalMask((num_queries + more_queries, num_keys + more_keys), offset=offset)
  heads = splash_attention.MultiHeadMask([mask] * q_BxMxHxK.shape[2])
  kernel = splash_attention.make_splash_mha(heads, head_shards=1, q_seq_shards=1, interpret=interpret)

  def attend(q_MxHxK, k_LxHxK, v_LxHxK, valid_L):
    segments = splash_attention.SegmentIds(q=jnp.ones(q_MxHxK.shape[0], jnp.int32), kv=valid_L.astype(jnp.int32))
    out_HxMxK = kernel(*(x.swapaxes(0, 1) for x in (q_MxHxK, k_LxHxK, v_LxHxK)), segment_ids=segments)
    return out_HxMxK.swapaxes(0, 1)

  filled = fill(q_BxMxHxK, more_queries), fill(k_BxLxHxK, more_keys), fill(v_BxLxHxK, more_keys)
  return jax.vmap(attend)(*filled, fill(valid_BxL, more_keys))[:, more_queries:]
