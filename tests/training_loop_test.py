"""A run: what it logs, draws, profiles and refuses, and updates that are not finite."""

import collections
import contextlib
import json
import os
import re
import signal

import jax
import numpy as np
import pytest
from tensorboard.backend.event_processing import event_accumulator
from tensorboard.plugins.hparams import metadata as hparams_metadata

from perceiver_ar_jax import loop
from perceiver_ar_jax.config import InputError
from perceiver_ar_jax.data.loader import TrainLoader
from perceiver_ar_jax.models import architectures
from perceiver_ar_jax.training import memory, optimizer
from tests import batches, tiny


def test_a_run_logs_every_step_and_its_settings(trained):
  losses = tiny.losses(trained)
  assert sorted(losses) == list(range(1, 13))
  assert len(set(losses.values())) >= 11, "only the first update, at rate 0, changes nothing"
  assert (trained / "config.json").read_text() == tiny.config().to_json()
  line = json.loads((trained / "metrics.jsonl").read_text().splitlines()[3])
  step_flops = architectures.train_flops(tiny.config())
  assert line["model_flops_per_second"] == pytest.approx(step_flops / line["seconds"])
  assert "model_flops_utilization" not in line, "the peak of a CPU is unknown"
  assert line["data_wait_seconds"] in (0, line["data_seconds"])
  assert line["skipped_files"] == 0
  assert json.loads((trained / "eval-validation-12.json").read_text())["step"] == 12


@pytest.mark.slow
def test_a_run_compiles_its_update_and_its_evaluation_once(tmp_path, caplog):
  with jax.log_compiles():
    loop.train(tiny.config(train__steps=6, train__checkpoint_every=6, eval__every=2), tmp_path)
  names = [re.match(r"Compiling (?:jit\()?(\w+)", record.getMessage()) for record in caplog.records]
  compiled = collections.Counter(name[1] for name in names if name)
  assert len(list(tmp_path.glob("eval-validation-*.json"))) >= 1
  assert (compiled["train_step"], compiled["eval_step"]) == (1, 1), compiled


@pytest.mark.slow
def test_a_step_makes_no_implicit_transfer(tmp_path, monkeypatch):
  """Between two batches the loop only transfers what it names: the batch to the devices, the metrics from them."""
  draw, to_global, num_batches, guard = TrainLoader.__next__, loop.to_global, 0, contextlib.ExitStack()

  def transfer(*arguments):
    with jax.transfer_guard("allow"):  # JAX counts an array made from a callback as implicit
      return to_global(*arguments)

  def count(self):
    nonlocal num_batches
    num_batches += 1
    if num_batches == 2:
      guard.enter_context(jax.transfer_guard("disallow"))
    if num_batches == 5:
      with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed host-to-device transfer"):
        jax.numpy.add(np.ones(2), 1)  # what an implicit transfer would have done
      guard.close()
    return draw(self)

  monkeypatch.setattr(loop, "to_global", transfer)
  monkeypatch.setattr(TrainLoader, "__next__", count)
  with guard:
    assert loop.train(tiny.config(train__steps=6, train__checkpoint_every=6), tmp_path) == 0
  assert num_batches == 6


@pytest.mark.slow
@pytest.mark.parametrize(
  ("show_seconds", "fetched"),
  [(1e9, [[1, 2, 3, 4], [5, 6], [7, 8], [9, 10, 11, 12]]), (0.0, [*([step] for step in range(1, 13))])],
)
def test_metrics_are_fetched_together_and_logged_alike(show_seconds, fetched, trained, tmp_path, monkeypatch):
  """One step late, so that the devices never wait; at once before saving."""
  report, reports = loop._Run._report, []
  monkeypatch.setattr(loop, "_SHOW_SECONDS", show_seconds)
  monkeypatch.setattr(
    loop._Run, "_report", lambda self, steps: (reports.append([step.number for step in steps]), report(self, steps))
  )
  assert loop.train(tiny.config(train__log_every=4, train__checkpoint_every=6), tmp_path) == 0
  assert reports == fetched
  every_step = {line["step"]: line for line in _lines(trained) if "loss" in line}
  lines = {line["step"]: line for line in _lines(tmp_path) if "loss" in line}
  assert {step: line["loss"] for step, line in lines.items()} == {step: every_step[step]["loss"] for step in (4, 8, 12)}
  for steps in fetched:
    if line := lines.get(steps[-1]):
      num_tokens = np.mean([every_step[step]["num_tokens"] for step in steps])
      assert line["tokens_per_second"] * line["seconds"] == pytest.approx(num_tokens)
      assert line.keys() == every_step[steps[-1]].keys()
      assert 0 <= line["data_wait_seconds"] <= line["data_seconds"]


@pytest.mark.slow
def test_the_host_is_at_most_two_steps_ahead_of_the_devices(tmp_path, monkeypatch):
  """However slow they are: here, a step is finished when the host has waited for it."""
  finished, num_steps, compile_step = set(), 0, memory.compile_step

  class Metric:
    def __init__(self, value):
      self.value, self.step = value, num_steps

    def is_ready(self):
      return self.step in finished

    def block_until_ready(self):
      finished.add(self.step)

    def __array__(self, *arguments, **named):
      return np.asarray(self.value)

  def compile_slow_step(*arguments):
    train_step = compile_step(*arguments)

    def slow_step(*inputs):
      nonlocal num_steps
      num_steps += 1
      assert {*range(1, num_steps - 2)} <= finished
      state, metrics = train_step(*inputs)
      return state, {name: Metric(value) for name, value in metrics.items()}

    return slow_step

  monkeypatch.setattr(memory, "compile_step", compile_slow_step)
  monkeypatch.setattr(loop, "_SHOW_SECONDS", 1e9)
  assert loop.train(tiny.config(train__steps=8, train__log_every=100, train__checkpoint_every=8), tmp_path) == 0
  assert num_steps == 8


@pytest.mark.slow
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


def test_tensorboard_compares_settings(trained):
  events = event_accumulator.EventAccumulator(str(trained)).Reload()
  content = events.PluginTagToContent("hparams")[hparams_metadata.SESSION_START_INFO_TAG]
  settings = hparams_metadata.parse_session_start_info_plugin_data(content).hparams
  assert settings["model.latent_width"].number_value == 16
  assert settings["train.optimizer.learning_rate"].number_value == 0.01
  assert settings["train.optimizer.schedule"].string_value == "cosine"
  assert not [name for name in settings if not name.startswith(("model.", "train."))]
  assert {"loss", "eval_nats_per_token", "learning_rate"} < {*events.Tags()["tensors"]}


def test_an_unreadable_held_out_file_is_found_before_anything_else(tmp_path):
  files = tmp_path / "files"
  for name in ("train/a.txt", "held-out/empty.txt"):
    (files / name).parent.mkdir(parents=True, exist_ok=True)
    (files / name).write_text("text " * 100 if "train" in name else "")
  data = {"data__task": "text_files", "data__files": f"{files}/train", "data__validation_files": f"{files}/held-out"}
  model = {"model__position_encoding": "rotary", "model__position_sizes": ()}
  config = tiny.config(**data, **model)
  message = r"'validation' of text_files contains no document.*empty\.txt has nothing to predict"
  with pytest.raises(InputError, match=message):
    loop.train(config, tmp_path / "run")
  assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_before_it_is_saved(tmp_path):
  config = tiny.config(train__optimizer__learning_rate=1e30, train__optimizer__clip_norm=0.0)
  with pytest.raises(InputError, match="At step [34] the loss is .* so training stopped"):
    loop.train(config, tmp_path)
  assert all(int(path.name) < 3 for path in (tmp_path / "checkpoints").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({}, "At step 6 the loss is nan"),
    ({"train__on_nonfinite": "skip", "train__max_skipped": 2}, "At step 7 the loss is nan .*2 such steps in a row"),
  ],
)
def test_a_loss_that_is_not_finite_between_two_lines_is_never_saved(settings, message, tmp_path, monkeypatch):
  _spoil_batches(monkeypatch, (6, 7))
  with pytest.raises(InputError, match=message):
    loop.train(tiny.config(train__log_every=100, train__checkpoint_every=4, **settings), tmp_path)
  assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"4"}


def _spoil_batches(monkeypatch, numbers):
  """Weights of the batches of these numbers, counted from 1, are NaN."""
  to_global, num_batches = loop.to_global, 0

  def spoil(batch, *arguments):
    nonlocal num_batches
    num_batches += 1
    factor = np.float32(np.nan if num_batches in numbers else 1)
    return to_global(batch | {"weights": batch["weights"] * factor}, *arguments)

  monkeypatch.setattr(loop, "to_global", spoil)


@pytest.mark.slow
@pytest.mark.parametrize("killed_at", [3, 6])
def test_a_profile_covers_three_steps_or_those_before_a_signal(killed_at, tmp_path, monkeypatch):
  draw, step = TrainLoader.__next__, 0

  def kill(self):
    nonlocal step
    step += 1
    assert bool(list((tmp_path / "profile").rglob("*.xplane.pb"))) == (step >= 5)
    if step == killed_at:
      os.kill(os.getpid(), signal.SIGTERM)
    return draw(self)

  monkeypatch.setattr(TrainLoader, "__next__", kill)
  assert loop.train(tiny.config(train__profile_at=2), tmp_path) == 128 + signal.SIGTERM
  assert list((tmp_path / "profile").rglob("*.xplane.pb"))


@pytest.mark.slow
def test_updates_that_are_not_finite_are_skipped_a_limited_number_of_times(tmp_path, capfd):
  config = tiny.config(
    train__optimizer__learning_rate=1e30,
    train__optimizer__clip_norm=0.0,
    train__on_nonfinite="skip",
    train__max_skipped=4,
  )
  with pytest.raises(InputError, match="At step [67] the loss is .*4 such steps in a row.*, so training stopped"):
    loop.train(config, tmp_path)
  assert "the update was skipped" in capfd.readouterr().out
  assert [line["skipped_steps"] for line in _lines(tmp_path)][-1] == 3


def _lines(workdir) -> list[dict]:
  return list(map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines()))


@pytest.mark.slow
def test_skipped_updates_are_counted_through_a_restart_and_leave_the_learning_rate(tmp_path, monkeypatch):
  """Batches 4 and 5 are not finite; the schedule does not advance there."""
  _spoil_batches(monkeypatch, (4, 5))
  settings = {"train__on_nonfinite": "skip", "train__optimizer__schedule": "t5"}
  loop.train(tiny.config(train__steps=6, **settings), tmp_path)
  loop.train(tiny.config(train__steps=8, **settings), tmp_path)
  lines = [line for line in _lines(tmp_path) if "skipped_steps" in line]
  assert [line["step"] for line in lines] == list(range(1, 9))
  assert [line["skipped_steps"] for line in lines] == [0, 0, 0, 1, 2, 2, 2, 2]
  schedule = optimizer.make_schedule(tiny.config(**settings).train.optimizer, 12)
  updates_before = [0, 1, 2, 3, 3, 3, 4, 5]
  np.testing.assert_allclose([line["learning_rate"] for line in lines], [schedule(index) for index in updates_before])


def test_processes_agree_on_whether_a_step_was_evaluated(copy_of_trained, monkeypatch):
  """Process 0 writes the metrics of a step, which a slower process would find and then not wait for it."""

  class NotHere(int):
    """0: this process finds no metrics; another one does."""

  (copy_of_trained / "eval-validation-12.json").unlink()
  added = []
  monkeypatch.setattr(loop.checkpoint.Checkpointer, "has_metrics", lambda *arguments: NotHere())
  monkeypatch.setattr(loop.checkpoint.Checkpointer, "add_metrics", lambda *arguments: added.append(arguments))
  monkeypatch.setattr(loop.distributed, "maximum", lambda value: 1 if isinstance(value, NotHere) else value)
  assert loop.train(tiny.config(), copy_of_trained) == 0
  assert (copy_of_trained / "eval-validation-12.json").exists() and not added
