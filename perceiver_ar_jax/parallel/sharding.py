"""Logical axes of weights and activations, and the one table that maps them to mesh axes.

Models name the meaning of each axis ("width", "heads"); only this file knows which part of the mesh it is
spread over. A dimension that its mesh axes do not divide is left whole, so that odd sizes (a vocabulary of
259) work on every mesh.
"""

import jax
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# logical axis -> mesh axes. "batch" rows are split over data and fsdp alike; fsdp also splits weights (ZeRO-3).
RULES: dict[str, tuple[str, ...]] = {
  "batch": ("data", "fsdp"),
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


def spec(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh) -> PartitionSpec:
  """The PartitionSpec of an array of `shape` with these logical `axes` on `mesh`.

  Raises:
    KeyError: an axis that RULES does not name.
  """
  parts = []
  for axis, size in zip(axes, shape, strict=True):
    names = tuple(name for name in (RULES[axis] if axis else ()) if mesh.shape[name] > 1)
    count = 1
    for name in names:
      count *= mesh.shape[name]
    parts.append(names if names and size % count == 0 else None)
  return PartitionSpec(*parts)


def current_spec(axes: tuple[str | None, ...], shape: tuple[int, ...]) -> PartitionSpec | None:
  """`spec` on the mesh in use (jax.set_mesh); None without one."""
  mesh = jax.sharding.get_abstract_mesh()
  return None if mesh.empty else spec(axes, shape, mesh)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
  """`x`, kept in the layout of its logical `axes` on the mesh in use; unchanged without one."""
  layout = current_spec(axes, x.shape)
  return x if layout is None else jax.lax.with_sharding_constraint(x, layout)


def shardings(boxed_shapes, mesh: Mesh):
  """A tree of NamedShardings for a tree of (possibly nn.Partitioned) shapes, as `jax.eval_shape` gives it."""

  def one(leaf):
    if isinstance(leaf, nn.Partitioned):
      return NamedSharding(mesh, spec(leaf.names, leaf.value.shape, mesh))
    return NamedSharding(mesh, PartitionSpec())

  return jax.tree.map(one, boxed_shapes, is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned))


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Rows of a batch over every device of the data and fsdp axes."""
  return NamedSharding(mesh, PartitionSpec(RULES["batch"]))
