"""Scores held-out sequences: every token once, in blocks of `stride` new tokens with as much context as fits.

data/splits.py provides the windows, this module the sums over each batch, and metrics.py the metrics of a split.
"""

import io
import json
import lzma
import traceback
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import PIL.Image
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from perceiver_ar_jax.config import Config, InputError, config_from_run, require, writing
from perceiver_ar_jax.data import loader, splits, tasks, units, windows
from perceiver_ar_jax.data.documents import Document
from perceiver_ar_jax.data.registry import Task
from perceiver_ar_jax.evaluation import metrics
from perceiver_ar_jax.models import architectures
from perceiver_ar_jax.parallel import distributed, sharding
from perceiver_ar_jax.parallel.mesh import check_batch, make_mesh, rows_of_processes
from perceiver_ar_jax.training import checkpoint, pretrained
from perceiver_ar_jax.training import step as step_lib
from perceiver_ar_jax.training import workdir as workdir_lib

_SILENT_SECONDS = 5  # a shorter evaluation shows no progress bar
_MAX_COMPRESSED_BYTES = 2**23  # of the first documents, so that compressing a large split takes seconds
_PICTURES = {"PNG": {"optimize": True}, "WebP": {"lossless": True, "quality": 100, "method": 6}}


def make_eval_step(config: Config):
  """Returns the pure function (params, batch) -> sums, for batches of splits.eval_batches.

  By row: `document` int32[B], and float32[B] `nats`, `correct` and `tokens`. By row and bucket of metrics.EDGES,
  float32[B, K]: `nats_by_<name>` and `tokens_by_<name>`, where `position` is the index of a target in its document and
  `context` the number of inputs that it is predicted from. Over all rows: `histogram` float32[V], the scored targets by
  token id, and the counts of documents (units.COUNTS).
  """
  model = architectures.make_model(config.model)

  def eval_step(params, batch):
    targets_BxM, weights_BxM = batch["targets"], batch["weights"]
    losses = step_lib.score(model, params, batch)
    nats_BxM = losses.cross_entropy * weights_BxM
    before_last_1xM = jnp.arange(targets_BxM.shape[1] - 1, -1, -1)[None]
    sums = {
      "document": batch["document"],
      "nats": nats_BxM.sum(axis=1),
      "correct": (losses.correct * weights_BxM).sum(axis=1),
      "tokens": weights_BxM.sum(axis=1),
      "histogram": jnp.zeros(config.model.vocab_size).at[targets_BxM].add(weights_BxM),
      **{name: batch[name].sum() for name in units.COUNTS if name in batch},
    }
    for name, last_B in (("position", batch["end"] - 1), ("context", (batch["inputs"] > 0).sum(axis=1))):
      bucket_BxM = jnp.searchsorted(jnp.array(metrics.EDGES), last_B[:, None] - before_last_1xM, side="right") - 1
      inside_KxBxM = bucket_BxM[None] == jnp.arange(len(metrics.EDGES))[:, None, None]
      sums[f"nats_by_{name}"] = jnp.where(inside_KxBxM, nats_BxM[None], 0).sum(axis=2).T
      sums[f"tokens_by_{name}"] = jnp.where(inside_KxBxM, weights_BxM[None], 0).sum(axis=2).T
    return sums

  return eval_step


def _next_on_all(batches: Iterator[windows.Batch]) -> windows.Batch | None:
  """Returns the next batch, None at the end; raises InputError on all processes if one of them cannot read its rows."""
  batch, error = None, None
  try:
    batch = next(batches, None)
  except InputError as input_error:
    error = input_error
  except Exception as any_error:  # of any library that reads the data
    traceback.print_exc()
    error = InputError(f"Held-out data cannot be read ({type(any_error).__name__}: {any_error}).")
  if distributed.maximum(error is not None):
    raise error or InputError("Another process cannot read held-out data: its own message gives the reason.")
  return batch


class Evaluator:
  """Scores one split with any parameters; compiled once. Raises InputError if the mesh does not divide a batch."""

  def __init__(self, config: Config, mesh: Mesh):
    check_batch(config.eval.batch_size, "eval.batch_size", mesh)
    self._config, self._mesh = config, mesh
    self._step = jax.jit(make_eval_step(config), out_shardings=NamedSharding(mesh, PartitionSpec()))
    self._compressors: dict[str, float] | None = None

  def __call__(
    self, params, step: int, should_stop=lambda: False, documents: Sequence[tuple[Task, Document]] | None = None
  ) -> dict | None:
    """Returns the metrics of the split or the documents (docs/evaluation.md).

    Returns None if `should_stop`, called once per batch by all processes, returned True. Raises InputError, on all
    processes, if no document can be read, or as splits.eval_batches.
    """
    config, totals, size = self._config, metrics.Totals(), self._config.eval.batch_size
    rows = rows_of_processes(self._mesh, size)[jax.process_index()]
    num_documents = len(documents or ())
    if documents is None:
      if self._compressors is None:
        self._compressors = compress(splits.eval_documents(config))
      num_documents = splits.num_documents(config, config.eval.split, config.eval.max_sequences)
      documents = splits.eval_documents(config)
    bar_settings = {"desc": "Evaluating", "unit": "document", "leave": False, "delay": _SILENT_SECONDS}
    bar = distributed.progress_bar(iterable=documents, total=num_documents, **bar_settings)
    with jax.set_mesh(self._mesh), bar as opened_documents:
      batches, pending = splits.eval_batches(config, opened_documents, rows), None
      while (batch := _next_on_all(batches)) is not None:
        if should_stop():
          return None
        # Fetched one step late, so that the device works while the host reads the next batch.
        layout = sharding.batch_shardings(self._mesh, {name: (size, *x.shape[1:]) for name, x in batch.items()})
        sums, pending = pending, self._step(params, loader.to_global(batch, size, layout))
        totals.add(sums)
      totals.add(pending)
    if not totals.num_tokens:
      raise splits.none_readable(config, config.eval.split)
    num_latents = config.eval.num_latents or config.model.num_latents
    task, _ = tasks.get_tasks(config.data, config.model.max_context + 1)[0]
    return {
      "task": config.data.task,
      "split": config.eval.split,
      "step": step,
      "num_latents": num_latents,
      "stride": config.eval.stride or num_latents,
      **totals.metrics(task.unit),
      "unit": task.unit,
      "compressors": self._compressors or {},
    }

  @staticmethod
  def describe(result: dict) -> str:
    """Returns one line: the metrics of the split, and those of compressors and its tokens' entropy for comparison."""
    interval = " of one document"
    if result["interval_95"]:
      low, high = result["interval_95"][result["unit"]]
      interval = f" of {result['num_documents']:,} documents ({result['unit']} {low:.4g} to {high:.4g} with 95%)"
    compressors = "".join(f"{name}: {bits:.3f}, " for name, bits in result.get("compressors", {}).items())
    loss_text = units.UNITS[result["unit"]].summary.format_map(result)
    return (
      f"{result['split']} at step {result['step']}: {loss_text} ({compressors}entropy of its token histogram:"
      f" {result['histogram_entropy_bits']:.3f} bits), accuracy {result['accuracy']:.2%},"
      f" {result['num_tokens']:,} tokens{interval}"
    )

  @staticmethod
  def write(result: dict, workdir: epath.Path, name: str | None = None) -> None:
    """Writes <name>.json, by default eval-<split>-<step>.json, in process 0; raises InputError if that fails."""
    if jax.process_index():
      return
    path = workdir / f"{name or 'eval-{split}-{step}'.format_map(result)}.json"
    with writing(path, "free it, or copy the run"):
      path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"Written to {path}", flush=True)


def compress(documents: Iterable[tuple[Task, Document]]) -> dict[str, float]:
  """Returns the bits per byte (sub-pixel) of general compressors, to compare a model's with.

  PNG and lossless WebP compress each picture to a file, headers included; xz -9 the texts as one, as they are decoded.
  {} for other data, and with several processes: one that cannot read a document would leave the others waiting.
  """
  if jax.process_count() > 1:
    return {}
  totals, num_bytes, texts = dict.fromkeys(_PICTURES, 0), 0, []
  for task, document in documents:
    if task.modality not in ("image", "text"):
      return {}
    decoded = task.decode(document.read(0, len(document)))
    if task.modality == "text":
      texts.append(decoded.encode())
      num_bytes += document.counts()["bytes"]  # of the original text, as the model's bits per byte
    else:
      num_bytes += decoded.size
      for name, settings in _PICTURES.items():
        file = io.BytesIO()
        PIL.Image.fromarray(decoded).save(file, name, **settings)
        totals[name] += 8 * file.tell()
    if num_bytes > _MAX_COMPRESSED_BYTES:
      break
  if texts:
    totals = {"xz": 8 * len(lzma.compress(b"".join(texts), preset=9 | lzma.PRESET_EXTREME))}
  return {name: total / num_bytes for name, total in totals.items() if total}


def restore(config: Config, workdir: epath.PathLike, step: int | None = None) -> tuple[Mesh, int, dict]:
  """Returns (the config's mesh, step, weights on it) of the newest good checkpoint of `workdir`, or of another `step`.

  Of a run with train.ema_decay, these are the averaged weights. The workdir, which may be a folder of exported weights,
  is only read. Raises InputError without a readable checkpoint of this model.
  """
  workdir = epath.Path(workdir)
  workdir_lib.check_model(config, workdir)
  mesh = make_mesh(config.mesh)
  architectures.check(config.model, mesh)
  abstract_params = step_lib.abstract_params(config, mesh)
  if (workdir / config_from_run.WEIGHTS).exists() and not workdir_lib.has_checkpoints(workdir):
    return mesh, *pretrained.restore(config.model, workdir, abstract_params)
  with checkpoint.Checkpointer(workdir, read_only=True) as checkpointer:
    restored = checkpointer.restore_params(abstract_params, step)
  require(restored is not None, f"--workdir={workdir} contains no checkpoint: train first, with the same --workdir.")
  return mesh, *restored


class Checkpoint(NamedTuple):
  """The trained weights of a run."""

  config: Config
  step: int
  params: dict  # on the config's mesh: PerceiverAR(config.model).apply({"params": params}, tokens_BxL, ...)


def load_checkpoint(workdir: epath.PathLike) -> Checkpoint:
  """Returns the newest good checkpoint of a run, which is only read; raises InputError as `restore`."""
  workdir = epath.Path(workdir).expanduser()
  config = config_from_run.load_config(workdir)
  return Checkpoint(config, *restore(config, workdir)[1:])


def evaluate(config: Config, workdir: epath.PathLike) -> dict:
  """Scores the newest good checkpoint of `workdir`, prints the result, and writes eval-<split>-<step>.json there.

  Raises InputError as `restore`, or if the workdir cannot be written.
  """
  mesh, step, params = restore(config, workdir)
  evaluator = Evaluator(config, mesh)
  result = evaluator(params, step)
  distributed.log(evaluator.describe(result))
  evaluator.write(result, epath.Path(workdir))
  return result
