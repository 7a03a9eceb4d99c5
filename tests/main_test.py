"""The command line as people meet it: one command from data to figures, and a paragraph for every mistake."""

import json
import os

import pytest

from tests import tiny

SHRUNK = [
  "--config.model.latent_width=32",
  "--config.model.num_layers=2",
  "--config.model.num_cross_heads=2",
  "--config.model.num_self_heads=2",
  "--config.model.num_latents=256",
  "--config.train.batch_size=2",
  "--config.train.log_every=1",
  "--config.train.optimizer.warmup_steps=0",
  "--config.train.optimizer.cosine_steps=2",
  "--config.eval.batch_size=2",
  "--config.eval.stride=256",
  "--config.eval.max_sequences=1",
  "--config.eval.num_samples=0",
]


def _main(*arguments):
  return tiny.python("-m", "perceiver_ar_jax.main", *arguments)


def test_the_papers_config_trains_resumes_and_evaluates_on_prepared_data(data_dir, tmp_path):
  base = ["--config=configs/imagenet32.py", f"--workdir={tmp_path}", f"--config.data.data_dir={data_dir}", *SHRUNK]
  first = _main(*base, "--config.train.steps=2")
  assert first.returncode == 0, first.stderr
  assert "bits/dim" in first.stdout and "Compiled the train step" in first.stdout
  second = _main(*base, "--config.train.steps=4")
  assert second.returncode == 0, second.stderr
  assert "Going on from the checkpoint of step 2" in second.stdout
  assert sorted(tiny.losses(tmp_path)) == [1, 2, 3, 4]
  third = _main(*base, "--mode=eval", "--config.train.steps=4", "--config.eval.stride=128")
  assert third.returncode == 0, third.stderr
  result = json.loads((tmp_path / "eval-validation-4.json").read_text())
  assert (result["task"], result["stride"], result["num_tokens"]) == ("imagenet32", 128, 3072)
  assert result["bits_per_dim"] == result["bits_per_token"] > 0


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
    (["--config=configs/cpoy.py", "--workdir=x"], ["configs/cpoy.py", "Did you mean 'configs/copy.py'"]),
    (["--config=nowhere/copy.py", "--workdir=x"], ["nowhere/copy.py does not exist", "the folder that holds configs/"]),
    (["--config=configs/copy.py"], ["--workdir is missing"]),
    (["--config=configs/copy.py", "--wrokdir=x"], ["wrokdir", "workdir"]),
    (["--config=configs/copy.py", "--workdir=x", "--mode=trian"], ["trian", "train"]),
    (["--config=configs/copy.py", "--workdir=x", "train"], ["Unexpected argument 'train'"]),
    (["--config=configs/copy.py", "--config.data.task=coyp", "--workdir=x"], ["coyp", "Did you mean 'copy'"]),
  ],
  ids=lambda value: "_".join(value)[-30:] if isinstance(value, list) else None,
)
def test_mistakes_end_in_one_paragraph(arguments, words, tmp_path):
  arguments = [argument.replace("--workdir=x", f"--workdir={tmp_path / 'run'}") for argument in arguments]
  tiny.expect_error(_main(*arguments), *words)
  assert not (tmp_path / "run").exists()


def test_a_missing_dataset_says_where_it_was_looked_for_and_what_needs_nothing(tmp_path):
  result = _main(
    "--config=configs/imagenet64.py", f"--workdir={tmp_path / 'run'}", f"--config.data.data_dir={tmp_path}", *SHRUNK
  )
  tiny.expect_error(result, str(tmp_path), "downsampled_imagenet", "photos32")


def test_a_workdir_that_cannot_be_written(tmp_path):
  (tmp_path / "file").write_text("")
  tiny.expect_error(tiny.run(tmp_path / "file" / "run"), "cannot be written", str(tmp_path / "file" / "run"))


def test_a_workdir_of_another_config_is_left_alone(tmp_path):
  assert tiny.run(tmp_path, train__steps=3).returncode == 0
  before = sorted(os.listdir(tmp_path / "checkpoints"))
  tiny.expect_error(
    tiny.run(tmp_path, model__num_layers=3),
    "contains the checkpoints of another config",
    "model.num_layers is 2 there and 3 here",
  )
  assert sorted(os.listdir(tmp_path / "checkpoints")) == before


def test_without_a_config_the_runs_own_is_taken(tmp_path):
  assert tiny.run(tmp_path, train__steps=3).returncode == 0
  workdir = f"--workdir={tmp_path}"
  result = _main(workdir, "--mode=eval", "--config.eval.max_sequences=5")
  assert result.returncode == 0, result.stderr
  assert json.loads((tmp_path / "eval-validation-3.json").read_text())["num_documents"] == 5

  result = _main(workdir, "--config.train.steps=4")
  assert result.returncode == 0 and "Going on from the checkpoint of step 3" in result.stdout, result.stderr
  assert max(tiny.losses(tmp_path)) == 4

  (tmp_path / "config.json").write_text("{")
  tiny.expect_error(_main(workdir, "--mode=eval"), f"{tmp_path / 'config.json'} cannot be read", "restore it")
  (tmp_path / "config.json").unlink()
  tiny.expect_error(_main(workdir, "--mode=eval"), "--config is missing", "configs/photos32.py")


def test_a_model_beyond_the_memory_is_refused_before_it_is_made(tmp_path):
  result = tiny.run(
    tmp_path,
    model__latent_width=2**16,
    model__num_layers=1000,
  )
  tiny.expect_error(result, "GiB on each device", "model.remat=full", "mesh.fsdp")


def test_help_and_version_are_there_for_newcomers():
  shown = _main("--help")
  assert all(f"{name}: " in shown.stdout for name in ("--config", "--workdir", "--mode", "version")), shown.stdout
  shown = _main("--version")
  assert shown.returncode == 0 and shown.stdout.startswith("perceiver_ar_jax 0."), shown.stderr


def test_the_package_offers_its_nouns_without_loading_tensorflow():
  program = """
import sys, perceiver_ar_jax
assert {"PerceiverAR", "ModelConfig", "Sampler", "load_checkpoint", "tasks"} <= set(dir(perceiver_ar_jax))
assert "tensorflow" not in sys.modules
assert "copy" in perceiver_ar_jax.tasks.names() and perceiver_ar_jax.Sampler.from_workdir
"""
  result = tiny.python("-c", program)
  assert result.returncode == 0, result.stderr
