"""Several processes as one program: initialization, agreement and joint exit.

Every process runs the same code on the same global arrays. What only one process knows (a signal, a file that cannot
be read) must be agreed on before any process acts on it: processes that take different branches deadlock.
"""

import collections
import contextlib
import glob
import importlib.util
import os
import pathlib
import platform
import sys
import time
import zlib
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint import multihost

from perceiver_ar_jax.config import checks, require

_COMPILED = "~/.cache/perceiver_ar_jax"
HEARTBEAT_SECONDS = 30  # a process without a heartbeat for this long counts as dead, and the others exit


def initialize(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None) -> None:
  """Initializes jax.distributed for several processes, before any use of a device; InputError for wrong arguments.

  Without arguments, it detects a TPU pod or a Slurm step of several tasks.
  """
  given = {"--coordinator": coordinator, "--num_processes": num_processes, "--process_id": process_id}
  missing = [name for name, value in given.items() if value is None]
  if len(missing) == len(given):
    if in_slurm_step() or _on_tpu():
      jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    return
  require(not missing, f"{' and '.join(missing)} must be set too: several processes need all of {', '.join(given)}.")
  require(0 <= process_id < num_processes, f"--process_id={process_id} must be in 0..{num_processes - 1}.")
  has_port = coordinator.rpartition(":")[2].isdigit()
  require(has_port, f"--coordinator={coordinator} must be host:port of process 0, such as 10.0.0.2:12345.")
  if num_processes > 1:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    timeouts = {f"{name}_timeout_seconds": HEARTBEAT_SECONDS for name in ("heartbeat", "shutdown")}
    jax.distributed.initialize(coordinator, num_processes, process_id, **timeouts)


def in_slurm_step() -> bool:
  """Returns whether this process is one of several tasks of a Slurm step."""
  tasks = os.environ.get("SLURM_STEP_NUM_TASKS", os.environ.get("SLURM_NTASKS", "1"))
  return "SLURM_PROCID" in os.environ and "SLURM_STEP_NODELIST" in os.environ and tasks.isdigit() and int(tasks) > 1


def _on_tpu() -> bool:
  """Whether this machine has TPUs and may use them; JAX then detects the other hosts from its environment."""
  allowed = not jax.config.jax_platforms or "tpu" in jax.config.jax_platforms
  present = glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")
  return bool(allowed and present and importlib.util.find_spec("libtpu"))


def cache_compiled() -> None:
  """Stores compiled programs for later starts, by kind of CPU, unless JAX_COMPILATION_CACHE_DIR has been set."""
  if jax.config.jax_compilation_cache_dir:
    return
  cpu = pathlib.Path("/proc/cpuinfo")
  lines = cpu.read_text().splitlines() if cpu.exists() else []
  flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
  name = f"{platform.machine()}-{zlib.crc32(flags.encode()):08x}"
  jax.config.update("jax_compilation_cache_dir", os.path.join(os.path.expanduser(_COMPILED), name))


def log(message: str) -> None:
  """Prints a message, on process 0 only and without breaking a progress bar."""
  if jax.process_index() == 0:
    with tqdm.tqdm.external_write_mode(file=sys.stdout):
      print(message, flush=True)


def progress_bar(**settings) -> tqdm.tqdm:
  """A bar on process 0, with these settings of tqdm; where standard error is a file, it gets a line every 5 s."""
  interval, is_silent = 0.5 if sys.stderr.isatty() else 5.0, jax.process_index() > 0
  return tqdm.tqdm(**{"disable": is_silent, "dynamic_ncols": True, "mininterval": interval} | settings)


def maximum(value: int) -> int:
  """Returns the largest `value` of all processes, which synchronize here."""
  if jax.process_count() == 1:
    return value
  return int(multihost_utils.process_allgather(np.int32(value)).max())


def wait_for_all(name: str) -> None:
  """A barrier: returns once every process has called it with the same `name`, however late; it uses no device."""
  if jax.process_count() > 1:
    multihost.get_barrier_sync_fn()(key=name, timeout_ms=24 * 3600 * 1000)


def delayed_maximum() -> Callable[[int], int]:
  """Returns a `maximum` that does not wait: a call returns the largest value that the previous call got anywhere."""
  if jax.process_count() == 1:
    return lambda value: value
  mesh, pending = Mesh(np.array(jax.devices()), ("all",)), collections.deque([0])
  split, replicated = NamedSharding(mesh, PartitionSpec("all")), NamedSharding(mesh, PartitionSpec())
  largest = jax.jit(jnp.max, out_shardings=replicated)

  def exchange(value: int) -> int:
    values = jax.make_array_from_callback((mesh.size,), split, lambda index: np.full(1, value, np.int32))
    pending.append(largest(values))
    return int(pending.popleft())

  return exchange


@contextlib.contextmanager
def end_together() -> Iterator[None]:
  """A context that all processes leave together: when all are done, or soon after an error in one of them.

  JAX's own barrier at exit times out while one process still writes files, and a process that failed would wait there.
  """
  try:
    yield
    wait_for_all("end")
  except SystemExit:
    raise
  except BaseException as error:
    if jax.process_count() == 1:
      raise
    name = f"process {jax.process_index()} of {jax.process_count()}"
    code = checks.report(error)
    if checks.is_computation(error):
      print(f"A computation failed in {name}; probably another process has died.", file=sys.stderr, flush=True)
      # Meanwhile JAX exits with the name of the process that died; the margin is for a late check of heartbeats.
      time.sleep(HEARTBEAT_SECONDS + 15)
    print(f"{name} exits.", file=sys.stderr, flush=True)
    os._exit(code)
