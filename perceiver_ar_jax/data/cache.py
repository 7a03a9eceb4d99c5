"""Caches a task's encoded documents with seqio's Beam pipeline; training reads them with `data.cache_dir`.

  python -m perceiver_ar_jax.data.cache --config=configs/pg19.py --output=DIR [--beam_options=--runner=...,...]

It pays for text in SentencePiece. Needs Apache Beam, in an environment of its own (launch/cache_tasks.sh makes it). The
layout is seqio's: DIR/<task>/<split>.tfrecord-*; settings.json has what the documents depend on; COMPLETED comes last.
"""

import dataclasses
import functools
import json
import os

from absl import flags

from perceiver_ar_jax import command_line
from perceiver_ar_jax.config import Config, DataConfig, InputError
from perceiver_ar_jax.data import sources, tasks
from perceiver_ar_jax.data.tf_cpu import seqio, tf

_OUTPUT = flags.DEFINE_string("output", None, "Folder of caches; each task gets a folder in it.")
_SHARDS = flags.DEFINE_integer("shards", 16, "Files of each split: a multiple of data.shards.", lower_bound=1)
_BEAM_OPTIONS = flags.DEFINE_list("beam_options", ["--runner=FnApiRunner"], "Options of the Beam pipeline.")


def main(config: Config) -> int:
  for task, _ in tasks.get_tasks(config.data, config.model.max_context + 1):
    _cache(dataclasses.replace(config.data, task=task.name, cache_dir=None), _OUTPUT.value)
  return 0


def _cache(data: DataConfig, output: str) -> None:
  """Stores all splits of `data.task` in the folder `output`; raises InputError if Beam or the data are missing."""
  try:
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions
    from seqio import beam_utils
  except ImportError as error:
    raise InputError(
      f"Caching needs the package {error.name}: run launch/cache_tasks.sh, which installs it in its own environment."
    ) from error
  folder = os.path.join(output, data.task)
  if tf.io.gfile.exists(os.path.join(folder, "COMPLETED")):
    raise InputError(f"{folder} contains a finished cache already: delete it, or choose another --output.")
  task = tasks.register(data)
  if not task.supports_caching:
    raise InputError(f"The task {data.task} is generated from numbers: caching is not supported.")
  splits = [split for split in task.source.splits if task.source.num_input_examples(split)]
  with beam.Pipeline(options=PipelineOptions(_BEAM_OPTIONS.value)) as pipeline:
    for split in splits:
      preprocess = beam_utils.PreprocessTask(task, split, setup_fn=functools.partial(tasks.register, data))
      documents = pipeline | f"make {split}" >> preprocess | f"shuffle {split}" >> beam.Reshuffle()
      prefix = seqio.get_cached_tfrecord_prefix(folder, split)
      _ = documents | f"write {split}" >> beam_utils.WriteExampleTfRecord(prefix, num_shards=_SHARDS.value)
      for name, transform, path in (
        ("info", beam_utils.GetInfo(_SHARDS.value), seqio.get_cached_info_path(folder, split)),
        ("stats", beam_utils.GetStats(task.output_features), seqio.get_cached_stats_path(folder, split)),
      ):
        _ = documents | f"{name} {split}" >> transform | f"write {name} {split}" >> beam_utils.WriteJson(path)
  settings = json.dumps(sources.cache_settings(data), indent=2)
  for name, content in ((sources.CACHE_SETTINGS, settings), ("COMPLETED", "")):
    with tf.io.gfile.GFile(os.path.join(folder, name), "w") as file:
      file.write(content)
  print(f"Stored {', '.join(splits)} of {data.task} in {folder}. Train on it: --config.data.cache_dir={output}")


if __name__ == "__main__":
  command_line.run(main, required=("output",))
