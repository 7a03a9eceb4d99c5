"""Several processes are one run: the same losses, one decision, one end; and any number of them goes on with it."""

import re
import signal
import socket
import subprocess
import time

import numpy as np
import pytest

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


def _start(workdir, count: int, devices: int) -> list[subprocess.Popen]:
  """The run's processes, their output in <workdir>-<number>.log."""
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
  processes = []
  for index in range(count):
    flags = (f"--coordinator=127.0.0.1:{port}", f"--num_processes={count}", f"--process_id={index}")
    with open(f"{workdir}-{index}.log", "w") as log:
      command = tiny.command(workdir, *flags, **SETTINGS)
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
  killed = time.monotonic()
  result |= {"killed": _codes(two, 90), "seconds": time.monotonic() - killed, "last_words": _log(run, 0)}
  result["alone"] = _codes(_start(run, 1, 8), 120)
  result["calm"] = _codes(_start(folder / "calm", 1, 8), 120)
  return result | {"losses": tiny.losses(run), "expected": tiny.losses(folder / "calm")}


def test_a_signal_to_one_process_saves_on_all_at_the_same_step(story):
  assert story["terminated"] == [128 + signal.SIGTERM] * 4
  step = max(story["first"])
  assert 15 <= step < 60
  assert f"saved at step {step}" in story["said"]


def test_a_dead_process_is_named_and_ends_the_others_within_a_minute(story):
  assert story["killed"][0] not in (0, 1) and story["seconds"] < 60
  assert re.search(r"stopped sending heartbeats\):\s+1\b", story["last_words"])


def test_losses_are_those_of_one_process_however_many_there_were(story):
  assert story["alone"] == story["calm"] == [0]
  steps = range(1, 61)
  ours, expected = ([losses[step] for step in steps] for losses in (story["losses"], story["expected"]))
  np.testing.assert_allclose(ours, expected, rtol=1e-6)
