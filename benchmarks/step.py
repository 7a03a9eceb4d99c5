"""Measures the training step of any config on random tokens, and prints one JSON object.

  python -m benchmarks.step --config=benchmarks/point_a.py --context=8192

It runs the production step: forward, backward, clipping and update, with the state donated. As in training, rows are
split over the cores of a CPU. run.py runs it for a grid of contexts and kernels.
"""

import dataclasses
import json
import resource
import statistics
import time

import jax
import numpy as np
from absl import flags

from perceiver_ar_jax import command_line
from perceiver_ar_jax.config import Config
from perceiver_ar_jax.models import architectures
from perceiver_ar_jax.parallel import chips, sharding
from perceiver_ar_jax.parallel.mesh import keep_host_memory, make_mesh, use_cpu_cores
from perceiver_ar_jax.training import optimizer as optimizer_lib
from perceiver_ar_jax.training.step import init_state, make_train_step

_CONTEXT = flags.DEFINE_integer("context", None, "Input tokens; default: the config's max_context.")
_STEPS = flags.DEFINE_integer("steps", 7, "Steps to time, after a warm-up step.")
_SECONDS = flags.DEFINE_float(
  "seconds", 60.0, "Stop after this time; if the first step takes longer, it is the measurement."
)


def measure(config: Config, steps: int, seconds: float) -> dict:
  """Returns metrics of one compiled step: seconds (median), targets_per_second, compile_seconds, temp_bytes and more.

  temp_bytes are those of each of num_devices (on CPUs, cores that have rows of their own); peak_rss_bytes those of the
  whole process, compiler included; state_bytes those of weights and optimizer state;
  model_flops_utilization the share of the devices' bfloat16 peak, None where it is unknown.
  """
  keep_host_memory()
  use_cpu_cores(config, [config.train.batch_size])
  mesh = make_mesh(config.mesh)
  optimizer = optimizer_lib.make_optimizer(config.train.optimizer, config.train.steps)
  batch = random_batch(config)
  batch = jax.device_put(batch, sharding.batch_shardings(mesh, {name: x.shape for name, x in batch.items()}))
  with jax.set_mesh(mesh):
    state = init_state(config, optimizer, mesh)
    layout = jax.tree.map(lambda leaf: leaf.sharding, state)
    step = jax.jit(make_train_step(config, optimizer), donate_argnums=0, out_shardings=(layout, None))
    start = time.perf_counter()
    compiled = step.lower(state, batch, jax.random.key(0)).compile()
    compile_seconds = time.perf_counter() - start
    times, begin = [], time.perf_counter()
    for index in range(steps + 1):
      start = time.perf_counter()
      state, metrics = compiled(state, batch, jax.random.key(index))
      jax.block_until_ready((state, metrics))
      times.append(time.perf_counter() - start)
      if time.perf_counter() - begin > seconds:
        break
  timed = times[1:] or times
  flops_per_second = architectures.train_flops(config) / statistics.median(timed)
  peak_flops = chips.peak_flops(jax.devices()[0].device_kind)
  return {
    "implementation": "perceiver_ar_jax",
    "version": f"jax {jax.__version__}, {jax.devices()[0].device_kind}",
    "attention": config.model.attention,
    "context": config.model.max_context,
    "num_devices": mesh.size,
    "seconds": statistics.median(timed),
    "all_seconds": timed,
    "targets_per_second": config.train.batch_size * config.model.num_latents / statistics.median(timed),
    "model_flops_per_second": flops_per_second,
    "model_flops_utilization": flops_per_second / (mesh.size * peak_flops) if peak_flops else None,
    "compile_seconds": compile_seconds,
    "temp_bytes": compiled.memory_analysis().temp_size_in_bytes,
    "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    "state_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves((state.params, state.opt_state))),
    "num_params": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
    "loss": float(metrics["loss"]),
  }


def at_context(config: Config, context: int | None) -> Config:
  """Returns the config with another context; a single position table grows with it."""
  if context is None:
    return config
  sizes = (context + 2,) if len(config.model.position_sizes) == 1 else config.model.position_sizes
  return dataclasses.replace(config, model=dataclasses.replace(config.model, max_context=context, position_sizes=sizes))


def random_batch(config: Config) -> dict[str, np.ndarray]:
  """Returns a batch of random tokens with all targets scored; positions are within the config's tables."""
  model, rows = config.model, config.train.batch_size
  rng = np.random.default_rng(0)
  if model.position_dims == 1:
    positions = np.broadcast_to(
      np.arange(1, model.max_context + 1, dtype=np.int32)[None, :, None], (rows, model.max_context, 1)
    )
  else:
    sizes = np.array(model.position_sizes or [model.max_context] * model.position_dims)
    positions = rng.integers(1, sizes, (rows, model.max_context, len(sizes)), np.int32)
  return {
    "inputs": rng.integers(3, model.vocab_size, (rows, model.max_context), np.int32),
    "positions": positions,
    "targets": rng.integers(3, model.vocab_size, (rows, model.num_latents), np.int32),
    "weights": np.ones((rows, model.num_latents), np.float32),
  }


def _main(config: Config) -> int:
  print(json.dumps(measure(at_context(config, _CONTEXT.value), _STEPS.value, _SECONDS.value)), flush=True)
  return 0


if __name__ == "__main__":
  command_line.run(_main, required=())
