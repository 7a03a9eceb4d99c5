"""--mode=data: what the model will see: shapes, statistics, examples, and the speed of the pipeline."""

import json
import sys
import time
from collections.abc import Iterable

import numpy as np
import tqdm
from etils import epath

from perceiver_ar_jax.config import Config, writing
from perceiver_ar_jax.data import NUM_SPECIAL, loader, render, splits, warn_once, windows
from perceiver_ar_jax.data.documents import Document
from perceiver_ar_jax.data.registry import Task
from perceiver_ar_jax.data.tasks import get_tasks

_MAX_DOCUMENTS = 1000
_MAX_EXAMPLES = 16
_RATE_SECONDS = 3.0
_EXCERPT_EVENTS = 600
_MAX_EVENTS = 2**20
"""Only the beginning of a longer document is counted."""
_PROGRESS_DELAY_SECONDS = 5.0


def inspect(config: Config, workdir: epath.PathLike) -> dict:
  """Prints a report on the data, writes WORKDIR/data/ (report.json, examples.txt, examples.png) and returns the report.

  Raises:
    InputError: as loader.TrainLoader; a split has no documents, or the folder cannot be written.
  """
  folder = epath.Path(workdir) / "data"
  with writing(f"--workdir={workdir}", "give another"):
    folder.mkdir(parents=True, exist_ok=True)
  warn_once.reset()
  train = loader.TrainLoader(config)
  report = {
    "task": config.data.task,
    "modality": train.task.modality,
    "batch": {name: [str(value.dtype), *value.shape] for name, value in train.spec.items()},
  }
  examples = []
  for split in dict.fromkeys((config.data.train_split, config.eval.split)):
    report[split], split_examples = _describe(config, split)
    examples += [(split, *example) for example in split_examples]
  _write_examples(folder, examples)
  _print(report)
  report["rate"] = rate = _rate(train, config)
  (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
  print(f"The pipeline alone: {rate['examples_per_second']:,.0f} examples/s, {rate['tokens_per_second']:,.0f} tokens/s")
  print(f"Examples: {', '.join(sorted(str(path) for path in folder.iterdir()))}")
  return report


def _describe(config: Config, split: str) -> tuple[dict, list]:
  """Returns statistics of the first documents of a split, and the first examples (task, events, positions)."""
  histogram = np.zeros(config.model.vocab_size, np.int64)
  lengths, largest, num_words, num_bytes, examples, unknown = [], 0, 0, 0, [], None
  num_skipped, longest_crop = warn_once.count("skipped"), config.model.max_context + 1
  for task, document in _documents(config, split):
    length = len(document)
    events = document.read(0, min(length, _MAX_EVENTS))
    positions = document.positions(0, len(events))
    for start in (0, max(length - longest_crop, 0)):  # positions may count from the start of a crop
      crop = document.positions(start, min(start + longest_crop, length))
      largest = np.maximum(largest, crop.max(axis=0))
    histogram += np.bincount(events, minlength=len(histogram))
    lengths.append(length)
    if task.modality == "text":
      counts = document.counts()
      num_words, num_bytes, unknown = num_words + counts["words"], num_bytes + counts["bytes"], task.unknown
    if len(examples) < _MAX_EXAMPLES:
      examples.append((task, events, positions))
  if not lengths:
    raise splits.none_readable(config, split)
  shares = histogram[histogram > 0] / histogram.sum()
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
    "histogram_entropy_bits": float(-(shares * np.log2(shares)).sum()),
    "most_frequent": [[int(token), float(histogram[token] / histogram.sum())] for token in np.argsort(-histogram)[:8]],
    "unknown_rate": 0.0 if unknown is None else float(histogram[unknown] / histogram.sum()),
  }
  if num_words:
    stats |= {"words": num_words, "bytes": num_bytes, "bytes_per_token": num_bytes / sum(lengths)}
  return stats, examples


def _documents(config: Config, split: str) -> Iterable[tuple[Task, Document]]:
  """The first documents of a split, with a progress bar if reading them takes long."""
  tasks = get_tasks(config.data, windows.longest_crop(config))
  counts = [task.num_records(split) for task, _ in tasks]
  total = sum(_MAX_DOCUMENTS if count is None else min(count, _MAX_DOCUMENTS) for count in counts)
  documents = splits.documents(config, split, _MAX_DOCUMENTS)
  return tqdm.tqdm(
    documents,
    f"Reading {split}",
    total,
    unit=" documents",
    delay=_PROGRESS_DELAY_SECONDS,
    mininterval=0.5 if sys.stderr.isatty() else 5.0,
  )


def _rate(train: loader.TrainLoader, config: Config) -> dict:
  """Returns the speed of the pipeline alone."""
  start, batches = time.monotonic(), 0
  while (seconds := time.monotonic() - start) < _RATE_SECONDS:
    next(train)
    batches += 1
  examples = batches * config.train.batch_size / seconds
  return {"examples_per_second": examples, "tokens_per_second": examples * config.model.max_context}


def _write_examples(folder: epath.Path, examples: list) -> None:
  pictures = [render.picture(task, events, positions) for _, task, events, positions in examples]
  pictures = [picture for picture in pictures if picture is not None]
  if pictures:
    wide = pictures[0].shape[1] > 4 * pictures[0].shape[0] or pictures[0].shape[1] > 400
    with (folder / "examples.png").open("wb") as file:
      render.save_png(render.grid(pictures, columns=1 if wide else 8), file)
  lines = []
  for split, task, events, _ in examples:
    excerpt = render.text(task, events[:_EXCERPT_EVENTS])
    lines.append(f"--- {split}, {task.name}: {len(events):,} events, the first of them:\n{excerpt}\n")
  (folder / "examples.txt").write_text("\n".join(lines))


def _print(report: dict) -> None:
  shapes = ", ".join(f"{name} {kind}{sizes}" for name, (kind, *sizes) in report["batch"].items())
  print(f"{report['task']} ({report['modality']}). A training batch: {shapes}")
  for split, stats in report.items():
    if not isinstance(stats, dict) or "documents" not in stats:
      continue
    common = ", ".join(f"{token} {share:.1%}" for token, share in stats["most_frequent"])
    print(
      f"{split}: {stats['documents']:,} documents{'' if stats['all_documents'] else ' (the first ones)'},"
      f" {stats['skipped']} skipped, {stats['events']:,} events;"
      f" lengths {stats['shortest']:,} to {stats['longest']:,}, median {stats['median']:,}; largest position"
      f" {tuple(stats['largest_position'])}\n"
      f"  {stats['different_tokens']:,} different tokens, entropy {stats['histogram_entropy_bits']:.3f} bits, unknown"
      f" {stats['unknown_rate']:.3%}; most frequent: {common} (0 PAD, 1 EOS, 2 SOS, value v is v + {NUM_SPECIAL})"
    )
    if "words" in stats:
      print(f"  {stats['words']:,} words, {stats['bytes']:,} bytes, {stats['bytes_per_token']:.2f} bytes per token")
