"""Streamed attention: constant memory for any context length.

The context is scanned in chunks: each chunk is projected to keys and values, attended to with a running softmax and
discarded (running softmax: Milakov & Gimelshein, 2018); the backward pass recomputes it (FlashAttention). Only inputs
as small as token ids are kept for all L slots. Where slots are sharded over devices, each device scans its own, and
what the devices exchange is as large as the latents, whatever the context.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from perceiver_ar_jax.models.keys import MASKED, Keys, product, query_segments, scaled, visible
from perceiver_ar_jax.parallel import sharding

_CPU_SCORES = 2**19
"""Scores of a chunk that a CPU computes at a time, or those of one row: several arrays of this size fit its caches."""
SAVED = "saved"
"""Checkpoint name of values that remat=dots keeps for the backward pass: small, and expensive to recompute."""


def streamed(q_BxMxHxK, keys: Keys, valid_BxL, keep_own: bool = False, chunk: int = 512):
  """Attention over the context in chunks of `chunk` slots, which need not divide L; see attention.py for arguments."""
  rows, slots = sharding.mesh_axes(("batch", "slots" if keys.sharded else None), valid_BxL.shape)
  layout = _Layout(q_BxMxHxK.shape[1], valid_BxL.shape[1], slots, keys.halo)
  scan = functools.partial(_scan_context, keys.project, chunk, keep_own, layout)
  scan = functools.partial(_scan_rows, scan, chunk)
  segments_BxM = query_segments(valid_BxL, q_BxMxHxK.shape[1])  # before the slots are split over devices
  if rows or slots:
    # Each device scans its own slots for its own rows, and gradients of the weights are summed over devices once, at
    # the end: left to the compiler, they would be summed after every chunk.
    replicated = jax.tree.map(lambda _: PartitionSpec(), keys.weights)
    split = jax.tree.map(lambda _: PartitionSpec(rows or None, slots or None), keys.inputs)
    latents, valid = PartitionSpec(rows or None), PartitionSpec(rows or None, slots or None)
    scan = jax.shard_map(
      scan,
      in_specs=(latents, replicated, split, valid, latents),
      out_specs=latents,
      axis_names={*rows, *slots},
      check_vma=False,
    )
  return scan(q_BxMxHxK, keys.weights, keys.inputs, valid_BxL, segments_BxM)


def chunked(q_BxMxHxK, keys: Keys, valid_BxL, keep_own: bool = False, chunk: int = 512):
  """`streamed` over keys and values that are projected once and kept: more memory, less to recompute."""
  projected = Keys.from_arrays(*keys.to_arrays(), sharded=keys.sharded)
  return streamed(q_BxMxHxK, projected, valid_BxL, keep_own, chunk)


def _scan_rows(scan, chunk, q_BxMxHxK, weights, *by_row):
  """`scan` over as many rows at a time as a CPU's caches hold the scores of; other devices scan all rows at once."""
  device, (rows, queries, heads, _) = jax.sharding.get_abstract_mesh().abstract_device, q_BxMxHxK.shape
  fits = max(_CPU_SCORES // (queries * heads * chunk), 1) if device and device.device_kind == "cpu" else rows
  size = max(size for size in range(1, rows + 1) if rows % size == 0 and size <= fits)
  if size == rows:
    return scan(q_BxMxHxK, weights, *by_row)
  groups = jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), (q_BxMxHxK, by_row))
  return jax.lax.map(lambda group: scan(group[0], weights, *group[1]), groups).reshape(q_BxMxHxK.shape)


class _Layout(NamedTuple):
  """Which slots of the context this device scans."""

  num_queries: int  # M
  num_keys: int  # L, over all devices
  axes: tuple[str, ...]  # mesh axes over which the slots are sharded, inside shard_map; (): this device has all slots
  halo: int  # slots before a chunk that its projection reads

  def chunks(self, inputs):
    """The function (first, size) -> `inputs` of the halo + `size` slots, from local slot first - halo on."""
    halo = self.halo
    if not halo:
      return functools.partial(_slice, inputs)
    # Before the first local slot: the previous device's last slots; ppermute gives zeros to the first device.
    before = jax.tree.map(lambda x: jnp.zeros_like(x[:, :halo]), inputs)
    if self.axes:
      shift = [(index, index + 1) for index in range(jax.lax.axis_size(self.axes) - 1)]
      before = jax.tree.map(lambda x: jax.lax.ppermute(x[:, -halo:], self.axes, shift), inputs)

    def chunk(first, size: int):
      def with_halo(x, x_before):
        local_T = first - halo + jnp.arange(halo)
        local = jnp.take(x, jnp.maximum(local_T, 0), axis=1)
        remote = jnp.take(x_before, jnp.clip(local_T + halo, 0, halo - 1), axis=1)
        is_local_T = (local_T >= 0).reshape(halo, *(1,) * (x.ndim - 2))
        return jnp.concatenate([jnp.where(is_local_T, local, remote), _slice(x, first, size)], axis=1)

      return jax.tree.map(with_halo, inputs, before)

    return chunk


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _scan_context(project, chunk, keep_own, layout, *arrays):
  return _forward(project, chunk, keep_own, layout, *arrays)[0]


def _forward(project, chunk, keep_own, layout, q_BxMxHxK, weights, *by_slot):
  q_BxHxMxK = scaled(q_BxMxHxK).swapaxes(1, 2)

  def attend(carry, unused_first, inputs, bias_Bx1xMxC):
    top_BxHxM, total_BxHxM, out_BxHxMxK = carry
    k_BxHxCxK, v_BxHxCxK = (x.swapaxes(1, 2) for x in project(weights, inputs))
    scores_BxHxMxC = product("bhmk,bhck->bhmc", q_BxHxMxK, k_BxHxCxK) + bias_Bx1xMxC
    # The chunk's own softmax first, then its weight: compilers fuse this, but not a maximum carried along.
    chunk_top_BxHxM = scores_BxHxMxC.max(axis=-1)
    p_BxHxMxC = jnp.exp(scores_BxHxMxC - chunk_top_BxHxM[..., None])
    chunk_out_BxHxMxK = product("bhmc,bhck->bhmk", p_BxHxMxC.astype(v_BxHxCxK.dtype), v_BxHxCxK)
    new_top = jnp.maximum(top_BxHxM, chunk_top_BxHxM)
    shrink, chunk_shrink = jnp.exp(top_BxHxM - new_top), jnp.exp(chunk_top_BxHxM - new_top)
    total_BxHxM = total_BxHxM * shrink + p_BxHxMxC.sum(axis=-1) * chunk_shrink
    return new_top, total_BxHxM, out_BxHxMxK * shrink[..., None] + chunk_out_BxHxMxK * chunk_shrink[..., None]

  rows = q_BxHxMxK.shape[:3]
  carry = jnp.full(rows, MASKED), jnp.zeros(rows), jnp.zeros(q_BxHxMxK.shape)
  top, total, out = _for_each_chunk(attend, carry, chunk, keep_own, layout, *by_slot)
  if layout.axes:  # combine the running softmax of each device into that over all slots
    local_top, top = top, jax.lax.pmax(top, layout.axes)
    shrink = jnp.exp(local_top - top)
    total, out = jax.lax.psum((total * shrink, out * shrink[..., None]), layout.axes)
  out_BxMxHxK = checkpoint_name((out / total[..., None]).swapaxes(1, 2).astype(q_BxMxHxK.dtype), SAVED)
  log_total_BxHxM = checkpoint_name(top + jnp.log(total), SAVED)
  return out_BxMxHxK, (q_BxMxHxK, weights, by_slot, out_BxMxHxK, log_total_BxHxM)


def _backward(project, chunk, keep_own, layout, residuals, grad_BxMxHxK):
  q_BxMxHxK, weights, by_slot, out_BxMxHxK, log_total_BxHxM = residuals
  if layout.axes:  # shard_map gives each device an equal part of the gradient of a replicated output
    grad_BxMxHxK = jax.lax.psum(grad_BxMxHxK, layout.axes)
  q_BxHxMxK, grad_BxHxMxK = scaled(q_BxMxHxK).swapaxes(1, 2), grad_BxMxHxK.swapaxes(1, 2)
  inner_BxHxM = product("bmhk,bmhk->bhm", grad_BxMxHxK, out_BxMxHxK)
  dtype = q_BxMxHxK.dtype

  def attend(carry, first, inputs, bias_Bx1xMxC):
    grad_q_BxHxKxM, grad_weights, grad_inputs = carry
    (k, v), pull_back = jax.vjp(project, weights, inputs)
    k_BxHxCxK, v_BxHxCxK = k.swapaxes(1, 2), v.swapaxes(1, 2)
    # Keys come before queries, and the gradient of the queries is accumulated transposed: then no product below has
    # to transpose its large operand, which on CPUs costs more than the product.
    scores_BxHxCxM = product("bhck,bhmk->bhcm", k_BxHxCxK, q_BxHxMxK) + bias_Bx1xMxC.swapaxes(2, 3)
    p_BxHxCxM = jnp.exp(scores_BxHxCxM - log_total_BxHxM[:, :, None])
    grad_p_BxHxCxM = product("bhck,bhmk->bhcm", v_BxHxCxK, grad_BxHxMxK)
    grad_scores_BxHxCxM = (p_BxHxCxM * (grad_p_BxHxCxM - inner_BxHxM[:, :, None])).astype(dtype)
    grad_q_BxHxKxM += product("bhck,bhcm->bhkm", k_BxHxCxK, grad_scores_BxHxCxM)
    grad_k_BxHxCxK = product("bhcm,bhmk->bhck", grad_scores_BxHxCxM, q_BxHxMxK)
    grad_v_BxHxCxK = product("bhcm,bhmk->bhck", p_BxHxCxM.astype(dtype), grad_BxHxMxK)
    grad_k, grad_v = grad_k_BxHxCxK.swapaxes(1, 2).astype(k.dtype), grad_v_BxHxCxK.swapaxes(1, 2).astype(v.dtype)
    chunk_grad_weights, chunk_grad_inputs = pull_back((grad_k, grad_v))
    grad_weights = jax.tree.map(jnp.add, grad_weights, chunk_grad_weights)
    write = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=first, axis=1)
    grad_inputs = jax.tree.map(lambda x, new: write(x, new) if _is_float(x) else x, grad_inputs, chunk_grad_inputs)
    return grad_q_BxHxKxM, grad_weights, grad_inputs

  zeros = functools.partial(jax.tree.map, lambda x: jnp.zeros(x.shape, x.dtype) if _is_float(x) else _no_gradient(x))
  carry = jnp.zeros(q_BxHxMxK.swapaxes(2, 3).shape), zeros(weights), zeros(by_slot[0])
  grad_q_BxHxKxM, grad_weights, grad_inputs = _for_each_chunk(attend, carry, chunk, keep_own, layout, *by_slot)
  grad_q_BxMxHxK = grad_q_BxHxKxM.transpose(0, 3, 1, 2)
  no_gradients = jax.tree.map(_no_gradient, by_slot[1:])
  return scaled(grad_q_BxMxHxK).astype(dtype), grad_weights, grad_inputs, *no_gradients


_scan_context.defvjp(_forward, _backward)


def _for_each_chunk(step, carry, chunk: int, keep_own: bool, layout: _Layout, inputs, valid_BxL, segments_BxM):
  """The carry after `step(carry, first, inputs, bias_Bx1xMxC)` for each chunk of this device's slots, in order.

  A step gets the inputs of the halo and the chunk, and what to add to its scores: 0 for visible keys, else MASKED.
  A remainder comes first. Only chunks that may have some of the last M slots need the causal mask.
  """
  num_local, inputs_of_chunk = valid_BxL.shape[1], layout.chunks(inputs)
  first_slot = jax.lax.axis_index(layout.axes) * num_local if layout.axes else 0  # of this device, over all devices

  def visit(carry, first, size: int, causal: bool):
    valid_BxC = _slice(valid_BxL, first, size)
    visible_Bx1xMxC = valid_BxC[:, None, None, :]
    if causal or segments_BxM is not None:
      slots_C = first_slot + first + jnp.arange(size)
      visible_Bx1xMxC = visible(slots_C, layout.num_queries, layout.num_keys, valid_BxC, keep_own, segments_BxM)
    return step(carry, first, inputs_of_chunk(first, size), jnp.where(visible_Bx1xMxC, 0.0, MASKED))

  whole, rest = divmod(num_local, chunk)
  before = layout.num_keys - layout.num_queries - first_slot  # local slots that every query may attend to
  if rest:
    carry = visit(carry, 0, rest, bool(layout.axes) or rest > before)
  # The bounds differ between devices: one program serves all of them, and only chunks near the end are masked.
  clip = jnp.clip if layout.axes else np.clip
  unmasked = clip((before - rest) // chunk, 0, whole)
  for start, end, causal in ((0, unmasked, False), (unmasked, whole, True)):

    def visit_at(index, carry, causal=causal):
      return visit(carry, rest + index * chunk, chunk, causal)

    if whole and (layout.axes or start < end):
      carry = jax.lax.fori_loop(start, end, visit_at, carry)
  return carry


def _slice(tree, first, size: int):
  """`size` slots, from slot `first`, of a tree of [B, L, ...]."""
  return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, first, size, axis=1), tree)


def _is_float(x) -> bool:
  return jnp.issubdtype(x.dtype, jnp.floating)


def _no_gradient(x) -> np.ndarray:
  """JAX's cotangent of integers and booleans."""
  return np.zeros(x.shape, jax.dtypes.float0)
