"""Official Perceiver AR parameters (Haiku's module paths) as this project's parameters.

The mapping is by meaning, one line a module; self-attention layers are stacked for nn.scan.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from perceiver_ar_jax.config import InputError, ModelConfig

_ACTIVATIONS = {"sq_relu": "squared_relu", "gelu": "gelu"}
_POSITIONS = {"sinusoidal": "sinusoidal", "fourier": "fourier", "random": "learned"}
# Options of the release that this model does not have, with the one value that means "off".
_UNSUPPORTED = {
  "num_latents_per_position": 1,
  "initial_query_embed_style": "last_n_inputs",
  "fraction_heads_to_rotate": 1.0,
}


def convert(
  haiku_params: Mapping[str, Mapping[str, np.ndarray]], model_kwargs: Mapping[str, Any]
) -> tuple[ModelConfig, dict]:
  """(config, parameters) of an official model.

  Args:
    haiku_params: {module path: {name: array}} as in an official checkpoint; Dense weights `w` are [in, out].
    model_kwargs: the official constructor's arguments, num_classes, input_idx_size and max_context_length included.

  Raises:
    InputError: an option that this model does not have, or a parameter that is missing.
  """
  config = _config(model_kwargs)
  modules = {path.replace("perceiver_ar/", "", 1).removeprefix("~/"): value for path, value in haiku_params.items()}

  def get(path, name):
    try:
      return np.asarray(modules[path][name])
    except KeyError as error:
      raise InputError(f"The checkpoint lacks the parameter {path}/{name}, which these arguments need.") from error

  def dense(path):
    return {"kernel": get(path, "w"), "bias": get(path, "b")}

  def norm(path):
    return {"scale": get(path, "scale"), "bias": get(path, "offset")}

  def attention(path):
    names = {"query": "linear", "key": "linear_1", "value": "linear_2", "out": "linear_3"}
    return {ours: dense(f"{path}/attention/{theirs}") for ours, theirs in names.items()}

  def mlp(path):
    return {"up": dense(f"{path}/dense/linear"), "down": dense(f"{path}/dense/linear_1")}

  def cross_attend(index):
    path = _numbered("cross_attention", index)
    return {
      "norm_query": norm(f"{path}/layer_norm"),
      "norm_inputs": norm(f"{path}/layer_norm_1"),
      "norm_mlp": norm(f"{path}/layer_norm_2"),
      "attention": attention(path),
      "mlp": mlp(path),
    }

  def layer(index):
    path = _numbered("self_attention", index)
    return {
      "norm_attention": norm(f"{path}/layer_norm"),
      "norm_mlp": norm(f"{path}/layer_norm_1"),
      "attention": attention(path),
      "mlp": mlp(path),
    }

  params = {
    "embed": get("embed", "embeddings"),
    "to_latents": dense("linear"),
    "final_norm": norm("layer_norm"),
    "logits": dense("logits"),
  }
  if config.position_encoding == "learned":
    for dimension in range(len(config.position_sizes)):
      params[f"position_{dimension}"] = get(f"embed_{dimension + 1}", "embeddings")
  start = 0
  for repeat, end in enumerate(sorted({after + 1 for after in config.cross_attend_after}) + [config.num_layers]):
    params[_numbered("cross_attend", repeat)] = cross_attend(repeat)
    if end > start:
      params[_numbered("layers", repeat)] = _stack([layer(index) for index in range(start, end)])
    start = end
  return config, params


def _numbered(name: str, index: int) -> str:
  return f"{name}_{index}" if index else name


def _stack(trees: list[dict]) -> dict:
  """One tree whose leaves are those of `trees` stacked on a new first axis."""
  first = trees[0]
  if not isinstance(first, dict):
    return np.stack(trees)
  return {name: _stack([tree[name] for tree in trees]) for name in first}


def _config(kwargs: Mapping[str, Any]) -> ModelConfig:
  for name, off in _UNSUPPORTED.items():
    if kwargs.get(name, off) != off:
      raise InputError(f"The official option {name}={kwargs[name]!r} is not supported; only {off!r} can be converted.")
  if kwargs["cross_attend_widening_factor"] != kwargs["transformer_widening_factor"]:
    raise InputError(
      "cross_attend_widening_factor and transformer_widening_factor differ"
      f" ({kwargs['cross_attend_widening_factor']} and {kwargs['transformer_widening_factor']}); only equal ones can"
      " be converted."
    )
  rotary = kwargs["position_encoding_type"] == "rotary"
  return ModelConfig(
    vocab_size=kwargs["num_classes"],
    max_context=kwargs["max_context_length"],
    num_latents=kwargs["z_index_dim"],
    num_layers=kwargs["num_transformers_per_block"],
    latent_width=kwargs["num_z_channels"],
    embed_width=kwargs["input_embed_dim"],
    num_cross_heads=kwargs["num_cross_attend_heads"],
    num_self_heads=kwargs["num_transformer_heads"],
    mlp_widening=kwargs["transformer_widening_factor"],
    activation=_ACTIVATIONS[kwargs["activation_name"]],
    position_encoding="rotary" if rotary else _POSITIONS[kwargs["position_encoding"]],
    position_sizes=()
    if rotary
    else tuple(size if size > 0 else kwargs["max_context_length"] for size in kwargs["input_idx_size"]),
    positions_from_data=kwargs["use_positions_from_data"],
    rotary_fraction=kwargs.get("fraction_to_rotate", 0.5),
    rotary_max_wavelength=kwargs.get("max_wavelength"),
    cross_attend_after=tuple(kwargs.get("additional_cross_attend_after_layers", ())),
    dropout=kwargs["dropout_prob"],
  )
