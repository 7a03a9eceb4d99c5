"""Exported weights: the files, reading them back to the same bits, fine-tuning, and files that are refused."""

import contextlib
import dataclasses
import json
import pathlib
import random
import shutil
import struct
from unittest import mock

import jax
import numpy as np
import pytest
import safetensors
from safetensors.numpy import load_file, save_file

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
  assert "| task | copy |" in card and "| latent_width | 16 |" in card and "| validation | 12 |" in card


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
  export.export_params(config, params, tmp_path / "a" / "b", step=7)
  assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]
  assert pretrained.read(config, tmp_path / "a" / "b")[0] == 7
  read_config, read_params = pretrained.load(tmp_path / "a" / "b")
  assert read_config == config
  jax.tree.map(np.testing.assert_array_equal, read_params, params)


def test_layers_are_numbered_through_all_groups(tmp_path):
  config = dataclasses.replace(CONFIG, cross_attend_after=(0, 2))
  params = _params(config)
  export.export_params(config, params, tmp_path / "folder")
  arrays = load_file(tmp_path / "folder" / "model.safetensors")
  for layer, (group, index) in enumerate([(0, 0), (1, 0), (1, 1), (2, 0)]):
    expected = params[f"layers_{group}"]["attention"]["out"]["kernel"][index]
    np.testing.assert_array_equal(arrays[f"layers.{layer}.attention.out.kernel"], expected)
  np.testing.assert_array_equal(arrays["cross_attend.2.mlp.up.kernel"], params["cross_attend_2"]["mlp"]["up"]["kernel"])


def test_half_precision_is_that_of_the_values(tmp_path):
  params = _params(CONFIG)
  export.export_params(CONFIG, params, tmp_path / "full")
  export.export_params(CONFIG, params, tmp_path / "half", dtype="bfloat16")
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


def test_a_folder_with_content_is_refused_and_an_empty_one_is_used(trained, tmp_path):
  (tmp_path / "full").mkdir()
  (tmp_path / "full" / "notes").write_text("mine")
  for output in (tmp_path / "full", tmp_path / "full" / "notes"):
    result = tiny.run_module(EXPORT, f"--workdir={trained}", f"--output={output}")
    tiny.expect_error(result, str(output), "give a new folder")
  assert (tmp_path / "full" / "notes").read_text() == "mine"
  (tmp_path / "empty").mkdir()
  export.export_params(CONFIG, _params(CONFIG), tmp_path / "empty")
  assert pretrained.exists(tmp_path / "empty")


def test_a_failure_leaves_no_files(tmp_path):
  with mock.patch.object(export, "save_file", side_effect=RuntimeError("stopped")), pytest.raises(RuntimeError):
    export.export_params(CONFIG, _params(CONFIG), tmp_path / "folder")
  assert not list(tmp_path.iterdir())


def test_parameters_of_another_model_are_not_exported(tmp_path):
  for options, words in (({"num_layers": 3}, "has shape"), ({"qk_norm": True}, "differ")):
    with pytest.raises(InputError, match=words):
      export.export_params(dataclasses.replace(CONFIG, **options), _params(CONFIG), tmp_path / "folder")


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


def test_compiled_programs_are_not_read_from_a_path_in_the_folder(copied):
  settings = json.loads((copied / "config.json").read_text())
  (copied / "config.json").write_text(json.dumps(settings | {"compilation_cache": str(copied / "programs")}))
  assert config_from_run.load_config(copied).compilation_cache == tiny.config().compilation_cache


def test_on_an_object_store_the_weights_are_written_last(tmp_path):
  names, is_remote = [], mock.Mock(return_value=True)
  params, copy = _params(CONFIG), shutil.copyfileobj

  def record(source, target):
    names.append(pathlib.Path(source.name).name)
    copy(source, target)

  with mock.patch.object(export, "is_object_store", is_remote), mock.patch.object(shutil, "copyfileobj", record):
    export.export_params(CONFIG, params, tmp_path / "folder")
  assert sorted(names) == ["README.md", "config.json", "model.safetensors"] and names[-1] == "model.safetensors"
  with mock.patch.object(pretrained, "is_object_store", is_remote):
    jax.tree.map(np.testing.assert_array_equal, pretrained.read(CONFIG, tmp_path / "folder")[1], params)


@pytest.mark.slow
def test_weights_without_a_run_need_a_config(tmp_path):
  config = tiny.config()
  export.export_params(config.model, _params(config.model), tmp_path / "folder")
  tiny.expect_error(
    tiny.main(f"--workdir={tmp_path / 'folder'}", "--mode=eval"), "only the model's settings", "--config"
  )
  assert tiny.run(tmp_path / "folder", "--mode=eval").returncode == 0
  assert Sampler.from_pretrained(tmp_path / "folder", config)(num_samples=1, length=2)[0].num_new > 0
  result = tiny.run(tmp_path / "folder", "--mode=eval", model__latent_width=32)
  tiny.expect_error(result, "model.latent_width was 16 and is 32")


def _texts(folder: pathlib.Path, text: str) -> str:
  folder.mkdir()
  for number in range(4):
    (folder / f"{number}.txt").write_text(text * 40)
  return str(folder)


@pytest.mark.slow
def test_fine_tuning_starts_from_the_weights_and_lowers_the_loss(tmp_path):
  first, second = _texts(tmp_path / "first", "ab cab d "), _texts(tmp_path / "second", "ab cab e ")
  settings = {"data__task": "text_files", "data__files": first, "model__dropout": 0.0, "data__min_crop": 16}
  settings |= {"train__steps": 40, "train__checkpoint_every": 20}
  assert tiny.run(tmp_path / "run", **settings).returncode == 0
  weights = tmp_path / "weights"
  assert tiny.run_module(EXPORT, f"--workdir={tmp_path / 'run'}", f"--output={weights}").returncode == 0
  settings |= {"data__files": second, "train__init_from": weights, "seed": 3, "train__optimizer__learning_rate": 0.003}
  result = tiny.run(tmp_path / "tuned", **settings)
  assert result.returncode == 0 and "Starting from the weights of step 40" in result.stdout, result.stderr
  before, after = tiny.losses(tmp_path / "run"), tiny.losses(tmp_path / "tuned")
  assert after[40] < after[1] < before[1] - 1, (before, after)
  again = tiny.run(tmp_path / "tuned", **(settings | {"train__init_from": "/nowhere", "train__steps": 41}))
  assert again.returncode == 0 and "Resuming from the checkpoint of step 40" in again.stdout, again.stderr
  assert set(tiny.losses(tmp_path / "tuned")) == set(range(1, 42))


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


def test_training_does_not_overwrite_exported_weights(copied):
  before = (copied / "config.json").read_text()
  tiny.expect_error(tiny.run(copied, train__steps=4), f"--config.train.init_from={copied}")
  assert (copied / "config.json").read_text() == before


def _header(path: pathlib.Path) -> tuple[dict, bytes]:
  content = path.read_bytes()
  (size,) = struct.unpack("<Q", content[:8])
  return json.loads(content[8 : 8 + size]), content[8 + size :]


def _forge(path: pathlib.Path, header, values: bytes) -> None:
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  path.write_bytes(struct.pack("<Q", len(text)) + text + values)


def _without(name):
  def change(path):
    arrays = load_file(path)
    del arrays[name]
    save_file(arrays, path)

  return change


def _with(name, array, **metadata):
  return lambda path: save_file(load_file(path) | {name: array}, path, metadata or None)


def _with_entry(**entry):
  def change(path):
    header, values = _header(path)
    header["final_norm.bias"] |= entry
    _forge(path, header, values)

  return change


def _replaced(content):
  return lambda path: path.write_bytes(content)


def _truncated(path):
  path.write_bytes(path.read_bytes()[:-1])


def _longer(path):
  path.write_bytes(path.read_bytes() + b"\0")


def _pickled(path):
  path.write_bytes(b"\x80\x04cos\nsystem\n(S'touch harm'\ntR.")


def _folder(path):
  path.unlink()
  path.mkdir()


BIAS = np.zeros(16, np.float32)


@pytest.mark.parametrize(
  ("change", "words"),
  [
    (_replaced(b""), "is damaged"),
    (_replaced(b"\0" * 8), "is damaged"),
    (_replaced(struct.pack("<Q", 2**63) + b"{}"), "is damaged"),
    (_replaced(struct.pack("<Q", 1000) + b"{}"), "is damaged"),
    (_replaced(struct.pack("<Q", 2) + b"{}"), " and 54 others"),
    (_replaced(struct.pack("<Q", 2) + b"\xff\xfe"), "is damaged"),
    (_pickled, "is damaged"),
    (_truncated, "is damaged"),
    (_longer, "is damaged"),
    (_folder, "contains no model.safetensors"),
    (_with_entry(shape=[2**40, 2**40]), "is damaged"),
    (_with_entry(shape=[-1]), "is damaged"),
    (_with_entry(data_offsets=[0, 2**62]), "is damaged"),
    (_with_entry(data_offsets=[64, 0]), "is damaged"),
    (_with_entry(dtype="OBJECT"), "is damaged"),
    (_with_entry(dtype="I32"), "final_norm.bias is of type I32"),
    (_with_entry(shape=[4, 4]), "final_norm.bias has shape (4, 4), and the model's has (16,)"),
    (_without("final_norm.bias"), "lacks parameters final_norm.bias"),
    (_with("extra", BIAS), "has unknown parameters extra"),
    (_with("final_norm.bias", BIAS.astype(np.float64)), "final_norm.bias is of type F64"),
    (_with("final_norm.bias", BIAS[:8]), "final_norm.bias has shape (8,)"),
    (_with("final_norm.bias", BIAS, step="-3"), "its step '-3' is not a number"),
  ],
)
def test_a_file_that_is_damaged_or_of_another_model_is_refused(change, words, copied):
  change(copied / "model.safetensors")
  with pytest.raises(InputError) as caught:
    pretrained.read(tiny.config().model, copied)
  assert words in str(caught.value)


def test_the_command_ends_with_one_paragraph(copied):
  _truncated(copied / "model.safetensors")
  for mode in ("eval", "sample", "attention"):
    tiny.expect_error(tiny.main(f"--workdir={copied}", f"--mode={mode}"), "model.safetensors is damaged")
  result = tiny.run(copied.with_name("run"), train__init_from=copied)
  tiny.expect_error(result, "model.safetensors is damaged")


@pytest.mark.parametrize(
  "text", ["", "[]", "{}", '{"model": 3}', '{"model": {}}', "[" * 100_000, '{"model": {"x": 1}}', "\xff"]
)
def test_a_damaged_config_is_refused(text, copied):
  (copied / "config.json").write_text(text, encoding="latin1")
  tiny.expect_error(tiny.main(f"--workdir={copied}", "--mode=eval"), "config.json")
  with pytest.raises(InputError):
    Sampler.from_pretrained(copied)
  with pytest.raises(InputError):
    pretrained.load(copied)


def test_a_model_too_large_for_its_file_is_refused_at_once(copied):
  config = dataclasses.replace(tiny.config().model, num_layers=10**9)
  with pytest.raises(InputError, match="fewer than 1,057 parameters"):
    pretrained.read(config, copied)


def test_random_changes_of_the_header_raise_only_input_errors(copied):
  path, rng, refused = copied / "model.safetensors", random.Random(0), 0
  original, config = path.read_bytes(), tiny.config().model
  with mock.patch.object(pretrained, "parameters", mock.Mock(return_value=pretrained.parameters(config))):
    for _ in range(300):
      content = bytearray(original)
      for _ in range(rng.randint(1, 4)):
        content[rng.randrange(3000)] = rng.randrange(256)
      path.write_bytes(content[: rng.choice((len(content), rng.randrange(len(content))))])
      with contextlib.suppress(InputError):
        pretrained.read(config, copied)
        refused -= 1
      refused += 1
  assert refused > 250


@pytest.mark.slow
def test_the_jax_model_reads_what_the_card_documents(tmp_path):
  export.export_params(CONFIG, _params(CONFIG), tmp_path / "folder")
  config, params = pretrained.load(tmp_path / "folder")
  logits = PerceiverAR(config).apply({"params": params}, np.ones((1, 6), np.int32))
  assert logits.shape == (1, 3, 11)
