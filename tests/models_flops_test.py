"""FLOPs and parameters: counted by hand, compared with the model's shapes and with XLA's count of a loop-free step."""

import jax
import jax.numpy as jnp
import pytest

from perceiver_ar_jax.evaluation.evaluate import make_eval_step
from perceiver_ar_jax.models import architectures
from perceiver_ar_jax.training import optimizer as optimizer_lib
from perceiver_ar_jax.training import step as step_lib
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
  assert architectures.eval_flops(config) == 7 * BY_HAND
  assert architectures.train_flops(config) == 3 * 3 * BY_HAND
  # What the backward pass recomputes, or does in parts, does not count.
  for changes in ({"model__remat": "full"}, {"model__attention": "streamed"}, {"model__logits_chunk": 1}):
    assert architectures.train_flops(tiny.config(**SMALL | changes)) == 3 * 3 * BY_HAND


# S 2, C 3, D 4, E 3, F 8, V 5, one layer: 6 inputs in three segments.
XL = SMALL | {
  "model__architecture": "transformer_xl",
  "model__position_encoding": "relative",
  "model__segment": 2,
  "model__memory": 3,
}
# Multiply-adds of one sequence's segment: latents from embeddings 2*3*4; projections 2*4*(4*4); keys and values of the
# memory 3*2*(4*4); scores by content and by distance, and values, 3 * 2*5*4; MLP 2*(4*8 + 8*4). Once for all
# sequences: encodings of distances 5*4*4. Logits 2*4*5.
XL_ROW, XL_MEMORY, XL_DISTANCES, XL_LOGITS = 24 + 128 + 96 + 120 + 128, 96, 80, 40


def test_a_step_of_transformer_xl_counted_by_hand():
  config = tiny.config(**XL)
  assert architectures.eval_flops(config) == 2 * (3 * (7 * XL_ROW + XL_DISTANCES) + 7 * XL_LOGITS)
  segment = 3 * (3 * XL_ROW - XL_MEMORY) + 2 * XL_DISTANCES
  assert architectures.train_flops(config) == 2 * (3 * segment + 3 * 3 * XL_LOGITS)


def test_cross_attend_dropout_and_ids_looked_up_cost_less():
  whole = architectures.train_flops(tiny.config(**SMALL))
  # Half of the four inputs before the latents are left out: keys and values 4*48 for 6*48, scores and values likewise.
  dropped = architectures.train_flops(tiny.config(**SMALL, model__cross_attend_dropout=0.5))
  assert whole - dropped == 3 * 3 * 2 * (2 * 48 + 2 * 2 * 16)
  # Rotary and more inputs than ids: keys and values of 5 ids once, not of 3 * 6 inputs.
  rotary = {"model__position_encoding": "rotary", "model__position_sizes": ()}
  assert whole - architectures.train_flops(tiny.config(**SMALL | rotary)) == 3 * 2 * (18 - 5) * 48


@pytest.mark.parametrize(
  "changes",
  [
    {},
    {"cross_attend_after": (0,), "embed_width": 192, "cross_attend_width": 64},
    {"value_features": 128, "conv_taps": 2, "qk_norm": True},
    {**XL_SHAPE, "segment": 192, "memory": 96, "num_latents": 192},  # one segment only, so that there is no loop
  ],
  ids=["perceiver_ar", "two_cross_attends", "options", "transformer_xl"],
)
def test_a_step_costs_what_xla_counts(changes):
  """One layer, plain attention and no remat, so that XLA has neither a loop nor recomputation to count."""
  config = tiny.config(
    model__max_context=192,
    model__num_layers=1,
    model__latent_width=128,
    model__position_sizes=(194,),
    model__attention="reference",
    model__dropout=0.0,
    model__remat="none",
    **{f"model__{name}": value for name, value in ({"num_latents": 96} | changes).items()},
  )
  optimizer = optimizer_lib.make_optimizer(config.train.optimizer, config.train.steps)
  batch = _batch(config, config.train.batch_size)
  params = architectures.abstract_params(config.model)
  state = step_lib.TrainState(jax.ShapeDtypeStruct((), jnp.int32), params, jax.eval_shape(optimizer.init, params))
  key = jax.eval_shape(lambda: jax.random.key(0))
  step = jax.jit(step_lib.make_train_step(config, optimizer)).lower(state, batch, key)
  assert architectures.train_flops(config) == pytest.approx(step.cost_analysis()["flops"], rel=0.05)
  rows = config.eval.batch_size
  indices = {name: jax.ShapeDtypeStruct((rows,), jnp.int32) for name in ("document", "end")}
  scored = jax.jit(make_eval_step(config)).lower(params, _batch(config, rows) | indices)
  assert architectures.eval_flops(config) == pytest.approx(scored.cost_analysis()["flops"], rel=0.05)


def _batch(config, rows: int):
  model = config.model
  ints = {"inputs": (model.max_context,), "positions": (model.max_context, 1), "targets": (model.num_latents,)}
  shapes = {name: jax.ShapeDtypeStruct((rows, *shape), jnp.int32) for name, shape in ints.items()}
  return shapes | {"weights": jax.ShapeDtypeStruct((rows, model.num_latents), jnp.float32)}
