"""Floating-point operations of a step, counted from the config: those of its matrix products, 2 for each multiply-add.

XLA's own count takes the body of a loop once, and layers and the walk over the context are loops. What is not a matrix
product (norms, softmax, dropout, the optimizer) is left out; for models of use it is a few per cent. Shape letters:
models/perceiver_ar.py, and C for the width of the cross-attend. Transformer-XL stands at the end.
"""

import dataclasses

from ml_collections import config_dict

from perceiver_ar_jax.config import Config, ModelConfig, resolve
from perceiver_ar_jax.models import attention, layers, positions, transformer_xl


@dataclasses.dataclass(frozen=True)
class Flops:
  """One step, over all devices."""

  useful: int
  """What the mathematics asks for: the products forward, and twice that backward; for model FLOPs utilization."""
  executed: int
  """With what is computed again in the backward pass to save memory: what the devices really do."""


def train_step(config: Config) -> Flops:
  """One update: forward, backward, all microbatches."""
  model, microbatches = config.model, config.train.microbatches
  rows = config.train.batch_size // microbatches
  if model.architecture == "transformer_xl":
    return _transformer_xl_step(model, rows, microbatches)
  length = model.num_latents + round((1 - model.cross_attend_dropout) * (model.max_context - model.num_latents))
  parts = _forward(model, rows, length, model.num_latents)
  forward = sum(parts.values())
  return Flops(microbatches * 3 * forward, microbatches * (3 * forward + _again(model, parts, length)))


def spend(config: config_dict.ConfigDict, total: float) -> None:
  """Sets `train.steps` to as many updates as `total` useful FLOPs pay for, but at least one."""
  config.train.steps = max(int(total / train_step(resolve(config)).useful), 1)


def eval_step(config: Config) -> Flops:
  """One batch of windows scored."""
  model, latents = config.model, config.eval.num_latents or config.model.num_latents
  if model.architecture == "transformer_xl":
    leading, predicting = transformer_xl.num_segments(model, model.max_context, latents)
    parts = _segment(model, config.eval.batch_size)
    forward = (leading + predicting) * sum(parts.values()) + _logits(model, config.eval.batch_size, latents)
  else:
    forward = sum(_forward(model, config.eval.batch_size, model.max_context, latents).values())
  return Flops(forward, forward)


def _forward(model: ModelConfig, rows: int, length: int, latents: int) -> dict[str, int]:
  """FLOPs of a forward pass over `rows` sequences of `length` inputs, by kind of product."""
  d, e, c = model.latent_width, model.input_width, model.cross_width
  f = model.mlp_widening * d
  n, crosses = model.num_layers, model.num_cross_attends
  # With rotary positions, keys and values are projected once for each token id where there are more inputs than ids.
  by_id = layers.projects_by_id(model, length)
  projected = model.vocab_size if by_id else rows * length
  per_latent = {
    "to_latents": 2 * e * d,
    "cross_query_out": crosses * 2 * 2 * d * c,
    "cross_scores": crosses * 2 * length * c,
    "cross_values": crosses * 2 * length * c,
    "cross_up": crosses * 2 * d * f,
    "cross_down": crosses * 2 * f * d,
    "layer_projections": n * 4 * 2 * d * d,
    "layer_scores": n * 2 * latents * d,
    "layer_values": n * 2 * latents * d,
    "layer_up": n * 2 * d * f,
    "layer_down": n * 2 * f * d,
  }
  parts = {name: rows * latents * value for name, value in per_latent.items()}
  parts["logits"] = _logits(model, rows, latents)
  return parts | {"cross_keys_values": crosses * projected * 2 * 2 * e * c}


def _logits(model: ModelConfig, rows: int, latents: int) -> int:
  return rows * latents * 2 * model.latent_width * model.vocab_size


def _again(model: ModelConfig, parts: dict[str, int], length: int) -> int:
  """FLOPs that the backward pass repeats. What nothing in it reads, such as an MLP's output, is not computed again."""
  cross = attention.choose(model.attention, model.num_latents, length)
  layer = attention.choose(model.attention, model.num_latents, model.num_latents)
  again = 0
  if cross.recomputes_scores:
    again += parts["cross_scores"]
  if cross.recomputes_keys and not layers.projects_by_id(model, length):
    again += parts["cross_keys_values"]
  if layer.recomputes_scores:
    again += parts["layer_scores"]
  if model.remat == "full":
    again += sum(parts[f"layer_{name}"] for name in ("projections", "scores", "values", "up"))
  elif model.remat == "dots" and not layer.recomputes_scores:  # products of attention itself are not among what is kept
    again += parts["layer_scores"] + parts["layer_values"]
  if model.logits_chunk is not None and model.logits_chunk < model.num_latents:
    again += parts["logits"]
  return again


def num_params(model: ModelConfig) -> int:
  """Weights of the model, by arithmetic alone, before any of it is traced."""
  d, e, c, v = model.latent_width, model.input_width, model.cross_width, model.vocab_size
  f, norm = model.mlp_widening * d, 2
  mlp = norm * d + _dense(d, f) + _dense(f, d)
  cross = norm * (d + e) + 2 * _dense(e, c) + _dense(d, c) + _dense(c, d) + mlp
  layer = norm * d + 4 * _dense(d, d) + mlp
  tables = v * e + (sum(model.position_sizes) * e if positions.encoding_of(model).learned else 0)
  if model.architecture == "transformer_xl":
    blocks = model.num_layers * (layer + d * d + 2 * d)  # projection of distances, u and v
  else:
    blocks = model.num_cross_attends * cross + model.num_layers * layer
  return tables + _dense(e, d) + blocks + norm * d + _dense(d, v)


def _dense(inputs: int, outputs: int) -> int:
  return (inputs + 1) * outputs


# Transformer-XL: the same products for each segment, whatever it holds.


def _transformer_xl_step(model: ModelConfig, rows: int, microbatches: int) -> Flops:
  """One update. Leading segments have no backward pass; nor have states of the memory, and encodings of distances.

  All layers of leading segments count, since they run, although of the later ones not all states are ever looked at.
  """
  leading, predicting = transformer_xl.num_segments(model, model.max_context, model.num_latents)
  parts, logits = _segment(model, rows), _logits(model, rows, model.num_latents)
  forward, constant = sum(parts.values()), parts["memory_keys_values"] + parts["distances"]
  useful = leading * forward + predicting * (3 * forward - constant) + 3 * logits
  again = 0
  if model.remat != "none":  # also with dots: products of attention itself are not among what is kept
    again += sum(parts[name] for name in ("content_scores", "distance_scores", "values"))
  if model.remat == "full":
    again += sum(parts[name] for name in ("projections", "memory_keys_values", "distances", "up"))
  chunked = model.logits_chunk is not None and model.logits_chunk < model.num_latents
  return Flops(microbatches * useful, microbatches * (useful + predicting * again + (logits if chunked else 0)))


def _segment(model: ModelConfig, rows: int) -> dict[str, int]:
  """FLOPs of one segment of `rows` sequences forward, by kind of product, without logits."""
  d, f, n = model.latent_width, model.mlp_widening * model.latent_width, model.num_layers
  size, kept = model.segment, transformer_xl.memory_size(model)
  scores = n * rows * size * 2 * (kept + size) * d
  return {
    "to_latents": rows * size * 2 * model.input_width * d,
    "projections": n * rows * size * 4 * 2 * d * d,
    "memory_keys_values": n * rows * kept * 2 * 2 * d * d,
    "distances": n * (kept + size) * 2 * d * d,  # once for all rows
    "content_scores": scores,
    "distance_scores": scores,
    "values": scores,
    "up": n * rows * size * 2 * d * f,
    "down": n * rows * size * 2 * f * d,
  }
