"""FLOPs and parameters: hand-counted, against the model's own shapes, and against XLA's count where it has no loops."""

import dataclasses
import importlib

import jax
import jax.numpy as jnp
import pytest

from perceiver_ar_jax import ModelConfig
from perceiver_ar_jax import config as config_lib
from perceiver_ar_jax.evaluation.evaluate import make_eval_step
from perceiver_ar_jax.models.architectures import make_model
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


XL_SHAPE = {"architecture": "transformer_xl", "position_encoding": "relative", "segment": 96}


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


# S 2, C 3, D 4, E 3, F 8, V 5, one layer: of 6 inputs the last two segments are leading and one holds the 2 latents.
XL = SMALL | {
  "model__architecture": "transformer_xl",
  "model__position_encoding": "relative",
  "model__segment": 2,
  "model__memory": 3,
}
# Multiply-adds of one sequence's segment: latents from embeddings 2*3*4; projections 2*4*(4*4); keys and values of the
# memory 3*2*(4*4); scores by content and by distance, and values, 3 * 2*5*4; MLP 2*(4*8 + 8*4). Once for all
# sequences: encodings of distances 5*4*4. Logits 2*4*5.
XL_ROW, XL_MEMORY, XL_SCORES, XL_DISTANCES, XL_LOGITS = 24 + 128 + 96 + 120 + 128, 96, 120, 80, 40


def test_a_step_of_transformer_xl_counted_by_hand():
  config = tiny.config(**XL)
  assert flops.eval_step(config).useful == 2 * (3 * (7 * XL_ROW + XL_DISTANCES) + 7 * XL_LOGITS)
  leading = 2 * (3 * XL_ROW + XL_DISTANCES)  # forward alone
  useful = 2 * (leading + 3 * 3 * (XL_ROW + XL_LOGITS) - 3 * XL_MEMORY + 2 * XL_DISTANCES)
  assert flops.train_step(config) == flops.Flops(useful=useful, executed=useful)
  for changes, again in (
    ({"model__remat": "dots"}, 3 * XL_SCORES),
    # Not the embeddings' 24 nor the MLP's second 64.
    ({"model__remat": "full"}, 3 * (XL_ROW - 24 - 64) + XL_DISTANCES),
    ({"model__logits_chunk": 1}, 3 * XL_LOGITS),
  ):
    counted = flops.train_step(tiny.config(**XL | changes))
    assert counted == flops.Flops(useful=useful, executed=useful + 2 * again), changes


def test_cross_attend_dropout_and_ids_looked_up_cost_less():
  whole = flops.train_step(tiny.config(**SMALL)).useful
  # Half of the four inputs before the latents are left out: keys and values 4*48 for 6*48, scores and values likewise.
  dropped = flops.train_step(tiny.config(**SMALL, model__cross_attend_dropout=0.5)).useful
  assert whole - dropped == 3 * 3 * 2 * (2 * 48 + 2 * 2 * 16)
  # Rotary and more inputs than ids: keys and values of 5 ids once, not of 3 * 6 inputs.
  rotary = {"model__position_encoding": "rotary", "model__position_sizes": ()}
  assert whole - flops.train_step(tiny.config(**SMALL | rotary)).useful == 3 * 2 * (18 - 5) * 48


@pytest.mark.parametrize(
  "changes",
  [
    {"remat": "none"},
    {"remat": "full"},
    {"remat": "dots", "cross_attend_after": (0,), "embed_width": 192, "cross_attend_width": 64},
    # One segment alone: no loop either. With dots, XLA finds without a loop what it has and does not compute it again.
    *({**XL_SHAPE, "segment": 192, "memory": 96, "num_latents": 192, "remat": how} for how in ("none", "full")),
  ],
  ids=lambda value: f"{value.get('architecture', 'perceiver_ar')}-{value['remat']}",
)
def test_a_step_costs_what_xla_counts(changes):
  """One layer, plain attention, so that the compiled step has no loop; XLA counts what is no matrix product as well."""
  config = tiny.config(
    model__max_context=192,
    model__num_layers=1,
    model__latent_width=128,
    model__position_sizes=(194,),
    model__attention="reference",
    model__dropout=0.0,
    **{f"model__{name}": value for name, value in ({"num_latents": 96} | changes).items()},
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
  return make_model(model).init(jax.random.key(0), tokens, jnp.ones((*tokens.shape, 1), jnp.int32))["params"]


def _batch(config, rows: int):
  model = config.model
  ints = {"inputs": (model.max_context,), "positions": (model.max_context, 1), "targets": (model.num_latents,)}
  shapes = {name: jax.ShapeDtypeStruct((rows, *shape), jnp.int32) for name, shape in ints.items()}
  return shapes | {"weights": jax.ShapeDtypeStruct((rows, model.num_latents), jnp.float32)}


@pytest.mark.parametrize(
  ("name", "changes"),
  [
    *((name, {"cross_attend_after": (1,)}) for name in ("imagenet64", "pg19", "copy131072")),
    ("text_files", {**XL_SHAPE, "embed_width": 32}),
  ],
)
def test_parameters_are_those_of_the_shapes(name, changes):
  model = config_lib.resolve(importlib.import_module(f"configs.{name}").get_config()).model
  model = dataclasses.replace(model, num_layers=3, **changes)
  tokens = jax.ShapeDtypeStruct((1, model.num_latents), jnp.int32)
  positions = jax.ShapeDtypeStruct((1, model.num_latents, len(model.position_sizes) or 1), jnp.int32)
  shapes = jax.eval_shape(make_model(model).init, jax.random.key(0), tokens, positions)
  assert flops.num_params(model) == sum(leaf.size for leaf in jax.tree.leaves(shapes))
