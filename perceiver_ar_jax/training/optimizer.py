"""Update rules and learning-rate schedules: two tables of optax transformations, as in the published runs.

To add one, add an entry to OPTIMIZERS or SCHEDULES; `train.optimizer.name` or `.schedule` then accepts its name.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from perceiver_ar_jax.config import OptimizerConfig, lookup


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
  """Returns the learning rate by update index: linear warm-up from 0 to the peak, then the configured decay.

  The cosine reaches `end_learning_rate` at the last of `steps`; in the original release it never does.
  """
  peak, warmup = config.learning_rate, config.warmup_steps
  after_warmup = lookup("train.optimizer.schedule", config.schedule, SCHEDULES)(config, steps)
  if not warmup:
    return after_warmup
  return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after_warmup], [warmup])


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
  """Chains clipping by global norm, the update rule and scaling by the schedule; InputError for an unknown name."""
  schedule = make_schedule(config, steps)
  rule = lookup("train.optimizer.name", config.name, OPTIMIZERS)(config)
  clip = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
  return optax.chain(*clip, rule, optax.scale_by_learning_rate(schedule))


def num_updates(opt_state: optax.OptState) -> jax.Array:
  """Returns int32: updates applied so far by an optimizer of `make_optimizer`, which index its schedule."""
  return opt_state[-1].count


def _cosine(config: OptimizerConfig, steps: int) -> optax.Schedule:
  after_warmup = steps - config.warmup_steps
  decay, peak = config.cosine_steps or after_warmup, config.learning_rate
  cosine = optax.cosine_decay_schedule(peak, decay, alpha=config.end_learning_rate / peak if peak else 0.0)
  return optax.join_schedules([optax.constant_schedule(peak), cosine], [after_warmup - decay])


def _steps(config: OptimizerConfig, steps: int) -> optax.Schedule:
  factors = {}
  for fraction in config.step_boundaries:
    boundary = int(fraction * steps)
    factors[boundary] = factors.get(boundary, 1.0) * config.step_factor
  return optax.piecewise_constant_schedule(config.learning_rate, factors)


def _t5(config: OptimizerConfig, unused_steps: int) -> optax.Schedule:
  warmup = max(config.warmup_steps, 1)
  return lambda count: config.learning_rate * jnp.sqrt(warmup / jnp.maximum(count + warmup, warmup))


def _adam(config: OptimizerConfig) -> optax.GradientTransformation:
  return optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)


def _decay(config: OptimizerConfig) -> optax.GradientTransformation:
  return optax.add_decayed_weights(config.weight_decay, mask=_is_kernel)


def _is_kernel(params):
  """The mask of weight decay: Dense kernels, without embeddings, biases and norms."""
  return jax.tree.map_with_path(lambda path, _: path[-1].key == "kernel", params)


def _per_layer(rule: optax.GradientTransformation) -> optax.GradientTransformation:
  """Applies `rule` to every weight separately and, below "layers...", to every layer of a stacked weight separately.

  nn.scan stacks the weights of equal layers; a rule that uses the shape or the norm of a weight would treat them as
  one. The state is a tree of the rule's states, one per weight, or its empty one.
  """

  def over_layers(path, function):
    stacked = any(str(part.key).startswith("layers") for part in path)
    return jax.vmap(function) if stacked else function

  def init(params):
    states = jax.tree.map_with_path(lambda path, param: over_layers(path, rule.init)(param), params)
    return states if jax.tree.leaves(states) else rule.init(params)

  def update(updates, state, params):
    stateful = bool(jax.tree.leaves(state))
    states = state if stateful else jax.tree.map(lambda _: state, updates)
    results = jax.tree.map_with_path(lambda path, *args: over_layers(path, rule.update)(*args), updates, states, params)
    new_updates, new_states = (jax.tree.map(lambda _, pair, i=i: pair[i], updates, results) for i in (0, 1))
    return new_updates, new_states if stateful else state

  return optax.GradientTransformation(init, update)


def _wsd(config: OptimizerConfig, steps: int) -> optax.Schedule:
  after_warmup = steps - config.warmup_steps
  decay = min(config.decay_steps or after_warmup // 5, after_warmup)
  return optax.linear_schedule(config.learning_rate, config.end_learning_rate, decay, after_warmup - decay)


def _muon(config: OptimizerConfig) -> optax.GradientTransformation:
  """Muon for the kernels of hidden layers, layer by layer; Adam with Nesterov momentum for all else.

  Updates are scaled to the root mean square of Adam's, so that both share a learning rate.
  """
  matrix = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)

  def dimension(path, unused_weight):
    return matrix if path[-1].key == "kernel" and path[0].key != "to_logits" else None

  # The learning rate of -1 cancels the change of sign: make_optimizer applies the schedule and the sign.
  return optax.contrib.muon(
    -1.0,
    weight_decay=config.weight_decay,
    weight_decay_mask=_is_kernel,
    adam_b1=config.b1,
    adam_b2=config.b2,
    consistent_rms=0.2,
    muon_weight_dimension_numbers=functools.partial(jax.tree.map_with_path, dimension),
  )


SCHEDULES: dict[str, Callable[[OptimizerConfig, int], optax.Schedule]] = {
  "constant": lambda config, steps: optax.constant_schedule(config.learning_rate),
  "cosine": _cosine,
  "steps": _steps,
  "t5": _t5,
  "wsd": _wsd,
}

OPTIMIZERS: dict[str, Callable[[OptimizerConfig], optax.GradientTransformation]] = {
  "adam": _adam,
  "adamw": lambda config: optax.chain(_adam(config), _decay(config)),
  "adafactor": lambda config: optax.chain(
    *map(_per_layer, (optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0), optax.scale_by_param_block_rms()))
  ),
  "lamb": lambda config: optax.chain(_adam(config), _decay(config), _per_layer(optax.scale_by_trust_ratio())),
  "muon": _muon,
  "sgd": lambda config: optax.trace(decay=config.b1, nesterov=True),
  "sm3": lambda config: _per_layer(optax.scale_by_sm3(b1=config.b1)),
}
