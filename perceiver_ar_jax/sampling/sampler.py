"""Samples from a trained model, in Python:

    sample = Sampler.from_workdir("runs/text")
    print(sample("Once upon a time", length=500, temperature=0.8)[0].value)
    print(sample.score("Once upon a time")["bits_per_byte"])

This module owns the loop on the host: batches, blocks, and when a context is computed again. generate.py owns the
computations on the device.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from perceiver_ar_jax.config import Config, SampleConfig, config_from_run, nearest, require
from perceiver_ar_jax.data import EOS, registry, tasks, warn_once
from perceiver_ar_jax.evaluation import evaluate
from perceiver_ar_jax.models import architectures, decode_cache
from perceiver_ar_jax.parallel import sharding
from perceiver_ar_jax.parallel.mesh import make_mesh
from perceiver_ar_jax.sampling import generate, prompts


@dataclasses.dataclass(frozen=True)
class Sample:
  """One generated sequence."""

  prompt: prompts.Prompt
  events: np.ndarray  # int32[n], including those of the prompt

  @property
  def task(self) -> registry.Task:
    return self.prompt.task

  @property
  def num_new(self) -> int:
    """Number of generated events."""
    return len(self.events) - len(self.prompt.events)

  @property
  def value(self) -> Any:
    """The decoded events: a text, a picture uint8[height, width, 3], notes or codes; see Task.decode."""
    return self.task.decode(self.events)


class Sampler:
  """Generates with the weights `params` (None: assigned later); compiled at the first call for each batch size.

  In one process, threads may call it at the same time; several processes make the same calls in the same order.
  `config.sample` has the defaults of a call. Rows of a batch are sharded over the mesh axes data and fsdp, the context
  over context. Raises InputError for an unknown task, or a model that cannot be cached (`sample.cache`).
  """

  def __init__(self, config: Config, params=None, mesh: Mesh | None = None, step: int = 0):
    self.config, self.params, self.step = config, params, step
    self.mesh = make_mesh(config.mesh) if mesh is None else mesh
    model, cached = config.model, config.sample.cache
    architectures.check(model, self.mesh)
    self.task = tasks.get_tasks(config.data, model.max_context + 1)[0][0]
    kept = config.sample.kept_latents or max(model.num_latents - model.num_latents // 8, 1)
    self._block_tokens = model.num_latents - kept + 1
    block: Callable = functools.partial(generate.exact_block, model)
    if cached:
      decode_cache.check(model)
      block = functools.partial(generate.cached_block, model, kept)

    def draw(params, state, plan, settings, seed, numbers_B):
      state, tokens_BxT, _ = block(params, state, plan, settings, generate.row_keys(seed, numbers_B))
      return state, sharding.constrain(tokens_BxT, None, None)  # every host reads all tokens

    self._begin = jax.jit(functools.partial(generate.begin, model, cached=cached))
    self._draw = jax.jit(draw, donate_argnums=1)

  @classmethod
  def from_workdir(cls, workdir: epath.PathLike, config: Config | None = None) -> "Sampler":
    """Returns a sampler with the newest good checkpoint of a run or exported weights, by default with their config.

    Raises InputError without readable weights, or if they are of another model than that of `config`.
    """
    workdir = epath.Path(workdir).expanduser()
    config = config or config_from_run.load_config(workdir)
    mesh, step, params = evaluate.restore(config, workdir)
    return cls(config, params, mesh, step)

  from_pretrained = from_workdir  # a folder of exported weights (interop/export.py) is used like a run

  def __call__(self, prompt: str | os.PathLike | np.ndarray | list | None = None, **settings) -> list[Sample]:
    """Returns samples.

    Args:
      prompt: a str is a text, or "data" for documents of eval.split; a pathlib.Path is a file, or a pattern of several;
        an array is events int32[n]; a list contains these and results of prompts.find, and "data" in it is a text.
        None: sample.prompt of the config, which is read as on the command line.
      **settings: other values of config.SampleConfig for this call: num_samples (of a list, by default one of each
        prompt), length, temperature, top_k, top_p, seed, batch_size, prompt_tokens.

    Raises InputError for a wrong setting or prompt.
    """
    *_, samples = self.stream(prompt, **settings)
    return samples

  def stream(self, prompt: str | os.PathLike | np.ndarray | list | None = None, **settings) -> Iterator[list[Sample]]:
    """Yields all samples begun so far: the prompts of each batch, then what they have grown to after each block.

    An iterator that is not exhausted keeps its cache on the device until it is closed. Arguments and errors, which are
    raised at once: as `__call__`.
    """
    known = {field.name for field in dataclasses.fields(SampleConfig)} - {"cache", "kept_latents", "prompt"}
    for name in settings:
      require(name in known, f"Unknown setting {name!r} of a sample. {nearest(name, known)}")
    chosen = dataclasses.replace(self.config.sample, **settings)
    given = prompts.find(self.config, self.task, prompt, chosen.num_samples, chosen.prompt_tokens)
    context = self.config.model.max_context
    require(bool(given), "The list of prompts is empty: give at least one, or None to sample without a prompt.")
    if isinstance(prompt, list) and "num_samples" not in settings:
      chosen = dataclasses.replace(chosen, num_samples=len(given))
    if (longest := max(len(each.events) for each in given)) > context:
      problem = f"The prompt of {longest:,} tokens is longer than the context"
      warn_once.warn_once("shortened", f"{problem}: the model sees its newest ones, at most {context:,}", "prompt")
    rows = [_Row(given[index % len(given)], chosen.length, context) for index in range(chosen.num_samples)]
    return self._generate(rows, chosen)

  def _generate(self, rows: list["_Row"], chosen: SampleConfig) -> Iterator[list[Sample]]:
    for first in range(0, len(rows), chosen.batch_size):
      begun = rows[: first + chosen.batch_size]
      for _ in self._fill(begun[first:], chosen, first):
        yield [Sample(row.prompt, row.events) for row in begun]

  def score(self, prompt: str | os.PathLike) -> dict:
    """Returns the likelihood of a text (a str) or a file (a pathlib.Path), as the metrics of --mode=eval.

    Raises InputError for an empty text, or a file that cannot be read.
    """
    documents = [(self.task, document) for document in prompts.read(self.task, prompt)]
    result = self._evaluator(self.params, self.step, documents=documents)
    assert result is not None  # without should_stop, evaluation always ends
    return result

  @functools.cached_property  # compiled once
  def _evaluator(self) -> evaluate.Evaluator:
    return evaluate.Evaluator(self.config, self.mesh)

  def _fill(self, rows: list["_Row"], settings: SampleConfig, first: int) -> Iterator[None]:
    """Adds events to the rows, numbers `first`, `first` + 1, ...; yields at the start and after each block."""
    context, new, padded = self.config.model.max_context, self._block_tokens, self._padded(rows, settings.batch_size)
    state, used, done = None, 0, 0  # slots of the context in use, tokens generated
    yield
    while needed := max(row.num_missing for row in rows):
      with jax.set_mesh(self.mesh):  # of this thread: another one may resume the iterator
        if state is None or used + min(new, needed) - 1 > context:  # full: start over from the newest tokens
          used = max(len(row.events) for row in rows)
          if used + min(new, needed) - 1 > context:
            used = min(used, max(context - max(context // 8, new - 1), 1))
          state = self._begin(self.params, *self._begin_arguments(padded, used, done))
        state, tokens_BxT = self._draw(self.params, state, *self._draw_arguments(padded, settings, first))
      used, done = used + new, done + new
      for row, tokens_T in zip(rows, np.asarray(tokens_BxT)):
        row.add(tokens_T)
      yield

  def _padded(self, rows: list["_Row"], batch_size: int) -> list["_Row"]:
    """Returns the rows, filled up to a batch that the mesh divides with rows that have ended."""
    mesh_rows = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
    size = -(-max(batch_size, len(rows)) // mesh_rows) * mesh_rows
    return rows + [_Row(rows[0].prompt, 1, 1, is_ended=True) for _ in range(size - len(rows))]

  def _draw_arguments(self, rows: list["_Row"], chosen: SampleConfig, first: int) -> tuple:
    """Returns the plan of the next block, settings, seed, and the numbers of the rows, from `first` on."""
    new = self._block_tokens
    unused_ids = self.config.model.vocab_size - self.task.vocab_size
    plan = generate.BlockPlan(
      np.stack([self._positions(row, len(row.events), len(row.events) + new) for row in rows]),
      np.stack([row.prompt.task.group(len(row.events) + np.arange(new)) for row in rows]).astype(np.int32),
      np.pad(self.task.allowed(), ((0, 0), (0, unused_ids))),
    )
    settings = (np.float32(chosen.temperature), np.int32(chosen.top_k), np.float32(chosen.top_p))
    numbers_B = np.arange(first, first + len(rows), dtype=np.int32)
    return plan, generate.SamplingSettings(*settings), np.uint32(chosen.seed), numbers_B

  def _begin_arguments(self, rows: list["_Row"], window: int, done: int) -> tuple:
    """Returns the arguments of generate.begin for rows whose newest `window` events are the context."""
    context = self.config.model.max_context
    dims = self.task.position_dims if self.config.model.positions_from_data else 1
    tokens_BxL = np.zeros((len(rows), context), np.int32)
    positions_BxLxP = np.zeros((len(rows), context, dims), np.int32)
    for row, tokens_L, positions_LxP in zip(rows, tokens_BxL, positions_BxLxP):
      end = len(row.events)
      row.start = max(end - window, 0)
      tokens_L[context - (end - row.start) :] = row.events[row.start :]
      positions_LxP[context - (end - row.start) :] = self._positions(row, row.start, end)
    return tokens_BxL, positions_BxLxP, np.array([row.is_ended for row in rows]), np.int32(done)

  def _positions(self, row: "_Row", start: int, end: int) -> np.ndarray:
    """Returns positions int32[end - start, P] of existing or future events in the row's window."""
    model = self.config.model
    if not model.positions_from_data:  # rotary: only differences matter, so any origin does
      return -np.arange(start, end, dtype=np.int32)[:, None]
    positions = row.prompt.place(row.start, end)[start - row.start :]
    missing = end - start - len(positions)  # beyond the end of a document, where tokens are not used
    positions = np.pad(positions, ((0, missing), (0, 0)), constant_values=1)
    sizes = np.array(model.position_sizes or [2**31 - 1] * self.task.position_dims)
    return np.minimum(positions, sizes - 1).astype(np.int32)


class _Row:
  """One unfinished sample."""

  def __init__(self, prompt: prompts.Prompt, length: int | None, context: int, is_ended: bool = False):
    self.prompt, self.events, self.start, self.is_ended = prompt, prompt.events, 0, is_ended
    goal = len(prompt.events) + length if length else max(context + 1, len(prompt.events) + max(context // 4, 1))
    self._goal = min(goal, prompt.length) if prompt.length else goal

  @property
  def num_missing(self) -> int:
    """Number of events that are still to be generated, at most."""
    return 0 if self.is_ended else max(self._goal - len(self.events), 0)

  def add(self, tokens_T: np.ndarray) -> None:
    """Adds the tokens of a block, up to EOS (included) or the requested length."""
    tokens_T = tokens_T[: self.num_missing]
    ends = np.flatnonzero(tokens_T == EOS)
    if len(ends):
      tokens_T, self.is_ended = tokens_T[: ends[0] + 1], True
    self.events = np.concatenate([self.events, tokens_T])
