"""Runs that stop, die and find damaged files go on as if nothing had happened."""

import json
import os
import pathlib
import random
import re
import resource
import shutil
import signal
import subprocess
import time

import pytest
from tensorboard.backend.event_processing import event_accumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import metadata as hparams_metadata

from perceiver_ar_jax.config import OPTIMIZERS, InputError, TransientError
from perceiver_ar_jax.evaluation import evaluate
from perceiver_ar_jax.parallel import flops
from perceiver_ar_jax.training import loop
from tests import tiny


class _Killer:
  """An evaluator that sends this process a signal when it is called."""

  def __init__(self, number: int):
    self.number = number

  def __call__(self, params, step, should_stop):
    os.kill(os.getpid(), self.number)
    time.sleep(0.1)
    assert should_stop()

  def describe(self, result):
    raise AssertionError("there is no result")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
  """A finished run of 12 steps."""
  workdir = tmp_path_factory.mktemp("uninterrupted")
  assert loop.train(tiny.config(), workdir, evaluate.Evaluator) == 0
  return workdir


@pytest.fixture
def finished(uninterrupted, tmp_path):
  """A copy of that run, to be damaged."""
  return pathlib.Path(shutil.copytree(uninterrupted, tmp_path / "run"))


def test_a_run_logs_every_step_and_its_settings(uninterrupted):
  losses = tiny.losses(uninterrupted)
  assert sorted(losses) == list(range(1, 13))
  assert len(set(losses.values())) >= 11, "only the first update, at rate 0, changes nothing"
  assert (uninterrupted / "config.json").read_text() == tiny.config().to_json()
  line = json.loads((uninterrupted / "metrics.jsonl").read_text().splitlines()[3])
  step_flops = flops.train_step(tiny.config()).useful
  assert line["model_flops_per_second"] == pytest.approx(step_flops / line["seconds"])
  assert "model_flops_utilization" not in line, "nobody knows what a CPU could do"
  assert line["data_wait_seconds"] in (0, line["data_seconds"])
  assert json.loads((uninterrupted / "eval-validation-12.json").read_text())["step"] == 12


def test_tensorboard_compares_settings_and_groups_curves(uninterrupted):
  events = event_accumulator.EventAccumulator(str(uninterrupted)).Reload()
  content = events.PluginTagToContent("hparams")[hparams_metadata.SESSION_START_INFO_TAG]
  settings = hparams_metadata.parse_session_start_info_plugin_data(content).hparams
  assert settings["model.latent_width"].number_value == 16
  assert settings["train.optimizer.learning_rate"].number_value == 0.01
  assert settings["train.optimizer.schedule"].string_value == "cosine"
  assert not [name for name in settings if not name.startswith(("model.", "train."))]
  (layout,) = events.Tensors("custom_scalars__config__")
  categories = layout_pb2.Layout.FromString(layout.tensor_proto.string_val[0]).category
  tags = [tag for category in categories for chart in category.chart for tag in chart.multiline.tag]
  there = events.Tags()["tensors"]
  assert {"^loss$", "^eval_nats_per_token$"} < set(tags)
  assert all(any(re.search(tag, name) for name in there) for tag in tags), (tags, there)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_save_and_the_run_goes_on_exactly(number, uninterrupted, tmp_path):
  config = tiny.config(eval__every=4)
  assert loop.train(config, tmp_path, lambda config, mesh: _Killer(number)) == 128 + number
  assert 4 <= max(tiny.losses(tmp_path)) <= 5
  assert loop.train(tiny.config(), tmp_path, evaluate.Evaluator) == 0
  assert tiny.losses(tmp_path) == tiny.losses(uninterrupted)


def test_other_seeds_give_other_losses(uninterrupted, tmp_path):
  loop.train(tiny.config(seed=1), tmp_path, evaluate.Evaluator)
  assert tiny.losses(tmp_path)[12] != tiny.losses(uninterrupted)[12]


def _largest(directory: pathlib.Path) -> pathlib.Path:
  return max((path for path in directory.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def _flip_a_byte(step: pathlib.Path):
  path = _largest(step / "params")
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 0xFF
  path.write_bytes(content)


def _truncate_optimizer(step: pathlib.Path):
  path = _largest(step / "optimizer")
  path.write_bytes(path.read_bytes()[:100])


def _lose_weights(step: pathlib.Path):
  shutil.rmtree(step / "params")


def _garble_data_position(step: pathlib.Path):
  for path in (step / "data").iterdir():
    path.write_bytes(b"not a checkpoint")


@pytest.mark.parametrize("damage", [_flip_a_byte, _truncate_optimizer, _lose_weights, _garble_data_position])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(damage, finished, uninterrupted, capfd):
  damage(finished / "checkpoints" / "12")
  assert loop.train(tiny.config(), finished, evaluate.Evaluator) == 0
  captured = capfd.readouterr()
  assert "checkpoint of step 12" in captured.err and "damaged" in captured.err
  assert "Going on from the checkpoint of step 9" in captured.out
  assert (finished / "damaged" / "12").is_dir()
  assert tiny.losses(finished) == tiny.losses(uninterrupted)


def test_when_every_checkpoint_is_damaged_the_run_stops_and_deletes_nothing(finished):
  for step in (finished / "checkpoints").iterdir():
    _flip_a_byte(step)
  logged = (finished / "metrics.jsonl").read_text()
  for _ in range(2):  # a restart loop must not begin anew either
    with pytest.raises(InputError, match="All checkpoints .* are damaged"):
      loop.train(tiny.config(), finished, evaluate.Evaluator)
  assert len(list((finished / "checkpoints").iterdir())) == 3
  assert (finished / "metrics.jsonl").read_text() == logged


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "adam"])
def test_every_optimizer_trains_and_resumes(name, tmp_path):
  settings = {"train__optimizer__name": name, "train__optimizer__schedule": "constant"}
  for steps in (3, 4):
    assert loop.train(tiny.config(train__steps=steps, **settings), tmp_path, evaluate.Evaluator) == 0
  assert sorted(tiny.losses(tmp_path)) == [1, 2, 3, 4]


def test_a_longer_run_continues_a_finished_one(finished):
  assert loop.train(tiny.config(train__steps=14), finished, evaluate.Evaluator) == 0
  assert sorted(tiny.losses(finished)) == list(range(1, 15))


def test_the_newest_and_the_best_checkpoint_are_kept(tmp_path):
  class Scores:
    """Evaluations that get worse."""

    def __call__(self, params, step, should_stop):
      return {"nats_per_token": float(step)}

    def describe(self, result):
      return str(result)

    def write(self, result, workdir):
      assert result == {"nats_per_token": 12.0}

  config = tiny.config(eval__every=2, train__checkpoint_every=1, train__keep_checkpoints=2)
  assert loop.train(config, tmp_path, lambda config, mesh: Scores()) == 0
  assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"2", "11", "12"}


def test_a_loss_that_is_not_finite_stops_before_it_is_saved(tmp_path):
  config = tiny.config(train__optimizer__learning_rate=1e30, train__optimizer__clip_norm=0.0)
  with pytest.raises(InputError, match="At step [34] the loss is .* so training stopped"):
    loop.train(config, tmp_path, evaluate.Evaluator)
  assert all(int(path.name) < 3 for path in (tmp_path / "checkpoints").iterdir())


def test_a_profile_is_written_on_request(tmp_path):
  assert loop.train(tiny.config(train__profile_at=2, train__steps=6), tmp_path, evaluate.Evaluator) == 0
  assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_killed_at_random_moments_the_run_ends_with_the_same_losses(uninterrupted, tmp_path):
  """kill -9, checkpoint writes included: with a checkpoint every step, the process is nearly always writing one."""
  rng, overrides = random.Random(0), {"train__checkpoint_every": 1}
  kills = 0
  for _ in range(12):
    process = subprocess.Popen(
      tiny.command(tmp_path, **overrides),
      cwd=tiny.ROOT,
      env=tiny.environment(),
      stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL,
    )
    before = _num_logged(tmp_path)
    while process.poll() is None and _num_logged(tmp_path) < min(before + 3, 12):
      time.sleep(0.01)
    time.sleep(rng.uniform(0, 0.3))
    if process.poll() is None:
      process.kill()
      kills += 1
    if process.wait() == 0:
      break
  assert kills >= 2, "the process was to be killed at least twice"
  if process.returncode:
    finish = tiny.run(tmp_path, **overrides)
    assert finish.returncode == 0, finish.stderr
  assert tiny.losses(tmp_path) == tiny.losses(uninterrupted)


def _num_logged(workdir: pathlib.Path) -> int:
  path = workdir / "metrics.jsonl"
  return path.read_text().count("\n") if path.exists() else 0


def test_updates_that_are_not_finite_are_skipped_but_not_for_ever(tmp_path, capfd):
  config = tiny.config(
    train__optimizer__learning_rate=1e30,
    train__optimizer__clip_norm=0.0,
    train__on_nonfinite="skip",
    train__max_skipped=4,
  )
  with pytest.raises(InputError, match="At step [67] the loss is .*, 4 steps in a row, so training stopped"):
    loop.train(config, tmp_path, evaluate.Evaluator)
  assert "was skipped: its loss is" in capfd.readouterr().out
  skipped = [json.loads(line)["skipped_steps"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  assert skipped[0] == 0 and skipped[-1] == 3


def test_a_full_disk_leaves_the_last_good_checkpoint(uninterrupted, tmp_path):
  """Files may not grow beyond what metrics take, so that checkpoints fail to be written, by the kernel's own word."""

  class Full:
    def __call__(self, params, step, should_stop):
      while not (tmp_path / "checkpoints" / "3").exists():  # it is written while training goes on
        time.sleep(0.05)
      resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))

  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  config = tiny.config(eval__every=5)
  try:
    with pytest.raises(TransientError, match="could not be written"):
      loop.train(config, tmp_path, lambda config, mesh: Full())
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
  assert {path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()} == {"3"}
  assert loop.train(tiny.config(), tmp_path, evaluate.Evaluator) == 0
  assert tiny.losses(tmp_path) == tiny.losses(uninterrupted)
