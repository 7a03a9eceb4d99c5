"""The update against the reference's training loop, and its own properties."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from perceiver_ar_jax.config import Config, DataConfig, EvalConfig, MeshConfig, OptimizerConfig, TrainConfig
from perceiver_ar_jax.data.loader import TrainLoader
from perceiver_ar_jax.interop import haiku
from perceiver_ar_jax.parallel.mesh import make_mesh
from perceiver_ar_jax.training import optimizer as optimizer_lib
from perceiver_ar_jax.training import step as step_lib
from tests import golden, tiny


def _optimizer_config(reference: dict) -> OptimizerConfig:
  """Our settings for the reference's."""
  name = reference["optimizer"]
  moments = reference["lamb_kwargs"] if name == "lamb" else reference["adam_kwargs"]
  return OptimizerConfig(
    name=name,
    learning_rate=reference["base_lr"],
    warmup_steps=reference["warmup_steps"],
    schedule=reference["schedule_type"],
    end_learning_rate=reference["cosine_decay_kwargs"]["end_value"],
    step_boundaries=tuple(reference["step_decay_kwargs"]["decay_boundaries"]),
    step_factor=reference["step_decay_kwargs"]["decay_rate"],
    clip_norm=reference["max_norm"],
    b1=reference["sgd_kwargs"]["decay"] if name == "sgd" else moments["b1"],
    b2=moments["b2"],
    eps=moments["eps"],
  )


def _config(model, train_steps, **train) -> Config:
  return Config(
    model=model,
    data=DataConfig(task="copy"),
    train=TrainConfig(steps=train_steps, batch_size=4, **train),
    eval=EvalConfig(batch_size=4),
  )


def _batch(events, positions, num_latents) -> dict[str, np.ndarray]:
  """The batch of rows of events, [B, L + 1], padded on the right as the reference does."""
  lengths = (events > 0).sum(axis=1)
  events, positions = golden.right_align(events, lengths), golden.right_align(positions, lengths)
  targets = events[:, -num_latents:]
  return {
    "inputs": events[:, :-1],
    "positions": positions[:, :-1],
    "targets": targets,
    "weights": (targets > 0).astype(np.float32),
  }


@pytest.mark.slow
@pytest.mark.parametrize("run", ["adam_cosine", "sgd_constant", "lamb_steps", "adam_t5_noclip"])
def test_four_steps_of_two_microbatches_match_the_reference(run):
  case = golden.Case("train_and_eval")
  reference = json.loads(str(case[f"{run}/optimizer_config"]))
  model, params = haiku.convert(case.tree("params"), case.kwargs)
  config = _config(
    model,
    reference["training_steps"],
    microbatches=2,
    loss_reduction="sum",
    optimizer=_optimizer_config(reference),
  )
  optimizer = optimizer_lib.make_optimizer(config.train.optimizer, config.train.steps)
  schedule = optimizer_lib.make_schedule(config.train.optimizer, config.train.steps)
  state = step_lib.TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))
  step = jax.jit(step_lib.make_train_step(config, optimizer))
  for index in range(4):
    np.testing.assert_allclose(schedule(index), case[f"{run}/scalars/learning_rate"][index], rtol=1e-5)
    # The reference keeps microbatches apart: [microbatch, row]; ours takes every second row for each.
    events, positions = (
      case[name][index].swapaxes(0, 1).reshape(4, *case[name].shape[3:]) for name in ("events", "event_idxs")
    )
    state, metrics = step(state, _batch(events, positions, model.num_latents), jax.random.key(0))
    total = (metrics["loss"] + metrics["z_loss"]) * metrics["num_tokens"]
    np.testing.assert_allclose(total, case[f"{run}/scalars/train_total_loss"][index], rtol=2e-5)
    np.testing.assert_allclose(metrics["grad_norm"], case[f"{run}/scalars/global_gradient_norm"][index], rtol=1e-4)
    np.testing.assert_allclose(metrics["num_tokens"], case[f"{run}/scalars/train_num_next_events"][index])
  # The reference stored part of its parameters: compare where they exist.
  stored = {**case.tree("params")}
  after = case.tree(f"{run}/params_after")
  merged = {module: {**values, **after.get(module, {})} for module, values in stored.items()}
  marks = {
    module: {name: np.full(value.shape, float(name in after.get(module, {}))) for name, value in values.items()}
    for module, values in stored.items()
  }
  _, expected = haiku.convert(merged, case.kwargs)
  _, exists = haiku.convert(marks, case.kwargs)
  for (path, ours), theirs, mark in zip(
    jax.tree.leaves_with_path(state.params), jax.tree.leaves(expected), jax.tree.leaves(exists), strict=True
  ):
    name = jax.tree_util.keystr(path)
    if name.endswith("['key']['bias']"):
      # A shift of every key leaves the softmax as it is: where rotary does not act, the gradient is rounding
      # noise that Adam turns into steps of full size. Only the rotated half of each head (4 of 8) is defined.
      ours, theirs = (leaf.reshape(*leaf.shape[:-1], 4, 8)[..., :4] for leaf in (ours, theirs))
    if mark.any():
      np.testing.assert_allclose(ours, theirs, atol=5e-5, rtol=1e-4, err_msg=name)


@pytest.mark.parametrize(
  "name", ["constant_warmup0", "constant_warmup4", "cosine_warmup0", "steps_warmup0", "steps_warmup4", "t5_warmup4"]
)
def test_learning_rates_match_the_reference(name):
  schedule, warmup = name.split("_warmup")
  config = OptimizerConfig(learning_rate=1e-2, warmup_steps=int(warmup), schedule=schedule, end_learning_rate=1e-3)
  ours = optimizer_lib.make_schedule(config, steps=20)
  rates = [ours(step) for step in range(40)]
  np.testing.assert_allclose(rates, golden.Case("train_and_eval")[f"lr/{name}"], rtol=2e-5)


def test_cosine_reaches_its_end_at_the_last_step():
  config = OptimizerConfig(
    learning_rate=1.0, warmup_steps=10, schedule="cosine", end_learning_rate=0.1, cosine_steps=50
  )
  schedule = optimizer_lib.make_schedule(config, steps=100)
  rates = [float(schedule(step)) for step in (0, 5, 10, 49, 50, 75, 100)]
  np.testing.assert_allclose(rates, [0.0, 0.5, 1.0, 1.0, 1.0, 0.55, 0.1], atol=1e-6)


def test_wsd_is_constant_and_then_linear_to_its_end():
  config = OptimizerConfig(learning_rate=1.0, warmup_steps=10, schedule="wsd", end_learning_rate=0.2, decay_steps=40)
  schedule = optimizer_lib.make_schedule(config, steps=100)
  rates = [float(schedule(step)) for step in (0, 5, 10, 60, 80, 100)]
  np.testing.assert_allclose(rates, [0.0, 0.5, 1.0, 1.0, 0.6, 0.2], atol=1e-6)
  fifth = optimizer_lib.make_schedule(dataclasses.replace(config, decay_steps=None), steps=110)
  np.testing.assert_allclose([fifth(90), fifth(100), fifth(110)], [1.0, 0.6, 0.2], atol=1e-6)
  shorter = optimizer_lib.make_schedule(config, steps=30)  # than its decay
  np.testing.assert_allclose([shorter(10), shorter(20), shorter(30)], [1.0, 0.6, 0.2], atol=1e-6)


def test_muon_orthogonalizes_hidden_kernels_of_each_layer_and_leaves_the_rest_to_nadam():
  rule = optimizer_lib.OPTIMIZERS["muon"](OptimizerConfig(name="muon"))
  adam = optax.scale_by_adam(nesterov=True)
  rng = np.random.default_rng(0)
  shapes = {
    "layers_0": {"kernel": (2, 8, 32), "bias": (2, 32)},
    "embed": {"tokens": (11, 8)},
    "to_logits": {"kernel": (8, 11)},
  }
  gradients = jax.tree.map(lambda shape: rng.normal(size=shape), shapes, is_leaf=lambda leaf: isinstance(leaf, tuple))
  params = jax.tree.map(np.zeros_like, gradients)
  updates, state = rule.update(gradients, rule.init(params), params)
  for update in updates["layers_0"].pop("kernel"):
    # Newton-Schulz brings singular values near 1; scaled to a root mean square of 0.2 for the larger dimension.
    values = np.linalg.svd(np.asarray(update), compute_uv=False) / (0.2 * 32**0.5)
    assert 0.5 < values.min() and values.max() < 1.5
  expected, _ = adam.update(gradients, adam.init(params), params)
  expected["layers_0"].pop("kernel")
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), updates, expected)


def test_the_momentum_of_muon_is_sharded_as_its_weight():
  config = tiny.config(train__optimizer__name="muon", mesh__fsdp=1, mesh__data=-1)
  optimizer = optimizer_lib.make_optimizer(config.train.optimizer, config.train.steps)
  abstract = step_lib.abstract_state(config, optimizer, make_mesh(config.mesh, jax.devices()[:1]))
  momentum = abstract.opt_state[1].inner_states["muon"].inner_state[0].mu["layers_0"]["mlp"]["up"]["kernel"]
  weight = abstract.params["layers_0"]["mlp"]["up"]["kernel"]
  assert momentum.shape == weight.shape and momentum.sharding == weight.sharding


def _after_three_updates(optimizer, weights, gradients, path) -> dict[str, jax.Array]:
  """`weights` at `path` of a tree of parameters, after one update for each leading index of `gradients`."""

  def nest(tree):
    return functools.reduce(lambda tree, key: {key: tree}, reversed(path), tree)

  @jax.jit
  def train(weights, gradients):
    params = nest(weights)
    state = optimizer.init(params)
    for step in range(3):
      gradient = {key: array[step] for key, array in gradients.items()}
      updates, state = optimizer.update(nest(gradient), state, params)
      params = optax.apply_updates(params, updates)
    return functools.reduce(lambda tree, key: tree[key], path, params)

  return train(weights, gradients)


@pytest.mark.parametrize(
  ("name", "path"),
  # Perceiver AR's layers, and, for the rules that look at paths, those of Transformer-XL.
  [
    *((name, ("layers_0",)) for name in optimizer_lib.OPTIMIZERS),
    *((n, ("segments", "layers")) for n in ("muon", "sm3")),
  ],
)
def test_stacked_layers_are_updated_as_optax_updates_them_unstacked(name, path, monkeypatch):
  config = OptimizerConfig(name=name, learning_rate=0.1, clip_norm=0.0, weight_decay=0.01)
  optimizer = optimizer_lib.make_optimizer(config, steps=10)
  monkeypatch.setattr(optimizer_lib, "_per_layer", lambda rule: rule)
  plain = optimizer_lib.make_optimizer(config, steps=10)
  rng = np.random.default_rng(0)
  shapes = {"kernel": (128, 130), "bias": (4,)}  # Adafactor factors the second moment of matrices from 128 x 128 on
  weights = {key: rng.normal(size=(2, *shape)).astype(np.float32) for key, shape in shapes.items()}
  gradients = {key: rng.normal(size=(3, 2, *shape)).astype(np.float32) for key, shape in shapes.items()}
  for key in shapes:  # two layers of different scales
    weights[key][1] *= 100
    gradients[key][:, 1] *= 10
  stacked = _after_three_updates(optimizer, weights, gradients, path)
  for layer in range(2):
    alone = [{key: array[layer] for key, array in weights.items()}, {k: a[:, layer] for k, a in gradients.items()}]
    expected = _after_three_updates(plain, *alone, ("to_latents",))
    for key in shapes:
      np.testing.assert_allclose(stacked[key][layer], expected[key], rtol=1e-5, atol=1e-6, err_msg=f"{key} {layer}")


def test_factored_second_moments_have_the_shapes_of_one_layer_and_whole_ones_the_sharding_of_their_weight():
  config = tiny.config(
    train__optimizer__name="adafactor", model__latent_width=128, model__embed_width=64, mesh__fsdp=1, mesh__data=-1
  )
  optimizer = optimizer_lib.make_optimizer(config.train.optimizer, config.train.steps)
  abstract = step_lib.abstract_state(config, optimizer, make_mesh(config.mesh, jax.devices()[:1]))
  rule = abstract.opt_state[1][0]["layers_0"]["mlp"]["up"]
  assert rule["kernel"].v_row.shape == (2, 128) and rule["kernel"].v_col.shape == (2, 512)
  assert rule["kernel"].v.shape == (2, 1)
  assert rule["bias"].v.shape == (2, 512) and rule["bias"].count.shape == (2,)
  assert rule["bias"].v.sharding == abstract.params["layers_0"]["mlp"]["up"]["bias"].sharding


@pytest.mark.parametrize("name", optimizer_lib.OPTIMIZERS)
def test_every_optimizer_lowers_a_quadratic(name):
  config = OptimizerConfig(name=name, learning_rate=0.02, weight_decay=1e-3 if name == "adamw" else 0.0)
  optimizer = optimizer_lib.make_optimizer(config, steps=60)
  kernel = 3 * jax.random.orthogonal(jax.random.key(0), 4, (2,))  # of full rank, since Muon moves singular values
  params = {"layers": {"kernel": kernel, "bias": jnp.ones((2, 4))}}
  state = optimizer.init(params)

  def loss(params):
    return sum(jnp.square(leaf).sum() for leaf in jax.tree.leaves(params))

  @jax.jit
  def update(params, state):
    updates, state = optimizer.update(jax.grad(loss)(params), state, params)
    return optax.apply_updates(params, updates), state

  before = loss(params)
  for _ in range(60):
    params, state = update(params, state)
  assert loss(params) < 0.9 * before


@pytest.mark.slow
def test_microbatches_equal_one_batch():
  """Of means; sums over microbatches are compared with the reference above."""
  settings = {"model__dropout": 0.0, "train__loss_reduction": "mean", "train__optimizer__name": "sgd"}
  config, results = tiny.config(**settings, train__optimizer__warmup_steps=0, train__optimizer__learning_rate=0.1), []
  params, batch = tiny.random_params(config.model), next(TrainLoader(config))
  batch["weights"][1, :5] = 0  # unequal numbers of targets must not change the mean
  for microbatches in (1, 4):
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, microbatches=microbatches))
    optimizer = optimizer_lib.make_optimizer(config.train.optimizer, 10)
    state = step_lib.TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))
    results.append(jax.jit(step_lib.make_train_step(config, optimizer))(state, batch, jax.random.key(0)))
  (whole, whole_metrics), (split, split_metrics) = results
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), whole.params, split.params)
  np.testing.assert_allclose(whole_metrics["grad_norm"], split_metrics["grad_norm"], rtol=1e-5)
  np.testing.assert_allclose(whole_metrics["loss"], split_metrics["loss"], rtol=1e-6)


@pytest.mark.slow
def test_an_update_that_is_not_finite_leaves_the_state_and_the_next_one_as_they_would_be():
  config = tiny.config(model__dropout=0.0, model__num_layers=1, train__on_nonfinite="skip", train__ema_decay=0.9)
  optimizer = optimizer_lib.make_optimizer(config.train.optimizer, config.train.steps)
  mesh = make_mesh(MeshConfig(), jax.devices()[:1])
  step = jax.jit(step_lib.make_train_step(config, optimizer))
  good = next(TrainLoader(config))
  state = step_lib.init_state(config, optimizer, mesh, tiny.random_params(config.model))
  state, _ = step(state, good, jax.random.key(0))
  skipped, metrics = step(state, good | {"weights": good["weights"] * np.inf}, jax.random.key(0))
  assert not np.isfinite(metrics["loss"]) and skipped.step == state.step + 1
  before, after = (jax.tree.leaves((each.params, each.opt_state, each.ema)) for each in (state, skipped))
  jax.tree.map(np.testing.assert_array_equal, after, before)
  assert np.isfinite(step(skipped, good, jax.random.key(0))[1]["loss"])


def test_the_average_of_the_weights_follows_its_definition_and_changes_nothing_else():
  settings = {"model__dropout": 0.0, "model__num_layers": 1}
  config, without = tiny.config(**settings, train__ema_decay=0.85), tiny.config(**settings)
  optimizer, mesh = optimizer_lib.make_optimizer(config.train.optimizer, 12), make_mesh(MeshConfig(), jax.devices()[:1])
  given = (tiny.random_params(config.model) for _ in range(2))  # which are donated
  state, plain = (step_lib.init_state(each, optimizer, mesh, next(given)) for each in (config, without))
  step, plain_step = (
    jax.jit(step_lib.make_train_step(each, optimizer), donate_argnums=0) for each in (config, without)
  )
  loader, expected = TrainLoader(config), jax.tree.map(np.array, state.params)
  for decay in (2 / 11, 3 / 12, 4 / 13):  # (1 + n) / (10 + n) while this is below 0.85
    batch = next(loader)
    state, plain = step(state, batch, jax.random.key(0))[0], plain_step(plain, batch, jax.random.key(0))[0]
    expected = jax.tree.map(lambda a, b, decay=decay: decay * a + (1 - decay) * b, expected, state.params)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state.params_to_evaluate, expected)
  jax.tree.map(np.testing.assert_array_equal, state.params, plain.params)
  assert plain.params_to_evaluate is plain.params
  *others, scale = state.opt_state
  late, before = (
    state.replace(opt_state=(*others, scale._replace(count=jnp.int32(1000)))),
    jax.tree.map(np.array, state.ema),
  )
  late, _ = step(late, batch, jax.random.key(0))
  expected = jax.tree.map(lambda a, b: 0.85 * a + 0.15 * b, before, late.params)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), late.params_to_evaluate, expected)


def test_positions_that_the_model_ignores_are_neither_made_nor_needed():
  settings = {"model__position_encoding": "rotary", "model__position_sizes": (), "model__dropout": 0.0}
  config = tiny.config(**settings, model__positions_from_data=False)
  batch, with_positions = next(TrainLoader(config)), next(TrainLoader(tiny.config(**settings)))
  assert "positions" not in batch and with_positions.keys() == {*batch, "positions"}
  optimizer = optimizer_lib.make_optimizer(config.train.optimizer, config.train.steps)
  state = step_lib.init_state(config, optimizer, make_mesh(config.mesh), tiny.random_params(config.model))
  step = jax.jit(step_lib.make_train_step(config, optimizer))
  losses = [float(step(state, rows, jax.random.key(0))[1]["loss"]) for rows in (batch, with_positions)]
  assert losses[0] == losses[1]


def test_targets_of_packed_batches_are_counted_and_split_into_microbatches():
  results = []
  for microbatches in (1, 2):
    settings = {"data__packing": 3, "data__min_crop": 2, "train__microbatches": microbatches}
    config = tiny.config(**settings, model__dropout=0.0)
    batch, optimizer = next(TrainLoader(config)), optimizer_lib.make_optimizer(config.train.optimizer, 10)
    params = tiny.random_params(config.model)
    state = step_lib.TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))
    _, metrics = jax.jit(step_lib.make_train_step(config, optimizer))(state, batch, jax.random.key(0))
    assert batch["segments"].max() > 1 and metrics["num_tokens"] == (batch["targets"] > 0).sum()
    results.append(metrics)
  for name in ("loss", "grad_norm", "accuracy"):
    np.testing.assert_allclose(results[0][name], results[1][name], rtol=1e-5)
