"""Scores held-out sequences: every token once, in blocks of `stride` new tokens with as much context as fits.

This is how the paper measures likelihood: a smaller stride gives each token more context and costs
more windows. Windows come from data/pipeline.py; this room turns logits into figures.
"""

import json
import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from perceiver_ar_jax.config import Config, InputError, writing
from perceiver_ar_jax.data import pipeline, records
from perceiver_ar_jax.data.documents import Document
from perceiver_ar_jax.data.global_batch import to_global
from perceiver_ar_jax.data.registry import Task
from perceiver_ar_jax.data.tasks import get_tasks
from perceiver_ar_jax.evaluation import figures
from perceiver_ar_jax.models import architectures
from perceiver_ar_jax.models.architectures import make_model
from perceiver_ar_jax.parallel import distributed, sharding
from perceiver_ar_jax.parallel.mesh import check_batch, make_mesh, rows_of_processes
from perceiver_ar_jax.training import checkpoint, loss
from perceiver_ar_jax.training import state as state_lib
from perceiver_ar_jax.training import workdir as workdir_lib


def make_eval_step(config: Config):
  """The pure function (params, batch) -> sums of its rows, and over its rows; batches are pipeline.eval_batches's.

  By row: `document` int32[B], and float32[B] `nats`, `right` and `tokens`. By row and bucket, float32[B, K] each:
  `nats_by_position` and `tokens_by_position` of the targets by their place in the document, `nats_by_context` and
  `tokens_by_context` by how many inputs each was predicted from. Over all rows: `histogram` float32[V], the
  scored targets by token id, and `words` and `bytes` of texts.
  """
  model = make_model(config.model)

  def eval_step(params, batch):
    targets_BxM, weights_BxM = batch["targets"], batch["weights"]
    num_latents = targets_BxM.shape[1]
    latents_BxMxD = model.apply(
      {"params": params}, batch["inputs"], batch["positions"], num_latents=num_latents, method="latents"
    )
    scored = loss.score(
      lambda latents: model.apply({"params": params}, latents, method="logits"),
      latents_BxMxD,
      targets_BxM,
      chunk=config.model.logits_chunk,
    )
    nats_BxM = scored.cross_entropy * weights_BxM
    before_last_1xM = jnp.arange(num_latents - 1, -1, -1)[None]
    sums = {
      "document": batch["document"],
      "nats": nats_BxM.sum(axis=1),
      "right": (scored.right * weights_BxM).sum(axis=1),
      "tokens": weights_BxM.sum(axis=1),
      "histogram": jnp.zeros(config.model.vocab_size).at[targets_BxM].add(weights_BxM),
      **{name: batch[name].sum() for name in ("words", "bytes") if name in batch},
    }
    last_B = {"position": batch["end"] - 1, "context": (batch["inputs"] > 0).sum(axis=1)}
    for name, of_last_B in last_B.items():
      bucket_BxM = jnp.searchsorted(jnp.array(figures.EDGES), of_last_B[:, None] - before_last_1xM, side="right") - 1
      inside_KxBxM = bucket_BxM[None] == jnp.arange(len(figures.EDGES))[:, None, None]
      sums[f"nats_by_{name}"] = jnp.where(inside_KxBxM, nats_BxM[None], 0).sum(axis=2).T
      sums[f"tokens_by_{name}"] = jnp.where(inside_KxBxM, weights_BxM[None], 0).sum(axis=2).T
    return sums

  return eval_step


class Evaluator:
  """Scores one split of the config's task with any parameters; compiled once.

  Raises:
    InputError: the mesh does not divide `eval.batch_size`.
  """

  def __init__(self, config: Config, mesh: Mesh):
    check_batch(config.eval.batch_size, "eval.batch_size", mesh)
    self._config = config
    self._mesh = mesh
    self._step = jax.jit(make_eval_step(config), out_shardings=NamedSharding(mesh, PartitionSpec()))

  def __call__(
    self,
    params,
    step: int,
    should_stop: Callable[[], bool] = lambda: False,
    documents: Iterable[tuple[Task, Document]] | None = None,
  ) -> dict | None:
    """Nats, bits and the task's own unit per token over the whole split; None if `should_stop` says so on the way.

    `documents`: score these instead of a split.

    `histogram_entropy_bits` is what a model would pay that knows only how often each token occurs in the split.
    `interval_95` holds the ends of each figure's 95% interval, documents being what is drawn at random; None for one
    document. `by_position` and `by_context` divide the tokens by their place in the document (from 0), and by
    how many inputs they were predicted from.

    Raises:
      InputError: as pipeline.eval_batches, or no document of the split can be read.
    """
    config, totals = self._config, figures.Totals()
    size = config.eval.batch_size
    rows = rows_of_processes(self._mesh, size)[jax.process_index()]
    batches = pipeline.eval_batches(config, rows, documents)
    with jax.set_mesh(self._mesh):
      pending = None
      for batch in batches:
        if should_stop():
          return None
        # Fetched one step late, so that the device works while the host reads the next batch.
        layout = sharding.batch_shardings(self._mesh, {name: (size, *x.shape[1:]) for name, x in batch.items()})
        sums, pending = pending, self._step(params, to_global(batch, rows, size, layout))
        totals.add(sums)
      totals.add(pending)
    if not totals.num_tokens:
      raise records.none_readable(config, config.eval.split)
    num_latents = config.eval.num_latents or config.model.num_latents
    task, _ = get_tasks(config.data, config.model.max_context + 1)[0]
    return {
      "task": config.data.task,
      "split": config.eval.split,
      "step": step,
      "num_latents": num_latents,
      "stride": config.eval.stride or num_latents,
      **totals.figures(task.unit),
      "unit": task.unit,
    }

  @staticmethod
  def describe(result: dict) -> str:
    """One line for people: the split's figures, and what they are to be compared with."""
    bits, nats = f"{result['bits_per_token']:.3f} bits/token", result["unit"] == "nats_per_token"
    entropy = result["histogram_entropy_bits"] * (math.log(2) if nats else 1)
    own = {
      "bits_per_dim": lambda value: f"{value:.3f} bits/dim",
      "bits_per_byte": lambda value: f"{value:.3f} bits/byte, {bits}",
      "word_perplexity": lambda value: f"perplexity {value:.4g} a word, {bits}",
      "nats_per_token": lambda value: f"{value:.3f} nats/token",
      "accuracy": lambda value: bits,
    }[result["unit"]](result[result["unit"]])
    interval = " of one document"
    if result["interval_95"]:
      low, high = result["interval_95"][result["unit"]]
      interval = f" of {result['num_documents']:,} documents ({result['unit']} {low:.4g} to {high:.4g} with 95%)"
    return (
      f"{result['split']} at step {result['step']}: {own}"
      f" (entropy of its token histogram: {entropy:.3f} {'nats' if nats else 'bits'}),"
      f" accuracy {result['accuracy']:.2%}, {result['num_tokens']:,} tokens{interval}"
    )

  @staticmethod
  def write(result: dict, workdir: epath.Path) -> None:
    """Writes eval-<split>-<step>.json; process 0 does.

    Raises:
      InputError: it cannot be written.
    """
    if jax.process_index():
      return
    path = workdir / f"eval-{result['split']}-{result['step']}.json"
    with writing(path, "free it, or copy the run"):
      path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"Written to {path}", flush=True)


def restore(config: Config, workdir: epath.PathLike) -> tuple[Mesh, int, dict]:
  """(the config's mesh, step, weights on it) of the newest good checkpoint of `workdir`, which stays as it is.

  Raises:
    InputError: the workdir holds no readable checkpoint, or one of another model; or the devices do not fit the config.
  """
  workdir = epath.Path(workdir)
  workdir_lib.check_model(config, workdir)
  mesh = make_mesh(config.mesh)
  architectures.check(config.model, mesh)
  with checkpoint.Checkpointer(workdir, read_only=True) as checkpointer:
    restored = checkpointer.restore_params(state_lib.abstract_params(config, mesh))
  if restored is None:
    raise InputError(f"--workdir={workdir} holds no checkpoint: train first, with the same --workdir.")
  return mesh, *restored


class Checkpoint(NamedTuple):
  """What a run has trained."""

  config: Config
  step: int
  params: dict
  """Its weights, on the config's mesh."""


def load_checkpoint(workdir: epath.PathLike) -> Checkpoint:
  """The newest good checkpoint of a run, which stays as it is.

  `PerceiverAR(checkpoint.config.model).apply({"params": checkpoint.params}, tokens_BxL, positions_BxLxP)` gives logits.

  Raises:
    InputError: there is no run, or no readable checkpoint; or the devices do not fit the run's config.
  """
  config = workdir_lib.load_config(epath.Path(workdir))
  _, step, params = restore(config, workdir)
  return Checkpoint(config, step, params)


def evaluate(config: Config, workdir: epath.PathLike) -> dict:
  """Scores the newest good checkpoint of `workdir` and writes eval-<split>-<step>.json there.

  Raises:
    InputError: the workdir holds no readable checkpoint, or one of another model, or cannot be written.
  """
  workdir = epath.Path(workdir)
  mesh, step, params = restore(config, workdir)
  evaluator = Evaluator(config, mesh)
  result = evaluator(params, step)
  distributed.log(evaluator.describe(result))
  evaluator.write(result, workdir)
  return result
