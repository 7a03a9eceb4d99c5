"""--mode=plan: whether the train step of a config fits a slice of TPUs or nodes of GPUs, without having them.

The real step is compiled by the real compiler, so bytes per chip are exact. The only statement about speed is the
compute-bound lower limit of a step: its FLOPs over the chips' peak.

The compiler runs in a process of its own, `python -m perceiver_ar_jax.plan TOPOLOGY RESULT.json < config.json`: libtpu
would affect all else that JAX does in a process, and a compiler at its limits may crash.
"""

import importlib.util
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from perceiver_ar_jax.config import Config, InputError, writing
from perceiver_ar_jax.data import windows
from perceiver_ar_jax.models import architectures, flops
from perceiver_ar_jax.parallel import sharding
from perceiver_ar_jax.parallel.chips import Topology, parse_topology
from perceiver_ar_jax.parallel.mesh import check_batch, make_mesh
from perceiver_ar_jax.training import optimizer as optimizer_lib
from perceiver_ar_jax.training import state as state_lib
from perceiver_ar_jax.training import step as step_lib


def plan(config: Config, workdir: str | os.PathLike) -> int:
  """Plans for `config.plan.topology`, prints a report and writes WORKDIR/plan.json; returns the exit code 0.

  Raises:
    InputError: the step does not fit (plan.json is written all the same), the compiler is not installed, the topology
      is unknown, or the mesh or the batch does not fit it.
  """
  if config.plan.topology is None:
    raise InputError(
      "--mode=plan needs the chips to plan for, such as --config.plan.topology=v5e:16x16, v4-128 or h100:4x8."
    )
  topology = parse_topology(config.plan.topology)
  check_compiler(topology)
  print(f"Compiling the train step for {topology} ({topology.num_chips} chips): one minute to several.", flush=True)
  result = compile_plan(config, topology)
  path = pathlib.Path(workdir) / "plan.json"
  with writing(path, "give another --workdir"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
  print(f"{describe(result)}\nWritten to {path}", flush=True)
  if not result["fits"]:
    raise InputError(refusal(config, result))
  return 0


def check_compiler(topology: Topology) -> None:
  """Raises InputError unless the compiler for these chips is installed."""
  if topology.chip.dims:
    package, extra, needs = "libtpu", "plan", "It needs no TPU, and runs on x86-64 Linux."
  else:
    package, extra, needs = "jax_cuda12_plugin", "cuda12", "It needs no GPU."
  if importlib.util.find_spec(package) is None:
    raise InputError(
      f"--mode=plan for {topology} compiles with the package {package}, which is not installed: pip install -e"
      f" '.[{extra}]'. {needs}"
    )


def compile_plan(config: Config, topology: Topology) -> dict:
  """Returns the content of plan.json, compiling in a process of its own.

  Raises:
    InputError: the compiler failed, or what `measure` raises.
  """
  environment = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "JAX_ENABLE_COMPILATION_CACHE": "false",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # do not disturb a second plan, or training on a TPU of this machine
    "TPU_SKIP_MDS_QUERY": "1",  # do not ask the cloud's metadata server which TPU this machine has
  }
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "result.json"
    process = subprocess.run(
      [sys.executable, "-m", "perceiver_ar_jax.plan", str(topology), str(path)],
      input=config.to_json(),
      env=environment,
      capture_output=True,
      text=True,
    )
    if not path.exists():
      reason = "; ".join(process.stderr.strip().splitlines()[-3:])
      raise InputError(
        f"The compiler for {topology} ended with exit code {process.returncode} and no result: {reason}. (Code -9 means"
        " that this machine has too little memory. A crash may be a bug of the compiler: try another libtpu.)"
      )
    measured = json.loads(path.read_text())
  if "error" in measured:
    raise InputError(measured["error"])
  return assemble(config, topology, measured)


def assemble(config: Config, topology: Topology, measured: dict) -> dict:
  """Returns the content of plan.json, given the result of `measure`."""
  chip = topology.chip
  measured = {"argument_bytes": sum(measured[f"{name}_bytes"] for name in ("weight", "optimizer", "batch"))} | measured
  if "refused" in measured:
    measured = {"temp_bytes": _required_bytes(measured["refused"]), "output_bytes": 0, "code_bytes": 0} | measured
  peak_bytes = sum(measured[f"{name}_bytes"] for name in ("argument", "temp", "output", "code"))
  step_flops = flops.train_step(config)
  return {
    "task": config.data.task,
    "topology": str(topology),
    "num_devices": topology.num_chips,
    **measured,
    "batch_size": config.train.batch_size,
    "microbatches": config.train.microbatches,
    "remat": config.model.remat,
    "attention": config.model.attention,
    "peak_bytes": peak_bytes,
    "hbm_bytes": chip.hbm_bytes,
    "fits": "refused" not in measured and peak_bytes <= chip.hbm_bytes,
    "step_flops": step_flops,
    "compute_bound_seconds": step_flops / (topology.num_chips * chip.peak_flops),
  }


def describe(plan: dict) -> str:
  """Returns the report that is printed."""
  mesh = " x ".join(f"{axis} {size}" for axis, size in plan["mesh"].items() if size > 1) or "of one device"
  verdict = "fits" if plan["fits"] else "DOES NOT FIT"
  labels = {"weight": "weights", "optimizer": "optimizer", "batch": "batch", "temp": "temporary", "code": "code"}
  parts = ", ".join(f"{label} {_format_bytes(plan[f'{name}_bytes'])}" for name, label in labels.items())
  lines = (
    f"{plan['task']} on {plan['topology']}: {plan['num_devices']} chips, mesh {mesh}",
    f"  {plan['num_params'] / 1e6:,.1f}M parameters, batch {plan['batch_size']:,}, microbatches {plan['microbatches']},"
    f" remat {plan['remat']}, attention {plan['attention']}",
    f"  {verdict}: {_format_bytes(plan['peak_bytes'])} of {_format_bytes(plan['hbm_bytes'])} per chip ({parts})",
    f"  {plan['step_flops']:.3g} FLOPs per step; compute-bound lower limit (FLOPs over peak):"
    f" {plan['compute_bound_seconds']:.3g} seconds per step",
    f"  compiled in {plan['compile_seconds']:.0f} s",
  )
  return "\n".join(lines)


def refusal(config: Config, plan: dict) -> str:
  """Returns one paragraph: that a plan does not fit, the compiler's reason, and what to change."""
  reason = f"The compiler reports: {plan['refused'].split(': ', 1)[-1]} " if "refused" in plan else ""
  return (
    f"The train step of {plan['task']} does not fit {plan['topology']}: it needs {_format_bytes(plan['peak_bytes'])} on"
    f" each of {plan['num_devices']} chips, which have {_format_bytes(plan['hbm_bytes'])}. {reason}Try"
    f" {', or '.join(suggestions(config, plan))}."
  )


def suggestions(config: Config, plan: dict) -> list[str]:
  """Returns changes of the config that lower its memory, the most promising first."""
  mesh, model, microbatches = plan["mesh"], config.model, config.train.microbatches
  rows = config.train.batch_size // (microbatches * mesh["data"] * mesh["fsdp"])
  state_bytes = plan["weight_bytes"] + plan["optimizer_bytes"]
  changes = []
  if mesh["data"] > 1 and state_bytes > plan["hbm_bytes"] / 8:
    changes.append(
      f"sharding the {_format_bytes(state_bytes)} of weights and optimizer state: --config.mesh.data=1"
      f" --config.mesh.fsdp={mesh['fsdp'] * mesh['data']}"
    )
  if model.attention == "reference":
    changes.append("attention that does not store its scores: --config.model.attention=streamed")
  elif model.attention == "chunked":
    changes.append("attention that does not store keys and values: --config.model.attention=streamed")
  if model.remat != "full":
    changes.append("recomputing layers in the backward pass: --config.model.remat=full")
  if rows > 1:
    free_bytes = max(plan["hbm_bytes"] - plan["argument_bytes"] - plan["code_bytes"], 1)
    sufficient = [n for n in range(2, rows + 1) if rows % n == 0 and n * free_bytes >= plan["temp_bytes"]]
    changes.append(f"smaller microbatches: --config.train.microbatches={min(sufficient, default=rows) * microbatches}")
  if model.logits_chunk is None and model.vocab_size > 4 * model.latent_width:
    changes.append("computing logits in chunks: --config.model.logits_chunk=128")
  return changes or ["a larger slice, or a smaller model (latent_width, num_layers, num_latents)"]


def _required_bytes(message: str) -> int:
  """Returns the memory that a refused program requires: "... temporaries (41.23G) exceeds ..."."""
  match = re.search(r"(?:\(|Used )([\d.]+)([KMGT])", message)
  return int(float(match[1]) * 1024 ** (1 + "KMGT".index(match[2]))) if match else 0


def _format_bytes(num_bytes: int) -> str:
  return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**29 else f"{num_bytes / 2**20:.0f} MiB"


# In the compiler's process.


def measure(config: Config, topology: Topology) -> dict:
  """Returns the mesh, the number of parameters, compile seconds, and the bytes of the compiled step on each chip.

  If the compiler refuses the program because of its memory, `refused` is its message, and the bytes that only a
  compiled program has are missing.

  Raises:
    InputError: the compiler does not know the topology, or the mesh or the batch does not fit it.
  """
  devices = _devices(topology)
  try:
    mesh = make_mesh(config.mesh, devices)
  except NotImplementedError as error:  # JAX cannot divide the torus into these axes
    raise InputError(
      f"The mesh {config.mesh} does not fit {topology}: each axis must be a product of some of the slice's dimensions."
      " Change --config.mesh.data, fsdp, tensor or context."
    ) from error
  architectures.check(config.model, mesh)
  check_batch(config.train.batch_size // config.train.microbatches, "train.batch_size / train.microbatches", mesh)
  optimizer = optimizer_lib.make_optimizer(config.train.optimizer, config.train.steps)
  state = state_lib.abstract_state(config, optimizer, mesh)
  batch = batch_shapes(config, mesh)
  result = {
    "mesh": dict(mesh.shape),
    "num_params": sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state.params)),
    "weight_bytes": sharding.bytes_per_device(state.params),
    "optimizer_bytes": sharding.bytes_per_device(state.opt_state),
    "batch_bytes": sharding.bytes_per_device(batch),
  }
  start = time.monotonic()
  with jax.set_mesh(mesh):
    lowered = step_lib.lower(config, optimizer, state, batch, mesh)
    try:
      memory = lowered.compile().memory_analysis()
      result |= {
        "argument_bytes": memory.argument_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "output_bytes": max(memory.output_size_in_bytes - memory.alias_size_in_bytes, 0),
        "code_bytes": memory.generated_code_size_in_bytes,
      }
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise
      result["refused"] = str(error).split("\n")[0]
  return result | {"compile_seconds": round(time.monotonic() - start, 1)}


def batch_shapes(config: Config, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns the shapes and shardings of a global batch, without reading data."""
  model, batch_size = config.model, config.train.batch_size
  dims = len(model.position_sizes) or 1
  row = windows.empty_batch(1, context=model.max_context, latents=model.num_latents, position_dims=dims)
  shapes = {name: (batch_size, *array.shape[1:]) for name, array in row.items()}
  layout = sharding.batch_shardings(mesh, shapes)
  return {name: jax.ShapeDtypeStruct(shapes[name], array.dtype, sharding=layout[name]) for name, array in row.items()}


def _devices(topology: Topology) -> list:
  platform, name, options = "tpu", topology.slice_name, {}
  if not topology.chip.dims:
    shape = "x".join(map(str, (1, *topology.shape)))
    platform, options = "cuda", {"target_config": topology.chip.target, "topology": shape}
  elif topology.version == "v4":
    options = {"chip_config_name": "megacore"}  # a chip's two cores act as one device
  if topology.slices > 1:
    options["num_slices"] = topology.slices
  try:
    return topologies.get_topology_desc(platform=platform, topology_name=name, **options).devices
  except jax.errors.JaxRuntimeError as error:
    reason = str(error).split("\n")[0]
    raise InputError(
      f"plan.topology={topology} is not known to the installed compiler ({reason}): choose another shape."
    ) from error


def _compile_here(topology: str, result_path: str) -> None:
  try:
    result = measure(Config.from_json(sys.stdin.read()), parse_topology(topology))
  except InputError as error:
    result = {"error": str(error)}
  pathlib.Path(result_path).write_text(json.dumps(result))
  sys.stdout.flush()
  os._exit(0)  # libtpu may crash at Python's shutdown


if __name__ == "__main__":
  _compile_here(*sys.argv[1:])
