"""Converts official Perceiver AR checkpoints (Haiku) to this project's parameters.

  python -m perceiver_ar_jax.interop.haiku --checkpoint=checkpoint.dill --config=configs/imagenet64.py --workdir=DIR

writes the weights to DIR in the form of interop/export.py. The file does not contain the architecture, so --config must
describe the model it was trained with.

A .dill file is a pickle, a program that may call anything. Here its names stand for classes of this module alone.
"""

import functools
import pickle
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from absl import flags
from flax import traverse_util

from perceiver_ar_jax.config import Config, InputError, ModelConfig, lookup, nearest, require
from perceiver_ar_jax.interop import export
from perceiver_ar_jax.models import perceiver_ar, positions

HaikuParams = Mapping[str, Mapping[str, np.ndarray]]
# Names of modules in the original release, by the names here.
_ENDS = {"to_latents": "linear", "final_norm": "layer_norm", "to_logits": "logits"}
_ATTENTION_AND_MLP = {
  "attention/query": "attention/linear",
  "keys_values/key": "attention/linear_1",
  "keys_values/value": "attention/linear_2",
  "attention/out": "attention/linear_3",
  "mlp/up": "dense/linear",
  "mlp/down": "dense/linear_1",
}
_CROSS_ATTEND = {"norm_query": "layer_norm", "norm_inputs": "layer_norm_1", "norm_mlp": "layer_norm_2"}
_LAYER = {"norm_attention": "layer_norm", "norm_mlp": "layer_norm_1"}
_NORM_PARAMETERS, _DENSE_PARAMETERS = {"scale": "scale", "bias": "offset"}, {"kernel": "w", "bias": "b"}

_REQUIRED = object()
# Options that are a field of ModelConfig, with the default of the original constructor.
_FIELDS: dict[str, tuple[str, Any]] = {
  "num_classes": ("vocab_size", _REQUIRED),
  "max_context_length": ("max_context", _REQUIRED),
  "z_index_dim": ("num_latents", 1024),
  "num_transformers_per_block": ("num_layers", 12),
  "num_z_channels": ("latent_width", 1024),
  "input_embed_dim": ("embed_width", 1024),
  "num_cross_attend_heads": ("num_cross_heads", 1),
  "num_transformer_heads": ("num_self_heads", 8),
  "transformer_widening_factor": ("mlp_widening", 1),
  "use_positions_from_data": ("positions_from_data", False),
  "fraction_to_rotate": ("rotary_fraction", 0.25),
  "max_wavelength": ("rotary_max_wavelength", 8192),
  "dropout_prob": ("dropout", 0.0),
  "latent_dropout_prob": ("latent_dropout", 0.0),
  "encoder_dropout_prob": ("cross_attend_dropout", 0.0),
}
# Options that are converted by `_config`, with their defaults.
_CONVERTED: dict[str, Any] = {
  "input_idx_size": _REQUIRED,
  "position_encoding_type": _REQUIRED,
  "position_encoding": "sinusoidal",
  "learnable_position_embeddings": False,
  "cross_attention_shape_for_attn": "kv",
  "cross_attend_widening_factor": 1,
  "additional_cross_attend_after_layers": (),
  "activation_name": "sq_relu",
}
# Options that are not supported, with the one value that can be converted.
_UNSUPPORTED = {
  "num_latents_per_position": 1,
  "initial_query_embed_style": "none",
  "initial_query_offsetting": False,
  "include_initial_cross_attention": True,
  "encoder_use_query_residual": True,
  "mask_style": "final_block",
  "fraction_heads_to_rotate": 1.0,
  "use_negative_rotary_positions": False,
  "train_input_positions": 0,
}
# Options that change only the order of computation, initial weights, or the effect of an unsupported option.
_IGNORED = """cross_attention_head_group_size chunked_cross_attention chunked_cross_query_size chunked_cross_key_size
  final_layer_init_zeros z_pos_enc_init_scale share_learned_initial_query initial_query_embed_activation_name
  initial_query_embed_num_layers concat_pos name""".split()
_ARRAYS = "_reconstruct _frombuffer scalar _reconstruct_array reconstruct_device_array _create_array".split()
"""Functions that build arrays in pickles of NumPy, JAX and dill."""


class _Object:
  """Stands for any object of the pickle: records what it would be built from, and calls nothing."""

  arguments: tuple = ()
  state: Any = None

  def __new__(cls, *arguments, **unused):  # whichever instruction of the pickle creates it
    self = super().__new__(cls)
    self.arguments = arguments
    return self

  def __setstate__(self, state) -> None:
    self.state = state

  def append(self, unused) -> None:
    pass

  extend = add = append

  def __setitem__(self, key, item) -> None:
    pass


@functools.cache  # the same few classes, however often a file names them
def _recorded_class(name: str) -> type[_Object]:
  return type(name, (_Object,), {})


class _Unpickler(pickle.Unpickler):
  def find_class(self, module: str, name: str) -> type[_Object]:
    return _recorded_class(name)


def _array(recorded: _Object) -> np.ndarray:
  """Returns the array of a recorded call of NumPy, JAX or dill."""
  arguments, name = recorded.arguments, type(recorded).__name__
  if name == "_frombuffer":
    content, dtype, shape, order = arguments
  elif name == "scalar":
    (dtype, content), shape, order = arguments, (), "C"
  else:  # the state of an empty array, which JAX and dill pass as an argument
    _, shape, dtype, is_fortran, content = recorded.state if name == "_reconstruct" else arguments[2]
    order = "F" if is_fortran else "C"
  code = dtype.arguments[0]
  plain_dtype = np.dtype(ml_dtypes.bfloat16 if getattr(code, "__name__", "") == "bfloat16" else code)
  if dtype.state and dtype.state[1] in ("<", ">"):
    plain_dtype = plain_dtype.newbyteorder(dtype.state[1])
  # np.frombuffer refuses types whose elements are references to objects.
  return np.frombuffer(content, plain_dtype).reshape(shape, order=order)


def _plain(value, *kinds: type):
  """Returns the value that an object of the pickle stands for, which must be of one of `kinds`."""
  name = type(value).__name__
  if isinstance(value, _Object):
    if name == "FlatMapping":  # Haiku's immutable dictionary, in the forms that its versions pickled
      slots = value.state[1] if isinstance(value.state, tuple) else value.state
      value = slots["_mapping"] if slots else value.arguments[0]
    elif name in _ARRAYS:
      value = _array(value)
  if not isinstance(value, kinds):
    raise pickle.UnpicklingError(f"{name} instead of {kinds[0].__name__}")
  return value


def load(path: str) -> tuple[dict[str, dict[str, np.ndarray]], int]:
  """Returns (parameters by module path, training step) of an official checkpoint.dill without running code from it.

  Raises InputError if the file cannot be read, or is not such a checkpoint.
  """
  try:
    with open(path, "rb") as file:
      state = _plain(_Unpickler(file).load(), dict)
    params: dict[str, dict[str, np.ndarray]] = {}
    for module, arrays in _plain(state["params"], dict).items():
      named = {_plain(name, str): _plain(array, np.ndarray) for name, array in _plain(arrays, dict).items()}
      params[_plain(module, str)] = named
    return params, int(_plain(state.get("global_step", 0), int, np.ndarray))
  except OSError as error:
    raise InputError(f"--checkpoint={path} cannot be read: {error.strerror or error}.") from error
  except Exception as error:  # any error of a damaged or foreign file
    problem = f"--checkpoint={path} is not an official checkpoint.dill, or is damaged"
    raise InputError(f"{problem} ({type(error).__name__}: {error}).") from error


def convert(haiku_params: HaikuParams, model_kwargs: Mapping[str, Any]) -> tuple[ModelConfig, dict]:
  """Returns (config, parameters) of a model of the original release.

  Args:
    haiku_params: {module path: {name: array}} as in an official checkpoint; Dense weights `w` are [in, out].
    model_kwargs: arguments of the original constructor, including num_classes, input_idx_size and max_context_length.

  Raises InputError if an option is not supported, or a parameter is missing.
  """
  config = _config(model_kwargs)
  return config, convert_params(haiku_params, config)[0]


def convert_params(haiku_params: HaikuParams, config: ModelConfig) -> tuple[dict, list[str]]:
  """Returns (the parameters of `config`, names of the checkpoint's parameters that are not used).

  Self-attention layers are stacked for nn.scan. Constant position tables, which official checkpoints contain as well,
  are ignored if they equal those of `config`. Raises InputError if a parameter is missing.
  """
  unused: dict[str, np.ndarray] = {}
  params: dict = {}
  for path, module in haiku_params.items():
    path = path.replace("perceiver_ar/", "", 1).removeprefix("~/")
    unused |= {f"{path}/{name}": value for name, value in module.items()}

  def take(name: str) -> np.ndarray:
    require(name in unused, f"The checkpoint lacks the parameter {name}: give the config of its model.")
    return np.asarray(unused.pop(name))

  def add(target: str, table: Mapping[str, str], sources: Sequence[str]) -> None:
    """Adds the modules of `table`, which are below `target` here and below `sources` in the checkpoint."""
    for module, official in table.items():
      parameters = _NORM_PARAMETERS if "norm" in module else _DENSE_PARAMETERS
      for name, official_name in parameters.items():
        values = [take(f"{source}{official}/{official_name}") for source in sources]
        params[f"{target}{module}/{name}"] = np.stack(values) if target.startswith("layers") else values[0]

  params["embed/tokens"] = take("embed/embeddings")
  for dimension, size in enumerate(config.position_sizes):
    name = f"embed_{dimension + 1}/embeddings"
    if config.position_encoding == "learned":
      params[f"embed/position_{dimension}"] = take(name)
    elif name in unused and (encode := positions.encoding_of(config).table) is not None:
      table = encode(jnp.arange(size)[None], size=size, width=config.input_width)[0]
      if unused[name].shape == table.shape and np.allclose(unused[name], table, atol=1e-3):
        del unused[name]

  def numbered(name: str, index: int) -> str:
    return f"{name}_{index}/" if index else f"{name}/"

  add("", _ENDS, [""])
  start = 0
  for group, depth in enumerate(perceiver_ar.group_depths(config)):
    add(f"cross_attend_{group}/", _ATTENTION_AND_MLP | _CROSS_ATTEND, [numbered("cross_attention", group)])
    if depth:
      layers = [numbered("self_attention", index) for index in range(start, start + depth)]
      add(f"layers_{group}/", _ATTENTION_AND_MLP | _LAYER, layers)
    start += depth
  return traverse_util.unflatten_dict(params, sep="/"), sorted(unused)


def _config(model_kwargs: Mapping[str, Any]) -> ModelConfig:
  defaults = _CONVERTED | {name: default for name, (_, default) in _FIELDS.items()}
  options = {*defaults, *_UNSUPPORTED, *_IGNORED}
  for name, value in model_kwargs.items():
    require(name in options, f"The original release's option {name}={value!r} is unknown. {nearest(name, options)}")
    only = _UNSUPPORTED.get(name, value)
    require(value == only, f"The option {name}={value!r} is not supported; only {only!r} can be converted.")
  kwargs = defaults | dict(model_kwargs)
  for name, value in kwargs.items():
    require(value is not _REQUIRED, f"The argument {name} is missing: add it to model_kwargs.")
  cross, layers = kwargs["cross_attend_widening_factor"], kwargs["transformer_widening_factor"]
  problem = f"cross_attend_widening_factor={cross} and transformer_widening_factor={layers} differ"
  require(cross == layers, f"{problem}; only equal ones can be converted.")

  widths = {"kv": kwargs["input_embed_dim"], "q": kwargs["num_z_channels"]}
  encodings = {"sinusoidal": "sinusoidal", "fourier": "fourier", "random": "learned"}
  encoding = lookup("position_encoding", kwargs["position_encoding"], encodings)
  if kwargs["learnable_position_embeddings"]:
    encoding = "learned"
  sizes = tuple(size if size > 0 else kwargs["max_context_length"] for size in kwargs["input_idx_size"])
  is_rotary = kwargs["position_encoding_type"] == "rotary"
  return ModelConfig(
    **{field: kwargs[name] for name, (field, _) in _FIELDS.items()},
    cross_attend_width=lookup("cross_attention_shape_for_attn", kwargs["cross_attention_shape_for_attn"], widths),
    cross_attend_after=tuple(kwargs["additional_cross_attend_after_layers"] or ()),
    activation=lookup("activation_name", kwargs["activation_name"], {"sq_relu": "squared_relu", "gelu": "gelu"}),
    position_encoding="rotary" if is_rotary else encoding,
    position_sizes=() if is_rotary else sizes,
  )


def _run(config: Config) -> int:
  folder = flags.FLAGS.workdir
  haiku_params, trained_steps = load(flags.FLAGS.checkpoint)
  params, unused = convert_params(haiku_params, config.model)
  shown = ", ".join(unused[:5]) + (" and others" if len(unused) > 5 else "")
  problem = f"The checkpoint contains parameters that the model of --config does not have: {shown}"
  require(not unused, f"{problem}. Give the config of its model.")
  export.export_run(config, params, folder, step=trained_steps)
  print(f"Wrote the weights, trained for {trained_steps:,} steps, to {folder}.")
  print(f"Evaluate them with perceiver_ar_jax.main --workdir={folder} --mode=eval, or train them further in a new")
  print(f"--workdir, with this --config and --config.train.init_from={folder}.")
  return 0


if __name__ == "__main__":
  from perceiver_ar_jax import command_line  # here, so that importing this module defines no flags

  flags.DEFINE_string("checkpoint", None, "An official checkpoint.dill.")
  command_line.run(_run, required=("checkpoint", "workdir"))
