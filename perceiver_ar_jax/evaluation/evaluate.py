"""Scores held-out sequences: every token once, in blocks of `stride` new tokens with as much context as fits.

This is how the paper measures likelihood: a smaller stride gives each token more context and costs
more windows. Windows come from data/pipeline.py; this room turns logits into figures.
"""

import collections
import json
import math
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from perceiver_ar_jax.config import Config, InputError
from perceiver_ar_jax.data import pipeline
from perceiver_ar_jax.data.documents import Document
from perceiver_ar_jax.data.global_batch import to_global
from perceiver_ar_jax.data.registry import Task
from perceiver_ar_jax.data.tasks import get_tasks
from perceiver_ar_jax.models.architectures import make_model
from perceiver_ar_jax.models.attention_kernels import check_platform
from perceiver_ar_jax.parallel import sharding
from perceiver_ar_jax.parallel.mesh import check_batch, make_mesh, rows_of_processes
from perceiver_ar_jax.training import checkpoint, loss
from perceiver_ar_jax.training import state as state_lib
from perceiver_ar_jax.training import workdir as workdir_lib


def make_eval_step(config: Config):
  """The pure function (params, batch) -> sums over the batch: `nats`, `correct`, `tokens`, `histogram` float32[V].

  The histogram counts the scored targets by token id. Batches of text give `words` and `bytes` as well.
  """
  model = make_model(config.model)

  def eval_step(params, batch):
    targets_BxM, weights_BxM = batch["targets"], batch["weights"]
    latents_BxMxD = model.apply(
      {"params": params}, batch["inputs"], batch["positions"], num_latents=targets_BxM.shape[1], method="latents"
    )
    sums = loss.summed(
      lambda latents: model.apply({"params": params}, latents, method="logits"),
      latents_BxMxD,
      targets_BxM,
      weights_BxM,
      chunk=config.model.logits_chunk,
    )
    return {
      "nats": sums["loss"],
      "correct": sums["accuracy"],
      "tokens": sums["num_tokens"],
      "histogram": jnp.zeros(config.model.vocab_size).at[targets_BxM].add(weights_BxM),
      **{name: batch[name].sum() for name in ("words", "bytes") if name in batch},
    }

  return eval_step


class Evaluator:
  """Scores one split of the config's task with any parameters; compiled once."""

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
    """
    config = self._config
    totals = collections.defaultdict(float)
    size = config.eval.batch_size
    rows = rows_of_processes(self._mesh, size)[jax.process_index()]
    batches = pipeline.eval_batches(config, batch_size_per_host=size, rows=rows, chosen=documents)
    with jax.set_mesh(self._mesh):
      pending = {}
      for batch in batches:
        if should_stop():
          return None
        # Fetched one step late, so that the device works while the host reads the next batch.
        layout = sharding.batch_shardings(self._mesh, {name: (size, *x.shape[1:]) for name, x in batch.items()})
        sums, pending = pending, self._step(params, to_global(batch, rows, size, layout))
        _add(totals, sums)
      _add(totals, pending)
    if not totals["tokens"]:
      raise InputError(f"The split {config.eval.split!r} of {config.data.task} holds no tokens to score.")
    nats = float(totals["nats"] / totals["tokens"])
    frequencies = totals["histogram"][totals["histogram"] > 0] / totals["tokens"]
    num_latents = config.eval.num_latents or config.model.num_latents
    result = {
      "task": config.data.task,
      "split": config.eval.split,
      "step": step,
      "num_latents": num_latents,
      "stride": config.eval.stride or num_latents,
      "num_tokens": int(totals["tokens"]),
      "nats_per_token": nats,
      "bits_per_token": nats / math.log(2),
      "histogram_entropy_bits": float(-(frequencies * np.log2(frequencies)).sum()),
      "accuracy": float(totals["correct"] / totals["tokens"]),
    }
    task, _ = get_tasks(config.data, config.model.max_context + 1)[0]
    if task.unit == "bits_per_dim":
      result["bits_per_dim"] = result["bits_per_token"]  # a token is one sub-pixel
    if totals["words"] and totals["bytes"]:  # of the text itself, so that figures of all vocabularies compare
      result |= {
        "num_words": int(totals["words"]),
        "num_bytes": int(totals["bytes"]),
        "word_perplexity": math.exp(min(totals["nats"] / totals["words"], 700.0)),
        "bits_per_byte": float(totals["nats"] / math.log(2) / totals["bytes"]),
      }
    return result | {"unit": task.unit}

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
    return (
      f"{result['split']} at step {result['step']}: {own}"
      f" (entropy of its token histogram: {entropy:.3f} {'nats' if nats else 'bits'}),"
      f" accuracy {result['accuracy']:.2%}, {result['num_tokens']:,} tokens"
    )


def _add(totals: dict, sums: dict) -> None:
  for name, value in sums.items():
    totals[name] += np.asarray(value, np.float64)


def restore(config: Config, workdir: epath.PathLike) -> tuple[Mesh, int, dict]:
  """(the config's mesh, step, weights on it) of the newest good checkpoint of `workdir`, which stays as it is.

  Raises:
    InputError: the workdir holds no readable checkpoint, or one of another model; or the devices do not fit the config.
  """
  workdir = epath.Path(workdir)
  workdir_lib.check_model(config, workdir)
  mesh = make_mesh(config.mesh)
  check_platform(config.model.attention, mesh)
  with checkpoint.Checkpointer(workdir, read_only=True) as checkpointer:
    restored = checkpointer.restore_params(state_lib.abstract_params(config, mesh))
  if restored is None:
    raise InputError(f"--workdir={workdir} holds no checkpoint: train first, with the same --workdir.")
  return mesh, *restored


def evaluate(config: Config, workdir: epath.PathLike) -> dict:
  """Scores the newest good checkpoint of `workdir` and writes eval-<split>-<step>.json there.

  Raises:
    InputError: the workdir holds no readable checkpoint, or one of another model, or cannot be written.
  """
  workdir = epath.Path(workdir)
  mesh, step, params = restore(config, workdir)
  evaluator = Evaluator(config, mesh)
  result = evaluator(params, step)
  if jax.process_index() == 0:
    path = workdir / f"eval-{result['split']}-{result['step']}.json"
    print(evaluator.describe(result), flush=True)
    try:
      path.write_text(json.dumps(result, indent=2) + "\n")
    except OSError as error:
      raise InputError(f"The figures above could not be written to {path}: {error.strerror or error}.") from error
    print(f"Written to {path}", flush=True)
  return result
