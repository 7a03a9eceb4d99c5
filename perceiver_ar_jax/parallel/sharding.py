"""Logical axes of weights and activations, and the one table that maps them to mesh axes.

Models name the meaning of each axis ("width", "heads"); only this module knows over which mesh axes it is sharded. A
dimension that its mesh axes do not divide is replicated, so that odd sizes (a vocabulary of 259) work on every mesh.
"""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# logical axis -> mesh axes, in the order of the mesh, as lax.ppermute needs them. "batch" rows are split over data and
# fsdp alike; fsdp also splits weights (ZeRO-3).
# "slots", the inputs of the cross-attention, are split over tensor too, instead of its heads: with heads split, devices
# would have to sum gradients of all inputs; with slots split, they exchange arrays as large as the latents.
RULES: dict[str, tuple[str, ...]] = {
  "batch": ("data", "fsdp"),
  "slots": ("tensor", "context"),
  "width": ("fsdp",),
  "latent": (),
  "heads": ("tensor",),
  "mlp": ("tensor",),
  "vocab": ("tensor",),
  "norm": (),
  "batch_heads": ("data", "fsdp", "tensor"),
  "context": ("context",),
  "layers": (),
}


def mesh_axes(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh=None) -> list[tuple[str, ...]]:
  """The mesh axes over which each dimension of an array with these logical `axes`, keys of RULES, is sharded.

  () for a dimension that is not sharded. Without `mesh`, the mesh in use (jax.set_mesh) counts, if there is one.
  """
  sizes, result = (jax.sharding.get_abstract_mesh() if mesh is None else mesh).shape, []
  for axis, size in zip(axes, shape, strict=True):
    names = tuple(name for name in (RULES[axis] if axis else ()) if sizes.get(name, 1) > 1)
    result.append(names if size % math.prod(sizes[name] for name in names) == 0 else ())
  return result


def spec(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh=None) -> PartitionSpec:
  """The PartitionSpec of these `mesh_axes`."""
  return PartitionSpec(*(names or None for names in mesh_axes(axes, shape, mesh)))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
  """`x` with a sharding constraint by its logical `axes` on the mesh in use; unchanged without a mesh."""
  is_free = jax.sharding.get_abstract_mesh().empty
  return x if is_free else jax.lax.with_sharding_constraint(x, spec(axes, x.shape))


def shardings(boxed_shapes, mesh: Mesh):
  """A tree of NamedShardings for a tree of (possibly nn.Partitioned) shapes, as `jax.eval_shape` gives it."""

  def layout(leaf):
    boxed = isinstance(leaf, nn.Partitioned)
    return NamedSharding(mesh, spec(leaf.names, leaf.value.shape, mesh) if boxed else PartitionSpec())

  return jax.tree.map(layout, boxed_shapes, is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned))


def bytes_per_device(tree) -> int:
  """Bytes per device of a tree of arrays, or of their shapes with shardings."""
  return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def batch_axes(name: str, ndim: int) -> tuple[str | None, ...]:
  """The logical axes of the array `name` of a batch; only rows are sharded, and slots of what the context reads."""
  return ("batch", "slots" if name in ("inputs", "positions", "segments") else None, None)[:ndim]


def batch_shardings(mesh: Mesh, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, NamedSharding]:
  """The sharding of each array of a batch: rows over data and fsdp, the slots of inputs over context as well."""
  return {name: NamedSharding(mesh, spec(batch_axes(name, len(shape)), shape, mesh)) for name, shape in shapes.items()}


def pad_context(x: jax.Array) -> jax.Array:
  """Ids [B, L, ...] padded on the left with zeros until the mesh in use divides L, and sharded."""
  sizes = jax.sharding.get_abstract_mesh().shape
  extra = -x.shape[1] % math.prod(sizes.get(axis, 1) for axis in RULES["slots"])
  padded = jnp.pad(x, ((0, 0), (extra, 0)) + ((0, 0),) * (x.ndim - 2)) if extra else x
  return constrain(padded, "batch", "slots", *(None,) * (x.ndim - 2))


def last_slots(x: jax.Array, size: int) -> jax.Array:
  """The last `size` slots of ids [B, L, ...]; where they are sharded, a slice would be an all-gather of all."""
  (slots,) = mesh_axes(("slots",), x.shape[1:2])
  if not slots:
    return x[:, -size:]

  def pick(x_BxC):
    num_local = x_BxC.shape[1]
    local_M = x.shape[1] - size + jnp.arange(size) - jax.lax.axis_index(slots) * num_local
    values_BxM = jnp.take(x_BxC, jnp.clip(local_M, 0, num_local - 1), axis=1)
    is_local_M = ((local_M >= 0) & (local_M < num_local)).reshape(size, *(1,) * (x.ndim - 2))
    return jax.lax.psum(jnp.where(is_local_M[None], values_BxM, 0), slots)

  split, replicated = PartitionSpec(None, slots), PartitionSpec()
  return jax.shard_map(pick, in_specs=split, out_specs=replicated, axis_names=set(slots), check_vma=False)(x)
