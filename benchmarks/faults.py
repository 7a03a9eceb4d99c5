"""The fault drill: kills a run at random moments, restarts it, and compares its losses with an undisturbed run's.

  python -m benchmarks.faults --kills=20 --read_errors=5 --processes=2 --folder=/tmp/drill

The run evaluates and draws samples. Each round starts all processes, waits until some steps are logged and a random
moment more (while starting, training, evaluating or saving), and kills one of them with SIGKILL. The others must end by
themselves within a minute, or within JAX's five minutes if the coordinator died before they reached it. Then come
rounds in which one process fails to read the newest checkpoint (permission, stale file handle, HTTP 503, memory): no
checkpoint may move. At last the run is completed.

It prints one JSON object and exits with 1 if the run was lost (did not resume), diverged (any loss differs), hung, or
if a checkpoint moved. With the same folder, an interrupted drill resumes.
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
_READ_ERRORS = flags.DEFINE_integer("read_errors", 5, "How many times a checkpoint cannot be read.")
_PROCESSES = flags.DEFINE_integer("processes", 2, "Processes of the run.")
_DEVICES = flags.DEFINE_integer("devices", 2, "Virtual CPU devices of each.")
_STEPS = flags.DEFINE_integer("steps", 400, "Steps of the run.")
_FOLDER = flags.DEFINE_string("folder", None, "Folder of the runs and of the drill's notes.", required=True)
_SECONDS = flags.DEFINE_float("seconds", float("inf"), "Stop after this long; the same command resumes.")

_PHASES = ("starting", "training", "evaluating", "saving")
_EVAL_EVERY = 20
_HANG_SECONDS = 600
_ERRORS = (
  "PermissionError(13, 'Permission denied')",
  "OSError(116, 'Stale file handle')",
  "ValueError('UNAVAILABLE: HTTP response code: 503')",
  "MemoryError()",
  "ValueError('RESOURCE_EXHAUSTED: Out of memory')",
)
_CANNOT_READ = """
import orbax.checkpoint as ocp
from perceiver_ar_jax import command_line, main

def restore(*args, **kwargs):
  raise {error}

ocp.StandardCheckpointHandler.restore = restore
command_line.run(main.main, required=("workdir",))
"""
_ROOT = pathlib.Path(__file__).parent.parent


def main(argv: list[str]) -> None:
  del argv
  begin, folder = time.monotonic(), pathlib.Path(_FOLDER.value)
  folder.mkdir(parents=True, exist_ok=True)
  undisturbed, notes_path = folder / "undisturbed", folder / "notes.json"
  if not _is_done(undisturbed):
    shutil.rmtree(undisturbed, ignore_errors=True)
    _wait(_start(undisturbed, folder), 600)
  notes = json.loads(notes_path.read_text()) if notes_path.exists() else []
  workdir, rounds = folder / "drilled", _KILLS.value + _READ_ERRORS.value
  while len(notes) < rounds and time.monotonic() - begin < _SECONDS.value:
    rng = random.Random(len(notes))
    notes.append(_kill(workdir, folder, rng) if len(notes) < _KILLS.value else _fail_to_read(workdir, folder, rng))
    notes_path.write_text(json.dumps(notes))
    print(json.dumps(notes[-1]), flush=True)
  if len(notes) < rounds:
    return
  codes = _wait(_start(workdir, folder), 600)
  expected, losses = _losses(undisturbed), _losses(workdir)
  kills, read_errors = notes[: _KILLS.value], notes[_KILLS.value :]
  survivors = sorted(note["seconds_to_end"] for note in kills)
  report = {
    "kills": len(kills),
    "processes": _PROCESSES.value,
    "killed_while": {phase: sum(note["phase"] == phase for note in kills) for phase in _PHASES},
    "lost_runs": int(any(codes) or losses.keys() != expected.keys()),
    "diverged_losses": sum(losses.get(step) != loss for step, loss in expected.items()),
    "hangs": sum(note["hung"] for note in notes),
    "seconds_until_the_others_ended": {"median": survivors[len(survivors) // 2], "most": survivors[-1]},
    "read_errors": len(read_errors),
    "moved_checkpoints": sum(note["moved"] for note in read_errors),
  }
  print(json.dumps(report), flush=True)
  sys.exit(int(any(report[name] for name in ("lost_runs", "diverged_losses", "hangs", "moved_checkpoints"))))


def _kill(workdir: pathlib.Path, folder: pathlib.Path, rng: random.Random) -> dict:
  """Starts the run, kills one process of it, and waits for the others to end."""
  before, processes, aim = len(_losses(workdir)), _start(workdir, folder), rng.random()
  target = before + rng.randint(1, 15)
  if aim < 0.2:
    time.sleep(rng.uniform(1, 8))
  else:
    _wait_until(lambda: len(_losses(workdir)) >= target, processes)
    if aim < 0.4:
      _wait_until(lambda: _is_saving(workdir), processes)
    elif aim < 0.7:
      _wait_until(lambda: _is_evaluating(workdir), processes)
    time.sleep(rng.uniform(0, 0.2))
  phase = "training"
  if len(_losses(workdir)) == before:
    phase = "starting"
  elif _is_saving(workdir):
    phase = "saving"
  elif _is_evaluating(workdir):
    phase = "evaluating"
  hung = aim >= 0.2 and len(_losses(workdir)) < target and all(process.poll() is None for process in processes)
  victim = rng.randrange(len(processes))
  processes[victim].kill()
  killed, codes = time.monotonic(), _wait(processes, 60 if phase != "starting" else 360)
  return {
    "phase": phase,
    "victim": victim,
    "codes": codes,
    "hung": hung or None in codes,
    "seconds_to_end": round(time.monotonic() - killed, 1),
    "steps": len(_losses(workdir)),
  }


def _fail_to_read(workdir: pathlib.Path, folder: pathlib.Path, rng: random.Random) -> dict:
  """Starts the run with one process that cannot read checkpoints, and waits for all to end."""
  error, before = rng.choice(_ERRORS), _checkpoints(workdir)
  victim = rng.randrange(_PROCESSES.value)
  codes = _wait(_start(workdir, folder, {victim: ["-c", _CANNOT_READ.format(error=error)]}), 120)
  return {
    "error": error,
    "victim": victim,
    "codes": codes,
    "hung": None in codes,
    "moved": len(before - _checkpoints(workdir)),
  }


def _checkpoints(workdir: pathlib.Path) -> set[str]:
  return {path.name for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()}


def _wait_until(condition: Callable[[], bool], processes: list[subprocess.Popen]) -> None:
  """Returns once `condition` holds, a process has ended, or after a time that only processes that hang need."""
  deadline = time.monotonic() + _HANG_SECONDS
  while not condition() and all(process.poll() is None for process in processes) and time.monotonic() < deadline:
    time.sleep(0.01)


def _is_saving(workdir: pathlib.Path) -> bool:
  """Whether a checkpoint is being written (until the first step after a start: or was, at the last kill)."""
  return any(workdir.glob("checkpoints/*.orbax-checkpoint-tmp*"))


def _is_evaluating(workdir: pathlib.Path) -> bool:
  """Whether the newest step is one that is evaluated, so that an evaluation or its samples are under way."""
  return max(_losses(workdir), default=1) % _EVAL_EVERY == 0


def _start(
  workdir: pathlib.Path, folder: pathlib.Path, programs: dict[int, list[str]] | None = None
) -> list[subprocess.Popen]:
  """Starts all processes; `programs` replaces main.py for some of them."""
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
  environment = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "XLA_FLAGS": f"--xla_force_host_platform_device_count={_DEVICES.value} --xla_backend_optimization_level=1",
  }
  processes = []
  for index in range(_PROCESSES.value):
    program = (programs or {}).get(index, ["-m", "perceiver_ar_jax.main"])
    command = [sys.executable, *program, *ARGUMENTS, f"--config.train.steps={_STEPS.value}"]
    command += [f"--config.eval.every={_EVAL_EVERY}", "--config.eval.num_samples=1"]
    command += [f"--workdir={workdir}", f"--coordinator=127.0.0.1:{port}"]
    command += [f"--num_processes={_PROCESSES.value}", f"--process_id={index}"]
    with (folder / f"{workdir.name}-{index}.log").open("a") as log:
      processes.append(subprocess.Popen(command, cwd=_ROOT, env=environment, stdout=log, stderr=log))
  return processes


def _wait(processes: list[subprocess.Popen], seconds: float) -> list[int | None]:
  """Returns the exit codes; None for a process that had to be killed after `seconds`."""
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
