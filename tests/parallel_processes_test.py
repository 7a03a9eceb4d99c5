"""Several processes are one run: the same losses, one decision, one end; any number of processes can resume it."""

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

from perceiver_ar_jax import loop
from perceiver_ar_jax.sampling.sampler import Sampler
from tests import tiny

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

STEPS = 30
SETTINGS = {
  "model__latent_width": 16,
  "model__num_layers": 1,
  "train__batch_size": 16,
  "train__steps": STEPS,
  "train__checkpoint_every": 5,
  "mesh__data": 2,
  "mesh__fsdp": 2,
  "mesh__context": 2,
}


def _free_port() -> int:
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    return probe.getsockname()[1]


def _start(workdir, count: int, devices: int) -> list[subprocess.Popen]:
  """The processes of a training run, their output in <workdir>-<number>.log."""
  port, processes = _free_port(), []
  for index in range(count):
    flags = (f"--coordinator=127.0.0.1:{port}", f"--num_processes={count}", f"--process_id={index}")
    with open(f"{workdir}-{index}.log", "w") as log:
      command = tiny.command(workdir, *flags, **SETTINGS)
      processes.append(subprocess.Popen(command, cwd=tiny.ROOT, env=tiny.environment(devices), stdout=log, stderr=log))
  return processes


def _train(workdir) -> int:
  return loop.train(tiny.config(**SETTINGS), workdir)


def _wait_for_steps(workdir, steps: int, processes: list[subprocess.Popen]) -> None:
  path, deadline = workdir / "metrics.jsonl", time.monotonic() + 900
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
def story(tmp_path_factory, eight_devices):
  """One run as 2 processes x 4 devices until a SIGTERM, again until a kill, to its end as 1 x 8."""
  folder = tmp_path_factory.mktemp("processes")
  run = folder / "run"
  two = _start(run, 2, 4)
  _wait_for_steps(run, 6, two)
  two[1].send_signal(signal.SIGTERM)  # one of them only
  result = {"run": run, "terminated": _codes(two, 3 * 60), "output": _log(run, 0), "first": tiny.losses(run)}
  two = _start(run, 2, 4)
  _wait_for_steps(run, len(result["first"]) + 6, two)
  two[1].kill()
  result |= {"killed": _codes(two, 3 * 90), "last_words": _log(run, 0)}
  result |= {"alone": eight_devices(_train, run), "uninterrupted": eight_devices(_train, folder / "uninterrupted")}
  return result | {"losses": tiny.losses(run), "expected": tiny.losses(folder / "uninterrupted")}


def test_a_signal_to_one_process_saves_on_all_at_the_same_step(story):
  assert story["terminated"] == [128 + signal.SIGTERM] * 2
  step = max(story["first"])
  assert 6 <= step < STEPS
  assert f"saved at step {step}" in story["output"]


def test_a_dead_process_is_named_and_ends_the_others(story):
  assert story["killed"][0] not in (0, 1)
  assert re.search(r"stopped sending heartbeats\):\s+1\b", story["last_words"])


def test_losses_are_those_of_one_process_however_many_there_were(story):
  assert story["alone"] == story["uninterrupted"] == 0
  steps = range(1, STEPS + 1)
  losses, expected = ([losses[step] for step in steps] for losses in (story["losses"], story["expected"]))
  np.testing.assert_allclose(losses, expected, rtol=1e-6)


_EVALUATES_AND_SAMPLES = """
import pathlib, sys, time
import jax
from perceiver_ar_jax.config import Config
from perceiver_ar_jax.evaluation import evaluate
from perceiver_ar_jax.parallel import distributed
from perceiver_ar_jax.sampling import write

address, index, config, workdir = sys.argv[1:]
initialize = jax.distributed.initialize
jax.distributed.initialize = lambda *args, **names: initialize(*args, **names | {"shutdown_timeout_seconds": 2})
config = Config.from_json(pathlib.Path(config).read_text())
distributed.initialize(address, 2, int(index))
with distributed.end_together():
  evaluate.evaluate(config, workdir)
  write.sample(config, workdir)
  if jax.process_index() == 0:
    time.sleep(6)  # writes for longer than JAX waits at the end
"""


def test_evaluation_and_samples_of_two_processes_equal_those_of_one_and_are_written_by_process_0(story, tmp_path):
  """Each process has a copy of the workdir, so that its writes are seen; process 1 waits for those of process 0."""
  trained, copies = story["run"], [tmp_path / "0", tmp_path / "1"]
  for copy in copies:
    shutil.copytree(trained, copy)
    (copy / f"eval-validation-{STEPS}.json").unlink()  # written during training
  before = _files(copies[0])
  settings = {"sample__num_samples": 3, "sample__batch_size": 2, "sample__length": 20}
  config = tiny.config(**SETTINGS | settings | {"mesh__data": 1, "mesh__context": 1})  # fsdp 2: a device each
  (tmp_path / "config.json").write_text(config.to_json())
  address, processes = f"127.0.0.1:{_free_port()}", []
  for index, copy in enumerate(copies):
    arguments = (address, str(index), str(tmp_path / "config.json"), str(copy))
    processes.append(subprocess.Popen([sys.executable, "-c", _EVALUATES_AND_SAMPLES, *arguments], cwd=tiny.ROOT))
  one_device = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, fsdp=1))
  expected = Sampler.from_workdir(trained, one_device)(num_samples=3, batch_size=2, length=20)
  assert _codes(processes, 3 * 240) == [0, 0]

  metrics = json.loads((copies[0] / f"eval-validation-{STEPS}.json").read_text())
  logged = json.loads((trained / "metrics.jsonl").read_text().splitlines()[-1])
  np.testing.assert_allclose(metrics["nats_per_token"], logged["eval_nats_per_token"], rtol=1e-6)
  names = [f"samples/{STEPS}-0/sample-{number}.npy" for number in range(3)]
  written = {f"eval-validation-{STEPS}.json", *names, f"samples/{STEPS}-0/samples.json", "samples/samples.json"}
  assert _files(copies[0]) - before == written
  for name, sample in zip(names, expected, strict=True):
    np.testing.assert_array_equal(np.load(copies[0] / name), sample.value)
  assert _files(copies[1]) == before


def _files(folder) -> set[str]:
  return {str(path.relative_to(folder)) for path in pathlib.Path(folder).rglob("*") if path.is_file()}
