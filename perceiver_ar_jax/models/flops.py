"""Floating-point operations of a step and parameters of a model, computed from the config alone.

Counted are matrix products, 2 FLOPs per multiply-add, as the mathematics requires them: what the backward pass
recomputes to save memory is excluded, as usual for model FLOPs utilization. Norms, softmax, dropout and the optimizer
are excluded too; in models of practical size they add a few per cent. XLA's own count visits the body of a loop once,
and layers and chunks of the context are loops, so it cannot be used here.

Shape letters: models/perceiver_ar.py, and C for the width of the cross-attention.
"""

from ml_collections import config_dict

from perceiver_ar_jax.config import Config, ModelConfig, resolve


def train_step(config: Config) -> int:
  """Returns the FLOPs of one update over all devices: forward, and backward at twice the forward cost."""
  model, rows = config.model, config.train.batch_size // config.train.microbatches
  if model.architecture == "transformer_xl":
    return config.train.microbatches * _transformer_xl_step(model, rows)
  length = model.num_latents + round((1 - model.cross_attend_dropout) * (model.max_context - model.num_latents))
  return config.train.microbatches * 3 * _forward(model, rows, length, model.num_latents)


def eval_step(config: Config) -> int:
  """Returns the FLOPs of scoring one batch of windows over all devices."""
  model, rows, latents = config.model, config.eval.batch_size, config.eval.num_latents or config.model.num_latents
  if model.architecture == "transformer_xl":
    leading, predicting = model.segments(model.max_context, latents)
    return (leading + predicting) * sum(_segment(model, rows).values()) + _logits(model, rows, latents)
  return _forward(model, rows, model.max_context, latents)


def spend(config: config_dict.ConfigDict, total_flops: float) -> None:
  """Sets `train.steps` to the number of updates that `total_flops` pay for, at least one."""
  config.train.steps = max(int(total_flops / train_step(resolve(config))), 1)


def num_params(model: ModelConfig) -> int:
  """Returns the number of weights."""
  d, e, c, v = model.latent_width, model.input_width, model.cross_width, model.vocab_size
  f, norm = model.mlp_widening * d, 2
  mlp = norm * d + _dense(d, f) + _dense(f, d)
  cross_attend = norm * (d + e) + 2 * _dense(e, c) + _dense(d, c) + _dense(c, d) + mlp
  layer = norm * d + 4 * _dense(d, d) + mlp
  tables = v * e + (sum(model.position_sizes) * e if model.position_encoding == "learned" else 0)
  if model.architecture == "transformer_xl":
    blocks = model.num_layers * (layer + d * d + 2 * d)  # the projection of distances, u and v
  else:
    blocks = model.num_cross_attends * cross_attend + model.num_layers * layer
  return tables + _dense(e, d) + blocks + norm * d + _dense(d, v)


def _dense(inputs: int, outputs: int) -> int:
  return (inputs + 1) * outputs


def _forward(model: ModelConfig, rows: int, length: int, latents: int) -> int:
  """Returns the FLOPs of a forward pass over `rows` sequences of `length` inputs."""
  d, e, c = model.latent_width, model.input_width, model.cross_width
  mlp = 2 * 2 * d * model.mlp_widening * d
  cross_attend = 2 * 2 * d * c + 2 * 2 * length * c + mlp  # query and output; scores and values
  layer = 4 * 2 * d * d + 2 * 2 * latents * d + mlp
  per_latent = 2 * e * d + model.num_cross_attends * cross_attend + model.num_layers * layer
  # With rotary positions and more inputs than token ids, keys and values are projected once per id.
  per_id = model.position_encoding == "rotary" and model.vocab_size <= length
  keys_values = 2 * 2 * e * c * (model.vocab_size if per_id else rows * length)
  return rows * latents * per_latent + model.num_cross_attends * keys_values + _logits(model, rows, latents)


def _logits(model: ModelConfig, rows: int, latents: int) -> int:
  return rows * latents * 2 * model.latent_width * model.vocab_size


def _transformer_xl_step(model: ModelConfig, rows: int) -> int:
  """Returns the FLOPs of one update. Leading segments, states of the memory and distances have no backward pass.

  All layers of leading segments are counted because they are computed, although not all of their states are read.
  """
  leading, predicting = model.segments(model.max_context, model.num_latents)
  parts = _segment(model, rows)
  forward, constant = sum(parts.values()), parts["memory_keys_values"] + parts["distances"]
  return leading * forward + predicting * (3 * forward - constant) + 3 * _logits(model, rows, model.num_latents)


def _segment(model: ModelConfig, rows: int) -> dict[str, int]:
  """Returns the forward FLOPs of one segment of `rows` sequences by kind of product, without logits."""
  assert model.segment  # validated for this architecture
  d, n, size, memory = model.latent_width, model.num_layers, model.segment, model.remembered
  return {
    "to_latents": rows * size * 2 * model.input_width * d,
    "projections": n * rows * size * 4 * 2 * d * d,
    "memory_keys_values": n * rows * memory * 2 * 2 * d * d,
    "distances": n * (memory + size) * 2 * d * d,  # once for all rows
    "scores_values": 3 * n * rows * size * 2 * (memory + size) * d,  # scores by content and by distance; values
    "mlp": n * rows * size * 2 * 2 * d * model.mlp_widening * d,
  }
