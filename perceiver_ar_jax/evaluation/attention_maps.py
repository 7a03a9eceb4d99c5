"""--mode=attention: which inputs a cross-attend takes from, for chosen outputs of one document.

An output is seen in the window in which it is the last to be scored: as many inputs as the context holds, and the
latents of evaluation. data/heat.py draws the pictures.
"""

import functools
import json
from collections.abc import Callable, Sequence

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from perceiver_ar_jax.config import Config, InputError, writing
from perceiver_ar_jax.data import features, heat, records, render
from perceiver_ar_jax.data.documents import Document
from perceiver_ar_jax.data.global_batch import to_global
from perceiver_ar_jax.data.registry import Task
from perceiver_ar_jax.data.tasks import get_tasks
from perceiver_ar_jax.evaluation import evaluate
from perceiver_ar_jax.models.perceiver_ar import attention_map
from perceiver_ar_jax.parallel import sharding

_DEFAULT_OUTPUTS = 4


def write(config: Config, workdir: epath.PathLike, read: Callable[[Task, str], list[Document]]) -> dict:
  """Writes WORKDIR/attention/: a picture and the numbers of each output, and attention.json, which it returns.

  Args:
    config: `attention_map` says what to show.
    workdir: of the run.
    read: the documents of a user's own text or files.

  Raises:
    InputError: no checkpoint or no cross-attend; a prompt that cannot be read, an output outside of it, a folder that
      cannot be written.
  """
  if config.model.architecture != "perceiver_ar":
    raise InputError(
      f"model.architecture={config.model.architecture} has no cross-attend, which --mode=attention would show."
    )
  mesh, step, params = evaluate.restore(config, workdir)
  settings, num_latents = config.attention_map, config.eval.num_latents or config.model.num_latents
  task, document = _document(config, read)
  outputs = _outputs(settings.outputs, len(document) - 1)
  folder = epath.Path(workdir) / "attention"
  with writing(folder, "free it, or copy the run"):
    folder.mkdir(parents=True, exist_ok=True)
  maps = compute(config, mesh, params, document, outputs)
  report = {
    "step": step,
    "task": task.name,
    "prompt": settings.prompt,
    "events": len(document),
    "cross_attend": settings.cross_attend,
    "num_latents": num_latents,
    "outputs": [_write_one(folder, task, document, *one, num_latents, step) for one in zip(outputs, maps)],
  }
  if jax.process_index() == 0:
    (folder / "attention.json").write_text(json.dumps(report, indent=2) + "\n")
    for one in report["outputs"]:
      print(
        f"output {one['output']:,}: entropy {one['entropy_nats']:.2f} nats over {one['inputs']:,} inputs,"
        f" {one['share_before_latents']:.1%} before the latents: {folder / one['files'][0]}"
      )
  return report


def compute(config: Config, mesh: Mesh, params, document: Document, outputs: Sequence[int]) -> list[np.ndarray]:
  """float32 weights_HxL of each output: by head, how much it takes from each slot of its window, 0 on padding.

  Args:
    config: `attention_map.cross_attend` says of which cross-attend.
    mesh: of the devices that the weights lie on.
    params: the weights.
    document: of which the outputs are.
    outputs: numbers of events, in 1..N - 1.
  """
  context, num_latents = config.model.max_context, config.eval.num_latents or config.model.num_latents
  size, dims = mesh.shape["data"] * mesh.shape["fsdp"], document.positions(0, 1).shape[1]
  batch = features.empty_batch(size, context=context, latents=num_latents, position_dims=dims)
  layout = sharding.batch_shardings(mesh, {name: x.shape for name, x in batch.items()})
  run = jax.jit(
    functools.partial(
      attention_map, config.model, num_latents=num_latents, cross_attend=config.attention_map.cross_attend
    ),
    out_shardings=NamedSharding(mesh, PartitionSpec()),
  )
  result = []
  with jax.set_mesh(mesh):
    for first in range(0, len(outputs), size):
      batch = features.empty_batch(size, context=context, latents=num_latents, position_dims=dims)
      some = outputs[first : first + size]
      for index, output in enumerate(some):
        features.eval_window(features.row_of(batch, index), document, output + 1, 1)
      placed = to_global(batch, range(size), size, layout)
      result += list(np.asarray(run(params, placed["inputs"], placed["positions"]))[: len(some)])
  return result


def _document(config: Config, read: Callable[[Task, str], list[Document]]) -> tuple[Task, Document]:
  prompt = config.attention_map.prompt
  if prompt == "data":
    for found in records.documents(config, config.eval.split, 1):
      return found
    raise records.none_readable(config, config.eval.split)
  task, _ = get_tasks(config.data, config.model.max_context + 1)[0]
  document = read(task, prompt)[0]
  if not document.has_targets():
    raise InputError(f"attention_map.prompt={prompt!r} holds nothing to predict: give a longer document.")
  return task, document


def _outputs(chosen: tuple[int, ...], count: int) -> list[int]:
  """The chosen outputs, or a few of the `count` that there are."""
  for output in chosen:
    if output > count:
      raise InputError(
        f"attention_map.outputs names {output}, and the document has {count:,} outputs: choose from 1..{count}."
      )
  parts = min(_DEFAULT_OUTPUTS, count)
  return list(dict.fromkeys(chosen)) or [count * part // parts for part in range(1, parts + 1)]


def _write_one(
  folder: epath.Path, task: Task, document: Document, output: int, weights_HxL: np.ndarray, num_latents: int, step: int
) -> dict:
  """What attention.json says of an output, whose files the first process writes."""
  length = weights_HxL.shape[1]
  start = max(output - length, 0)
  inputs, end = output - start, output + 1
  window = heat.Window(task, document.read(start, end), document.positions(start, end), start)
  mean_L = weights_HxL.mean(axis=0, dtype=np.float64)
  seen_L = mean_L[mean_L > 0]
  names = [f"{step}-{output}.png", f"{step}-{output}.npz"]
  if jax.process_index() == 0:
    padding = length - inputs
    with (folder / names[0]).open("wb") as file:
      render.save_png(heat.picture(window, weights_HxL[:, -inputs:]), file)
    with (folder / names[1]).open("wb") as file:
      np.savez(
        file,
        weights_HxL=weights_HxL,
        tokens_L=np.pad(window.events[:-1], (padding, 0)),
        positions_LxP=np.pad(window.positions[:-1], ((padding, 0), (0, 0))),
        places_L=np.pad(np.arange(start, output), (padding, 0), constant_values=-1),
      )
  return {
    "output": output,
    "event": int(window.events[-1]),
    "inputs": inputs,
    "first_input": start,
    "entropy_nats": float(-(seen_L * np.log(seen_L)).sum()),
    "share_before_latents": float(mean_L[: length - num_latents].sum()),
    "files": names,
  }
