"""Measures generation with random weights, for any config, and prints one JSON object.

  python -m benchmarks.generate --config=benchmarks/point_a.py --tokens=8000

Reports milliseconds per step (one token for each row of the batch), with refills and the loop on the host, without
compilation: the mean, the median over blocks, the first and the last thousand tokens; and of a full pass per token.
"""

import dataclasses
import json
import statistics
import time

import jax
from absl import flags

from perceiver_ar_jax import command_line
from perceiver_ar_jax.config import Config
from perceiver_ar_jax.parallel.mesh import make_mesh
from perceiver_ar_jax.sampling.sampler import Sampler
from perceiver_ar_jax.training import optimizer as optimizer_lib
from perceiver_ar_jax.training import step as step_lib

_BATCH = flags.DEFINE_integer("batch", 4, "Sequences per batch.")
_TOKENS = flags.DEFINE_integer("tokens", 8000, "New tokens per sequence.")
_EXACT_TOKENS = flags.DEFINE_integer("exact_tokens", 20, "New tokens to measure without a cache; 0: none.")


def measure(config: Config, batch: int, tokens: int, exact_tokens: int) -> dict:
  """Returns metrics of one run: milliseconds per step of each kind, and tokens_per_second over all rows."""
  mesh = make_mesh(config.mesh)
  params = step_lib.init_state(config, optimizer_lib.make_optimizer(config.train.optimizer, 1000), mesh).params

  def times(length: int, cache: bool) -> list[tuple[int, float]]:
    """Returns (new tokens so far, seconds) after each block of a second call, which does not compile."""
    changed = dataclasses.replace(config, sample=dataclasses.replace(config.sample, cache=cache))
    sampler = Sampler(changed, params, mesh)
    sampler(num_samples=batch, batch_size=batch, length=min(length, 40))
    start = time.perf_counter()
    growing = sampler.stream(num_samples=batch, batch_size=batch, length=length)
    return [(samples[0].num_new, time.perf_counter() - start) for samples in growing if samples[0].num_new]

  def per_token(stamps, first: int, last: int) -> float:
    inside = [stamp for stamp in stamps if first <= stamp[0] <= last]
    (count, start), (end_count, end) = inside[0], inside[-1]
    return (end - start) / (end_count - count) * 1000

  cached = times(tokens, cache=True)
  steps = [(after[1] - before[1]) / (after[0] - before[0]) * 1000 for before, after in zip(cached, cached[1:])]
  result = {
    "version": f"jax {jax.__version__}, {jax.devices()[0].device_kind}",
    "context": config.model.max_context,
    "batch": batch,
    "tokens": cached[-1][0],
    "ms": cached[-1][1] / cached[-1][0] * 1000,
    "ms_median": statistics.median(steps),
    "ms_first_1000": per_token(cached, 1, 1000),
    "ms_last_1000": per_token(cached, cached[-1][0] - 1000, cached[-1][0]),
    "tokens_per_second": batch * cached[-1][0] / cached[-1][1],
  }
  if exact_tokens:
    exact = times(exact_tokens, cache=False)
    result["ms_exact"] = exact[-1][1] / exact[-1][0] * 1000
  return result


def _main(config: Config) -> int:
  print(json.dumps(measure(config, _BATCH.value, _TOKENS.value, _EXACT_TOKENS.value)), flush=True)
  return 0


if __name__ == "__main__":
  command_line.run(_main, required=())
