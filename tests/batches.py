"""What tests of data share: files, settings of a tiny model, batches that are taken and compared."""

import dataclasses
import pathlib

import numpy as np

from perceiver_ar_jax import config as config_lib
from perceiver_ar_jax.data import loader, splits


def write(folder: pathlib.Path, contents: dict[str, bytes | str]) -> pathlib.Path:
  """Writes {name: content} and returns the folder."""
  for name, content in contents.items():
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
  return folder


def config(
  data: config_lib.DataConfig,
  *,
  context: int,
  latents: int,
  sizes: tuple[int, ...],
  vocab_size: int = 259,
  encoding: str = "learned",
  batch_size: int = 4,
  seed: int = 0,
) -> config_lib.Config:
  """An experiment on these data, with tables of `sizes` for positions."""
  return config_lib.Config(
    seed=seed,
    model=config_lib.ModelConfig(
      vocab_size=vocab_size,
      max_context=context,
      num_latents=latents,
      num_layers=1,
      latent_width=8,
      num_cross_heads=1,
      num_self_heads=1,
      position_encoding=encoding,
      position_sizes=sizes,
    ),
    data=data,
    train=config_lib.TrainConfig(steps=1, batch_size=batch_size),
    eval=config_lib.EvalConfig(batch_size=batch_size),
  )


def train_loader(config: config_lib.Config, batch_size: int, shard: int = 0, shards: int = 1) -> loader.TrainLoader:
  """The loader of a host that provides the `batch_size` rows of one shard."""
  config = dataclasses.replace(
    config,
    train=dataclasses.replace(config.train, batch_size=batch_size * shards),
    data=dataclasses.replace(config.data, shards=shards),
  )
  rows_of_hosts = [range(host * batch_size, (host + 1) * batch_size) for host in range(shards)]
  return loader.TrainLoader(config, rows_of_hosts, shard)


def take(iterator, count: int) -> list:
  return [next(iterator) for _ in range(count)]


def evaluate(config: config_lib.Config, hosts: int = 1, batch: int = 4, **settings) -> list[list]:
  """Evaluation batches, `batch` rows on each of some hosts: [hosts][batches]; `settings` are others of config.eval."""
  changed = dataclasses.replace(config.eval, batch_size=hosts * batch, **settings)
  config = dataclasses.replace(config, eval=changed)
  shares = [range(host * batch, (host + 1) * batch) for host in range(hosts)]
  return [list(splits.eval_batches(config, splits.eval_documents(config), rows)) for rows in shares]


def assert_equal(batches: list, expected_batches: list) -> None:
  assert len(batches) == len(expected_batches)
  for number, (batch, expected) in enumerate(zip(batches, expected_batches)):
    for name in batch:
      np.testing.assert_array_equal(batch[name], expected[name], err_msg=f"{name} of batch {number}")
