"""--mode=plan: whether the train step of a config fits a slice of TPUs, and what bounds its speed there, without one.

The real step is compiled by the real compiler, in a process of its own (training/ahead_of_time.py). What it says of
memory is exact. Seconds are a roofline: work over the chip's peak, and bytes that the compiled program moves over the
bandwidth, as if each ran at its best and all at once. A real step takes longer.
"""

import dataclasses
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

from perceiver_ar_jax.config import REMAT_POLICIES, Config, InputError
from perceiver_ar_jax.parallel import chips, flops

_WORST_FIRST = REMAT_POLICIES  # none keeps most, full least


def plan(config: Config, workdir: str | os.PathLike) -> int:
  """Plans for `config.plan.topology`, prints a report, writes plan.json into `workdir`; returns the exit code 0.

  Raises:
    InputError: the step does not fit (plan.json says so as well), libtpu is missing, the topology is unknown, the mesh
      or the batch does not fit it.
  """
  if config.plan.topology is None:
    raise InputError(
      "--mode=plan needs the slice of TPUs to plan for: --config.plan.topology=v5e:16x16, or such as v4-128."
    )
  topology = chips.parse(config.plan.topology)
  check_libtpu()
  if config.plan.search:
    best, tried = search(config, topology)
    result = best | {"candidates": tried}
  else:
    print(f"Compiling the train step for {topology} ({topology.num_chips} chips): about a minute.", flush=True)
    result = compile_plan(config, topology)
  path = pathlib.Path(workdir) / "plan.json"
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
  except OSError as error:
    raise InputError(f"{path} cannot be written ({error.strerror or error}): give another --workdir.") from error
  print(describe(result), flush=True)
  print(f"Written to {path}", flush=True)
  if not result["fits"]:
    raise InputError(refusal(config, result))
  return 0


def check_libtpu() -> None:
  """Raises InputError where the TPU's compiler is not installed."""
  if importlib.util.find_spec("libtpu") is None:
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
    seconds["interconnect"] = figures["traffic"]["sent_bytes"] / chip.ici_bandwidth
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
  chips_of = "x".join(f"{axis} {size}" for axis, size in plan["mesh"].items() if size > 1) or "one device"
  seconds = ", ".join(f"{name} {value:.3f}" for name, value in plan["roofline_seconds"].items())
  lines = [
    f"{plan['task']} on {plan['topology']}: {plan['num_devices']} chips, mesh {chips_of.replace('x', ' x ')};"
    f" {plan['num_params'] / 1e6:,.1f}M parameters, batch {plan['batch_size']:,} in {plan['microbatches']} part(s),"
    f" remat {plan['remat']}, attention {plan['attention']}",
    f"  {'fits' if plan['fits'] else 'DOES NOT FIT'}: {_size(plan['peak_bytes'])} of {_size(plan['hbm_bytes'])} a chip",
    f"    weights {_size(plan['weight_bytes'])}, optimizer {_size(plan['optimizer_bytes'])}, batch"
    f" {_size(plan['batch_bytes'])}, temporary {_size(plan['temp_bytes'])}, code {_size(plan['code_bytes'])}",
    f"  a step: {plan['step_flops']:.3g} FLOPs, {plan['executed_flops']:.3g} with what is computed twice; an evaluation"
    f" step: {plan['eval_step_flops']:.3g}",
    f"  at best {plan['step_seconds']:.3f} s a step, bound by {_BOUNDS[plan['bound']]} (seconds: {seconds}):"
    f" {plan['batch_size'] / plan['step_seconds']:,.0f} sequences/s, {plan['model_flops_utilization']:.0%} of peak",
  ]
  if "largest" in plan:
    lines += ["  largest arrays:", *(f"    {_size(size):>9} {what}" for size, what in plan["largest"][:5])]
  if plan.get("candidates"):
    lines += ["  tried, best first:", *(f"    {candidate}" for candidate in plan["candidates"])]
    settings = {f"mesh.{axis}": size for axis, size in plan["mesh"].items()}
    settings |= {"train.microbatches": plan["microbatches"], "model.remat": plan["remat"]}
    lines.append("  take " + " ".join(f"--config.{name}={value}" for name, value in settings.items()))
  lines.append(f"  compiled in {plan['compile_seconds']:.0f} s")
  return "\n".join(lines)


_BOUNDS = {"compute": "compute", "hbm": "HBM bandwidth", "interconnect": "the interconnect"}


def refusal(config: Config, plan: dict) -> str:
  """Why a plan does not fit, what takes the memory, and what to change, in one paragraph."""
  reason = f"The compiler says: {plan['refused'].split(': ', 1)[-1]} " if "refused" in plan else ""
  largest = "; ".join(f"{_size(size)} {what}" for size, what in plan.get("largest", ())[:3])
  return (
    f"The train step of {plan['task']} does not fit {plan['topology']}: it needs {_size(plan['peak_bytes'])} on each of"
    f" {plan['num_devices']} chips, which have {_size(plan['hbm_bytes'])}. {reason}"
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
      f"more fsdp, which splits the {_size(state)} of weights and optimizer state: --config.mesh.data=1"
      f" --config.mesh.fsdp={fsdp}"
    )
  if not flops.walks(model, model.num_latents, model.max_context):
    found.append("attention that does not keep its scores: --config.model.attention=streamed")
  elif model.attention == "chunked":
    found.append("not keeping keys and values of the context: --config.model.attention=streamed")
  if model.remat != "full":
    found.append("keeping less of each layer: --config.model.remat=full")
  if rows > 1:
    parts = next(n for n in range(2, rows + 1) if rows % n == 0) * config.train.microbatches
    found.append(f"a part of the batch at a time: --config.train.microbatches={parts}")
  if model.logits_chunk is None and model.vocab_size > 4 * model.latent_width:
    found.append("a part of the logits at a time: --config.model.logits_chunk=128")
  return found or ["a larger slice, or a smaller model (latent_width, num_layers, num_latents)"]


def _refused_bytes(message: str) -> int:
  """The memory that the compiler says a program wants: "... temporaries (41.23G) exceeds ..."."""
  match = re.search(r"(?:\(|Used )([\d.]+)([KMGT])", message)
  return int(float(match[1]) * 1024 ** (1 + "KMGT".index(match[2]))) if match else 0


def _size(num_bytes: int) -> str:
  return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**29 else f"{num_bytes / 2**20:.0f} MiB"


# Search


@dataclasses.dataclass(frozen=True)
class Candidate:
  """A way to run a config on a slice, and what arithmetic alone says of it."""

  config: Config
  least_bytes: int
  """What it needs at the least: state, gradients, what the layers keep."""
  least_seconds: float
  """Of compute or the interconnect; HBM is left to the compiler."""

  @property
  def name(self) -> str:
    mesh = self.config.mesh
    axes = " ".join(f"{axis} {size}" for axis, size in dataclasses.asdict(mesh).items() if size > 1 or axis == "fsdp")
    return f"{axes}, microbatches {self.config.train.microbatches}, remat {self.config.model.remat}"

  def needs_no_less_than(self, other: "Candidate") -> bool:
    """Whether it cannot fit where `other` did not: no more of the state is split, no less is kept."""
    ours, theirs = self.config, other.config
    return (
      ours.mesh.fsdp * ours.mesh.tensor <= theirs.mesh.fsdp * theirs.mesh.tensor
      and ours.mesh.tensor <= theirs.mesh.tensor
      and _rows(ours) >= _rows(theirs)
      and _WORST_FIRST.index(ours.model.remat) <= _WORST_FIRST.index(theirs.model.remat)
    )


def candidates(config: Config, topology: chips.Topology) -> list[Candidate]:
  """All ways of running `config` there that arithmetic does not rule out, the most promising first.

  Meshes share the chips among data, fsdp and tensor (at most 8); the context axis stays as the config has it.

  Raises:
    InputError: there is none.
  """
  model, train = config.model, config.train
  context = max(config.mesh.context, 1)
  found, least = [], None
  for tensor in (1, 2, 4, 8):
    if topology.num_chips % (context * tensor) or model.num_cross_heads % tensor or model.num_self_heads % tensor:
      continue
    parts = topology.num_chips // (context * tensor)
    for fsdp in (1 << power for power in range(parts.bit_length())):
      if parts % fsdp or train.batch_size % parts:
        continue
      mesh = dataclasses.replace(config.mesh, data=parts // fsdp, fsdp=fsdp, tensor=tensor, context=context)
      for microbatches in (1 << power for power in range((train.batch_size // parts).bit_length())):
        if (train.batch_size // parts) % microbatches:
          continue
        for remat in REMAT_POLICIES:
          changed = dataclasses.replace(
            config,
            mesh=mesh,
            model=dataclasses.replace(model, remat=remat),
            train=dataclasses.replace(train, microbatches=microbatches),
          )
          candidate = Candidate(changed, least_bytes(changed), least_seconds(changed, topology))
          least = min(least or candidate.least_bytes, candidate.least_bytes)
          if candidate.least_bytes <= topology.chip.hbm_bytes:
            found.append(candidate)
  if not found:
    if least is None:
      raise InputError(
        f"train.batch_size={train.batch_size} divides over no mesh of {topology.num_chips} chips: make it a multiple of"
        f" {topology.num_chips // context}, or take a smaller slice."
      )
    raise InputError(
      f"Nothing fits {topology}: whatever mesh, microbatches and remat, weights, optimizer state, gradients and"
      f" activations take at least {_size(least)} a chip, which has {_size(topology.chip.hbm_bytes)}. Take"
      " a larger slice, or a smaller model (latent_width, num_layers, num_latents)."
    )
  return sorted(found, key=lambda candidate: (candidate.least_seconds, candidate.least_bytes))


def search(config: Config, topology: chips.Topology) -> tuple[dict, list[str]]:
  """(the best plan, a line for each one compiled, best first): at most `config.plan.max_compiles` are compiled.

  Raises:
    InputError: none of them fits.
  """
  waiting = candidates(config, topology)
  limit = min(config.plan.max_compiles, len(waiting))
  print(f"{len(waiting)} candidates may fit {topology}; compiling at most {limit}, a minute or so each.", flush=True)
  fitting, others = [], []
  for number in range(1, limit + 1):
    if not waiting:
      break
    candidate = waiting.pop(0)
    result = compile_plan(candidate.config, topology)
    line = f"{candidate.name}: {_size(result['peak_bytes'])}, "
    if result["fits"]:
      line += f"{result['step_seconds']:.3f} s at best, bound by {_BOUNDS[result['bound']]}"
      fitting.append((result["step_seconds"], line, result))
      # What arithmetic alone bounds from below by a slower step than this cannot be better.
      waiting = [other for other in waiting if other.least_seconds < result["step_seconds"]]
    else:
      line += "does not fit"
      others.append(line)
      waiting = [other for other in waiting if not other.needs_no_less_than(candidate)]
    print(f"{number} of at most {limit}: {line}", flush=True)
  if not fitting:
    raise InputError(
      f"None of the {len(others)} most promising ways fits {topology} ({'; '.join(others)}): allow more with"
      " --config.plan.max_compiles, take a larger slice, or a smaller model."
    )
  fitting.sort(key=lambda entry: entry[0])
  return fitting[0][2], [line for _, line, _ in fitting] + others


def _rows(config: Config) -> int:
  """Rows of the batch that a device has at a time."""
  return config.train.batch_size // (config.train.microbatches * config.mesh.data * config.mesh.fsdp)


# What a layer keeps of each latent in the compute dtype, in multiples of D, at the least: its input; with dots, the
# outputs of its six matrix products (one of them F wide) and of attention; with none, activations and norms as well.
def _kept_widths(config: Config) -> int:
  widening = config.model.mlp_widening
  return {"full": 1, "dots": 7 + widening, "none": 9 + 2 * widening}[config.model.remat]


def least_bytes(config: Config) -> int:
  """What each device needs at the least: weights, what the optimizer keeps of each, gradients, what layers keep."""
  model = config.model
  kept_moments = {"adam": 2, "adamw": 2, "lamb": 2, "sgd": 1, "sm3": 1, "adafactor": 0}[config.train.optimizer.name]
  state = flops.num_params(model) * 4 * (2 + kept_moments) // (config.mesh.fsdp * config.mesh.tensor)
  latents = _rows(config) * model.num_latents * model.latent_width * _item_bytes(config)
  return state + latents * model.num_layers * _kept_widths(config) // config.mesh.tensor


def least_seconds(config: Config, topology: chips.Topology) -> float:
  """The longer of compute and the interconnect at their best; weights are gathered twice, gradients sent once."""
  model, mesh, chip = config.model, config.mesh, topology.chip
  compute = flops.train_step(config).executed / (topology.num_chips * chip.peak_flops)
  weights = flops.num_params(model) / mesh.tensor
  sent = config.train.microbatches * 3 * weights * _item_bytes(config) * (mesh.fsdp - 1) / mesh.fsdp
  sent += 2 * weights / mesh.fsdp * _item_bytes(config) * (mesh.data - 1) / mesh.data
  latents = config.train.batch_size / (mesh.data * mesh.fsdp) * model.num_latents * model.latent_width
  # With tensor, two sums over devices in each layer, forward and backward.
  sent += 4 * model.num_layers * latents * _item_bytes(config) * 2 * (mesh.tensor - 1) / mesh.tensor
  return max(compute, sent / chip.ici_bandwidth)


def _item_bytes(config: Config) -> int:
  return 2 if config.model.dtype == "bfloat16" else 4
