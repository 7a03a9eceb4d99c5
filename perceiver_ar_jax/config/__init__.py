"""The settings of an experiment: frozen, documented, validated dataclasses.

A config file fills the `ml_collections.ConfigDict` of `defaults()`, the command line overrides it, and `resolve` turns
it into a `Config`. This package owns names, types, defaults and every check that needs only the settings. Names of
implementations are checked by the module whose table has them.
"""

import dataclasses
import json
import typing
from collections.abc import Iterator
from types import UnionType
from typing import Any

from ml_collections import config_dict

from perceiver_ar_jax.config.checks import InputError, TransientError, lookup, nearest, reading, require, writing
from perceiver_ar_jax.config.data import DATA_PATHS, HELD_OUT_BY_NAME, IMAGE_ORDERS, DataConfig
from perceiver_ar_jax.config.evaluation import AttentionMapConfig, EvalConfig, SampleConfig
from perceiver_ar_jax.config.model import ModelConfig
from perceiver_ar_jax.config.training import MESH_AXES, MeshConfig, OptimizerConfig, PlanConfig, TrainConfig

_REMOVED_SETTINGS = (
  "attention_map.prompt data.cache_dir mesh.across_slices mesh.cpu_devices plan.max_compiles plan.search train.tracker"
).split()
"""Ignored in the config.json of older runs."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """One experiment."""

  seed: int = 0
  """Seed of weights, dropout, shuffling and crops: 0..2^32-1."""
  model: ModelConfig
  data: DataConfig
  train: TrainConfig
  eval: EvalConfig
  sample: SampleConfig = SampleConfig()
  attention_map: AttentionMapConfig = AttentionMapConfig()
  mesh: MeshConfig = MeshConfig()
  plan: PlanConfig = PlanConfig()

  def __post_init__(self):
    require(0 <= self.seed < 2**32, f"seed={self.seed} must be in 0..4294967295 (2^32-1).")
    rows, shards = self.train.batch_size, self.data.shards
    require(rows % shards == 0, f"data.shards={shards} does not divide train.batch_size={rows}: change either.")
    kept, num_latents = self.sample.kept_latents, self.model.num_latents
    is_valid = kept is None or 1 <= kept <= num_latents
    require(is_valid, f"sample.kept_latents={kept} must be in 1..{num_latents}, the latents.")
    index, last = self.attention_map.cross_attend, self.model.num_cross_attends - 1
    require(0 <= index <= last, f"attention_map.cross_attend={index} must be in 0..{last}, the cross-attentions.")
    latents, context = self.eval.num_latents or num_latents, self.model.max_context
    require(latents <= context, f"eval.num_latents={latents} exceeds model.max_context={context}: lower it.")
    stride = self.eval.stride or latents
    require(stride <= latents, f"eval.stride={stride} exceeds the {latents} latents at evaluation: lower it.")

  def to_json(self) -> str:
    """Returns the settings as indented JSON, with keys in the order of declaration."""
    return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

  @classmethod
  def from_json(cls, text: str) -> "Config":
    """Inverts `to_json`; raises InputError for unknown or wrong settings, ValueError for text that is not JSON."""
    values = json.loads(text)
    values.pop("compilation_cache", None)
    for section, name in (setting.split(".") for setting in _REMOVED_SETTINGS):
      values.get(section, {}).pop(name, None)
    data = values.get("data", {})
    rule = data.pop("split_rule", "path" if "sentencepiece_fingerprint" in data else "name")  # 0.1.0 has neither
    if rule == "name" and data.get("files") and not data.get("validation_files"):
      data["validation_files"] = HELD_OUT_BY_NAME
    return _build(cls, values)


def defaults(section: type = Config) -> config_dict.ConfigDict:
  """Returns a ConfigDict of all defaults, with None for settings that have no default: the config file sets them."""
  result = config_dict.ConfigDict()
  for field, kind, _ in _typed_fields(section):
    if dataclasses.is_dataclass(kind):
      result[field.name] = defaults(kind)
    elif field.default in (dataclasses.MISSING, None):
      result[field.name] = config_dict.placeholder(kind)
    else:
      result[field.name] = field.default
  return result


def resolve(config: config_dict.ConfigDict) -> Config:
  """Returns the validated, frozen `Config` of a filled `ConfigDict`; raises InputError for invalid settings."""
  return _build(Config, config.to_dict(preserve_field_references=False))


def _typed_fields(cls: type) -> Iterator[tuple[dataclasses.Field, type, bool]]:
  """Yields (field, its plain type, whether None is allowed) of each field."""
  for field in dataclasses.fields(cls):
    kinds: Any = typing.get_args(field.type) if isinstance(field.type, UnionType) else (field.type,)
    yield field, typing.get_origin(kinds[0]) or kinds[0], len(kinds) > 1


def _build(cls: type, values: dict[str, Any], prefix: str = "") -> Any:
  """Returns a `cls` of plain `values`, recursively; errors name unknown and missing keys with their full path."""
  known = [field.name for field in dataclasses.fields(cls)]
  for name in values:
    require(name in known, f"Unknown config key {prefix + name!r}. {nearest(name, known)}")
  arguments = {}
  for field, kind, optional in _typed_fields(cls):
    name, value = field.name, values.get(field.name, field.default)
    path = f"config.{prefix}{name}"
    if dataclasses.is_dataclass(kind):
      arguments[name] = _build(kind, values.get(name) or {}, f"{prefix}{name}.")
      continue
    if isinstance(value, list | tuple):  # lists are read from JSON, and (None,) is parsed from --config...=None
      value = tuple(tuple(x) if isinstance(x, list) else x for x in value) if value != (None,) else None
    elif kind is float and type(value) is int:
      value = float(value)
    if value is None or value is dataclasses.MISSING:
      has_default = field.default is not dataclasses.MISSING
      require(has_default, f"{path} is not set: add --{path}=... or set it in the file.")
      require(optional, f"{path} must not be None.")
    else:
      require(type(value) is kind, f"{path}={value!r} must be of type {kind.__name__}.")
    arguments[name] = value
  return cls(**arguments)
