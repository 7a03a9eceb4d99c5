"""FLOPs and parameters: hand-counted, against the model's own shapes, and against XLA's count where it has no loops."""

import dataclasses
import importlib

import jax
import jax.numpy as jnp
import pytest

from perceiver_ar_jax import ModelConfig, PerceiverAR
from perceiver_ar_jax import config as config_lib
from perceiver_ar_jax.evaluation.evaluate import make_eval_step
from perceiver_ar_jax.models import attention_kernels
from perceiver_ar_jax.parallel import flops
from perceiver_ar_jax.training import optimizer as optimizer_lib
from perceiver_ar_jax.training import step as step_lib
from perceiver_ar_jax.training.state import TrainState
from tests import tiny

# L 6, M 2, D 4, E 3, C 8, F 8, V 5, one layer.
SMALL = {
  "model__max_context": 6,
  "model__num_latents": 2,
  "model__num_layers": 1,
  "model__latent_width": 4,
  "model__embed_width": 3,
  "model__cross_attend_width": 8,
  "model__mlp_widening": 2,
  "model__vocab_size": 5,
  "model__position_sizes": (8,),
  "model__attention": "reference",
  "model__remat": "none",
  "train__batch_size": 3,
  "eval__batch_size": 7,
}
# Multiply-adds of one sequence: latents from embeddings 2*3*4; cross-attend: queries and out 2*(4*8 + 8*4), keys and
# values 6*(3*8 + 3*8), scores and values 2*(6*8 + 6*8), MLP 2*(4*8 + 8*4); layer: projections 2*4*(4*4), scores and
# values 2*(2*4 + 2*4), MLP 2*(4*8 + 8*4); logits 2*4*5.
BY_HAND = 2 * (24 + 128 + 288 + 192 + 128 + 128 + 32 + 128 + 40)


def test_a_step_counted_by_hand():
  config = tiny.config(**SMALL)
  assert flops.eval_step(config).useful == 7 * BY_HAND
  assert flops.train_step(config) == flops.Flops(useful=3 * 3 * BY_HAND, executed=3 * 3 * BY_HAND)


@pytest.mark.parametrize(
  ("changes", "again"),
  [
    # A layer again, without the product whose output nobody reads: projections 128, attention 32, the MLP's first 64.
    ({"model__remat": "full"}, 2 * (128 + 32 + 64)),
    # Dense products are kept, so attention alone: scores and values.
    ({"model__remat": "dots"}, 2 * 32),
    # Walks: the cross-attend's scores 96, keys and values 288, the layer's scores 16.
    ({"model__attention": "streamed"}, 2 * (96 + 288 + 16)),
    ({"model__attention": "chunked"}, 2 * (96 + 16)),
    ({"model__logits_chunk": 1}, 2 * 40),
  ],
  ids=lambda value: str(value)[:40],
)
def test_what_is_computed_again_counted_by_hand(changes, again):
  counted = flops.train_step(tiny.config(**SMALL | changes))
  assert counted.useful == 9 * BY_HAND
  assert counted.executed - counted.useful == 3 * again


def test_cross_attend_dropout_and_ids_looked_up_cost_less():
  whole = flops.train_step(tiny.config(**SMALL)).useful
  # Half of the four inputs before the latents are left out: keys and values 4*48 for 6*48, scores and values likewise.
  dropped = flops.train_step(tiny.config(**SMALL, model__cross_attend_dropout=0.5)).useful
  assert whole - dropped == 3 * 3 * 2 * (2 * 48 + 2 * 2 * 16)
  # Rotary and more inputs than ids: keys and values of 5 ids once, not of 3 * 6 inputs.
  rotary = {"model__position_encoding": "rotary", "model__position_sizes": ()}
  assert whole - flops.train_step(tiny.config(**SMALL | rotary)).useful == 3 * 2 * (18 - 5) * 48


def test_walks_from_where_the_kernels_do():
  model = tiny.config(model__attention="auto").model
  assert attention_kernels._LARGE == flops._WALKS_FROM, "auto walks from another size: change flops._WALKS_FROM too"
  assert flops.walks(model, 2**7, 2**8) and not flops.walks(model, 2**7 - 1, 2**8)


@pytest.mark.parametrize(
  "changes",
  [
    {"remat": "none"},
    {"remat": "full"},
    {"remat": "dots", "cross_attend_after": (0,), "embed_width": 192, "cross_attend_width": 64},
  ],
  ids=lambda value: value["remat"],
)
def test_a_step_costs_what_xla_counts(changes):
  """One layer, plain attention, so that the compiled step has no loop; XLA counts what is no matrix product as well."""
  config = tiny.config(
    model__max_context=192,
    model__num_latents=96,
    model__num_layers=1,
    model__latent_width=128,
    model__position_sizes=(194,),
    model__attention="reference",
    model__dropout=0.0,
    **{f"model__{name}": value for name, value in changes.items()},
  )
  optimizer = optimizer_lib.make_optimizer(config.train.optimizer, config.train.steps)
  batch = _batch(config, config.train.batch_size)
  params = jax.eval_shape(lambda: _init(config.model))
  state = TrainState(jax.ShapeDtypeStruct((), jnp.int32), params, jax.eval_shape(optimizer.init, params))
  key = jax.eval_shape(lambda: jax.random.key(0))
  compiled = jax.jit(step_lib.make_train_step(config, optimizer)).lower(state, batch, key).compile()
  assert flops.train_step(config).executed == pytest.approx(compiled.cost_analysis()["flops"], rel=0.05)
  rows = config.eval.batch_size
  places = {name: jax.ShapeDtypeStruct((rows,), jnp.int32) for name in ("document", "end")}
  scored = jax.jit(make_eval_step(config)).lower(params, _batch(config, rows) | places).compile()
  assert flops.eval_step(config).useful == pytest.approx(scored.cost_analysis()["flops"], rel=0.05)


def _init(model: ModelConfig):
  tokens = jnp.ones((1, model.num_latents), jnp.int32)
  return PerceiverAR(model).init(jax.random.key(0), tokens, jnp.ones((*tokens.shape, 1), jnp.int32))["params"]


def _batch(config, rows: int):
  model = config.model
  ints = {"inputs": (model.max_context,), "positions": (model.max_context, 1), "targets": (model.num_latents,)}
  shapes = {name: jax.ShapeDtypeStruct((rows, *shape), jnp.int32) for name, shape in ints.items()}
  return shapes | {"weights": jax.ShapeDtypeStruct((rows, model.num_latents), jnp.float32)}


@pytest.mark.parametrize("name", ["imagenet64", "pg19", "copy131072"])
def test_parameters_are_those_of_the_shapes(name):
  model = config_lib.resolve(importlib.import_module(f"configs.{name}").get_config()).model
  model = dataclasses.replace(model, num_layers=3, cross_attend_after=(1,))
  tokens = jax.ShapeDtypeStruct((1, model.num_latents), jnp.int32)
  positions = jax.ShapeDtypeStruct((1, model.num_latents, len(model.position_sizes) or 1), jnp.int32)
  shapes = jax.eval_shape(PerceiverAR(model).init, jax.random.key(0), tokens, positions)
  assert flops.num_params(model) == sum(leaf.size for leaf in jax.tree.leaves(shapes))
