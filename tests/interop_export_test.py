"""Exported weights: the files, reading them back to the same bits, and fine-tuning."""

import dataclasses
import json
import pathlib
import shutil
from unittest import mock

import jax
import numpy as np
import pytest
import safetensors
from safetensors.numpy import load_file

from perceiver_ar_jax import ModelConfig, PerceiverAR, Sampler, load_checkpoint
from perceiver_ar_jax.config import InputError, config_from_run
from perceiver_ar_jax.interop import export
from perceiver_ar_jax.training import pretrained
from tests import tiny

EXPORT = "perceiver_ar_jax.interop.export"
CONFIG = ModelConfig(
  vocab_size=11,
  max_context=6,
  num_latents=3,
  num_layers=4,
  latent_width=8,
  num_cross_heads=2,
  num_self_heads=2,
  position_encoding="rotary",
)


_params = tiny.random_params


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
  """The folder of the trained run's weights."""
  folder = tmp_path_factory.mktemp("export") / "copy"
  result = tiny.run_module(EXPORT, f"--workdir={trained}", f"--output={folder}")
  assert result.returncode == 0, result.stderr
  return folder


@pytest.fixture
def copied(exported, tmp_path):
  return pathlib.Path(shutil.copytree(exported, tmp_path / "copied"))


def test_the_folder_has_flat_names_all_settings_and_a_model_card(trained, exported):
  assert sorted(path.name for path in exported.iterdir()) == ["README.md", "config.json", "model.safetensors"]
  arrays = load_file(exported / "model.safetensors")
  assert arrays["layers.1.mlp.up.kernel"].shape == (16, 64) and arrays["embed.tokens"].shape[1] == 16
  checkpoint = load_checkpoint(trained)
  np.testing.assert_array_equal(
    arrays["layers.1.mlp.up.kernel"], checkpoint.params["layers_0"]["mlp"]["up"]["kernel"][1]
  )
  assert config_from_run.load_config(exported) == checkpoint.config
  with safetensors.safe_open(exported / "model.safetensors", framework="np") as file:
    assert file.metadata()["step"] == "12"
  card = (exported / "README.md").read_text()
  assert f"{sum(x.size for x in arrays.values()):,} parameters" in card
  assert "| validation | 12 |" in card


def test_evaluation_samples_and_scores_have_the_same_bits(trained, copied):
  assert tiny.main(f"--workdir={copied}", "--mode=eval").returncode == 0
  names = [path.name for path in trained.glob("eval-*.json")]
  assert names
  for name in names:
    assert json.loads((copied / name).read_text()) == json.loads((trained / name).read_text())
  prompt = np.array([2, 40, 41, 42], np.int32)
  before, after = (
    make(folder) for make, folder in ((Sampler.from_workdir, trained), (Sampler.from_pretrained, copied))
  )
  assert after.step == 12
  for settings in ({"temperature": 0.0}, {"seed": 3}):
    samples = [sampler(prompt, num_samples=1, length=5, **settings)[0].events for sampler in (before, after)]
    np.testing.assert_array_equal(*samples)
  result = tiny.main(f"--workdir={copied}", "--mode=sample", "--config.sample.num_samples=1")
  assert result.returncode == 0 and (copied / "samples" / "12-0").is_dir(), result.stderr


@pytest.mark.parametrize(
  "options",
  [
    {},
    {"num_layers": 0},
    {"cross_attend_after": (0, 3), "conv_taps": 2, "qk_norm": True},
    {
      "position_encoding": "learned+rotary",
      "position_sizes": (7, 3),
      "rotary_axes": ((0.5, 2.0, 8.0), (0.5, 1.0, 4.0)),
    },
    {"architecture": "transformer_xl", "position_encoding": "relative", "segment": 3},
  ],
)
def test_parameters_are_read_back_to_the_same_bits(options, tmp_path):
  config = dataclasses.replace(CONFIG, **options)
  params = _params(config)
  tiny.export_model(config, params, tmp_path / "a" / "b", step=7)
  assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]
  assert pretrained.read(config, tmp_path / "a" / "b")[0] == 7
  read_config, read_params = pretrained.load(tmp_path / "a" / "b")
  assert read_config == config
  jax.tree.map(np.testing.assert_array_equal, read_params, params)


def test_layers_are_numbered_through_all_groups(tmp_path):
  config = dataclasses.replace(CONFIG, cross_attend_after=(0, 2))
  params = _params(config)
  tiny.export_model(config, params, tmp_path / "folder")
  arrays = load_file(tmp_path / "folder" / "model.safetensors")
  for layer, (group, index) in enumerate([(0, 0), (1, 0), (1, 1), (2, 0)]):
    expected = params[f"layers_{group}"]["attention"]["out"]["kernel"][index]
    np.testing.assert_array_equal(arrays[f"layers.{layer}.attention.out.kernel"], expected)
  np.testing.assert_array_equal(arrays["cross_attend.2.mlp.up.kernel"], params["cross_attend_2"]["mlp"]["up"]["kernel"])


def test_half_precision_is_that_of_the_values(tmp_path):
  params = _params(CONFIG)
  tiny.export_model(CONFIG, params, tmp_path / "full")
  tiny.export_model(CONFIG, params, tmp_path / "half", dtype="bfloat16")
  sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("full", "half")]
  assert sizes[1] < 0.7 * sizes[0]  # the header is large here
  rounded = jax.tree.map(lambda x: np.asarray(x.astype("bfloat16").astype("float32")), params)
  jax.tree.map(np.testing.assert_array_equal, pretrained.read(CONFIG, tmp_path / "half")[1], rounded)


def test_a_chosen_step_is_exported(trained, tmp_path):
  result = tiny.run_module(EXPORT, f"--workdir={trained}", f"--output={tmp_path / 'new'}", "--step=9")
  assert result.returncode == 0, result.stderr
  assert pretrained.read(tiny.config().model, tmp_path / "new")[0] == 9
  result = tiny.run_module(EXPORT, f"--workdir={trained}", f"--output={tmp_path / 'other'}", "--step=5")
  tiny.expect_error(result, "no checkpoint of step 5", "12")
  assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_averaged_weights_are_resumed_evaluated_and_exported(trained, tmp_path):
  folders = {name: tmp_path / name for name in ("whole", "resumed", "averaged")}
  assert tiny.run(folders["whole"], train__ema_decay=0.5).returncode == 0
  shutil.copytree(folders["whole"], folders["resumed"])
  shutil.rmtree(folders["resumed"] / "checkpoints" / "12")
  assert tiny.run(folders["resumed"], train__ema_decay=0.5).returncode == 0
  result, resumed = (
    json.loads((folders[name] / "eval-validation-12.json").read_text()) for name in ("whole", "resumed")
  )
  assert resumed["nats_per_token"] == result["nats_per_token"]
  assert tiny.run(folders["resumed"], "--mode=eval").returncode == 0, "the run decides, not the settings of the command"
  again = json.loads((folders["resumed"] / "eval-validation-12.json").read_text())
  assert again["nats_per_token"] == result["nats_per_token"]
  exported = tiny.run_module(EXPORT, f"--workdir={folders['whole']}", f"--output={folders['averaged']}")
  assert exported.returncode == 0, exported.stderr
  assert tiny.run(folders["averaged"], "--mode=eval").returncode == 0
  averaged = json.loads((folders["averaged"] / "eval-validation-12.json").read_text())["nats_per_token"]
  last = json.loads((trained / "eval-validation-12.json").read_text())["nats_per_token"]  # of the same last weights
  assert averaged == result["nats_per_token"] != last
  assert "## Metrics" in (folders["averaged"] / "README.md").read_text()


def test_a_folder_with_content_is_refused_and_an_empty_one_is_used(trained, tmp_path):
  (tmp_path / "full").mkdir()
  (tmp_path / "full" / "notes").write_text("mine")
  for output in (tmp_path / "full", tmp_path / "full" / "notes"):
    result = tiny.run_module(EXPORT, f"--workdir={trained}", f"--output={output}")
    tiny.expect_error(result, str(output), "give a new folder")
  assert (tmp_path / "full" / "notes").read_text() == "mine"
  (tmp_path / "empty").mkdir()
  tiny.export_model(CONFIG, _params(CONFIG), tmp_path / "empty")
  assert (tmp_path / "empty" / "model.safetensors").exists()


def test_a_failure_leaves_no_files(tmp_path):
  with mock.patch.object(export, "save_file", side_effect=RuntimeError("stopped")), pytest.raises(RuntimeError):
    tiny.export_model(CONFIG, _params(CONFIG), tmp_path / "folder")
  assert not list(tmp_path.iterdir())


def test_parameters_of_another_model_are_not_exported(tmp_path):
  of_layers = r"layers_0/attention/out/bias \(3, 8\), layers_0/attention/out/bias \(4, 8\), .* differ"
  for options, words in (({"num_layers": 3}, of_layers), ({"qk_norm": True}, "norm.* differ")):
    with pytest.raises(InputError, match=words):
      tiny.export_model(dataclasses.replace(CONFIG, **options), _params(CONFIG), tmp_path / "folder")


def test_the_vocabulary_is_part_of_the_folder(tmp_path):
  (tmp_path / "vocabulary").write_bytes(b"subwords")
  config = tiny.config(data__sentencepiece=str(tmp_path / "vocabulary"), mesh__fsdp=4, mesh__data=1)
  export.export_run(config, _params(config.model), tmp_path / "folder", dtype="float32", step=1)
  (tmp_path / "vocabulary").unlink()
  moved = (tmp_path / "folder").rename(tmp_path / "moved")
  loaded = config_from_run.load_config(moved)
  assert loaded.data.sentencepiece == str(moved / "sentencepiece.model")
  assert pathlib.Path(loaded.data.sentencepiece).read_bytes() == b"subwords"
  assert loaded.mesh.fsdp == 1  # of the machine that loads it


def test_weights_are_read_from_an_object_store_and_written_to_local_folders(tmp_path):
  params, is_remote = _params(CONFIG), mock.Mock(return_value=True)
  tiny.export_model(CONFIG, params, tmp_path / "folder")
  with mock.patch.object(pretrained, "is_object_store", is_remote):
    jax.tree.map(np.testing.assert_array_equal, pretrained.read(CONFIG, tmp_path / "folder")[1], params)
  with pytest.raises(InputError, match="gs://bucket/folder is not a local folder"):
    tiny.export_model(CONFIG, params, "gs://bucket/folder")


@pytest.mark.slow
def test_fine_tuning_starts_from_the_weights_and_resumes_without_them(trained, exported, tmp_path):
  """Updates with a learning rate of 0 leave every weight as it is, to the last bit."""
  settings = {"train__init_from": exported, "seed": 3, "train__optimizer__learning_rate": 0.0}
  result = tiny.run(tmp_path, **settings, train__steps=3)
  assert result.returncode == 0 and "Starting from the weights of step 12" in result.stdout, result.stderr
  saved, expected = load_checkpoint(tmp_path), load_checkpoint(trained)
  assert saved.step == 3
  jax.tree.map(np.testing.assert_array_equal, saved.params, expected.params)
  settings |= {"train__init_from": "/nowhere", "train__optimizer__learning_rate": 0.01}
  again = tiny.run(tmp_path, **settings, train__steps=6)
  assert again.returncode == 0 and "Resuming from the checkpoint of step 3" in again.stdout, again.stderr
  assert sorted(tiny.losses(tmp_path)) == list(range(1, 7))
  assert not np.array_equal(load_checkpoint(tmp_path).params["embed"]["tokens"], expected.params["embed"]["tokens"])


@pytest.mark.parametrize(
  ("settings", "words"),
  [
    ({"model__latent_width": 32}, "model.latent_width was 16 and is 32"),
    ({"model__vocab_size": 300}, "model.vocab_size"),
    ({"model__position_sizes": (40,)}, "model.position_sizes"),
    ({"model__position_encoding": "rotary", "model__position_sizes": ()}, "model.position_encoding"),
    ({"model__conv_taps": 1}, "model.conv_taps"),
    ({"train__init_from": "/nowhere"}, "/nowhere"),
  ],
)
def test_fine_tuning_with_another_model_is_refused(settings, words, exported, tmp_path):
  result = tiny.run(tmp_path / "run", **({"train__init_from": exported} | settings))
  tiny.expect_error(result, words)
  assert not (tmp_path / "run").exists()


def test_those_who_can_read_one_file_of_a_folder_can_read_all(tmp_path):
  model = tiny.config().model
  tiny.export_model(model, tiny.random_params(model), tmp_path / "folder")
  assert len({path.stat().st_mode for path in (tmp_path / "folder").iterdir()}) == 1


def test_training_does_not_overwrite_exported_weights(copied):
  before = (copied / "config.json").read_text()
  tiny.expect_error(tiny.run(copied, train__steps=4), f"--config.train.init_from={copied}")
  assert (copied / "config.json").read_text() == before


def test_the_jax_model_reads_what_the_card_documents(tmp_path):
  tiny.export_model(CONFIG, _params(CONFIG), tmp_path / "folder")
  config, params = pretrained.load(tmp_path / "folder")
  logits = PerceiverAR(config).apply({"params": params}, np.ones((1, 6), np.int32))
  assert logits.shape == (1, 3, 11)
