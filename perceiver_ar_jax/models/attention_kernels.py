"""Ways to compute the same attention, in one table: `KERNELS[name](q, k, v, valid)`.

All give q_BxMxHxK's attention over k, v_BxLxHxK with softmax in float32: query m, which stands on slot
L - M + m, sees key l iff l <= L - M + m and valid_BxL[l]. A query that sees no key at all, which only padding
does, gets finite values of no meaning.
"""

import functools

import jax
import jax.numpy as jnp

_MASKED = -1e30  # finite, so that a row with every key masked does not become NaN
_CHUNK = 512
_LARGE = 2**20  # scores of one head from which walking over the keys is faster and far smaller; measured on CPU


def reference(q_BxMxHxK, k_BxLxHxK, v_BxLxHxK, valid_BxL):
  """Plain einsums: the truth. Keeps scores of size B x H x M x L."""
  scores_BxHxMxL = _scores(_scaled(q_BxMxHxK), k_BxLxHxK, valid_BxL, first_key=0, num_keys=k_BxLxHxK.shape[1])
  weights_BxHxMxL = jax.nn.softmax(scores_BxHxMxL, axis=-1)
  return jnp.einsum("bhml,blhk->bmhk", weights_BxHxMxL.astype(v_BxLxHxK.dtype), v_BxLxHxK)


def chunked(q_BxMxHxK, k_BxLxHxK, v_BxLxHxK, valid_BxL, chunk: int = _CHUNK):
  """A running softmax over chunks of keys, recomputed in the backward pass (Milakov & Gimelshein; FlashAttention).

  Scores exist for one chunk at a time: B x H x M x `chunk`. Any chunk size does; the last one is filled up.
  """
  num_keys = k_BxLxHxK.shape[1]
  filler = -num_keys % min(chunk, num_keys)

  def fill(x):  # in front, where padding stands anyway: the causal offset stays as it is
    return jnp.pad(x, ((0, 0), (filler, 0)) + ((0, 0),) * (x.ndim - 2))

  return _chunked(q_BxMxHxK, fill(k_BxLxHxK), fill(v_BxLxHxK), fill(valid_BxL), min(chunk, num_keys))


def auto(q_BxMxHxK, k_BxLxHxK, v_BxLxHxK, valid_BxL):
  """The faster of the kernels for these shapes."""
  large = q_BxMxHxK.shape[1] * k_BxLxHxK.shape[1] >= _LARGE
  return (chunked if large else reference)(q_BxMxHxK, k_BxLxHxK, v_BxLxHxK, valid_BxL)


KERNELS = {"auto": auto, "reference": reference, "chunked": chunked}


def _scaled(q_BxMxHxK):
  return q_BxMxHxK * q_BxMxHxK.shape[-1] ** -0.5


def _scores(q_BxMxHxK, k_BxCxHxK, valid_BxC, first_key, num_keys: int):
  """float32[B, H, M, C] masked scores of the keys from `first_key` on, of `num_keys` in all."""
  num_queries, chunk = q_BxMxHxK.shape[1], k_BxCxHxK.shape[1]
  scores_BxHxMxC = jnp.einsum("bmhk,bchk->bhmc", q_BxMxHxK, k_BxCxHxK, preferred_element_type=jnp.float32)
  slots_M = jnp.arange(num_keys - num_queries, num_keys)
  seen_MxC = first_key + jnp.arange(chunk)[None] <= slots_M[:, None]
  return jnp.where(seen_MxC[None, None] & valid_BxC[:, None, None, :], scores_BxHxMxC, _MASKED)


def _split(x_BxL, chunk: int):
  """[L / chunk, B, chunk, ...]: chunks on the first axis, to scan over."""
  return x_BxL.reshape(x_BxL.shape[0], -1, chunk, *x_BxL.shape[2:]).swapaxes(0, 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _chunked(q, k, v, valid, chunk):
  return _forward(q, k, v, valid, chunk)[0]


def _forward(q_BxMxHxK, k_BxLxHxK, v_BxLxHxK, valid_BxL, chunk):
  q, num_keys = _scaled(q_BxMxHxK), k_BxLxHxK.shape[1]
  batch, num_queries, heads, width = q.shape

  def attend(carry, keys):
    top_BxHxM, sum_BxHxM, out_BxHxMxK = carry
    first_key, k_BxCxHxK, v_BxCxHxK, valid_BxC = keys
    scores = _scores(q, k_BxCxHxK, valid_BxC, first_key, num_keys)
    new_top = jnp.maximum(top_BxHxM, scores.max(axis=-1))
    shrink, weights = jnp.exp(top_BxHxM - new_top), jnp.exp(scores - new_top[..., None])
    part = jnp.einsum("bhmc,bchk->bhmk", weights.astype(v_BxCxHxK.dtype), v_BxCxHxK, preferred_element_type=jnp.float32)
    return (new_top, sum_BxHxM * shrink + weights.sum(axis=-1), out_BxHxMxK * shrink[..., None] + part), None

  rows = (batch, heads, num_queries)
  start = jnp.full(rows, _MASKED), jnp.zeros(rows), jnp.zeros((*rows, width))
  keys = jnp.arange(0, num_keys, chunk), _split(k_BxLxHxK, chunk), _split(v_BxLxHxK, chunk), _split(valid_BxL, chunk)
  (top, total, out), _ = jax.lax.scan(attend, start, keys)
  out_BxMxHxK = (out / total[..., None]).swapaxes(1, 2).astype(v_BxLxHxK.dtype)
  return out_BxMxHxK, (q_BxMxHxK, k_BxLxHxK, v_BxLxHxK, valid_BxL, out_BxMxHxK, top + jnp.log(total))


def _backward(chunk, residuals, grad_BxMxHxK):
  q_BxMxHxK, k_BxLxHxK, v_BxLxHxK, valid_BxL, out_BxMxHxK, log_total_BxHxM = residuals
  q, num_keys = _scaled(q_BxMxHxK), k_BxLxHxK.shape[1]
  dtype = q.dtype
  inner_BxHxM = jnp.einsum("bmhk,bmhk->bhm", grad_BxMxHxK, out_BxMxHxK, preferred_element_type=jnp.float32)
  product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

  def attend(grad_q_BxMxHxK, keys):
    first_key, k_BxCxHxK, v_BxCxHxK, valid_BxC = keys
    scores = _scores(q, k_BxCxHxK, valid_BxC, first_key, num_keys)
    weights_BxHxMxC = jnp.exp(scores - log_total_BxHxM[..., None])
    grad_weights = product("bmhk,bchk->bhmc", grad_BxMxHxK, v_BxCxHxK)
    grad_scores = (weights_BxHxMxC * (grad_weights - inner_BxHxM[..., None])).astype(dtype)
    grad_v = product("bhmc,bmhk->bchk", weights_BxHxMxC.astype(dtype), grad_BxMxHxK)
    grad_k = product("bhmc,bmhk->bchk", grad_scores, q)
    grad_q_BxMxHxK += product("bhmc,bchk->bmhk", grad_scores, k_BxCxHxK)
    return grad_q_BxMxHxK, (grad_k.astype(dtype), grad_v.astype(dtype))

  keys = jnp.arange(0, num_keys, chunk), _split(k_BxLxHxK, chunk), _split(v_BxLxHxK, chunk), _split(valid_BxL, chunk)
  grad_q, (grad_k, grad_v) = jax.lax.scan(attend, jnp.zeros(q.shape), keys)

  def join(x):
    return x.swapaxes(0, 1).reshape(k_BxLxHxK.shape)

  return _scaled(grad_q).astype(dtype), join(grad_k), join(grad_v), None


_chunked.defvjp(_forward, _backward)
