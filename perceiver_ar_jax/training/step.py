"""The training state, and one update of it as a pure function: (state, batch, key) -> (state, metrics)."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from perceiver_ar_jax.config import Config, require
from perceiver_ar_jax.models import architectures
from perceiver_ar_jax.parallel.sharding import batch_axes, batch_shardings, constrain, shardings
from perceiver_ar_jax.training import loss as loss_lib
from perceiver_ar_jax.training import optimizer as optimizer_lib

Optimizer = optax.GradientTransformation
Batch = dict[str, jax.Array]
"""inputs int32[B, L], positions int32[B, L, P] unless the model ignores them, targets int32[B, M], weights
float32[B, M], segments int32[B, L] with data.packing; or their shapes."""


@struct.dataclass
class TrainState:
  """Everything that an update changes. Random keys are functions of the seed and `step`, so they are not stored."""

  step: jax.Array  # int32[]: number of updates done
  params: dict
  opt_state: optax.OptState
  ema: dict | None = None  # exponential moving average of params (train.ema_decay)

  @property
  def params_to_evaluate(self) -> dict:
    """The averaged weights if there are any, else `params`."""
    return self.params if self.ema is None else self.ema


def abstract_state(config: Config, optimizer: Optimizer, mesh: Mesh) -> TrainState:
  """Returns the state as jax.ShapeDtypeStructs with their shardings on `mesh`; allocates nothing.

  Optimizer state that belongs to a weight and has its shape is sharded as the weight is; the rest is replicated.
  """
  params = abstract_params(config, mesh)
  weights = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(params)}
  replicated = NamedSharding(mesh, PartitionSpec())

  def place(path, leaf):
    name = jax.tree_util.keystr(path)
    weight = weights.get(max((known for known in weights if known in name), key=len, default=""))
    alike = weight is not None and weight.shape == leaf.shape
    return leaf.update(sharding=weight.sharding if alike else replicated)

  opt_state = jax.tree.map_with_path(place, jax.eval_shape(optimizer.init, params))
  ema = params if config.train.ema_decay else None
  return TrainState(jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated), params, opt_state, ema)


def abstract_params(config: Config, mesh: Mesh) -> dict:
  """Returns the weights of `abstract_state`."""
  boxed = architectures.abstract_params(config.model)
  return jax.tree.map(lambda leaf, layout: leaf.update(sharding=layout), nn.meta.unbox(boxed), shardings(boxed, mesh))


def init_state(config: Config, optimizer: Optimizer, mesh: Mesh, params: dict | None = None) -> TrainState:
  """Returns the initial state, the same on every mesh; each device creates only its own shard.

  `params` are weights to start from, in the layout of `abstract_params`, and donated; None: random ones, by the seed.
  """
  layout = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, optimizer, mesh))

  def init(key, params):
    if params is None:
      params = nn.meta.unbox(architectures.init_params(config.model, key))
    ema = params if config.train.ema_decay else None
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), ema)

  with jax.set_mesh(mesh):
    return jax.jit(init, out_shardings=layout, donate_argnums=1)(jax.random.key(config.seed), params)


def score(model: nn.Module, params, batch: Batch, dropout_key=None, **terms: float) -> loss_lib.TokenLosses:
  """Returns the losses of a batch's targets, with dropout if a key is given; `terms` as in loss.token_losses."""
  packed = {"segments_BxL": batch["segments"]} if "segments" in batch else {}
  latents_BxMxD = model.apply(
    {"params": params},
    batch["inputs"],
    batch.get("positions"),
    num_latents=batch["targets"].shape[1],
    deterministic=dropout_key is None,
    rngs=None if dropout_key is None else {"dropout": dropout_key},
    method="latents",
    **packed,
  )
  to_logits = functools.partial(model.apply, {"params": params}, method="logits")
  return loss_lib.score(to_logits, latents_BxMxD, batch["targets"], chunk=model.config.logits_chunk, **terms)


def make_train_step(config: Config, optimizer: Optimizer) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
  """Returns the update (state, batch, key of the run) for `config`; jit it with the state donated.

  Its metrics are scalars: `loss` and `z_loss` in nats per scored token, `accuracy`, `num_tokens` scored, `grad_norm`
  before clipping, and `learning_rate`. With train.on_nonfinite=skip, an update whose loss or norm is not finite changes
  nothing but the step, and `skipped_steps` counts them. Raises InputError for settings that the model does not support.
  """
  packing, architecture = config.data.packing, config.model.architecture
  is_valid = packing == 1 or architectures.architecture_of(config.model).has_cross_attention
  require(is_valid, f"data.packing={packing} is not supported by {architecture}: set --config.data.packing=1.")
  schedule = optimizer_lib.make_schedule(config.train.optimizer, config.train.steps)
  model = architectures.make_model(config.model)
  has_dropout = config.model.dropout or config.model.latent_dropout or config.model.cross_attend_dropout

  def sum_of_losses(params, batch: Batch, key: jax.Array):
    terms = {"z_loss": config.train.z_loss, "label_smoothing": config.train.label_smoothing}
    losses = score(model, params, batch, key if has_dropout else None, **terms)
    sums = loss_lib.weighted_sums(losses, batch["weights"])
    return sums["loss"] + sums["z_loss"], sums

  grad_fn = jax.grad(sum_of_losses, has_aux=True)

  def grad_of_part(params, part: Batch, key: jax.Array):
    # Part i of n consists of the rows i, i + n, ..., so that rows stay on their devices.
    part = {name: constrain(x, *batch_axes(name, x.ndim)) for name, x in part.items()}
    return grad_fn(params, part, jax.random.fold_in(key, part["row"][0]))

  def train_step(state: TrainState, batch: Batch, key: jax.Array):
    key = jax.random.fold_in(key, state.step + 1)
    if config.train.microbatches == 1:
      gradients, sums = grad_fn(state.params, batch, key)
    else:
      rows = len(batch["inputs"])
      add_up = optax.microbatching.microbatch(grad_of_part, 1, rows // config.train.microbatches)
      gradients, sums = add_up(state.params, batch | {"row": jnp.arange(rows)}, key)
    num_tokens = jnp.maximum(sums["num_tokens"], 1.0)
    if config.train.loss_reduction == "mean":
      gradients = jax.tree.map(lambda gradient: gradient / num_tokens, gradients)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    metrics = {name: sums[name] / num_tokens for name in ("loss", "z_loss", "accuracy")}
    metrics |= {"num_tokens": sums["num_tokens"], "grad_norm": optax.global_norm(gradients)}
    metrics["learning_rate"] = schedule(optimizer_lib.num_updates(state.opt_state))
    params, ema = optax.apply_updates(state.params, updates), state.ema
    if ema is not None:
      # The weight of the newest parameters: larger at first, to forget the initial ones.
      weight = jnp.maximum(1.0 - config.train.ema_decay, 9.0 / (10.0 + optimizer_lib.num_updates(opt_state)))
      ema = optax.incremental_update(params, ema, weight)
    if config.train.on_nonfinite == "skip":
      finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
      select = functools.partial(jax.tree.map, lambda new, old: jnp.where(finite, new, old))
      params, ema, opt_state = map(select, (params, ema, opt_state), (state.params, state.ema, state.opt_state))
      metrics["skipped_steps"] = state.step + 1 - optimizer_lib.num_updates(opt_state)
    return TrainState(step=state.step + 1, params=params, opt_state=opt_state, ema=ema), metrics

  return train_step


def lower(config: Config, optimizer: Optimizer, abstract: TrainState, batch: Batch, mesh: Mesh) -> jax.stages.Lowered:
  """Returns the update lowered for the shapes of a state (`abstract_state`) and of a global batch.

  Compiled, it takes (state, batch, key) and donates the state. Call `lower` with `mesh` in use (jax.set_mesh).
  """
  layouts = batch_shardings(mesh, {name: spec.shape for name, spec in batch.items()})
  batch = {name: spec.update(sharding=layouts[name]) for name, spec in batch.items()}
  replicated = NamedSharding(mesh, PartitionSpec())
  key = jax.eval_shape(lambda: jax.random.key(0))
  layout = jax.tree.map(lambda leaf: leaf.sharding, abstract)
  update = jax.jit(make_train_step(config, optimizer), donate_argnums=0, out_shardings=(layout, replicated))
  return update.lower(abstract, batch, jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=replicated))
