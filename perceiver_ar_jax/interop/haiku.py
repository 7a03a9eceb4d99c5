"""Converts official Perceiver AR checkpoints (Haiku) to this project's parameters and checkpoints.

  python -m perceiver_ar_jax.interop.haiku --checkpoint=checkpoint.dill --config=configs/imagenet64.py --workdir=DIR

writes the weights as step 0 of a run in DIR, which can be evaluated and trained further (fine-tuning). The file does
not contain the architecture, so --config must describe the model it was trained with.

A .dill file is a pickle, which dill would execute. unpickle.py reads its arrays without running code from it.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from etils import epath

from perceiver_ar_jax.config import Config, InputError, ModelConfig, nearest
from perceiver_ar_jax.interop import unpickle
from perceiver_ar_jax.models import perceiver_ar, positions
from perceiver_ar_jax.models.architectures import architecture_of
from perceiver_ar_jax.parallel.mesh import make_mesh
from perceiver_ar_jax.training import checkpoint
from perceiver_ar_jax.training import optimizer as optimizer_lib
from perceiver_ar_jax.training import state as state_lib
from perceiver_ar_jax.training import workdir as workdir_lib

_ACTIVATIONS = {"sq_relu": "squared_relu", "gelu": "gelu"}
_ENCODINGS = {"sinusoidal": "sinusoidal", "fourier": "fourier", "random": "learned"}
# Defaults of the official constructor.
_DEFAULTS: dict[str, Any] = {
  "cross_attention_shape_for_attn": "kv",
  "input_embed_dim": 1024,
  "position_encoding": "sinusoidal",
  "learnable_position_embeddings": False,
  "num_transformers_per_block": 12,
  "z_index_dim": 1024,
  "num_z_channels": 1024,
  "num_cross_attend_heads": 1,
  "num_transformer_heads": 8,
  "cross_attend_widening_factor": 1,
  "transformer_widening_factor": 1,
  "additional_cross_attend_after_layers": (),
  "dropout_prob": 0.0,
  "latent_dropout_prob": 0.0,
  "encoder_dropout_prob": 0.0,
  "activation_name": "sq_relu",
  "fraction_to_rotate": 0.25,
  "max_wavelength": 8192,
  "use_positions_from_data": False,
}
_MAX_PARAMETERS = 100_000
"""Arrays that a checkpoint may have; the largest published model has hundreds."""
_REQUIRED = ("num_classes", "input_idx_size", "max_context_length", "position_encoding_type")
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
_IGNORED = (
  "cross_attention_head_group_size",
  "chunked_cross_attention",
  "chunked_cross_query_size",
  "chunked_cross_key_size",
  "final_layer_init_zeros",
  "z_pos_enc_init_scale",
  "share_learned_initial_query",
  "initial_query_embed_activation_name",
  "initial_query_embed_num_layers",
  "concat_pos",
  "name",
)


def convert(
  haiku_params: Mapping[str, Mapping[str, np.ndarray]], model_kwargs: Mapping[str, Any]
) -> tuple[ModelConfig, dict]:
  """Returns (config, parameters) of an official model.

  Args:
    haiku_params: {module path: {name: array}} as in an official checkpoint; Dense weights `w` are [in, out].
    model_kwargs: arguments of the official constructor, including num_classes, input_idx_size and max_context_length.

  Raises:
    InputError: an option is not supported, or a parameter is missing.
  """
  config = _config(model_kwargs)
  return config, convert_params(haiku_params, config)[0]


def load(path: str) -> tuple[dict[str, dict[str, np.ndarray]], int]:
  """Returns (parameters by module path, training step) of an official checkpoint.dill without running code from it.

  Raises:
    InputError: the file cannot be read, or is not such a checkpoint.
  """
  try:
    with pathlib.Path(path).open("rb") as file:
      state = unpickle.load(file)
  except OSError as error:
    raise InputError(f"--checkpoint={path} cannot be read: {error.strerror or error}.") from error
  except Exception as error:  # any error of a damaged or foreign file
    raise InputError(
      f"--checkpoint={path} is not a readable pickle: {error}. Give an official checkpoint.dill."
    ) from error
  state = state if isinstance(state, dict) else {}
  params: Any = state.get("params")
  step = state.get("global_step", 0)
  modules: list[Any] = list(params.values()) if isinstance(params, dict) else [None]
  are_arrays = (
    all(isinstance(module, dict) for module in modules)
    and sum(map(len, modules)) <= _MAX_PARAMETERS  # modules can share one dictionary, so a small file can have many
    and all(isinstance(value, np.ndarray) for module in modules for value in module.values())
  )
  if not are_arrays or not isinstance(step, (int, np.integer)):
    raise InputError(
      f"--checkpoint={path} is not an official checkpoint, which contains 'params': a mapping from module paths to"
      " arrays."
    )
  return params, int(step)


def convert_params(haiku_params: Mapping[str, Mapping[str, np.ndarray]], config: ModelConfig) -> tuple[dict, list[str]]:
  """Returns (the parameters of `config`, names of official parameters that are not used).

  Self-attention layers are stacked for nn.scan. Constant position tables, which official checkpoints contain as well,
  are ignored if they equal those of `config`.

  Raises:
    InputError: a parameter is missing.
  """
  used = set()
  modules = {path.replace("perceiver_ar/", "", 1).removeprefix("~/"): value for path, value in haiku_params.items()}

  def get(path, name):
    used.add(f"{path}/{name}")
    try:
      return np.asarray(modules[path][name])
    except KeyError as error:
      raise InputError(
        f"The checkpoint lacks the parameter {path}/{name}: give the config of the model that it was trained with."
      ) from error

  def dense(path):
    return {"kernel": get(path, "w"), "bias": get(path, "b")}

  def norm(path):
    return {"scale": get(path, "scale"), "bias": get(path, "offset")}

  def attention(path):
    return {
      "attention": {"query": dense(f"{path}/attention/linear"), "out": dense(f"{path}/attention/linear_3")},
      "keys_values": {"key": dense(f"{path}/attention/linear_1"), "value": dense(f"{path}/attention/linear_2")},
    }

  def mlp(path):
    return {"up": dense(f"{path}/dense/linear"), "down": dense(f"{path}/dense/linear_1")}

  def cross_attend(index):
    path = _numbered("cross_attention", index)
    return {
      "norm_query": norm(f"{path}/layer_norm"),
      "norm_inputs": norm(f"{path}/layer_norm_1"),
      "norm_mlp": norm(f"{path}/layer_norm_2"),
      "mlp": mlp(path),
      **attention(path),
    }

  def layer(index):
    path = _numbered("self_attention", index)
    return {
      "norm_attention": norm(f"{path}/layer_norm"),
      "norm_mlp": norm(f"{path}/layer_norm_1"),
      "mlp": mlp(path),
      **attention(path),
    }

  embed = {"tokens": get("embed", "embeddings")}
  if config.position_encoding == "learned":
    for dimension in range(len(config.position_sizes)):
      embed[f"position_{dimension}"] = get(f"embed_{dimension + 1}", "embeddings")
  params = {
    "embed": embed,
    "to_latents": dense("linear"),
    "final_norm": norm("layer_norm"),
    "to_logits": dense("logits"),
  }
  start = 0
  for run, length in enumerate(perceiver_ar.group_depths(config)):
    params[f"cross_attend_{run}"] = cross_attend(run)
    if length:
      params[f"layers_{run}"] = _stack([layer(index) for index in range(start, start + length)])
    start += length
  encode = positions.encoding_of(config).table
  if encode is not None:
    for dimension, size in enumerate(config.position_sizes):
      path = f"embed_{dimension + 1}"
      table = encode(jnp.arange(size)[None], size=size, width=config.input_width)[0]
      stored = modules.get(path, {}).get("embeddings")
      if stored is not None and stored.shape == table.shape and np.allclose(stored, table, atol=1e-3):
        used.add(f"{path}/embeddings")
  names = {f"{path}/{name}" for path, module in modules.items() for name in module}
  return params, sorted(names - used)


def _numbered(name: str, index: int) -> str:
  return f"{name}_{index}" if index else name


def _stack(trees: list[dict]) -> dict:
  """Stacks the leaves of `trees` on a new first axis."""
  first = trees[0]
  if not isinstance(first, dict):
    return np.stack(trees)
  return {name: _stack([tree[name] for tree in trees]) for name in first}


def _config(model_kwargs: Mapping[str, Any]) -> ModelConfig:
  for name in _REQUIRED:
    if name not in model_kwargs:
      raise InputError(f"The official argument {name} is missing: add it to model_kwargs.")
  options = {*_REQUIRED, *_DEFAULTS, *_UNSUPPORTED, *_IGNORED}
  for name, value in model_kwargs.items():
    if name in _UNSUPPORTED and value != _UNSUPPORTED[name]:
      raise InputError(
        f"The official option {name}={value!r} is not supported; only {_UNSUPPORTED[name]!r} can be converted."
      )
    if name not in options:
      raise InputError(f"The official option {name}={value!r} is unknown. {nearest(name, options)}")
  kwargs = _DEFAULTS | dict(model_kwargs)
  widening = kwargs["transformer_widening_factor"]
  if kwargs["cross_attend_widening_factor"] != widening:
    raise InputError(
      f"cross_attend_widening_factor={kwargs['cross_attend_widening_factor']} and"
      f" transformer_widening_factor={widening} differ; only equal ones can be converted."
    )
  widths = {"kv": kwargs["input_embed_dim"], "q": kwargs["num_z_channels"]}
  for name, known in (
    ("activation_name", _ACTIVATIONS),
    ("position_encoding", _ENCODINGS),
    ("cross_attention_shape_for_attn", widths),
  ):
    if kwargs[name] not in known:
      raise InputError(f"The official option {name}={kwargs[name]!r} is not supported; known: {', '.join(known)}.")
  rotary = kwargs["position_encoding_type"] == "rotary"
  encoding = "learned" if kwargs["learnable_position_embeddings"] else _ENCODINGS[kwargs["position_encoding"]]
  sizes = tuple(size if size > 0 else kwargs["max_context_length"] for size in kwargs["input_idx_size"])
  return ModelConfig(
    vocab_size=kwargs["num_classes"],
    max_context=kwargs["max_context_length"],
    num_latents=kwargs["z_index_dim"],
    num_layers=kwargs["num_transformers_per_block"],
    latent_width=kwargs["num_z_channels"],
    embed_width=kwargs["input_embed_dim"],
    num_cross_heads=kwargs["num_cross_attend_heads"],
    cross_attend_width=widths[kwargs["cross_attention_shape_for_attn"]],
    num_self_heads=kwargs["num_transformer_heads"],
    mlp_widening=widening,
    activation=_ACTIVATIONS[kwargs["activation_name"]],
    position_encoding="rotary" if rotary else encoding,
    position_sizes=() if rotary else sizes,
    positions_from_data=kwargs["use_positions_from_data"],
    rotary_fraction=kwargs["fraction_to_rotate"],
    rotary_max_wavelength=kwargs["max_wavelength"],
    cross_attend_after=tuple(kwargs["additional_cross_attend_after_layers"] or ()),
    dropout=kwargs["dropout_prob"],
    latent_dropout=kwargs["latent_dropout_prob"],
    cross_attend_dropout=kwargs["encoder_dropout_prob"],
  )


def write_checkpoint(config: Config, haiku_params: Mapping[str, Mapping[str, np.ndarray]], workdir: str) -> int:
  """Writes converted weights as step 0 of a run of `config` in `workdir`; returns their number.

  Raises:
    InputError: the weights do not fit `config.model`, or the workdir contains a run.
  """
  if not architecture_of(config.model).has_cross_attention:
    raise InputError(
      f"Official checkpoints are of Perceiver AR, not of model.architecture={config.model.architecture}: leave it out."
    )
  folder, mesh = epath.Path(workdir), make_mesh(config.mesh)
  optimizer = optimizer_lib.make_optimizer(config.train.optimizer, config.train.steps)
  abstract = state_lib.abstract_state(config, optimizer, mesh)
  params, unused = convert_params(haiku_params, config.model)
  if unused:
    raise InputError(
      f"The checkpoint contains parameters that the model of --config does not have: {', '.join(unused[:5])}"
      f"{' and others' if len(unused) > 5 else ''}. Give the config of the model that it was trained with."
    )
  _check_shapes(params, abstract.params)
  if (folder / "checkpoints").exists():
    raise InputError(f"--workdir={workdir} already contains a run: give a new folder.")
  with workdir_lib.own(config, folder), jax.set_mesh(mesh), checkpoint.Checkpointer(folder) as checkpointer:
    params = jax.tree.map(lambda value, leaf: jax.device_put(value, leaf.sharding), params, abstract.params)
    layout = jax.tree.map(lambda leaf: leaf.sharding, abstract.opt_state)
    opt_state = jax.jit(optimizer.init, out_shardings=layout)(params)
    checkpointer.save(state_lib.TrainState(jnp.zeros((), jnp.int32), params, opt_state), data=None)
  return sum(leaf.size for leaf in jax.tree.leaves(params))


def _check_shapes(params: dict, expected: dict) -> None:
  def shapes(tree):
    return {
      jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
      for path, leaf in jax.tree.leaves_with_path(tree)
    }

  given = shapes(params)
  for name, shape in shapes(expected).items():
    if given[name] != shape:
      raise InputError(
        f"The checkpoint's parameter {name} has shape {given[name]}, and with --config it has {shape}: give the config"
        " of the model that it was trained with."
      )


def _run() -> None:
  """Parses the flags, writes the checkpoint and exits."""
  from perceiver_ar_jax import command_line  # here, so that importing this module defines no flags

  flags.DEFINE_string("checkpoint", None, "An official checkpoint.dill.")

  def convert_run(config: Config) -> int:
    haiku_params, trained_steps = load(flags.FLAGS.checkpoint)
    workdir = flags.FLAGS.workdir
    count = write_checkpoint(config, haiku_params, workdir)
    print(
      f"Wrote {count:,} parameters, trained for {trained_steps:,} steps, as step 0 of {workdir}. To evaluate them, run"
      " python -m perceiver_ar_jax.main with this --config and --workdir and --mode=eval; without --mode, it trains"
      " them."
    )
    return 0

  command_line.run(convert_run, required=("checkpoint", "workdir"))


if __name__ == "__main__":
  _run()
