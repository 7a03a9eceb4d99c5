"""The settings of an experiment: frozen, documented, validated dataclasses.

A config file builds an `ml_collections.ConfigDict` from `defaults()`, so that every field below can be overridden on
the command line (`--config.train.steps=100`); `resolve` turns it into a `Config`. This package owns names, types,
defaults and every check that needs only the settings. What depends on the machine (the number of devices, the data on
disk) is checked where it is first known, and names of implementations by the module whose table has them.
"""

import dataclasses
import json
import types
import typing
from typing import Any

from ml_collections import config_dict

from perceiver_ar_jax.config.checks import (
  InputError,
  TransientError,
  lookup,
  nearest,
  reading,
  require,
  require_seed,
  writing,
)
from perceiver_ar_jax.config.data import DATA_PATHS, IMAGE_ORDERS, DataConfig
from perceiver_ar_jax.config.evaluation import AttentionMapConfig, EvalConfig, SampleConfig
from perceiver_ar_jax.config.model import ModelConfig
from perceiver_ar_jax.config.training import MESH_AXES, MeshConfig, OptimizerConfig, PlanConfig, TrainConfig

_REMOVED_SETTINGS = (("plan", "search"), ("plan", "max_compiles"))
"""Ignored in the config.json of older runs, which they did not affect."""
_IMPLICIT_DATA = {"split_rule": "name"}
"""Data settings of a config.json that lacks them, where these are not the defaults."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """One experiment."""

  seed: int = 0
  """Seed of weights, dropout, shuffling and crops: 0..2^32-1."""
  compilation_cache: str | None = "~/.cache/perceiver_ar_jax"
  """Folder of compiled programs, used by later starts of any run; JAX_COMPILATION_CACHE_DIR takes precedence. None: no
  cache."""
  model: ModelConfig
  data: DataConfig
  train: TrainConfig
  eval: EvalConfig
  sample: SampleConfig = SampleConfig()
  attention_map: AttentionMapConfig = AttentionMapConfig()
  mesh: MeshConfig = MeshConfig()
  plan: PlanConfig = PlanConfig()

  def __post_init__(self):
    require_seed("seed", self.seed)
    require(
      self.train.batch_size % self.data.shards == 0,
      f"data.shards={self.data.shards} does not divide train.batch_size={self.train.batch_size}: each shard of the data"
      " provides the same number of rows of a batch, so choose a divisor.",
    )
    kept = self.sample.kept_latents
    require(
      kept is None or 1 <= kept <= self.model.num_latents,
      f"sample.kept_latents={kept} must be in 1..{self.model.num_latents}: the model has {self.model.num_latents}"
      " latents.",
    )
    cross_attends = self.model.num_cross_attends
    require(
      0 <= self.attention_map.cross_attend < cross_attends,
      f"attention_map.cross_attend={self.attention_map.cross_attend} must be in 0..{cross_attends - 1}: {cross_attends}"
      f" cross-attentions, the first and those of model.cross_attend_after={self.model.cross_attend_after}.",
    )
    latents = self.eval.num_latents or self.model.num_latents
    stride = self.eval.stride or latents
    require(
      latents <= self.model.max_context,
      f"eval.num_latents={latents} exceeds model.max_context={self.model.max_context}: lower it.",
    )
    require(
      stride <= latents,
      f"eval.stride={stride} exceeds the {latents} latents at evaluation, so tokens would not be scored: lower"
      " eval.stride or raise eval.num_latents.",
    )

  def to_json(self) -> str:
    """Returns the settings as indented JSON, with keys in the order of declaration."""
    return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

  @classmethod
  def from_json(cls, text: str) -> "Config":
    """Inverts `to_json`; raises InputError for unknown or wrong settings, ValueError for text that is not JSON."""
    values = json.loads(text)
    for section, name in _REMOVED_SETTINGS:
      values.get(section, {}).pop(name, None)
    return _build(cls, values | {"data": _IMPLICIT_DATA | values.get("data", {})}, prefix="")


def defaults() -> config_dict.ConfigDict:
  """Returns a ConfigDict of all defaults, with None for settings that have no default: the config file sets them."""
  return _defaults(Config)


def resolve(config: config_dict.ConfigDict) -> Config:
  """Returns the validated, frozen `Config` of a filled `ConfigDict`; raises InputError for invalid settings."""
  return _build(Config, config.to_dict(preserve_field_references=False), prefix="")


def _typed_fields(cls: type) -> list[tuple[dataclasses.Field, type, bool]]:
  """Returns (field, its plain type, whether None is allowed) of each field."""
  hints, result = typing.get_type_hints(cls), []
  for field in dataclasses.fields(cls):
    hint = hints[field.name]
    optional = isinstance(hint, types.UnionType)
    if optional:
      (hint,) = (arg for arg in typing.get_args(hint) if arg is not types.NoneType)
    result.append((field, typing.get_origin(hint) or hint, optional))
  return result


def _defaults(cls: type) -> config_dict.ConfigDict:
  result = config_dict.ConfigDict()
  for field, kind, _ in _typed_fields(cls):
    if dataclasses.is_dataclass(kind):
      result[field.name] = _defaults(kind)
    elif field.default in (dataclasses.MISSING, None):
      result[field.name] = config_dict.placeholder(kind)
    else:
      result[field.name] = field.default
  return result


def _build(cls: type, values: dict[str, Any], prefix: str) -> Any:
  """Builds a `cls` from plain `values`, recursively; errors name unknown and missing keys with their full path."""
  fields = _typed_fields(cls)
  known = [field.name for field, _, _ in fields]
  for name in values:
    require(name in known, f"Unknown config key {prefix + name!r}. {nearest(name, known)}")
  arguments = {}
  for field, kind, optional in fields:
    name, value = field.name, values.get(field.name)
    if kind is tuple and value == (None,):  # parsed from the flag --config...=None
      value = None
    if dataclasses.is_dataclass(kind):
      arguments[name] = _build(kind, value or {}, f"{prefix}{name}.")
    elif value is None:
      missing = field.default is dataclasses.MISSING
      require(not missing, f"config.{prefix}{name} is not set: add --config.{prefix}{name}=... or set it in the file.")
      require(optional or name not in values, f"config.{prefix}{name} must not be None.")
      arguments[name] = None if name in values else field.default
    else:
      arguments[name] = _convert(kind, value, prefix + name)
  return cls(**arguments)


def _convert(kind: type, value: Any, path: str) -> Any:
  if kind is tuple and isinstance(value, (list, tuple)):
    return tuple(value)
  if kind is float and type(value) is int:
    return float(value)
  require(type(value) is kind, f"config.{path}={value!r} must be of type {kind.__name__}.")
  return value
