"""The command line: one command from data to metrics, flags of every form, and one paragraph for every mistake."""

import io
import json
import os
import sys

import pytest
from absl import flags
from absl.testing import flagsaver
from etils import epath

from perceiver_ar_jax import command_line
from perceiver_ar_jax.config import TransientError, config_from_run
from perceiver_ar_jax.training import workdir as workdir_lib
from tests import tiny

SHRUNK = [
  "--config.model.latent_width=32",
  "--config.model.num_layers=2",
  "--config.model.num_cross_heads=2",
  "--config.model.num_self_heads=2",
  "--config.model.num_latents=256",
  "--config.train.batch_size=2",
  "--config.train.steps=2",
  "--config.train.log_every=1",
  "--config.train.optimizer.warmup_steps=0",
  "--config.train.optimizer.cosine_steps=2",
  "--config.eval.batch_size=2",
  "--config.eval.stride=256",
  "--config.eval.max_sequences=1",
  "--config.eval.num_samples=0",
]


def _run(monkeypatch, *arguments, command, required=("workdir",)) -> int:
  """The exit code of a command line that runs `command`."""
  monkeypatch.setattr(sys, "argv", ["main.py", *map(str, arguments)])
  with flagsaver.flagsaver(), pytest.raises(SystemExit) as exit:
    flags.DEFINE_enum("mode", "train", ["train", "eval"], "As the main command defines it.")
    command_line.run(command, required)
  return exit.value.code


def _config(monkeypatch, *arguments):
  """The config that a command line resolves to, and the workdir."""
  results = []

  def command(config):
    results.append((config, command_line.WORKDIR.value))
    return 0

  assert _run(monkeypatch, *arguments, command=command) == 0
  return results[0]


@pytest.mark.slow
def test_the_papers_config_trains_and_evaluates_on_prepared_data(data_dir, tmp_path):
  flags = ["--config=configs/imagenet32.py", f"--workdir={tmp_path}", f"--config.data.data_dir={data_dir}", *SHRUNK]
  result = tiny.main(*flags, "--config.eval.stride=128")
  assert result.returncode == 0, result.stderr
  assert "bits/dim" in result.stdout and "Compiled the train step" in result.stdout
  assert sorted(tiny.losses(tmp_path)) == [1, 2]
  scores = json.loads((tmp_path / "eval-validation-2.json").read_text())
  assert (scores["task"], scores["stride"], scores["num_tokens"]) == ("imagenet32", 128, 3072)
  assert scores["bits_per_dim"] == scores["bits_per_token"] > 0


@pytest.mark.parametrize(
  ("arguments", "words"),
  [
    (["--config=configs/copy.py", "--config.train.stesp=3", "--workdir=x"], ["stesp", "steps"]),
    (["--config=configs/copy.py", "--config.trian.steps=3", "--workdir=x"], ["trian", "train"]),
    (
      ["--config=configs/copy.py", "--config.model.num_latents=64", "--workdir=x"],
      ["num_latents=64", "max_context=32"],
    ),
    (["--config=configs/copy.py", "--config.train.steps=many", "--workdir=x"], ["train.steps", "many"]),
    (["--config=configs/copy.py", "--config.data.files=~/nowhere", "--workdir=x"], ["data.files=~/nowhere", "exist"]),
    (["--config=configs/cpoy.py", "--workdir=x"], ["configs/cpoy.py", "Did you mean 'configs/copy.py'"]),
    (
      ["--config=nowhere/copy.py", "--workdir=x"],
      ["nowhere/copy.py does not exist", "the folder that contains configs/"],
    ),
    (["--config=configs/copy.py"], ["--workdir is missing"]),
    (["--config.train.steps=3", "--workdir=x"], ["--config is missing", "contains no run", "configs/photos32.py"]),
    (["--config=configs/copy.py", "--wrokdir=x"], ["wrokdir", "workdir"]),
    (["--config=configs/copy.py", "--workdir=x", "--mode=trian"], ["trian", "train"]),
    (["--config=configs/copy.py", "--workdir=x", "train"], ["Unexpected argument 'train'"]),
    (["--config=configs/copy.py", "--config.data.task=coyp", "--workdir=x"], ["coyp", "Did you mean 'copy'"]),
    (["--config=configs/copy.py", "--config.train.steps=None", "--workdir=x"], ["config.train.steps is not set"]),
    (["--config=configs/copy.py", "--config.model.dropout=None", "--workdir=x"], ["model.dropout must not be None"]),
    (["--config=configs/copy.py", "--config.model.position_sizes=None", "--workdir=x"], ["must not be None"]),
    (["--config=configs/copy.py", "--config.seed=4294967296", "--workdir=x"], ["seed=4294967296 must be in 0.."]),
    (["--config=configs/copy.py", "--config.seed=-1", "--workdir=x"], ["seed=-1 must be in 0..4294967295"]),
    (["--config=configs/copy.py", "--config.sample.seed=4294967296", "--workdir=x"], ["sample.seed=4294967296"]),
  ],
  ids=lambda value: "_".join(value)[-30:] if isinstance(value, list) else None,
)
def test_mistakes_end_in_one_paragraph(arguments, words, tmp_path):
  arguments = [argument.replace("--workdir=x", f"--workdir={tmp_path / 'run'}") for argument in arguments]
  tiny.expect_error(tiny.main(*arguments), *words)
  assert not (tmp_path / "run").exists()


def test_every_optional_setting_can_be_none(monkeypatch):
  base = ["--config=configs/copy.py", "--workdir=x"]
  names = [
    "eval.stride",
    "eval.max_sequences",
    "model.logits_chunk",
    "model.rotary_max_wavelength",
    "model.embed_width",
  ]
  names += ["train.profile_at", "sample.length", "sample.prompt", "data.sentencepiece"]
  config, _ = _config(monkeypatch, *base, *(f"--config.{name}=None" for name in names))
  for name in names:
    section, setting = name.split(".")
    assert getattr(getattr(config, section), setting) is None
  config, _ = _config(monkeypatch, *base, "--config.eval.stride=None", "--config.eval.stride=8")
  assert config.eval.stride == 8


def test_a_flag_and_its_value_may_be_two_arguments(monkeypatch, tmp_path):
  config = tiny.config(train__steps=77)
  (tmp_path / "config.json").write_text(config.to_json())
  assert _config(monkeypatch, "--workdir", tmp_path) == (config, str(tmp_path))
  arguments = ["--config", "configs/copy.py", "-workdir", tmp_path, "--config.train.steps", "123", "--mode", "eval"]
  config, _ = _config(monkeypatch, *arguments, "--config.mesh.data", "-1", "--config.sample.prompt", "--stop it")
  assert (config.train.steps, config.mesh.data, config.sample.prompt) == (123, -1, "--stop it")


def test_a_tilde_is_the_home_folder_in_every_path(monkeypatch, tmp_path):
  monkeypatch.setenv("HOME", str(tmp_path))
  (tmp_path / "run").mkdir()
  (tmp_path / "run" / "config.json").write_text(tiny.config(train__steps=77).to_json())
  config, workdir = _config(monkeypatch, "--workdir=~/run")
  assert workdir == str(tmp_path / "run") and config.train.steps == 77
  (tmp_path / "copy.py").write_text("from configs.copy import get_config")
  names = ("data_dir", "files", "validation_files", "sentencepiece")
  arguments = ["--config", "~/copy.py", "--workdir", "~/new", *(f"--config.data.{name}=~/run" for name in names)]
  config, workdir = _config(monkeypatch, *arguments)
  assert workdir == str(tmp_path / "new") and not (tmp_path / "new").exists()
  assert {getattr(config.data, name) for name in names} == {str(tmp_path / "run")}


@pytest.mark.parametrize("flush", [False, True])
def test_output_without_a_reader_ends_the_program_quietly(flush, monkeypatch, capsys):
  def command(config):
    print("first line", flush=flush)
    return 0

  flags = ["--config=configs/copy.py", "--workdir=x"]
  for printing in ([*flags], [*flags, "--help"], ["--version"]):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as broken:
      monkeypatch.setattr(sys, "stdout", broken)
      assert _run(monkeypatch, *printing, command=command) == 128 + 13
      print("for the flush at the end, which must not fail")
  assert capsys.readouterr().err == ""


def test_another_broken_pipe_is_an_error(monkeypatch, tmp_path, capsys):
  def command(config):
    raise BrokenPipeError

  with open(tmp_path / "out", "w") as file:
    monkeypatch.setattr(sys, "stdout", file)
    assert _run(monkeypatch, "--config=configs/copy.py", command=command, required=()) == 75
  assert "BrokenPipeError" in capsys.readouterr().err


def test_characters_that_the_terminal_cannot_show_are_replaced(monkeypatch):
  content = io.BytesIO()
  monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(content, encoding="ascii"))

  def command(config):
    print("caf\u00e9 \udc80")
    return 0

  assert _run(monkeypatch, "--config=configs/copy.py", command=command, required=()) == 0
  assert content.getvalue() == b"caf? ?\n"


def test_a_missing_dataset_reports_where_it_was_searched_and_what_needs_no_download(tmp_path):
  result = tiny.main(
    "--config=configs/imagenet64.py", f"--workdir={tmp_path / 'run'}", f"--config.data.data_dir={tmp_path}", *SHRUNK
  )
  tiny.expect_error(result, str(tmp_path), "downsampled_imagenet", "photos32")


def test_a_workdir_that_cannot_be_written(tmp_path):
  (tmp_path / "file").write_text("")
  tiny.expect_error(tiny.run(tmp_path / "file" / "run"), "cannot be written", str(tmp_path / "file" / "run"))


def test_a_run_with_a_constant_rate_may_choose_its_decay_late(copy_of_trained):
  """With wsd, the settings of its end are chosen when the end is near."""
  constant = {"train__optimizer__schedule": "wsd", "train__steps": 100, "train__optimizer__decay_steps": 50}
  saved, earlier = (tiny.config(**constant | changes) for changes in ({}, {"train__optimizer__decay_steps": 5}))
  (copy_of_trained / "config.json").write_text(saved.to_json())
  with workdir_lib.own(earlier, epath.Path(copy_of_trained)):
    assert json.loads((copy_of_trained / "config.json").read_text())["train"]["optimizer"]["decay_steps"] == 5


def test_a_workdir_of_another_config_is_left_alone(copy_of_trained):
  before = sorted(os.listdir(copy_of_trained / "checkpoints"))
  tiny.expect_error(
    tiny.run(copy_of_trained, model__num_layers=3),
    "contains the checkpoints of another config",
    "model.num_layers was 2 and is 3",
  )
  assert sorted(os.listdir(copy_of_trained / "checkpoints")) == before


@pytest.mark.slow
def test_without_a_config_that_of_the_run_is_used(copy_of_trained):
  workdir = f"--workdir={copy_of_trained}"
  result = tiny.main(workdir, "--mode=eval", "--config.eval.max_sequences=5")
  assert result.returncode == 0, result.stderr
  assert json.loads((copy_of_trained / "eval-validation-12.json").read_text())["num_documents"] == 5

  result = tiny.main(workdir, "--config.train.steps=13")
  assert result.returncode == 0 and "Resuming from the checkpoint of step 12" in result.stdout, result.stderr
  assert sorted(tiny.losses(copy_of_trained)) == list(range(1, 14))

  config = copy_of_trained / "config.json"
  config.write_text("{")
  tiny.expect_error(tiny.main(workdir, "--mode=eval"), f"{config} cannot be read", "restore it")
  config.unlink()
  tiny.expect_error(tiny.main(workdir, "--mode=eval"), "--config is missing", "configs/photos32.py")


def test_a_run_whose_storage_is_out_of_reach_may_be_restarted(copy_of_trained, monkeypatch):
  def fail(workdir):
    raise TransientError("config.json cannot be read: Stale file handle")

  monkeypatch.setattr(config_from_run, "load_config", fail)
  result = tiny.main(f"--workdir={copy_of_trained}", "--mode=eval")
  assert result.returncode == 75, result.stderr
  assert "Error: config.json cannot be read" in result.stderr and "Traceback" not in result.stderr


def test_a_model_that_exceeds_the_memory_is_refused_before_it_is_initialized(tmp_path):
  result = tiny.run(tmp_path, model__latent_width=2**16, model__num_layers=1000)
  tiny.expect_error(result, "memory on each device", "model.remat=full", "mesh.fsdp")


def test_help_and_version_are_printed():
  output = tiny.main("--help").stdout
  assert all(f"{name}: " in output for name in ("--config", "--workdir", "--mode", "version")), output
  result = tiny.main("--version")
  assert result.returncode == 0 and result.stdout.startswith("perceiver_ar_jax 0."), result.stderr


@pytest.mark.slow
def test_help_and_mistakes_need_neither_jax_nor_tensorflow():
  program = """
import sys
from perceiver_ar_jax import command_line, main
sys.argv[1:] = ["--config=configs/copy.py", "--wrokdir=x"]
try:
  command_line.run(main.main, ())
except SystemExit as exit:
  assert exit.code == 1
assert not {"jax", "tensorflow"} & set(sys.modules), "imported before the flags were parsed"
"""
  result = tiny.python("-c", program)
  assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_the_package_offers_its_nouns_without_loading_tensorflow():
  program = """
import sys, perceiver_ar_jax
assert {"PerceiverAR", "ModelConfig", "Sampler", "load_checkpoint", "tasks"} <= set(dir(perceiver_ar_jax))
assert "tensorflow" not in sys.modules
assert perceiver_ar_jax.Sampler.from_workdir and "tensorflow" not in sys.modules
"""
  result = tiny.python("-c", program)
  assert result.returncode == 0, result.stderr
