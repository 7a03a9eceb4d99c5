"""--mode=plan: whether the train step of a config fits a slice of TPUs, without having it.

The real compiler compiles the real step, so bytes per chip are exact; the only statement about speed is the
compute-bound lower limit of a step. The compiler runs in a process of its own, `python -m perceiver_ar_jax.plan
TOPOLOGY RESULT.json < config.json`: libtpu would affect all else that JAX does in a process, and may crash.
"""

import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time

import jax
from jax.experimental import topologies

from perceiver_ar_jax.config import Config, InputError, require, writing
from perceiver_ar_jax.data import windows
from perceiver_ar_jax.models import architectures
from perceiver_ar_jax.parallel import sharding
from perceiver_ar_jax.parallel.chips import Topology, parse_topology
from perceiver_ar_jax.parallel.mesh import check_batch, make_mesh
from perceiver_ar_jax.training import optimizer as optimizer_lib
from perceiver_ar_jax.training import step as step_lib
from perceiver_ar_jax.training.memory import LESS_MEMORY, bytes_beside_arguments, format_bytes


def plan(config: Config, workdir: str | os.PathLike) -> int:
  """Plans for `config.plan.topology`, prints whether it fits and writes WORKDIR/plan.json; returns the exit code 0.

  Raises InputError if the step does not fit (plan.json is written all the same), the compiler is not installed or
  failed, the topology is unknown, or the mesh or the batch does not fit it.
  """
  name, is_installed = config.plan.topology, importlib.util.find_spec("libtpu") is not None
  require(name is not None, "--mode=plan needs the chips to plan for, such as --config.plan.topology=v5e:16x16.")
  topology = parse_topology(name)
  require(is_installed, "--mode=plan needs the package libtpu: pip install -e '.[plan]'. It needs no TPU.")
  print(f"Compiling the train step for {topology} ({topology.num_chips} chips): one minute to several.", flush=True)
  result = assemble(config, topology, compile_plan(config, topology))
  path = pathlib.Path(workdir) / "plan.json"
  with writing(path, "give another --workdir"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
  needed, available = format_bytes(result["peak_bytes"]), format_bytes(result["hbm_bytes"])
  limit = f"compute-bound lower limit {result['compute_bound_seconds']:.3g} seconds per step"
  print(f"{'fits' if result['fits'] else 'DOES NOT FIT'}: {needed} of {available} per chip; {limit}")
  print(f"Written, with FLOPs and all bytes, to {path}", flush=True)
  reason = f"The compiler reports: {result['refused'].split(': ', 1)[-1]} " if "refused" in result else ""
  problem = f"The train step of {config.data.task} does not fit {topology}: it needs {needed} on each of"
  require(result["fits"], f"{problem} {topology.num_chips} chips, which have {available}. {reason}{LESS_MEMORY}")
  return 0


def compile_plan(config: Config, topology: Topology) -> dict:
  """Returns the result of `measure` in a process of its own; raises InputError as it, or if the compiler failed."""
  environment = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "JAX_ENABLE_COMPILATION_CACHE": "false",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # do not disturb a second plan, or training on a TPU of this machine
    "TPU_SKIP_MDS_QUERY": "1",  # do not ask the cloud's metadata server which TPU this machine has
  }
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "result.json"
    command = [sys.executable, "-m", "perceiver_ar_jax.plan", str(topology), str(path)]
    process = subprocess.run(command, input=config.to_json(), env=environment, capture_output=True, text=True)
    reason = "; ".join(process.stderr.strip().splitlines()[-3:])
    code = f"exit code {process.returncode} (-9: too little memory)"
    require(path.exists(), f"The compiler for {topology} ended with {code} and no result: {reason}.")
    measured = json.loads(path.read_text())
  require("error" not in measured, measured.get("error", ""))
  return measured


def assemble(config: Config, topology: Topology, measured: dict) -> dict:
  """Returns the content of plan.json, given the result of `measure`."""
  step_flops = architectures.train_flops(config)
  return {
    "task": config.data.task,
    "topology": str(topology),
    "num_devices": topology.num_chips,
    "microbatches": config.train.microbatches,
    **measured,
    "hbm_bytes": topology.chip.hbm_bytes,
    "fits": "refused" not in measured and measured["peak_bytes"] <= topology.chip.hbm_bytes,
    "step_flops": step_flops,
    "compute_bound_seconds": step_flops / (topology.num_chips * topology.chip.peak_flops),
  }


def measure(config: Config, topology: Topology) -> dict:
  """Returns the mesh, the number of parameters, compile seconds, and the bytes of the compiled step on each chip.

  If the compiler refuses the program because of its memory, `refused` is its message. Raises InputError if it does not
  know the topology, or the mesh or the batch does not fit it.
  """
  options: dict = {"num_slices": topology.slices} if topology.slices > 1 else {}
  if topology.version == "v4":
    options["chip_config_name"] = "megacore"  # a chip's two cores act as one device
  try:
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology.slice_name, **options).devices
    mesh = make_mesh(config.mesh, devices)
  except jax.errors.JaxRuntimeError as error:
    reason = str(error).split("\n")[0]
    raise InputError(f"The installed compiler does not know plan.topology={topology} ({reason}).") from error
  except NotImplementedError as error:  # JAX cannot divide the torus into these axes
    fix = "each axis must be a product of some of the slice's dimensions"
    raise InputError(f"The mesh {config.mesh} does not fit {topology}: {fix}.") from error
  architectures.check(config.model, mesh)
  check_batch(config.train.batch_size // config.train.microbatches, "train.batch_size / train.microbatches", mesh)
  optimizer = optimizer_lib.make_optimizer(config.train.optimizer, config.train.steps)
  state = step_lib.abstract_state(config, optimizer, mesh)
  model, rows = config.model, config.train.batch_size
  is_packed = config.data.packing > 1
  batch = jax.eval_shape(lambda: windows.empty_batch(rows, model, model.position_dims, packed=is_packed))
  result = {"mesh": dict(mesh.shape), "num_params": architectures.num_params(model)}
  start = time.monotonic()
  with jax.set_mesh(mesh):
    lowered = step_lib.lower(config, optimizer, state, batch, mesh)
    try:
      compiled = lowered.compile()
      memory = compiled.memory_analysis()
      argument_bytes, temp_bytes = memory.argument_size_in_bytes, memory.temp_size_in_bytes
      peak_bytes = argument_bytes + bytes_beside_arguments(compiled) + memory.generated_code_size_in_bytes
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise
      result["refused"] = refused = str(error).split("\n")[0]
      match = re.search(r"(?:\(|Used )([\d.]+)([KMGT])", refused)  # "... temporaries (41.23G) exceeds ..."
      temp_bytes = int(float(match[1]) * 1024 ** (1 + "KMGT".index(match[2]))) if match else 0
      argument_bytes = sharding.bytes_per_device(state)
      peak_bytes = argument_bytes + temp_bytes
  result |= {"argument_bytes": argument_bytes, "temp_bytes": temp_bytes, "peak_bytes": peak_bytes}
  return result | {"compile_seconds": round(time.monotonic() - start, 1)}


if __name__ == "__main__":
  try:
    _RESULT = measure(Config.from_json(sys.stdin.read()), parse_topology(sys.argv[1]))
  except InputError as _error:
    _RESULT = {"error": str(_error)}
  pathlib.Path(sys.argv[2]).write_text(json.dumps(_RESULT))
  sys.stdout.flush()
  os._exit(0)  # libtpu may crash at Python's shutdown
