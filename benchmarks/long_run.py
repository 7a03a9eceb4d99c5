"""Measures the host memory of a long run, or the delay by a checkpoint; prints one JSON object.

  python -m benchmarks.long_run --steps=5000 --folder=/tmp/long
  python -m benchmarks.long_run --checkpoint_mib=600 --folder=/tmp/saves

The first trains a tiny model on 8 virtual devices and reports the process's resident memory at each tenth of the run.
The second saves a state of that size while steps run, and reports how long the loop was blocked and how long writing
took.
"""

import json
import os
import pathlib
import subprocess
import sys
import time

from absl import app, flags

from benchmarks.tiny_run import ARGUMENTS

_STEPS = flags.DEFINE_integer("steps", 5000, "Steps of the run.")
_CHECKPOINT_MIB = flags.DEFINE_integer("checkpoint_mib", None, "Measure saving a state of about this size instead.")
_FOLDER = flags.DEFINE_string("folder", None, "Folder of the run; it should be empty.", required=True)

_ROOT = pathlib.Path(__file__).parent.parent


def main(argv: list[str]) -> None:
  del argv
  if _CHECKPOINT_MIB.value:
    print(json.dumps(_saving(pathlib.Path(_FOLDER.value), _CHECKPOINT_MIB.value)))
  else:
    print(json.dumps(_memory(pathlib.Path(_FOLDER.value), _STEPS.value)))


def _memory(workdir: pathlib.Path, steps: int) -> dict:
  """Returns the resident memory in MiB by step of a run on 8 virtual devices, with its duration and exit code."""
  import psutil

  settings = [*ARGUMENTS, "--config.train.log_every=10", "--config.train.checkpoint_every=500"]
  settings += [f"--config.train.steps={steps}", "--config.eval.every=1000"]
  settings += ["--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.context=2"]
  environment = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=1",
  }
  begin, log, resident = time.monotonic(), workdir / "metrics.jsonl", {}
  process = subprocess.Popen(
    [sys.executable, "-m", "perceiver_ar_jax.main", *settings, f"--workdir={workdir}"], cwd=_ROOT, env=environment
  )
  while process.poll() is None:
    step = json.loads(log.read_text().splitlines()[-1])["step"] if log.exists() and log.stat().st_size else 0
    if step >= (len(resident) + 1) * steps // 10:
      resident[step] = round(psutil.Process(process.pid).memory_info().rss / 2**20)
    time.sleep(0.2)
  return {"steps": steps, "code": process.returncode, "seconds": round(time.monotonic() - begin), "rss_mib": resident}


def _saving(folder: pathlib.Path, mib: int) -> dict:
  import jax
  import jax.numpy as jnp

  from perceiver_ar_jax.training import checkpoint
  from perceiver_ar_jax.training.step import TrainState

  size = mib * 2**20 // 4 // 8

  @jax.jit
  def step(state, busy):
    return state.replace(step=state.step + 1), jax.lax.fori_loop(0, 5, lambda _, x: jnp.tanh(x @ x), busy)

  params = {str(index): jnp.full(size, index, jnp.float32) for index in range(8)}
  state, busy = TrainState(jnp.int32(1), params, {"count": jnp.int32(0)}), jnp.ones((1000, 1000))
  seconds = {"step_alone": [], "step_while_writing": []}
  with checkpoint.Checkpointer(folder) as checkpointer:
    for phase in ("compile", "step_alone", "step_while_writing"):
      if phase == "step_while_writing":
        begin = time.perf_counter()
        checkpointer.save(state, None)
        held_up = time.perf_counter() - begin
      for _ in range(10 if phase != "compile" else 1):
        start = time.perf_counter()
        state, busy = jax.block_until_ready(step(state, busy))
        seconds.setdefault(phase, []).append(time.perf_counter() - start)
  written = time.perf_counter() - begin
  means = {f"{name}_seconds": round(sum(times) / len(times), 3) for name, times in seconds.items() if name != "compile"}
  return {"mib": mib, "held_up_seconds": round(held_up, 2), "written_after_seconds": round(written, 2), **means}


if __name__ == "__main__":
  app.run(main)
