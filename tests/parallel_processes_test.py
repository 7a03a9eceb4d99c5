"""Several processes are one run: the same losses, one decision, one end; and any number of processes resumes it."""

import dataclasses
import json
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from etils import epath

from perceiver_ar_jax.config.config_from_run import load_config
from perceiver_ar_jax.sampling.sampler import Sampler
from tests import tiny

SETTINGS = {
  "model__latent_width": 16,
  "model__num_layers": 1,
  "train__batch_size": 16,
  "train__steps": 60,
  "train__checkpoint_every": 10,
  "mesh__data": 2,
  "mesh__fsdp": 2,
  "mesh__context": 2,
}


def _free_port() -> int:
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    return probe.getsockname()[1]


def _start(workdir, count: int, devices: int, *arguments: str, own_copies: bool = False) -> list[subprocess.Popen]:
  """The run's processes, their output in <workdir>-<number>.log; own_copies: all but process 0 see copies of it."""
  port, processes = _free_port(), []
  for index in range(count):
    seen = workdir
    if own_copies and index:
      seen = shutil.copytree(workdir, f"{workdir}-of-{index}")
    flags = (f"--coordinator=127.0.0.1:{port}", f"--num_processes={count}", f"--process_id={index}")
    with open(f"{workdir}-{index}.log", "w") as log:
      command = tiny.command(seen, *flags, *arguments, **SETTINGS)
      processes.append(subprocess.Popen(command, cwd=tiny.ROOT, env=tiny.environment(devices), stdout=log, stderr=log))
  return processes


def _wait_for_steps(workdir, steps: int, processes: list[subprocess.Popen]) -> None:
  path, deadline = workdir / "metrics.jsonl", time.monotonic() + 240
  while not path.exists() or path.read_text().count("\n") < steps:
    assert time.monotonic() < deadline and all(process.poll() is None for process in processes), _log(workdir, 0)
    time.sleep(0.01)


def _codes(processes: list[subprocess.Popen], seconds: float) -> list[int]:
  """Exit codes; no process survives the test."""
  try:
    deadline = time.monotonic() + seconds
    return [process.wait(max(deadline - time.monotonic(), 0.1)) for process in processes]
  finally:
    for process in processes:
      process.kill()


def _log(workdir, index: int) -> str:
  with open(f"{workdir}-{index}.log", errors="replace") as log:
    return log.read()


@pytest.fixture(scope="module")
def story(tmp_path_factory):
  """One run as 4 processes x 2 devices until a SIGTERM, as 2 x 4 until a kill, to its end as 1 x 8."""
  folder = tmp_path_factory.mktemp("processes")
  run = folder / "run"
  four = _start(run, 4, 2)
  _wait_for_steps(run, 15, four)
  four[2].send_signal(signal.SIGTERM)  # one of them only
  result = {"run": run, "terminated": _codes(four, 60), "said": _log(run, 0), "first": tiny.losses(run)}
  two = _start(run, 2, 4)
  _wait_for_steps(run, len(result["first"]) + 10, two)
  two[1].kill()
  result |= {"killed": _codes(two, 90), "last_words": _log(run, 0)}
  result["alone"] = _codes(_start(run, 1, 8), 120)
  result["calm"] = _codes(_start(folder / "calm", 1, 8), 120)
  return result | {"losses": tiny.losses(run), "expected": tiny.losses(folder / "calm")}


def test_a_signal_to_one_process_saves_on_all_at_the_same_step(story):
  assert story["terminated"] == [128 + signal.SIGTERM] * 4
  step = max(story["first"])
  assert 15 <= step < 60
  assert f"saved at step {step}" in story["said"]


def test_a_dead_process_is_named_and_ends_the_others(story):
  assert story["killed"][0] not in (0, 1)
  assert re.search(r"stopped sending heartbeats\):\s+1\b", story["last_words"])


def test_losses_are_those_of_one_process_however_many_there_were(story):
  assert story["alone"] == story["calm"] == [0]
  steps = range(1, 61)
  ours, expected = ([losses[step] for step in steps] for losses in (story["losses"], story["expected"]))
  np.testing.assert_allclose(ours, expected, rtol=1e-6)


def test_evaluation_and_samples_of_two_processes_are_those_of_one_and_written_by_process_0(story, tmp_path):
  trained = story["run"]
  evaluated, sampled = (shutil.copytree(trained, tmp_path / mode) for mode in ("eval", "sample"))
  (evaluated / "eval-validation-60.json").unlink()  # written by training, to be written again
  trained_files = _files(trained)
  settings = ("--config.sample.num_samples=3", "--config.sample.batch_size=2", "--config.sample.length=20")
  mesh = ("--config.mesh.data=1", "--config.mesh.context=1")  # fsdp 2: a device each
  evaluating = _start(evaluated, 2, 1, "--mode=eval", *mesh, own_copies=True)
  sampling = _start(sampled, 2, 1, "--mode=sample", *mesh, *settings, own_copies=True)
  config = load_config(epath.Path(trained))
  one_device = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, data=1, fsdp=1, context=1))
  expected = Sampler.from_workdir(trained, one_device)(num_samples=3, batch_size=2, length=20)
  assert _codes(evaluating, 240) == [0, 0], _log(evaluated, 0)
  assert _codes(sampling, 240) == [0, 0], _log(sampled, 0)

  assert _files(evaluated) == trained_files
  result = json.loads((evaluated / "eval-validation-60.json").read_text())
  logged = json.loads((trained / "metrics.jsonl").read_text().splitlines()[-1])
  np.testing.assert_allclose(result["nats_per_token"], logged["eval_nats_per_token"], rtol=1e-6)
  names = [f"samples/60-0/sample-{number}.npy" for number in range(3)]
  assert _files(sampled) - trained_files == {*names, "samples/60-0/samples.json", "samples/samples.json"}
  for name, sample in zip(names, expected, strict=True):
    np.testing.assert_array_equal(np.load(sampled / name), sample.value)
  assert _files(f"{evaluated}-of-1") == trained_files - {"eval-validation-60.json"}
  assert _files(f"{sampled}-of-1") == trained_files


def _files(folder) -> set[str]:
  return {str(path.relative_to(folder)) for path in pathlib.Path(folder).rglob("*") if path.is_file()}


_WRITES_LONG = """
import sys, time
import jax
from perceiver_ar_jax.parallel import distributed

initialize = jax.distributed.initialize
jax.distributed.initialize = lambda *args, **names: initialize(*args, **names | {"shutdown_timeout_seconds": 3})
distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
with distributed.EndTogether():
  if jax.process_index() == 0:
    time.sleep(8)
"""


def test_a_process_that_still_writes_is_waited_for_longer_than_jax_waits_at_the_end():
  address = f"127.0.0.1:{_free_port()}"
  processes = [
    subprocess.Popen(
      [sys.executable, "-c", _WRITES_LONG, address, str(index)], cwd=tiny.ROOT, stderr=subprocess.DEVNULL
    )
    for index in range(2)
  ]
  assert _codes(processes, 60) == [0, 0]
