"""Runs that stop, die or meet damaged files resume exactly; nothing that follows a saved step can cost it."""

import json
import os
import pathlib
import pty
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from tensorboard.backend.event_processing import event_accumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import metadata as hparams_metadata

from perceiver_ar_jax import loop
from perceiver_ar_jax.config import InputError, TransientError
from perceiver_ar_jax.data.loader import TrainLoader
from perceiver_ar_jax.evaluation import evaluate
from perceiver_ar_jax.models import flops
from perceiver_ar_jax.sampling import write
from perceiver_ar_jax.training import checkpoint, metrics, optimizer
from perceiver_ar_jax.training import optimizer as optimizer_lib
from tests import batches, tiny


def _replace_evaluation(monkeypatch, evaluate_step):
  """Replaces what an evaluator does by `evaluate_step(step, should_stop)`."""

  def call(self, params, step, should_stop=lambda: False, documents=None):
    return evaluate_step(step, should_stop)

  monkeypatch.setattr(evaluate.Evaluator, "__call__", call)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
  """A finished run of 12 steps."""
  workdir = tmp_path_factory.mktemp("uninterrupted")
  assert loop.train(tiny.config(), workdir) == 0
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
  step_flops = flops.train_step(tiny.config())
  assert line["model_flops_per_second"] == pytest.approx(step_flops / line["seconds"])
  assert "model_flops_utilization" not in line, "the peak of a CPU is unknown"
  assert line["data_wait_seconds"] in (0, line["data_seconds"])
  assert line["skipped_files"] == 0
  assert json.loads((uninterrupted / "eval-validation-12.json").read_text())["step"] == 12


def test_skipped_files_are_in_the_metrics_and_reported_at_the_end(tmp_path, capsys):
  texts = {"train/a.txt": "tick tock " * 20, "train/b.txt": "", "train/c.txt": "", "validation/d.txt": "tick tock"}
  files = batches.write(tmp_path / "texts", texts)
  config = tiny.config(
    data__task="text_files",
    data__files=str(files / "train"),
    data__validation_files=str(files / "validation"),
    train__steps=3,
  )
  assert loop.train(config, tmp_path / "run") == 0
  lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
  assert [json.loads(line)["skipped_files"] for line in lines if "loss" in json.loads(line)] == [2, 2, 2]
  assert "2 files or records were skipped" in "".join(capsys.readouterr())


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
  curves = events.Tags()["tensors"]
  assert {"^loss$", "^eval_nats_per_token$"} < set(tags)
  assert all(any(re.search(tag, name) for name in curves) for tag in tags), (tags, curves)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_signals_save_and_the_run_resumes_exactly(number, uninterrupted, tmp_path, monkeypatch):
  """The signal comes during the evaluation of step 4, which the restart makes up for."""

  def kill(step, should_stop):
    os.kill(os.getpid(), number)
    time.sleep(0.1)
    assert should_stop()

  config = tiny.config(eval__every=4)
  with monkeypatch.context() as patch:
    _replace_evaluation(patch, kill)
    assert loop.train(config, tmp_path) == 128 + number
  assert max(tiny.losses(tmp_path)) == 4 and (tmp_path / "checkpoints" / "4").is_dir()
  assert loop.train(config, tmp_path) == 0
  assert tiny.losses(tmp_path) == tiny.losses(uninterrupted)
  assert _evaluated_steps(tmp_path) == [4, 8, 12]


def _evaluated_steps(workdir) -> list[int]:
  lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
  return [line["step"] for line in lines if "eval_nats_per_token" in line]


@pytest.mark.parametrize("error", [InputError("held-out.txt is gone"), ZeroDivisionError("a bug")])
def test_a_failing_evaluation_costs_no_step_and_no_restart(error, uninterrupted, tmp_path, monkeypatch, capfd):
  def fail(step, should_stop):
    raise error

  with monkeypatch.context() as patch:
    _replace_evaluation(patch, fail)
    with pytest.raises(InputError, match="Training is complete and step 12 is saved, but its evaluation failed"):
      loop.train(tiny.config(eval__every=4), tmp_path)
    messages = capfd.readouterr().err
    assert "The evaluation of step 4 failed, and training continues" in messages
    assert "The evaluation of step 8 failed, and training continues" in messages
    assert str(error) in messages and ("Traceback" in messages) == (not isinstance(error, InputError))
    assert tiny.losses(tmp_path) == tiny.losses(uninterrupted)
    with pytest.raises(InputError, match="its evaluation failed"):  # a restart neither trains nor loses anything
      loop.train(tiny.config(eval__every=4), tmp_path)
    with pytest.raises(InputError, match="step 14 is saved"):  # the evaluation owed at step 12 fails, and that is all
      loop.train(tiny.config(eval__every=4, train__steps=14), tmp_path)
  assert (tmp_path / "checkpoints" / "14").is_dir()
  assert loop.train(tiny.config(eval__every=4, train__steps=14), tmp_path) == 0
  assert _evaluated_steps(tmp_path) == [14]


def test_failing_samples_cost_no_step(tmp_path, monkeypatch, capfd):
  def fail(self, params, should_stop):
    assert (tmp_path / "checkpoints" / "4" / "metrics").is_dir(), "the step and its metrics were to be saved first"
    raise ValueError("a bug in sampling")

  monkeypatch.setattr(write.PreviewSampler, "__call__", fail)
  assert loop.train(tiny.config(eval__every=4, eval__num_samples=1), tmp_path) == 0
  messages = capfd.readouterr().err
  assert "No samples of step 4 were drawn: ValueError: a bug in sampling" in messages and "Traceback" in messages
  assert _evaluated_steps(tmp_path) == [4, 8, 12]


def test_samples_are_drawn_for_one_device_and_fit_its_memory(tmp_path, monkeypatch):
  drawn = []
  monkeypatch.setattr(metrics.MetricsLog, "write_samples", lambda self, step, samples: drawn.append(len(samples)))
  assert loop.train(tiny.config(eval__num_samples=None, train__steps=3), tmp_path / "default") == 0
  assert drawn == [2]
  monkeypatch.setattr(write.PreviewSampler, "compile", lambda self, params: 2**60)
  with pytest.raises(InputError, match="3 samples .* needs 1073741824.0 GiB on each device.*eval.num_samples=0"):
    loop.train(tiny.config(eval__num_samples=3, train__steps=3), tmp_path / "large")
  assert not (tmp_path / "large" / "checkpoints").exists()


def test_an_unreadable_held_out_file_is_found_before_anything_else(tmp_path):
  files = tmp_path / "files"
  for name in ("train/a.txt", "held-out/empty.txt"):
    (files / name).parent.mkdir(parents=True, exist_ok=True)
    (files / name).write_text("text " * 100 if "train" in name else "")
  data = {"data__task": "text_files", "data__files": f"{files}/train", "data__validation_files": f"{files}/held-out"}
  model = {"model__position_encoding": "rotary", "model__position_sizes": ()}
  config = tiny.config(**data, **model)
  with pytest.raises(InputError, match=r"'validation' of text_files contains no document.*empty\.txt is empty"):
    loop.train(config, tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_other_seeds_give_other_losses(uninterrupted, tmp_path):
  loop.train(tiny.config(seed=1), tmp_path)
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
  assert loop.train(tiny.config(), finished) == 0
  captured = capfd.readouterr()
  assert "checkpoint of step 12" in captured.err and "damaged" in captured.err
  assert "Resuming from the checkpoint of step 9" in captured.out
  assert (finished / "damaged" / "12").is_dir()
  assert tiny.losses(finished) == tiny.losses(uninterrupted)


def test_when_every_checkpoint_is_damaged_the_run_stops_and_deletes_nothing(finished):
  for step in (finished / "checkpoints").iterdir():
    _flip_a_byte(step)
  logged = (finished / "metrics.jsonl").read_text()
  for _ in range(2):  # a restart loop must not start over either
    with pytest.raises(InputError, match="All checkpoints .* are damaged"):
      loop.train(tiny.config(), finished)
  assert len(list((finished / "checkpoints").iterdir())) == 3
  assert (finished / "metrics.jsonl").read_text() == logged


@pytest.mark.parametrize("name", [name for name in optimizer_lib.OPTIMIZERS if name != "adam"])
def test_every_optimizer_trains_and_resumes(name, tmp_path):
  settings = {"train__optimizer__name": name, "train__optimizer__schedule": "constant"}
  for steps in (3, 4):
    assert loop.train(tiny.config(train__steps=steps, **settings), tmp_path) == 0
  assert sorted(tiny.losses(tmp_path)) == [1, 2, 3, 4]


def test_a_longer_run_continues_a_finished_one(finished):
  assert loop.train(tiny.config(train__steps=14), finished) == 0
  assert sorted(tiny.losses(finished)) == list(range(1, 15))


def test_the_newest_and_the_best_checkpoint_are_kept(tmp_path, monkeypatch):
  """The best evaluation is one that a restart made up for."""
  scores = {2: 5.0, 4: 1.0, 6: 2.0, 8: 3.0, 10: 4.0, 12: 6.0}

  def score(step, should_stop):
    if step == 4 and not restarted:
      os.kill(os.getpid(), signal.SIGTERM)
      assert should_stop()
      return None
    return {"nats_per_token": scores[step]}

  _replace_evaluation(monkeypatch, score)
  monkeypatch.setattr(evaluate.Evaluator, "describe", str)
  monkeypatch.setattr(evaluate.Evaluator, "write", lambda self, result, workdir: None)
  config = tiny.config(eval__every=2, train__checkpoint_every=1, train__keep_checkpoints=2)
  restarted = False
  assert loop.train(config, tmp_path) == 128 + signal.SIGTERM
  restarted = True
  assert loop.train(config, tmp_path) == 0
  assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"4", "11", "12"}


def test_a_loss_that_is_not_finite_stops_before_it_is_saved(tmp_path):
  config = tiny.config(train__optimizer__learning_rate=1e30, train__optimizer__clip_norm=0.0)
  with pytest.raises(InputError, match="At step [34] the loss is .* so training stopped"):
    loop.train(config, tmp_path)
  assert all(int(path.name) < 3 for path in (tmp_path / "checkpoints").iterdir())


@pytest.mark.parametrize("end", ["window", "last step", "signal", "error"])
def test_a_profile_is_kept_however_the_run_ends(end, tmp_path, monkeypatch):
  """The trace covers 3 steps; the run may end within them."""
  config = tiny.config(train__profile_at=5 if end == "last step" else 2, train__steps=6)
  draw, drawn = TrainLoader.__next__, []

  def disturb(self):
    drawn.append(None)
    if len(drawn) == 3 and end == "signal":
      os.kill(os.getpid(), signal.SIGTERM)
    if len(drawn) == 3 and end == "error":
      raise InputError("no more data")
    return draw(self)

  monkeypatch.setattr(TrainLoader, "__next__", disturb)
  if end == "error":
    with pytest.raises(InputError, match="no more data"):
      loop.train(config, tmp_path)
  else:
    assert loop.train(config, tmp_path) == (128 + signal.SIGTERM if end == "signal" else 0)
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
    loop.train(config, tmp_path)
  assert "was skipped: its loss is" in capfd.readouterr().out
  assert [line["skipped_steps"] for line in _lines(tmp_path)][-1] == 3


def _lines(workdir) -> list[dict]:
  return list(map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines()))


def test_skipped_updates_are_counted_through_a_restart_and_leave_the_learning_rate(tmp_path, monkeypatch):
  """Batches 4 and 5 are NaN; the schedule does not advance on them."""
  from_array, num_batches = loop.to_global, 0

  def spoil(batch, *arguments):
    nonlocal num_batches
    num_batches += 1
    return from_array(
      batch | {"weights": batch["weights"] * np.float32(np.nan if num_batches in (4, 5) else 1)}, *arguments
    )

  monkeypatch.setattr(loop, "to_global", spoil)
  settings = {"train__on_nonfinite": "skip", "train__optimizer__schedule": "t5"}
  loop.train(tiny.config(train__steps=6, **settings), tmp_path)
  loop.train(tiny.config(train__steps=8, **settings), tmp_path)
  lines = [line for line in _lines(tmp_path) if "skipped_steps" in line]
  assert [line["step"] for line in lines] == list(range(1, 9))
  assert [line["skipped_steps"] for line in lines] == [0, 0, 0, 1, 2, 2, 2, 2]
  schedule = optimizer.make_schedule(tiny.config(**settings).train.optimizer, 12)
  updates_before = [0, 1, 2, 3, 3, 3, 4, 5]
  np.testing.assert_allclose([line["learning_rate"] for line in lines], [schedule(index) for index in updates_before])


def test_a_full_disk_leaves_the_last_good_checkpoint(uninterrupted, tmp_path, monkeypatch):
  """Files may not exceed the size of metrics, so that the kernel itself refuses to write checkpoints."""

  def fill(self, state, data):
    if int(state.step) == 6:
      while not (tmp_path / "checkpoints" / "3").exists():  # it is written while training continues
        time.sleep(0.05)
      resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))
    save(self, state, data)

  before, save = resource.getrlimit(resource.RLIMIT_FSIZE), checkpoint.Checkpointer.save
  try:
    with monkeypatch.context() as patch, pytest.raises(TransientError, match="could not be written"):
      patch.setattr(checkpoint.Checkpointer, "save", fill)
      loop.train(tiny.config(), tmp_path)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
  assert {path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()} == {"3"}
  assert loop.train(tiny.config(), tmp_path) == 0
  assert tiny.losses(tmp_path) == tiny.losses(uninterrupted)


_WAITS_FOR_A_SIGNAL = """
import os, sys, time
from perceiver_ar_jax.training import signals
with signals.Signals() as stop_signals:
  os.write(3, b"ready")
  while not stop_signals.received:
    time.sleep(0.01)
  time.sleep(0.3)  # for the second SIGHUP, of the shell
  print("saved", flush=True)
  print("saved", file=sys.stderr, flush=True)
  os.write(3, stop_signals.name.encode())
"""


def test_a_terminal_that_closes_neither_kills_nor_breaks_output():
  """The kernel sends SIGHUP, and writing to the terminal fails from then on."""
  terminal, reader = pty.openpty(), os.pipe()
  code = f"import os; os.dup2({reader[1]}, 3)\n{_WAITS_FOR_A_SIGNAL}"
  process = subprocess.Popen(
    [sys.executable, "-c", f"import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n{code}"],
    cwd=tiny.ROOT,
    stdin=terminal[1],
    stdout=terminal[1],
    stderr=terminal[1],
    pass_fds=[reader[1]],
    start_new_session=True,
  )
  os.close(terminal[1])
  os.close(reader[1])
  assert os.read(reader[0], 5) == b"ready"
  os.close(terminal[0])
  process.send_signal(signal.SIGHUP)
  assert os.read(reader[0], 10) == b"SIGHUP"
  assert process.wait() == 0
  os.close(reader[0])
