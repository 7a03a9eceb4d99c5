"""The fault drill: kills processes of a run at random moments, restarts it, and compares its losses with a calm run's.

  python -m benchmarks.faults --kills=20 --processes=2 --folder=/tmp/drill

Each round starts all processes, waits until some steps are logged and a random moment more (while starting, training
or saving), and kills one of them with SIGKILL. The others must end by themselves within a minute. It prints one JSON
object and exits with 1 if a run was lost (did not go on) or diverged (other losses than the calm run). The same folder
goes on with a drill that was stopped.
"""

import json
import os
import pathlib
import random
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable

from absl import app, flags

from benchmarks.tiny_run import ARGUMENTS

_KILLS = flags.DEFINE_integer("kills", 20, "How many processes to kill.")
_PROCESSES = flags.DEFINE_integer("processes", 2, "Processes of the run.")
_DEVICES = flags.DEFINE_integer("devices", 2, "Virtual CPU devices of each.")
_STEPS = flags.DEFINE_integer("steps", 400, "Steps of the run.")
_FOLDER = flags.DEFINE_string("folder", None, "Where the runs and the drill's own notes lie.", required=True)
_SECONDS = flags.DEFINE_float("seconds", float("inf"), "Stop after this long; the same command goes on.")

_PHASES = ("starting", "training", "saving")
_ROOT = pathlib.Path(__file__).parent.parent


def main(argv: list[str]) -> None:
  del argv
  begin, folder = time.monotonic(), pathlib.Path(_FOLDER.value)
  folder.mkdir(parents=True, exist_ok=True)
  calm, notes_path = folder / "calm", folder / "kills.json"
  if not _is_done(calm):
    shutil.rmtree(calm, ignore_errors=True)
    _wait(_start(calm, folder), 600)
  notes = json.loads(notes_path.read_text()) if notes_path.exists() else []
  workdir, rng = folder / "drilled", random.Random(len(notes))
  while len(notes) < _KILLS.value and time.monotonic() - begin < _SECONDS.value:
    notes.append(_round(workdir, folder, rng))
    notes_path.write_text(json.dumps(notes))
    print(json.dumps(notes[-1]), flush=True)
  if len(notes) < _KILLS.value:
    return
  codes = _wait(_start(workdir, folder), 600)
  expected, losses = _losses(calm), _losses(workdir)
  differences = [abs(losses[step] / expected[step] - 1) for step in expected if step in losses]
  survivors = [note["seconds_to_end"] for note in notes]
  report = {
    "kills": len(notes),
    "processes": _PROCESSES.value,
    "killed_while": {phase: sum(note["phase"] == phase for note in notes) for phase in _PHASES},
    "lost_runs": int(any(codes) or losses.keys() != expected.keys()),
    "diverged_losses": sum(difference > 1e-6 for difference in differences),
    "largest_difference": max(differences),
    "hangs": sum(note["hung"] for note in notes),
    "seconds_until_the_others_ended": {"median": sorted(survivors)[len(survivors) // 2], "most": max(survivors)},
  }
  print(json.dumps(report), flush=True)
  sys.exit(int(bool(report["lost_runs"] or report["diverged_losses"] or report["hangs"])))


def _round(workdir: pathlib.Path, folder: pathlib.Path, rng: random.Random) -> dict:
  """Starts the run, kills one process of it, and sees the others end."""
  before, processes, aim = len(_losses(workdir)), _start(workdir, folder), rng.random()
  if aim < 0.2:
    time.sleep(rng.uniform(1, 8))
  else:
    wanted = before + rng.randint(1, 15)
    _wait_until(lambda: len(_losses(workdir)) >= wanted, processes)
    if aim < 0.5:
      _wait_until(lambda: _is_saving(workdir), processes)
    else:
      time.sleep(rng.uniform(0, 0.2))
  phase = "starting" if len(_losses(workdir)) == before else "saving" if _is_saving(workdir) else "training"
  victim = rng.randrange(len(processes))
  processes[victim].kill()
  killed, codes = time.monotonic(), _wait(processes, 60)
  return {
    "phase": phase,
    "victim": victim,
    "codes": codes,
    "hung": None in codes,
    "seconds_to_end": round(time.monotonic() - killed, 1),
    "steps": len(_losses(workdir)),
  }


def _wait_until(condition: Callable[[], bool], processes: list[subprocess.Popen]) -> None:
  """Returns once `condition` holds, or a process has ended."""
  while not condition() and all(process.poll() is None for process in processes):
    time.sleep(0.002)


def _is_saving(workdir: pathlib.Path) -> bool:
  """Whether a checkpoint is being written (until the first step of a start: or was, when the last kill came)."""
  return any(workdir.glob("checkpoints/*.orbax-checkpoint-tmp*"))


def _start(workdir: pathlib.Path, folder: pathlib.Path) -> list[subprocess.Popen]:
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
  environment = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "XLA_FLAGS": f"--xla_force_host_platform_device_count={_DEVICES.value} --xla_backend_optimization_level=1",
  }
  processes = []
  for index in range(_PROCESSES.value):
    command = [sys.executable, "-m", "perceiver_ar_jax.main", *ARGUMENTS, f"--config.train.steps={_STEPS.value}"]
    command += [f"--workdir={workdir}", f"--config.compilation_cache={folder / 'compiled'}"]
    command += [f"--coordinator=127.0.0.1:{port}", f"--num_processes={_PROCESSES.value}", f"--process_id={index}"]
    with (folder / f"{workdir.name}-{index}.log").open("a") as log:
      processes.append(subprocess.Popen(command, cwd=_ROOT, env=environment, stdout=log, stderr=log))
  return processes


def _wait(processes: list[subprocess.Popen], seconds: float) -> list[int | None]:
  """Exit codes; None for a process that had to be killed after so long."""
  deadline, codes = time.monotonic() + seconds, []
  for process in processes:
    try:
      codes.append(process.wait(max(deadline - time.monotonic(), 0.01)))
    except subprocess.TimeoutExpired:
      process.kill()
      process.wait()
      codes.append(None)
  return codes


def _losses(workdir: pathlib.Path) -> dict[int, float]:
  path, losses = workdir / "metrics.jsonl", {}
  for line in path.read_text().splitlines() if path.exists() else []:
    try:
      entry = json.loads(line)
    except ValueError:  # cut short by a kill
      continue
    if "loss" in entry:
      losses[entry["step"]] = entry["loss"]
  return losses


def _is_done(workdir: pathlib.Path) -> bool:
  return len(_losses(workdir)) == _STEPS.value and (workdir / "checkpoints" / str(_STEPS.value)).exists()


if __name__ == "__main__":
  app.run(main)
