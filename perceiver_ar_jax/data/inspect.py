"""--mode=data: what the model will see, before it is trained: shapes, statistics, examples, and how fast it comes."""

import json
import time

import numpy as np
from etils import epath

from perceiver_ar_jax.config import Config, writing
from perceiver_ar_jax.data import NUM_SPECIAL, notices, pipeline, records, render

_MAX_DOCUMENTS = 1000
_EXAMPLES = 16
_SECONDS = 3.0
_EXCERPT = 600
_MAX_EVENTS = 2**20
"""Of a longer document only the beginning is counted."""


def inspect(config: Config, workdir: epath.PathLike) -> dict:
  """Prints the report, writes WORKDIR/data/ (report.json, examples.txt, examples.png) and returns the report.

  Raises:
    InputError: as pipeline.TrainIterator; a split without documents, or a folder that cannot be written.
  """
  folder = epath.Path(workdir) / "data"
  with writing(f"--workdir={workdir}", "give another"):
    folder.mkdir(parents=True, exist_ok=True)
  train = pipeline.TrainIterator(config, config.train.batch_size)
  report = {
    "task": config.data.task,
    "modality": train.task.modality,
    "batch": {name: [str(value.dtype), *value.shape] for name, value in train.spec.items()},
  }
  examples = []
  for split in dict.fromkeys((config.data.train_split, config.eval.split)):
    report[split], some = _describe(config, split)
    examples += [(split, *example) for example in some]
  _write_examples(folder, examples)
  _print(report)
  report["rate"] = rate = _rate(train, config)
  (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
  print(f"The pipeline alone: {rate['examples_per_second']:,.0f} examples/s, {rate['tokens_per_second']:,.0f} tokens/s")
  print(f"Examples: {', '.join(sorted(str(path) for path in folder.iterdir()))}")
  return report


def _describe(config: Config, split: str) -> tuple[dict, list]:
  """Statistics of the first documents of a split, and the first few (task, events)."""
  histogram = np.zeros(config.model.vocab_size, np.int64)
  lengths, largest, words, num_bytes, examples, unknown = [], 0, 0, 0, [], None
  skipped, longest_crop = notices.count("skipped"), config.model.max_context + 1
  for task, document in records.documents(config, split, _MAX_DOCUMENTS):
    length = len(document)
    events = document.read(0, min(length, _MAX_EVENTS))
    positions = document.positions(0, len(events))
    for start in (0, max(length - longest_crop, 0)):  # positions may count from a crop's start
      crop = document.positions(start, min(start + longest_crop, length))
      largest = np.maximum(largest, crop.max(axis=0))
    histogram += np.bincount(events, minlength=len(histogram))
    lengths.append(length)
    if task.modality == "text":
      counts = document.counts()
      words, num_bytes, unknown = words + counts["words"], num_bytes + counts["bytes"], task.unknown
    if len(examples) < _EXAMPLES:
      examples.append((task, events, positions))
  if not lengths:
    raise records.none_readable(config, split)
  shares = histogram[histogram > 0] / histogram.sum()
  result = {
    "documents": len(lengths),
    "all_documents": len(lengths) < _MAX_DOCUMENTS,
    "skipped": notices.count("skipped") - skipped,
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
  if words:
    result |= {"words": words, "bytes": num_bytes, "bytes_per_token": num_bytes / sum(lengths)}
  return result, examples


def _rate(train: pipeline.TrainIterator, config: Config) -> dict:
  """How fast the pipeline alone is."""
  start, batches = time.monotonic(), 0
  while (seconds := time.monotonic() - start) < _SECONDS:
    next(train)
    batches += 1
  examples = batches * config.train.batch_size / seconds
  return {"examples_per_second": examples, "tokens_per_second": examples * config.model.max_context}


def _write_examples(folder: epath.Path, examples: list) -> None:
  pictures = [render.picture(task, events, positions) for _, task, events, positions in examples]
  pictures = [one for one in pictures if one is not None]
  if pictures:
    wide = pictures[0].shape[1] > 4 * pictures[0].shape[0] or pictures[0].shape[1] > 400
    with (folder / "examples.png").open("wb") as file:
      render.save_png(render.grid(pictures, columns=1 if wide else 8), file)
  lines = []
  for split, task, events, _ in examples:
    shown = render.text(task, events[:_EXCERPT])
    lines.append(f"--- {split}, {task.name}: {len(events):,} events, the first of them:\n{shown}\n")
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
      print(f"  {stats['words']:,} words, {stats['bytes']:,} bytes, {stats['bytes_per_token']:.2f} bytes a token")
