"""Measures the training pipeline of any config alone, and prints one JSON object.

  python -m benchmarks.data --config=configs/maestro_v3.py --config.data.data_dir=DIR

`cold_tokens_per_second` is the speed of the first batches, whose documents are decoded; `warm_tokens_per_second` that
of as many batches after the rest of an epoch, when documents are in memory if they fit. Tokens are inputs of a batch,
padding included, as in --mode=data. `scored_share` is the share of latents whose target is scored, and
`scored_tokens_per_second` their number, in the last batches: data.packing raises both where documents are short.
"""

import json
import time

from absl import flags

from perceiver_ar_jax import command_line
from perceiver_ar_jax.config import Config
from perceiver_ar_jax.data.loader import TrainLoader

_BATCHES = flags.DEFINE_integer("batches", 8, "Batches to time, cold and warm.")


def measure(config: Config, num_batches: int) -> dict:
  """Returns the speeds, and the seconds of the first batch, in which TensorFlow starts and the shuffle buffer fills."""
  loader, batch_tokens = TrainLoader(config), config.train.batch_size * config.model.max_context

  def draw(count: int) -> tuple[float, float]:
    """Draws batches; returns the seconds, and the number of scored targets."""
    start, scored = time.perf_counter(), 0.0
    for _ in range(count):
      scored += next(loader)["weights"].sum()
    return time.perf_counter() - start, float(scored)

  (first, _), (cold, _) = draw(1), draw(num_batches)
  records = loader.task.num_records(config, config.data.train_split) or 0
  records_per_batch = config.train.batch_size * config.data.packing
  epoch, _ = draw(max(-(-records // records_per_batch) - num_batches - 1, 0))
  warm, scored = draw(num_batches)
  return {
    "task": config.data.task,
    "records": records,
    "first_batch_seconds": first,
    "cold_tokens_per_second": num_batches * batch_tokens / cold,
    "first_epoch_seconds": first + cold + epoch,
    "warm_tokens_per_second": num_batches * batch_tokens / warm,
    "scored_tokens_per_second": scored / warm,
    "scored_share": scored / (num_batches * config.train.batch_size * config.model.num_latents),
  }


def _main(config: Config) -> int:
  print(json.dumps(measure(config, _BATCHES.value)), flush=True)
  return 0


if __name__ == "__main__":
  command_line.run(_main, required=())
