"""Compiles the real train step for chips that are not here, in a process of its own, which parallel/plan.py starts.

  python -m perceiver_ar_jax.training.ahead_of_time v5e:16x16 RESULT.json < config.json

A process of its own, since libtpu would take part in whatever else JAX does in one, and a compiler that is led to its
limits may crash. RESULT.json holds what `measure` returns, or {"error": a message to people}.
"""

import json
import math
import os
import pathlib
import sys
import tempfile
import time

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from perceiver_ar_jax.config import Config, InputError
from perceiver_ar_jax.data import features
from perceiver_ar_jax.models import architectures
from perceiver_ar_jax.parallel import chips, hlo, sharding
from perceiver_ar_jax.parallel.mesh import check_batch, make_mesh
from perceiver_ar_jax.training import optimizer as optimizer_lib
from perceiver_ar_jax.training import state as state_lib
from perceiver_ar_jax.training import step as step_lib


def measure(config: Config, topology: chips.Topology) -> dict:
  """Figures of the compiled train step on each chip of `topology`, all in bytes but for those named otherwise.

  Where the compiler refuses the program for its memory, `refused` holds its words, and what only a finished
  compilation knows is missing.

  Raises:
    InputError: libtpu does not know the topology, or the mesh or the batch does not fit it.
  """
  devices = _devices(topology)
  try:
    mesh = make_mesh(config.mesh, devices)
  except NotImplementedError as error:  # what JAX raises for a torus that it cannot divide so
    raise InputError(
      f"The mesh {config.mesh} cannot be laid over {topology}: each axis must be a product of some of the slice's own"
      " sizes. Change --config.mesh.data, fsdp, tensor or context."
    ) from error
  architectures.check(config.model, mesh)
  check_batch(config.train.batch_size // config.train.microbatches, "train.batch_size / train.microbatches", mesh)
  optimizer = optimizer_lib.make_optimizer(config.train.optimizer, config.train.steps)
  abstract = state_lib.abstract_state(config, optimizer, mesh)
  batch = batch_shapes(config, mesh)
  figures = {
    "mesh": dict(mesh.shape),
    "num_params": sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract.params)),
    "weight_bytes": sharding.bytes_per_device(abstract.params),
    "optimizer_bytes": sharding.bytes_per_device(abstract.opt_state),
    "batch_bytes": sharding.bytes_per_device(batch),
  }
  start = time.monotonic()
  with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as dump:
    lowered = step_lib.lower(config, optimizer, abstract, batch, mesh)
    try:
      compiled = lowered.compile(compiler_options={"xla_dump_to": dump})
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise
      figures["refused"] = str(error).split("\n")[0]
    else:
      memory = compiled.memory_analysis()
      figures |= {
        "argument_bytes": memory.argument_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "output_bytes": max(memory.output_size_in_bytes - memory.alias_size_in_bytes, 0),
        "code_bytes": memory.generated_code_size_in_bytes,
      }
    text = _dumped(dump)  # there also where the program was refused, and where `as_text` fails
  figures["compile_seconds"] = round(time.monotonic() - start, 1)
  if text:
    moved = hlo.traffic(text)
    figures["traffic"] = {
      "hbm_bytes": int(moved.hbm_bytes),
      "sent_bytes": int(moved.sent_bytes),
      "sent_bytes_by_collective": {name: int(size) for name, size in moved.collectives.items()},
    }
    figures["largest"] = moved.largest
  return figures


def batch_shapes(config: Config, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
  """A global batch's shapes on `mesh`, without the data: the config says how many dimensions its positions have."""
  model, batch_size = config.model, config.train.batch_size
  dims = len(model.position_sizes) or 1
  row = features.empty_batch(1, context=model.max_context, latents=model.num_latents, position_dims=dims)
  shapes = {name: (batch_size, *x.shape[1:]) for name, x in row.items()}
  layout = sharding.batch_shardings(mesh, shapes)
  return {name: jax.ShapeDtypeStruct(shapes[name], x.dtype, sharding=layout[name]) for name, x in row.items()}


def _devices(topology: chips.Topology) -> list:
  platform, options = "tpu", {}
  if not topology.chip.dims:
    shape = "x".join(map(str, (1, *topology.shape)))
    platform, options = "cuda", {"target_config": topology.chip.target, "topology": shape}
  elif topology.version == "v4":  # a chip has two cores, which then work as one device
    options = {"chip_config_name": "megacore"}
  if topology.slices > 1:
    options["num_slices"] = topology.slices
  try:
    return topologies.get_topology_desc(platform=platform, topology_name=topology.shape_name, **options).devices
  except jax.errors.JaxRuntimeError as error:
    reason = str(error).split("\n")[0]
    raise InputError(
      f"plan.topology={topology} is not known to the installed compiler ({reason}): take another shape."
    ) from error


def _dumped(folder: str) -> str:
  """The program, finished or refused, as the compiler left it; empty if it left none."""
  files = sorted(pathlib.Path(folder).glob("*jit_train_step*after_optimizations.txt"))
  return files[-1].read_text(errors="replace") if files else ""


def _main(topology: str, result: str) -> None:
  try:
    figures = measure(Config.from_json(sys.stdin.read()), chips.parse(topology))
  except InputError as error:
    figures = {"error": str(error)}
  pathlib.Path(result).write_text(json.dumps(figures))
  sys.stdout.flush()
  os._exit(0)  # libtpu may crash when Python takes it down


if __name__ == "__main__":
  _main(*sys.argv[1:])
