"""Runs that stop, die or meet damaged files resume exactly; nothing that follows a saved step can cost it."""

import json
import os
import pathlib
import pty
import random
import resource
import signal
import subprocess
import sys
import time

import pytest
from tensorboard.backend.event_processing import event_accumulator

from perceiver_ar_jax import loop
from perceiver_ar_jax.config import InputError, TransientError
from perceiver_ar_jax.evaluation import evaluate
from perceiver_ar_jax.sampling import write
from perceiver_ar_jax.training import checkpoint
from tests import tiny


def _replace_evaluation(monkeypatch, evaluate_step):
  """Replaces the evaluation by `evaluate_step(step, should_stop)`."""

  def call(self, params, step, should_stop=lambda: False, documents=None):
    return evaluate_step(step, should_stop)

  monkeypatch.setattr(evaluate.Evaluator, "__call__", call)


@pytest.mark.slow
def test_signals_save_and_the_run_resumes_exactly(trained, tmp_path, monkeypatch):
  """One signal arrives during each evaluation, which the restart repeats."""
  signals = {6: signal.SIGTERM, 12: signal.SIGINT}
  config = tiny.config(eval__every=6, train__checkpoint_every=6)
  call = evaluate.Evaluator.__call__

  def kill(self, params, step, should_stop=lambda: False, **named):
    if step != killed_at:
      return call(self, params, step, should_stop, **named)
    os.kill(os.getpid(), signals[step])
    time.sleep(0.1)
    assert should_stop()

  monkeypatch.setattr(evaluate.Evaluator, "__call__", kill)
  for killed_at, number in signals.items():
    assert loop.train(config, tmp_path) == 128 + number
    assert max(tiny.losses(tmp_path)) == killed_at and (tmp_path / "checkpoints" / str(killed_at)).is_dir()
  killed_at = None
  assert loop.train(config, tmp_path) == 0
  assert tiny.losses(tmp_path) == tiny.losses(trained)
  assert _evaluated_steps(tmp_path) == [6, 12]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_is_remembered_and_its_handler_is_restored(number):
  before = signal.signal(number, signal.SIG_DFL)  # SIGHUP may be ignored, as by nohup
  try:
    with loop.Signals() as stop_signals:
      assert not stop_signals.agree(wait=True)
      os.kill(os.getpid(), number)
      assert stop_signals.agree(wait=True) == number and stop_signals.name == number.name
    assert signal.getsignal(number) == signal.SIG_DFL
  finally:
    signal.signal(number, before)


def _evaluated_steps(workdir) -> list[int]:
  lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
  return [line["step"] for line in lines if "eval_nats_per_token" in line]


@pytest.mark.slow
def test_a_failing_evaluation_costs_no_step_and_no_restart(trained, tmp_path, monkeypatch, capfd):
  gone, bug = InputError("held-out.txt is gone"), ZeroDivisionError("a bug")
  errors = {4: gone, 8: bug, 12: gone, 14: bug}
  settings = {"eval__every": 4, "train__checkpoint_every": 12}

  def fail(step, should_stop):
    raise errors[step]

  with monkeypatch.context() as patch:
    _replace_evaluation(patch, fail)
    with pytest.raises(InputError, match="Training is complete and step 12 is saved, but its evaluation failed.*gone"):
      loop.train(tiny.config(**settings), tmp_path)
    messages = capfd.readouterr().err
    assert "The evaluation of step 4 failed, and training continues" in messages and str(gone) in messages
    assert "The evaluation of step 8 failed, and training continues" in messages and str(bug) in messages
    assert messages.count("Traceback") == 1, "a bug has one, and a mistake of the user has none"
    assert tiny.losses(tmp_path) == tiny.losses(trained)
    with pytest.raises(InputError, match="its evaluation failed"):  # a restart neither trains nor loses anything
      loop.train(tiny.config(**settings), tmp_path)
    with pytest.raises(InputError, match="step 14 is saved"):  # the evaluation owed at step 12 fails, and that is all
      loop.train(tiny.config(**settings, train__steps=14), tmp_path)
  assert (tmp_path / "checkpoints" / "14").is_dir()
  assert loop.train(tiny.config(**settings, train__steps=14), tmp_path) == 0
  assert _evaluated_steps(tmp_path) == [14]


@pytest.mark.slow
def test_failing_samples_cost_no_step(tmp_path, monkeypatch, capfd):
  """Samples of step 4 fail; those of the last step, two by default, are in TensorBoard."""
  draw = write.preview

  def fail_at_first(sampler, params, should_stop):
    assert (tmp_path / "checkpoints" / "4" / "metrics").is_dir(), "the step and its metrics must be saved first"
    if (tmp_path / "checkpoints" / "8").is_dir():
      return draw(sampler, params, should_stop)
    raise ValueError("a bug in sampling")

  monkeypatch.setattr(write, "preview", fail_at_first)
  settings = {"eval__every": 4, "train__checkpoint_every": 8, "eval__num_samples": None}
  assert loop.train(tiny.config(train__steps=8, **settings), tmp_path) == 0
  messages = capfd.readouterr().err
  assert "No samples of step 4 were drawn: ValueError: a bug in sampling" in messages and "Traceback" in messages
  assert _evaluated_steps(tmp_path) == [4, 8]
  events = event_accumulator.EventAccumulator(str(tmp_path), size_guidance={"tensors": 0}).Reload()
  samples = {tag: events.Tensors(tag) for tag in events.Tags()["tensors"] if tag.startswith("sample/")}
  assert {tag: [event.step for event in samples[tag]] for tag in samples} == {"sample/0": [8], "sample/1": [8]}


def _largest(directory: pathlib.Path) -> pathlib.Path:
  return max((path for path in directory.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def _flip_a_byte(step: pathlib.Path):
  path = _largest(step / "params")
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 0xFF
  path.write_bytes(content)


def _garble_data_position(step: pathlib.Path):
  for path in (step / "data").iterdir():
    path.write_bytes(b"not a checkpoint")


@pytest.mark.parametrize("damage", [_flip_a_byte, _garble_data_position])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(damage, copy_of_trained, trained, capfd):
  damage(copy_of_trained / "checkpoints" / "12")
  assert loop.train(tiny.config(), copy_of_trained) == 0
  captured = capfd.readouterr()
  assert "checkpoint of step 12" in captured.err and "damaged" in captured.err
  assert "Resuming from the checkpoint of step 9" in captured.out
  assert (copy_of_trained / "damaged" / "12").is_dir()
  assert tiny.losses(copy_of_trained) == tiny.losses(trained)


@pytest.mark.slow
def test_when_every_checkpoint_is_damaged_the_run_stops_and_deletes_nothing(copy_of_trained):
  for step in (copy_of_trained / "checkpoints").iterdir():
    _flip_a_byte(step)
  logged = (copy_of_trained / "metrics.jsonl").read_text()
  for _ in range(2):  # a restart loop must not start over either
    with pytest.raises(InputError, match="All checkpoints .* are damaged"):
      loop.train(tiny.config(), copy_of_trained)
  assert len(list((copy_of_trained / "checkpoints").iterdir())) == 3
  assert (copy_of_trained / "metrics.jsonl").read_text() == logged


@pytest.mark.slow
def test_the_newest_and_the_best_checkpoint_are_kept(tmp_path, monkeypatch):
  """The best evaluation is one that a restart repeated."""
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


@pytest.mark.slow
def test_killed_at_a_random_moment_the_run_ends_with_the_same_losses(tmp_path):
  """kill -9, checkpoint writes included: with a checkpoint every step, the process is nearly always writing one.

  Unlike other tests, at XLA's default optimization level.
  """
  environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
  del environment["XLA_FLAGS"]
  settings = {"model__num_layers": 0, "train__checkpoint_every": 1}

  def start(command):
    return subprocess.Popen(command, cwd=tiny.ROOT, env=environment, stdout=subprocess.DEVNULL)

  process = start(tiny.command(tmp_path / "killed", **settings))
  while process.poll() is None and _num_logged(tmp_path / "killed") < 3:
    time.sleep(0.01)
  time.sleep(random.uniform(0, 0.3))
  assert process.poll() is None, "it finished before it was killed"
  process.kill()
  process.wait()
  workdirs = [str(tmp_path / name) for name in ("killed", "uninterrupted")]
  settings |= {"train__checkpoint_every": 12}
  both = f"from tests import tiny; assert not any(tiny.run(path, **{settings}).returncode for path in {workdirs})"
  assert start([sys.executable, "-c", both]).wait() == 0
  assert tiny.losses(tmp_path / "killed") == tiny.losses(tmp_path / "uninterrupted")


def _num_logged(workdir: pathlib.Path) -> int:
  path = workdir / "metrics.jsonl"
  return path.read_text().count("\n") if path.exists() else 0


@pytest.mark.slow
def test_a_full_disk_leaves_the_last_good_checkpoint(trained, tmp_path, monkeypatch):
  """Files may not exceed the size of metrics, so that the kernel refuses to write checkpoints."""

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
  assert tiny.losses(tmp_path) == tiny.losses(trained)


_WAITS_FOR_A_SIGNAL = """
import os, signal, sys, time
from perceiver_ar_jax import loop
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup, under which the tests may run, ignores it
with loop.Signals() as stop_signals:
  os.write(3, b"ready")
  while not stop_signals.received:
    time.sleep(0.01)
  time.sleep(0.3)  # for the second SIGHUP, of the shell
  print("saved", flush=True)
  print("saved", file=sys.stderr, flush=True)
  os.write(3, stop_signals.name.encode())
"""


@pytest.mark.slow
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
