"""Measures the training pipeline of any config alone, and prints one JSON object.

  python -m benchmarks.data --config=configs/maestro_v3.py --config.data.data_dir=DIR

`cold_tokens_per_second` is the speed of the first batches, whose documents are decoded; `warm_tokens_per_second` that
of as many batches after the rest of an epoch, when documents are in memory if they fit. Tokens are inputs of a batch,
padding included, as in --mode=data.
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

  def seconds(count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
      next(loader)
    return time.perf_counter() - start

  first, cold = seconds(1), seconds(num_batches)
  records = loader.task.num_records(config, config.data.train_split) or 0
  epoch = seconds(max(-(-records // config.train.batch_size) - num_batches - 1, 0))
  warm = seconds(num_batches)
  return {
    "task": config.data.task,
    "records": records,
    "first_batch_seconds": first,
    "cold_tokens_per_second": num_batches * batch_tokens / cold,
    "first_epoch_seconds": first + cold + epoch,
    "warm_tokens_per_second": num_batches * batch_tokens / warm,
  }


def _main(config: Config) -> int:
  print(json.dumps(measure(config, _BATCHES.value)), flush=True)
  return 0


if __name__ == "__main__":
  command_line.run(_main, required=())
