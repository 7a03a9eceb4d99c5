"""--mode=data: what the model will see: shapes, statistics, examples, and the speed of the pipeline."""

import collections
import json
import sys
import time

import numpy as np
import scipy.stats
import tqdm
from etils import epath

from perceiver_ar_jax.config import Config, writing
from perceiver_ar_jax.data import loader, render, splits, warn_once

_MAX_DOCUMENTS = 1000
_MAX_EXAMPLES = 16
_RATE_SECONDS = 3.0
_EXCERPT_EVENTS = 600
_MAX_EVENTS = 2**20  # only the beginning of a longer document is counted
_PROGRESS_DELAY_SECONDS = 5.0


def inspect(config: Config, workdir: epath.PathLike) -> dict:
  """Prints a report on the data, writes WORKDIR/data/ (report.json, examples.txt, examples.png) and returns the report.

  Raises InputError as loader.TrainLoader, or if a split has no documents, or the folder cannot be written.
  """
  folder = epath.Path(workdir) / "data"
  with writing(f"--workdir={workdir}", "give another"):
    folder.mkdir(parents=True, exist_ok=True)
  warn_once.reset()
  train = loader.TrainLoader(config)
  batch = {name: [str(value.dtype), *value.shape] for name, value in train.spec.items()}
  shapes = ", ".join(f"{name} {kind}{sizes}" for name, (kind, *sizes) in batch.items())
  print(f"{config.data.task} ({train.task.modality}). A training batch: {shapes}")
  report = {"task": config.data.task, "modality": train.task.modality, "batch": batch}
  excerpts, pictures = [], []
  for split in dict.fromkeys((config.data.train_split, config.eval.split)):
    report[split], examples = _describe(config, split)
    for task, events in examples:
      excerpt = render.text(task, events[:_EXCERPT_EVENTS])
      excerpts.append(f"--- {split}, {task.name}: {len(events):,} events, the first of them:\n{excerpt}\n")
      pictures.append(render.picture(task, events))
  start, num_batches = time.monotonic(), 0
  while (seconds := time.monotonic() - start) < _RATE_SECONDS:
    next(train)
    num_batches += 1
  rate = num_batches * config.train.batch_size / seconds
  report["rate"] = {"examples_per_second": rate, "tokens_per_second": rate * config.model.max_context}
  print(f"The pipeline alone: {rate:,.0f} examples/s, {report['rate']['tokens_per_second']:,.0f} tokens/s")
  (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
  (folder / "examples.txt").write_text("\n".join(excerpts))
  if shown := [picture for picture in pictures if picture is not None]:
    height, width, _ = shown[0].shape
    render.save_png(render.grid(shown, columns=1 if width > min(4 * height, 400) else 8), folder / "examples.png")
  print(f"Examples: {', '.join(sorted(str(path) for path in folder.iterdir()))}")
  return report


def _describe(config: Config, split: str) -> tuple[dict, list]:
  """Prints and returns statistics of the first documents of a split; also returns the first examples (task, events)."""
  histogram = np.zeros(config.model.vocab_size, np.int64)
  lengths, largest, counts, examples = [], 0, collections.Counter(), []
  num_skipped, longest_crop = warn_once.count("skipped"), config.model.max_context + 1
  documents = tqdm.tqdm(
    splits.documents(config, split, _MAX_DOCUMENTS),
    f"Reading {split}",
    splits.num_documents(config, split, _MAX_DOCUMENTS),
    unit=" documents",
    delay=_PROGRESS_DELAY_SECONDS,
    mininterval=0.5 if sys.stderr.isatty() else 5.0,
  )
  for task, document in documents:
    length = len(document)
    events = document.read(0, min(length, _MAX_EVENTS))
    for start in (0, max(length - longest_crop, 0)):  # positions may count from the start of a crop
      largest = np.maximum(largest, document.positions(start, min(start + longest_crop, length)).max(axis=0))
    histogram += np.bincount(events, minlength=len(histogram))
    lengths.append(length)
    counts.update(document.counts())
    if len(examples) < _MAX_EXAMPLES:
      examples.append((task, events))
  stats = {
    "documents": len(lengths),
    "all_documents": len(lengths) < _MAX_DOCUMENTS,
    "skipped": warn_once.count("skipped") - num_skipped,
    "events": sum(lengths),
    "shortest": min(lengths),
    "median": int(np.median(lengths)),
    "longest": max(lengths),
    "largest_position": largest.tolist(),
    "different_tokens": int((histogram > 0).sum()),
    "histogram_entropy_bits": float(scipy.stats.entropy(histogram, base=2)),
    **counts,
  }
  shown = (f"{name} {round(value, 4) if isinstance(value, float) else value}" for name, value in stats.items())
  print(f"{split}: {', '.join(shown)}")
  return stats, examples
