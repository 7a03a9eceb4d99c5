"""--mode=plan: whether the train step of a config fits a slice of TPUs or some GPUs, and what bounds its speed there.

The real step is compiled by the real compiler, in a process of its own (training/ahead_of_time.py). What it says of
memory is exact. Seconds are a roofline: work over the chip's peak, and bytes that the compiled program moves over the
bandwidth, as if each ran at its best and all at once. A real step takes longer.
"""

import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

from perceiver_ar_jax.config import Config, InputError, writing
from perceiver_ar_jax.parallel import chips, flops, plan_search
from perceiver_ar_jax.parallel.plan_search import BOUNDS, size_of


def plan(config: Config, workdir: str | os.PathLike) -> int:
  """Plans for `config.plan.topology`, prints a report, writes plan.json into `workdir`; returns the exit code 0.

  Raises:
    InputError: the step does not fit (plan.json says so as well), libtpu is missing, the topology is unknown, the mesh
      or the batch does not fit it.
  """
  if config.plan.topology is None:
    raise InputError(
      "--mode=plan needs the chips to plan for: --config.plan.topology=v5e:16x16, v4-128, h100:4x8 or such."
    )
  topology = chips.parse(config.plan.topology)
  check_compiler(topology)
  if config.plan.search:
    best, tried = plan_search.search(config, topology, compile_plan)
    result = best | {"candidates": tried}
  else:
    print(f"Compiling the train step for {topology} ({topology.num_chips} chips): one minute to several.", flush=True)
    result = compile_plan(config, topology)
  path = pathlib.Path(workdir) / "plan.json"
  with writing(path, "give another --workdir"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
  print(describe(result), flush=True)
  print(f"Written to {path}", flush=True)
  if not result["fits"]:
    raise InputError(refusal(config, result))
  return 0


def check_compiler(topology: chips.Topology) -> None:
  """Raises InputError where the compiler for these chips is not installed."""
  if not topology.chip.dims:
    if importlib.util.find_spec("jax_cuda12_plugin") is None:
      raise InputError(
        f"--mode=plan for {topology} compiles with JAX's CUDA plugin, which is not installed: pip install -e"
        " '.[cuda12]'. It needs no GPU."
      )
  elif importlib.util.find_spec("libtpu") is None:
    raise InputError(
      "--mode=plan compiles with the TPU's own compiler, the package libtpu, which is not installed: pip install -e"
      " '.[plan]'. It needs no TPU, and runs on x86-64 Linux."
    )


def compile_plan(config: Config, topology: chips.Topology) -> dict:
  """The plan of one config, as plan.json holds it: compiled in a process of its own.

  Raises:
    InputError: what `ahead_of_time.measure` raises, or the compiler broke down.
  """
  environment = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "JAX_ENABLE_COMPILATION_CACHE": "false",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # a second plan, or a training run on a TPU here, is left alone
    "TPU_SKIP_MDS_QUERY": "1",  # it would ask the cloud which TPU this machine has
  }
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "result.json"
    finished = subprocess.run(
      [sys.executable, "-m", "perceiver_ar_jax.training.ahead_of_time", str(topology), str(path)],
      input=config.to_json(),
      env=environment,
      capture_output=True,
      text=True,
    )
    if not path.exists():
      last = "; ".join(finished.stderr.strip().splitlines()[-3:])
      raise InputError(
        f"The compiler for {topology} ended with code {finished.returncode} and no result: {last}. (Code -9 means that"
        " this machine has too little memory. A crash may be the compiler's own: try another libtpu.)"
      )
    figures = json.loads(path.read_text())
  if "error" in figures:
    raise InputError(figures["error"])
  return assemble(config, topology, figures)


def assemble(config: Config, topology: chips.Topology, figures: dict) -> dict:
  """plan.json's content, from what `ahead_of_time.measure` found."""
  chip, train = topology.chip, flops.train_step(config)
  figures = {"argument_bytes": sum(figures[f"{name}_bytes"] for name in ("weight", "optimizer", "batch"))} | figures
  if "refused" in figures:
    figures = {"temp_bytes": _refused_bytes(figures["refused"]), "output_bytes": 0, "code_bytes": 0} | figures
  peak = sum(figures[f"{name}_bytes"] for name in ("argument", "temp", "output", "code"))
  seconds = {"compute": train.executed / (topology.num_chips * chip.peak_flops)}
  if "traffic" in figures:
    seconds["hbm"] = figures["traffic"]["hbm_bytes"] / chip.hbm_bandwidth
    seconds["interconnect"] = figures["traffic"]["sent_bytes"] / topology.sent_bandwidth
  bound = max(seconds, key=seconds.get)
  return {
    "task": config.data.task,
    "topology": str(topology),
    "num_devices": topology.num_chips,
    **figures,
    "batch_size": config.train.batch_size,
    "microbatches": config.train.microbatches,
    "remat": config.model.remat,
    "attention": config.model.attention,
    "peak_bytes": peak,
    "hbm_bytes": chip.hbm_bytes,
    "fits": "refused" not in figures and peak <= chip.hbm_bytes,
    "step_flops": train.useful,
    "executed_flops": train.executed,
    "eval_step_flops": flops.eval_step(config).useful,
    "roofline_seconds": seconds,
    "step_seconds": seconds[bound],
    "bound": bound,
    "model_flops_utilization": train.useful / (topology.num_chips * chip.peak_flops * seconds[bound]),
  }


def describe(plan: dict) -> str:
  """A plan for people."""
  mesh = " x ".join(f"{axis} {size}" for axis, size in plan["mesh"].items() if size > 1) or "of one device"
  parts = f" in {plan['microbatches']} microbatches" if plan["microbatches"] > 1 else ""
  lines = [
    f"{plan['task']} on {plan['topology']}: {plan['num_devices']} chips, mesh {mesh}; {plan['num_params'] / 1e6:,.1f}M"
    f" parameters, batch {plan['batch_size']:,}{parts}, remat {plan['remat']}, attention {plan['attention']}",
    f"  {'fits' if plan['fits'] else 'DOES NOT FIT'}: {size_of(plan['peak_bytes'])} of {size_of(plan['hbm_bytes'])} a"
    " chip",
    f"    weights {size_of(plan['weight_bytes'])}, optimizer {size_of(plan['optimizer_bytes'])}, batch"
    f" {size_of(plan['batch_bytes'])}, temporary {size_of(plan['temp_bytes'])}, code {size_of(plan['code_bytes'])}",
    f"  a step: {plan['step_flops']:.3g} FLOPs, {plan['executed_flops']:.3g} with what is computed twice; an evaluation"
    f" step: {plan['eval_step_flops']:.3g}",
  ]
  if plan["fits"]:
    seconds = ", ".join(f"{name} {value:.3f}" for name, value in plan["roofline_seconds"].items())
    between = "; the network between slices is not counted" if chips.parse(plan["topology"]).slices > 1 else ""
    lines.append(
      f"  at best {plan['step_seconds']:.3f} s a step, bound by {BOUNDS[plan['bound']]} (seconds: {seconds}):"
      f" {plan['batch_size'] / plan['step_seconds']:,.0f} sequences/s, {plan['model_flops_utilization']:.0%} of peak"
      f"{between}"
    )
  if "largest" in plan:
    lines += ["  largest arrays:", *(f"    {size_of(size):>9} {what}" for size, what in plan["largest"][:5])]
  if plan.get("candidates"):
    lines += ["  tried, best first:", *(f"    {candidate}" for candidate in plan["candidates"])]
    settings = {f"mesh.{axis}": size for axis, size in plan["mesh"].items()}
    settings |= {"train.microbatches": plan["microbatches"], "model.remat": plan["remat"]}
    lines.append("  take " + " ".join(f"--config.{name}={value}" for name, value in settings.items()))
  lines.append(f"  compiled in {plan['compile_seconds']:.0f} s")
  return "\n".join(lines)


def refusal(config: Config, plan: dict) -> str:
  """Why a plan does not fit, what takes the memory, and what to change, in one paragraph."""
  reason = f"The compiler says: {plan['refused'].split(': ', 1)[-1]} " if "refused" in plan else ""
  largest = "; ".join(f"{size_of(size)} {what}" for size, what in plan.get("largest", ())[:3])
  return (
    f"The train step of {plan['task']} does not fit {plan['topology']}: it needs {size_of(plan['peak_bytes'])} on each"
    f" of {plan['num_devices']} chips, which have {size_of(plan['hbm_bytes'])}. {reason}"
    f"{f'Largest arrays: {largest}. ' if largest else ''}Try {', or '.join(suggestions(config, plan))}; or let"
    " --config.plan.search=true look for what fits."
  )


def suggestions(config: Config, plan: dict) -> list[str]:
  """Changes of the config that lower its memory, the most promising first."""
  mesh, model, found = plan["mesh"], config.model, []
  rows = config.train.batch_size // (config.train.microbatches * mesh["data"] * mesh["fsdp"])
  state = plan["weight_bytes"] + plan["optimizer_bytes"]
  if mesh["data"] > 1 and state > plan["hbm_bytes"] / 8:
    fsdp = mesh["fsdp"] * mesh["data"]
    found.append(
      f"more fsdp, which splits the {size_of(state)} of weights and optimizer state: --config.mesh.data=1"
      f" --config.mesh.fsdp={fsdp}"
    )
  if not flops.walks(model, model.num_latents, model.max_context):
    found.append("attention that does not keep its scores: --config.model.attention=streamed")
  elif model.attention == "chunked":
    found.append("not keeping keys and values of the context: --config.model.attention=streamed")
  if model.remat != "full":
    found.append("keeping less of each layer: --config.model.remat=full")
  if rows > 1:
    room = max(plan["hbm_bytes"] - plan["argument_bytes"] - plan["code_bytes"], 1)
    enough = [n for n in range(2, rows + 1) if rows % n == 0 and n * room >= plan["temp_bytes"]]
    parts = min(enough, default=rows) * config.train.microbatches
    found.append(f"a part of the batch at a time: --config.train.microbatches={parts}")
  if model.logits_chunk is None and model.vocab_size > 4 * model.latent_width:
    found.append("a part of the logits at a time: --config.model.logits_chunk=128")
  return found or ["a larger slice, or a smaller model (latent_width, num_layers, num_latents)"]


def _refused_bytes(message: str) -> int:
  """The memory that the compiler says a program wants: "... temporaries (41.23G) exceeds ..."."""
  match = re.search(r"(?:\(|Used )([\d.]+)([KMGT])", message)
  return int(float(match[1]) * 1024 ** (1 + "KMGT".index(match[2]))) if match else 0
