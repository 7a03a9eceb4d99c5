"""--config.plan.search=true: which mesh, microbatches and remat policy run a config best on a slice of TPUs.

Arithmetic leaves out what cannot fit and orders the rest; the compiler then judges the most promising, and what it says
of one rules out others like it.
"""

import collections
import dataclasses
from collections.abc import Callable

from perceiver_ar_jax.config import REMAT_POLICIES, Config, InputError
from perceiver_ar_jax.parallel import chips, flops
from perceiver_ar_jax.parallel.mesh import AXES

BOUNDS = {"compute": "compute", "hbm": "HBM bandwidth", "interconnect": "the interconnect"}
"""What bounds a step, for people."""


def size_of(num_bytes: int) -> str:
  """Bytes for people."""
  return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**29 else f"{num_bytes / 2**20:.0f} MiB"


@dataclasses.dataclass(frozen=True)
class Candidate:
  """A way to run a config on a slice, and what arithmetic alone says of it."""

  config: Config
  least_bytes: int
  """What it needs at the least: state, gradients, what the layers keep."""
  seconds: dict[str, float]
  """Of compute and the interconnect at their best; HBM is left to the compiler."""

  @property
  def least_seconds(self) -> float:
    return max(self.seconds.values())

  @property
  def name(self) -> str:
    sizes = {axis: getattr(self.config.mesh, axis) for axis in AXES}
    axes = " ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1 or axis == "fsdp")
    return f"{axes}, microbatches {self.config.train.microbatches}, remat {self.config.model.remat}"

  @property
  def kind(self) -> tuple[int, str]:
    """Candidates of one kind differ in their mesh alone."""
    return self.config.train.microbatches, self.config.model.remat

  def needs_no_less_than(self, other: "Candidate") -> bool:
    """Whether it cannot fit where `other` did not: no more of the state is split, no less is kept."""
    ours, theirs = self.config, other.config
    return (
      ours.mesh.fsdp * ours.mesh.tensor <= theirs.mesh.fsdp * theirs.mesh.tensor
      and ours.mesh.tensor <= theirs.mesh.tensor
      and _rows(ours) >= _rows(theirs)
      and REMAT_POLICIES.index(ours.model.remat) <= REMAT_POLICIES.index(theirs.model.remat)
    )


def candidates(config: Config, topology: chips.Topology) -> list[Candidate]:
  """All ways of running `config` there that arithmetic does not rule out, the most promising first.

  Meshes share the chips among data, fsdp and tensor (at most 8); the context axis stays as the config has it.

  Raises:
    InputError: there is none.
  """
  model, train = config.model, config.train
  context = max(config.mesh.context, 1)
  if topology.num_chips % context:
    raise InputError(
      f"mesh.context={context} does not divide the {topology.num_chips} chips of {topology}: choose a divisor."
    )
  found, least = [], None
  for tensor in (1, 2, 4, 8):
    if topology.num_chips % (context * tensor) or model.num_cross_heads % tensor or model.num_self_heads % tensor:
      continue
    parts = topology.num_chips // (context * tensor)
    for fsdp in (1 << power for power in range(parts.bit_length())):
      if parts % fsdp or train.batch_size % parts:
        continue
      mesh = dataclasses.replace(config.mesh, data=parts // fsdp, fsdp=fsdp, tensor=tensor, context=context)
      if getattr(mesh, mesh.across_slices) % topology.slices:
        continue
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
          candidate = Candidate(changed, least_bytes(changed), _seconds(changed, topology))
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
      f" activations take at least {size_of(least)} a chip, which has {size_of(topology.chip.hbm_bytes)}. Take"
      " a larger slice, or a smaller model (latent_width, num_layers, num_latents)."
    )
  # Of equal seconds, the smallest first: what a chip works on at a time then lies on the chip, and spares HBM.
  found.sort(key=lambda candidate: (candidate.least_seconds, candidate.least_bytes))
  # The best mesh of every kind first, then the second best: meshes differ less than kinds do.
  seen = collections.Counter()
  ranks = []
  for candidate in found:
    ranks.append(seen[candidate.kind])
    seen[candidate.kind] += 1
  return [candidate for _, candidate in sorted(zip(ranks, found), key=lambda pair: pair[0])]


def search(
  config: Config, topology: chips.Topology, compile_plan: Callable[[Config, chips.Topology], dict]
) -> tuple[dict, list[str]]:
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
    try:
      result = compile_plan(candidate.config, topology)
    except InputError as error:  # such as a compiler that broke down
      others.append(f"{candidate.name}: {error}")
      print(f"{number} of at most {limit}: {others[-1]}", flush=True)
      continue
    line = f"{candidate.name}: {size_of(result['peak_bytes'])}, "
    if result["fits"]:
      line += f"{result['step_seconds']:.3f} s at best, bound by {BOUNDS[result['bound']]}"
      fitting.append((result["step_seconds"], line, result))
      # What arithmetic alone bounds from below by a slower step than this cannot be better.
      waiting = [other for other in waiting if other.least_seconds < result["step_seconds"]]
    else:
      line += "does not fit"
      others.append(line)
      # What arithmetic missed here, the same kind on another mesh needs as well.
      missed = result["peak_bytes"] - candidate.least_bytes
      waiting = [
        other
        for other in waiting
        if not other.needs_no_less_than(candidate)
        and not (other.kind == candidate.kind and other.least_bytes + missed > topology.chip.hbm_bytes)
      ]
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


def _seconds(config: Config, topology: chips.Topology) -> dict[str, float]:
  """Compute and the interconnect at their best; each microbatch gathers weights twice and sums gradients."""
  model, mesh, chip = config.model, config.mesh, topology.chip
  compute = flops.train_step(config).executed / (topology.num_chips * chip.peak_flops)
  weights = flops.num_params(model) / mesh.tensor
  passes = config.train.microbatches * weights * _item_bytes(config)
  sent = passes * (3 * (mesh.fsdp - 1) + 2 * (mesh.data - 1) / mesh.data) / mesh.fsdp
  latents = config.train.batch_size / (mesh.data * mesh.fsdp) * model.num_latents * model.latent_width
  # With tensor, two sums over devices in each layer, forward and backward.
  sent += 4 * model.num_layers * latents * _item_bytes(config) * 2 * (mesh.tensor - 1) / mesh.tensor
  return {"compute": compute, "interconnect": sent / topology.sent_bandwidth}


def _item_bytes(config: Config) -> int:
  return 2 if config.model.dtype == "bfloat16" else 4
