"""Settings: every published config is valid, and every mistake is named with its fix."""

import dataclasses
import importlib
import json
import pathlib
import signal
import sys
import types

import jax
import numpy as np
import pytest

from configs import copy
from perceiver_ar_jax import PerceiverAR
from perceiver_ar_jax import config as config_lib
from perceiver_ar_jax.config import InputError, config_from_run
from perceiver_ar_jax.data import tasks
from perceiver_ar_jax.models import architectures
from perceiver_ar_jax.training import optimizer, step
from tests import tiny

CONFIG_FOLDER = pathlib.Path(__file__).parent.parent / "configs"
CONFIGS = sorted(path.stem for path in CONFIG_FOLDER.glob("*.py"))


XL = {"model.architecture": "transformer_xl", "model.position_encoding": "relative", "model.segment": 8}


def _config(name):
  return importlib.import_module(f"configs.{name}").get_config()


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_resolves_and_names_a_task_that_fits(name):
  config = config_lib.resolve(_config(name))
  data = dataclasses.replace(config.data, sentencepiece=None)  # a model that the user trains
  for task, _ in tasks.get_tasks(data, config.model.max_context + 1):
    assert task.vocab_size <= config.model.vocab_size


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_comes_back_from_its_run(name, tmp_path):
  config = config_lib.resolve(_config(name))
  (tmp_path / "config.json").write_text(config.to_json())
  assert config_lib.resolve(config_from_run.get_config(str(tmp_path))) == config


def test_lists_in_a_config_file_are_tuples():
  rotary = {"position_encoding": "rotary", "position_sizes": [], "rotary_axes": [[0.5, 4, 64]]}
  model = tiny.config(**{f"model__{name}": value for name, value in rotary.items()}).model
  assert (model.position_sizes, model.rotary_axes) == ((), ((0.5, 4, 64),))


def test_config_json_of_an_older_version_may_contain_removed_settings():
  config = tiny.config()
  old = json.loads(config.to_json())
  old["plan"] |= {"search": False, "max_compiles": 8}
  old["data"] |= {"cache_dir": "/removed"}
  old["compilation_cache"] = "/removed"
  old["train"] |= {"tracker": "wandb"}
  old["mesh"] |= {"across_slices": "data"}
  old["attention_map"] |= {"prompt": "data"}
  assert config_lib.Config.from_json(json.dumps(old)) == config


def test_removed_settings_are_unknown_in_a_config_file():
  config = copy.get_config()
  config.data.cache_dir = "/removed"
  with pytest.raises(InputError, match="Unknown config key 'data.cache_dir'"):
    config_lib.resolve(config)


def test_the_imagenet_model_has_the_papers_size():
  model = config_lib.resolve(_config("imagenet64")).model
  tokens = jax.ShapeDtypeStruct((1, model.num_latents), "int32")
  positions = jax.ShapeDtypeStruct((1, model.num_latents, 3), "int32")
  shapes = jax.eval_shape(PerceiverAR(model).init, jax.random.key(0), tokens, positions)
  assert round(sum(leaf.size for leaf in jax.tree.leaves(shapes)) / 1e6) == 770


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"model.num_latents": 33}, "model.num_latents=33 exceeds model.max_context=32"),
    ({"model.num_self_heads": 3}, "model.latent_width=64 is not divisible by model.num_self_heads=3"),
    ({"model.position_encoding": "rotery"}, "Did you mean 'rotary'"),
    ({"model.position_sizes": ()}, "model.position_sizes is empty"),
    ({"model.vocab_size": 2}, "model.vocab_size=2 must exceed 3"),
    ({"model.vocab_size": None}, "config.model.vocab_size is not set"),
    ({"model.dropout": 1.0}, "model.dropout=1.0 must be in"),
    ({"model.cross_attend_dropout": -0.1}, "model.cross_attend_dropout=-0.1 must be in"),
    ({"model.attention": "stremed"}, "Did you mean 'streamed'"),
    ({"model.attention": "cudnn"}, "set model.dtype=bfloat16"),
    ({"model.attention_chunk": 0}, "model.attention_chunk=0 must be at least 1"),
    ({"model.cross_attend_width": 6}, "model.cross_attend_width=6 is not divisible by model.num_cross_heads=4"),
    ({"model.architecture": "transformerxl"}, "Did you mean 'transformer_xl'"),
    ({"model.segment": 8}, "model.segment=8 is a setting of transformer_xl"),
    ({"model.position_encoding": "relative"}, "is supported by transformer_xl only"),
    ({"model.architecture": "transformer_xl"}, "set --config.model.position_encoding=relative"),
    (XL | {"model.segment": None}, "model.segment=None must be at least 1"),
    (XL | {"model.memory": -1}, "model.memory=-1 must not be negative"),
    (XL | {"model.latent_dropout": 0.1}, "model.latent_dropout=0.1 is not supported by transformer_xl"),
    (XL | {"model.attention": "streamed"}, "model.attention=streamed is not supported by transformer_xl"),
    (XL | {"mesh.context": 2}, "mesh.context=2 shards the inputs of a cross-attention"),
    ({"model.cross_attend_after": (1,)}, "names a layer outside 0..0"),
    ({"model.cross_attend_after": ("a",)}, "model.cross_attend_after=('a',) names a layer outside 0..0"),
    (XL | {"data.packing": 2}, "data.packing=2 is not supported by transformer_xl: set --config.data.packing=1"),
    ({"data.packing": 0}, "data.packing=0 must be at least 1"),
    ({"model.logits_chunk": 0}, "model.logits_chunk=0 must be at least 1, or None"),
    ({"train.optimizer.cosine_steps": -1}, "train.optimizer.cosine_steps=-1 must be at least 1, or None"),
    ({"train.batch_size": 0}, "train.batch_size=0 must be at least 1"),
    ({"train.microbatches": 3}, "train.batch_size=64 is not divisible by train.microbatches=3"),
    ({"train.steps": 50}, "is too short for train.optimizer.warmup_steps=100"),
    ({"train.optimizer.name": "adan"}, "Did you mean 'adam'"),
    ({"train.optimizer.schedule": "linear"}, "Known: constant, cosine, steps, t5"),
    ({"eval.stride": 17}, "eval.stride=17 exceeds the 16 latents"),
    ({"eval.num_latents": 64}, "eval.num_latents=64 exceeds model.max_context=32"),
    ({"mesh.fsdp": -1}, "at most one may be -1"),
    ({"mesh.tensor": 0}, "must be positive"),
    ({"model.widht": 3}, "Unknown config key 'model.widht'"),
    ({"data.shufle_buffer": 3}, "Did you mean 'shuffle_buffer'"),
    ({"train.steps": "many"}, "config.train.steps='many' must be of type int"),
  ],
)
def test_mistakes_are_named(changes, message):
  values = _config("copy").to_dict()
  for path, value in changes.items():
    *sections, name = path.split(".")
    section = values
    for part in sections:
      section = section[part]
    section[name] = value
  with pytest.raises(InputError) as error:
    config = config_lib.resolve(config_lib.config_dict.ConfigDict(values))
    # The modules that own the tables of implementations check their names.
    mesh = types.SimpleNamespace(shape={"context": config.mesh.context}, devices=np.array(jax.devices()))
    architectures.check(config.model, mesh)
    step.make_train_step(config, optimizer.make_optimizer(config.train.optimizer, config.train.steps))
  assert message in str(error.value)


@pytest.mark.parametrize("mode", ["eval", "sample", "score", "attention", "report"])
def test_a_missing_run_is_reported_before_slow_imports(mode, tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "perceiver_ar_jax.parallel", None)  # importing it raises ImportError
  monkeypatch.setitem(sys.modules, "perceiver_ar_jax.experiments", None)
  tiny.expect_error(tiny.run(tmp_path, f"--mode={mode}"), "contains no run")


def test_the_start_up_lines_of_tensorflow_are_hidden_and_other_lines_are_not():
  program = """
import os
from perceiver_ar_jax.data.tf_cpu import _without_start_up_lines
with _without_start_up_lines():
  os.write(2, b"WARNING: All log messages before absl::InitializeLog() is called\\nI0000 00:00:1.2 1 a.cc:1] Hidden\\n")
  os.write(2, b"Shown\\nF0000 00:00:1.2 1 a.cc:1] Last words\\n")
  os.abort()
"""
  result = tiny.python("-c", program)
  assert result.returncode == -signal.SIGABRT
  assert result.stderr == "Shown\nF0000 00:00:1.2 1 a.cc:1] Last words\n"
