"""Feeds a host: an endless, resumable stream of training batches, and a pass over a split for evaluation.

Batches are dicts of NumPy arrays, the part of one host (B rows there): inputs int32[B, L], positions int32[B, L, P],
targets int32[B, M], weights float32[B, M]. `to_global` turns them into global jax arrays.

Order of the training stages: this host's records, still encoded -> shuffle -> repeat -> documents -> crops ->
batches. Shuffling before repeating makes every epoch see each record just once, and shuffling encoded records keeps
the saved state at the size of the shuffle buffer.
"""

import json
import os
from collections.abc import Iterator, Mapping

import jax
import numpy as np
import seqio
from etils import epath

from perceiver_ar_jax.config import Config, InputError, nearest
from perceiver_ar_jax.data import features, tasks
from perceiver_ar_jax.data.sources import TfdsSource
from perceiver_ar_jax.data.tf_cpu import tf

Batch = dict[str, np.ndarray]

_AHEAD_BYTES = 8 * 2**20
"""Finished rows that may wait for their batch; with the shuffle buffer, what a saved state mostly consists of."""
_THREADS = 8
"""Parallel decoders of a host; each one's sequence in the making is saved too."""


class TrainIterator:
  """Training batches of one host, without end; the same ones for the same settings, after a restore as well.

  Args:
    config: the experiment; `data`, `seed` and the model's context and latents shape the stream.
    batch_size_per_host: rows of each batch.
    host_index: this host's number; each host reads its own part of the records.
    host_count: number of hosts.

  Raises:
    InputError: unknown task or split, data that is not prepared, fewer records than hosts, or events and positions
      for which the model has no room (the latter only once a batch shows it).
  """

  def __init__(self, config: Config, batch_size_per_host: int, host_index: int = 0, host_count: int = 1):
    task = tasks.get_task(config.data.task, config.data.data_dir)
    split = config.data.train_split
    _check_vocabulary(task, config)
    num_records = _num_records(task, split)
    if num_records is not None and num_records < host_count:
      raise InputError(
        f"The split {split!r} of {task.name} has {num_records} records, fewer than the {host_count} hosts that share"
        " them: train on fewer hosts, or on more data."
      )
    self._config = config
    self._name = f"host-{host_index:05d}-of-{host_count:05d}"
    # What fixes the stream: a state restored under other settings would silently be another stream.
    self._stream = {
      "task": task.name,
      "split": split,
      "num_records": num_records,
      "seed": config.seed,
      "min_crop": config.data.min_crop,
      "shuffle_buffer": config.data.shuffle_buffer,
      "context": config.model.max_context,
      "latents": config.model.num_latents,
      "batch_size_per_host": batch_size_per_host,
      "host_count": host_count,
    }
    self._host = host_index, host_count
    self._iterator = self._start()

  def _start(self):
    """A tf.data iterator at the beginning of the stream."""
    config, (host_index, host_count) = self._config, self._host
    task = tasks.get_task(config.data.task, config.data.data_dir)
    records = _host_records(task.source, self._stream["split"], config.seed, host_index, host_count)
    records = records.shuffle(config.data.shuffle_buffer, seed=config.seed, reshuffle_each_iteration=True).repeat()

    def to_window(index, document):
      # Numbering examples over all hosts gives each of them a crop seed of its own.
      seed = tf.stack([config.seed, index * host_count + host_index])
      return features.train_window(
        document,
        seed,
        context=config.model.max_context,
        latents=config.model.num_latents,
        min_crop=config.data.min_crop,
      )

    dataset = _documents(task, records, config).enumerate().map(to_window, num_parallel_calls=tf.data.AUTOTUNE)
    batch_size = self._stream["batch_size_per_host"]
    dataset = dataset.prefetch(min(2 * batch_size, _rows_ahead(dataset.element_spec)))
    return iter(dataset.batch(batch_size, drop_remainder=True).with_options(_options()))

  @property
  def spec(self) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and type of each array of a batch, without drawing one."""
    return {
      name: jax.ShapeDtypeStruct(tuple(spec.shape), spec.dtype.as_numpy_dtype)
      for name, spec in self._iterator.element_spec.items()
    }

  def __iter__(self) -> "TrainIterator":
    return self

  def __next__(self) -> Batch:
    batch = {name: value.numpy() for name, value in next(self._iterator).items()}
    _check_positions(batch["positions"], self._config)
    return batch

  def save(self, directory: os.PathLike | str) -> None:
    """Writes the complete state into files of this host's own under `directory`, which is made if need be."""
    directory = epath.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tf.train.Checkpoint(iterator=self._iterator).write(os.fspath(directory / self._name))
    (directory / f"{self._name}.json").write_text(json.dumps(self._stream, indent=2) + "\n")

  def restore(self, directory: os.PathLike | str) -> None:
    """Takes up the state that `save` wrote: the next batch is the one that followed then.

    Raises:
      InputError: there is no state of this host, or it belongs to another stream (other settings).
    """
    directory = epath.Path(directory)
    settings = directory / f"{self._name}.json"
    if not settings.exists():
      found = sorted(path.stem for path in directory.glob("host-*.json")) if directory.exists() else []
      raise InputError(
        f"{directory} holds no data iterator state for {self._name}"
        + (f", only for {', '.join(found)}: resume with as many hosts as before." if found else ".")
      )
    saved = json.loads(settings.read_text())
    changed = [
      f"{name} was {saved.get(name)!r} and is {value!r}"
      for name, value in self._stream.items()
      if saved.get(name) != value
    ]
    if changed:
      raise InputError(
        f"The data iterator state in {directory} belongs to other settings ({'; '.join(changed)}), so its place in"
        " the data means nothing here: resume with the same settings, or start in a new workdir."
      )
    # Begin anew: the state of an iterator that had not begun does not undo the shuffles of one that has.
    self._iterator = self._start()
    tf.train.Checkpoint(iterator=self._iterator).read(os.fspath(directory / self._name)).assert_consumed()


def eval_batches(
  config: Config,
  *,
  split: str | None = None,
  num_latents: int | None = None,
  stride: int | None = None,
  batch_size_per_host: int,
  host_index: int = 0,
  host_count: int = 1,
  max_sequences: int | None = None,
) -> Iterator[Batch]:
  """Batches of sliding windows over a split, in order, in which every scored event weighs 1 just once.

  Arguments that are None come from `config.eval`. The windows of all documents form one list; a step of all hosts
  takes host_count * batch_size_per_host of them, this host its share. So all hosts yield equally many batches, of one
  shape, and together the same rows however many they are. The end is filled up with rows of PAD and weight 0.

  Raises:
    InputError: as TrainIterator; or a stride beyond the latents; or an endless split without `max_sequences`.
  """
  split = split or config.eval.split
  num_latents = num_latents or config.eval.num_latents or config.model.num_latents
  stride = stride or config.eval.stride or num_latents
  max_sequences = max_sequences or config.eval.max_sequences
  if not stride <= num_latents <= config.model.max_context:
    raise InputError(
      f"A stride of {stride} with {num_latents} latents and a context of {config.model.max_context} cannot score every"
      " token: make eval.stride at most eval.num_latents, and that at most model.max_context."
    )
  task = tasks.get_task(config.data.task, config.data.data_dir)
  _check_vocabulary(task, config)
  _num_records(task, split)
  records = task.source.get_dataset(split=split, shuffle=False)
  if max_sequences is None and records.cardinality() == tf.data.INFINITE_CARDINALITY:
    raise InputError(
      f"The split {split!r} of {task.name} never ends: set eval.max_sequences to how many sequences to score."
    )
  documents = _documents(task, records if max_sequences is None else records.take(max_sequences), config)
  rows_per_step = batch_size_per_host * host_count
  not_filler = tf.constant(-1, tf.int64)

  def blocks(document):
    return features.eval_blocks(document, stride).map(lambda end, num_new: (document, end, num_new, not_filler))

  empty = {
    name: tf.zeros([1 if size is None else size for size in spec.shape], spec.dtype)
    for name, spec in documents.element_spec.items()
  }
  filler = tf.data.Dataset.range(rows_per_step - 1).map(
    lambda number: (empty, tf.constant(1, tf.int64), tf.constant(0, tf.int64), number)
  )

  def is_ours(row, block):
    # Filler row number k stands at place (number of real rows) + k, so each of them knows where the real ones end, and
    # a step of nothing but filler, which only some hosts would run, can be left out.
    in_needed_step = (block[3] == not_filler) | (row // rows_per_step * rows_per_step < row - block[3])
    return in_needed_step & (row // batch_size_per_host % host_count == host_index)

  def to_window(row, block):
    del row
    return features.window(*block[:3], context=config.model.max_context, latents=num_latents)

  dataset = documents.flat_map(blocks).concatenate(filler).enumerate().filter(is_ours)
  dataset = dataset.map(to_window, num_parallel_calls=tf.data.AUTOTUNE)
  dataset = dataset.batch(batch_size_per_host, drop_remainder=True).prefetch(1)
  for batch in dataset.with_options(_options()).as_numpy_iterator():
    _check_positions(batch["positions"], config)
    yield batch


def to_global(batch: Mapping[str, np.ndarray], sharding: jax.sharding.Sharding) -> dict[str, jax.Array]:
  """Global arrays of the hosts' parts of a batch, laid out by `sharding` (which splits the first axis)."""
  return {name: jax.make_array_from_process_local_data(sharding, value) for name, value in batch.items()}


def sequence_length(config: Config) -> dict[str, int]:
  """The longest crop, in events: the context's inputs and the last one's target."""
  return {"events": config.model.max_context + 1}


def _options() -> tf.data.Options:
  options = tf.data.Options()
  options.deterministic = True
  # All elements that a stage has ready are part of the saved state, so every buffer is bounded: parallel maps by the
  # threads there are, and no stages that TensorFlow adds by itself.
  options.threading.private_threadpool_size = _THREADS
  options.experimental_optimization.inject_prefetch = False
  options.experimental_optimization.map_and_batch_fusion = False
  return options


def _rows_ahead(spec: Mapping[str, tf.TensorSpec]) -> int:
  """How many rows of this shape fit into _AHEAD_BYTES; at least 1."""
  row_bytes = sum(row.shape.num_elements() * row.dtype.size for row in spec.values())
  return max(1, _AHEAD_BYTES // row_bytes)


def _num_records(task: seqio.Task, split: str) -> int | None:
  """Records of a split, None where nobody knows; raises InputError for an unknown split or missing data."""
  if isinstance(task.source, TfdsSource):
    return task.source.num_input_examples(split)
  if split not in task.splits:
    raise InputError(f"The task {task.name} has no split {split!r}. {nearest(split, task.splits)}")
  try:
    return task.num_input_examples(split)
  except KeyError:  # The source counts its other splits, but not this one.
    return None


def _host_records(source, split: str, seed: int, host_index: int, host_count: int) -> tf.data.Dataset:
  """This host's part of the records, the files (where there are any) in a new order in each epoch."""
  if source.supports_arbitrary_sharding:
    return source.get_dataset(
      split=split, shuffle=True, seed=seed, shard_info=seqio.ShardInfo(index=host_index, num_shards=host_count)
    )
  return source.get_dataset(split=split, shuffle=False).shard(host_count, host_index)


def _documents(task: seqio.Task, records: tf.data.Dataset, config: Config) -> tf.data.Dataset:
  documents = task.preprocess_postcache(records, sequence_length(config), seed=config.seed)
  return documents.filter(lambda document: tf.size(document["events"]) >= features.MIN_EVENTS)


def _check_vocabulary(task: seqio.Task, config: Config) -> None:
  size = tasks.vocab_size(task)
  if size > config.model.vocab_size:
    raise InputError(
      f"The task {task.name} has {size} token ids (PAD, EOS and SOS included), but model.vocab_size is"
      f" {config.model.vocab_size}: set --config.model.vocab_size={size} or more."
    )


def _check_positions(positions_BxLxP: np.ndarray, config: Config) -> None:
  if not config.model.positions_from_data:
    return
  if config.model.position_encoding == "rotary":
    if positions_BxLxP.shape[-1] != 1:
      raise InputError(
        f"The task {config.data.task} has {positions_BxLxP.shape[-1]} position dimensions, and rotary positions are"
        " one number: count them from the last token instead (--config.model.positions_from_data=False), or use learned"
        " ones."
      )
    return
  largest, sizes = positions_BxLxP.max(axis=(0, 1)), config.model.position_sizes
  if len(sizes) != len(largest):
    raise InputError(
      f"Positions of the task {config.data.task} have {len(largest)} dimensions, but model.position_sizes={sizes} has"
      f" {len(sizes)}: give one size (largest position + 1) for each."
    )
  if any(position >= size for position, size in zip(largest, sizes)):
    raise InputError(
      f"The task {config.data.task} has positions up to {tuple(map(int, largest))}, beyond"
      f" model.position_sizes={sizes}: make each size at least the largest position + 1."
    )
