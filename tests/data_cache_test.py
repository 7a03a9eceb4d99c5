"""Cached documents are those of the task itself, in training and evaluation, and a cache of something else is refused.

The caches are written by hand in the layout that seqio's Beam pipeline gives them, since Beam is not needed here.
"""

import dataclasses
import importlib.util
import json
import shutil
import subprocess

import numpy as np
import pytest
import sentencepiece
import seqio

from perceiver_ar_jax.config import DataConfig, InputError
from perceiver_ar_jax.data import music, registry, sources, splits, tasks, texts, warn_once
from perceiver_ar_jax.data.music import Note
from perceiver_ar_jax.data.tf_cpu import tf
from tests import batches, tiny
from tests.batches import evaluate, take, write
from tests.own_files import npy

SHARDS = 4
WORDS = "tick tock the clock struck one and down they run again".split()
TEXTS = {
  "train": [" ".join(WORDS[: 1 + number]) + f" {number}\n" for number in range(9)] + [""],
  "validation": ["tick tock", "", "the  clock\nstruck", "x"],
}
SPLITS = ("train", "validation")


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
  warn_once.reset()
  monkeypatch.setattr(seqio.utils, "_GLOBAL_CACHE_DIRECTORIES", [])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Texts, two SentencePiece models, MIDI files and audio codes, a few of each unusable."""
  folder = tmp_path_factory.mktemp("data")
  for split, contents in TEXTS.items():
    for kind in ("text", "midi", "audio"):
      (folder / kind / split).mkdir(parents=True)
    for number, text in enumerate(contents):
      (folder / "text" / split / f"{number}.txt").write_text(text)
      notes = [Note(40 + number + step, 80, step / 4, step / 4 + 0.2) for step in range(len(text.split()))]
      (folder / "midi" / split / f"{number}.mid").write_bytes(music.to_midi(notes))
      codes = np.arange(2 * len(text.split())).reshape(-1, 2) % 7 + number
      np.save(folder / "audio" / split / f"{number}.npy", codes)
  (folder / "sample").write_text("".join(TEXTS["train"]) * 20)
  for name, kind in (("letters", "char"), ("words", "word")):
    sentencepiece.SentencePieceTrainer.train(
      input=str(folder / "sample"),
      model_prefix=str(folder / name),
      model_type=kind,
      vocab_size=40,
      hard_vocab_limit=False,
      minloglevel=2,
    )
  return folder


def data_of(folder, kind):
  """Data settings."""
  files = {"files": str(folder / kind), "validation_files": str(folder / kind / "validation")}
  return {
    "text": DataConfig(task="text_files", sentencepiece=str(folder / "letters.model"), **files),
    "midi": DataConfig(task="midi_files", **files),
    "audio": DataConfig(task="audio_codes", codebook_size=20, code_levels=2, **files),
  }[kind]


def get_task(data):
  ((task, _),) = tasks.get_tasks(data, 100)
  return task


def settings(data, *, context=100, **more):
  task = get_task(dataclasses.replace(data, cache_dir=None))
  sizes = (200,) * task.position_dims
  data = dataclasses.replace(data, **more)
  return batches.config(data, context=context, latents=8, sizes=sizes, vocab_size=task.vocab_size)


def store(data, output):
  """Writes what data/cache.py writes, example k of a split into file k % SHARDS."""
  task = get_task(data)
  as_seqio = registry.to_seqio(task)
  place = output / data.task
  place.mkdir(parents=True)
  for split in SPLITS:
    records = task.source.get_dataset(split=split, shuffle=False)
    examples = list(as_seqio.preprocess_precache(records).as_numpy_iterator())
    for shard in range(SHARDS):
      with tf.io.TFRecordWriter(str(place / f"{split}.tfrecord-{shard:05d}-of-{SHARDS:05d}")) as file:
        for example in examples[shard::SHARDS]:
          file.write(seqio.dict_to_tfexample(example).SerializeToString())
    features = {
      name: {"dtype": value.dtype.name, "shape": [None, *value.shape[1:]] if value.ndim else []}
      for name, value in examples[0].items()
    }
    info = {"features": features, "num_shards": SHARDS, "seqio_version": seqio.__version__}
    (place / f"info.{split}.json").write_text(json.dumps(info))
    lengths = [len(example["events"]) for example in examples]
    stats = {"events_max_tokens": max(lengths), "events_tokens": sum(lengths), "examples": len(examples)}
    (place / f"stats.{split}.json").write_text(json.dumps(stats))
  (place / sources.CACHE_SETTINGS).write_text(json.dumps(sources.cache_settings(data)))
  (place / "COMPLETED").touch()


@pytest.fixture(scope="module")
def stored(folder, tmp_path_factory):
  """A folder with the caches of all three tasks."""
  output = tmp_path_factory.mktemp("cache")
  for kind in KINDS:
    store(data_of(folder, kind), output)
  return output


KINDS = ("text", "midi", "audio")


@pytest.fixture(params=KINDS)
def data(request, folder):
  return data_of(folder, request.param)


def whole_documents(config, split):
  """Everything about each document of a split, in an order that does not depend on the files."""
  documents = [
    (
      document.read(0, len(document)).tolist(),
      document.positions(0, len(document)).tolist(),
      sorted(document.counts().items()),
    )
    for _, document in splits.documents(config, split)
  ]
  return sorted(documents)


def crops(batch):
  """The inputs and the last target of each row, padding left off."""
  return {(*row[row > 0].tolist(), int(last)) for row, last in zip(batch["inputs"], batch["targets"][:, -1])}


@pytest.mark.parametrize("split", SPLITS)
def test_the_documents_are_those_of_the_task(split, data, stored):
  uncached = whole_documents(settings(data), split)
  cached = whole_documents(settings(data, cache_dir=str(stored)), split)
  assert cached == uncached
  assert len(cached) == sum(bool(text) for text in TEXTS[split])


def test_evaluation_scores_the_same_events_words_and_bytes(data, stored):
  def totals(config, hosts):
    scored = [batch for of_host in evaluate(config, hosts, 2, stride=3) for batch in of_host]
    targets = np.sort(np.concatenate([batch["targets"][batch["weights"] == 1] for batch in scored])).tolist()
    return targets, [sum(batch[name].sum() for batch in scored) for name in ("words", "bytes") if name in scored[0]]

  targets, counts = totals(settings(data, cache_dir=str(stored)), 3)
  assert (targets, counts) == totals(settings(data), 1)
  if data.task == "text_files":
    texts = TEXTS["validation"]
    assert counts == [sum(len(text.split()) for text in texts), sum(map(len, texts))]


@pytest.mark.parametrize("hosts", [1, 3])
def test_hosts_train_on_documents_of_their_own_and_together_on_all(hosts, data, stored):
  config = settings(data, cache_dir=str(stored), min_crop=101)  # Each row is a whole document.
  seen = [set.union(*map(crops, take(batches.train_loader(config, 5, host, hosts), 6))) for host in range(hosts)]
  assert sum(map(len, seen)) == len(set.union(*seen)), "two hosts read the same document"
  assert set.union(*seen) == {tuple(events) for events, *_ in whole_documents(settings(data), "train")}


def test_an_epoch_sees_each_document_once_and_the_next_in_another_order(stored, folder):
  config = settings(data_of(folder, "audio"), cache_dir=str(stored), min_crop=101)
  iterator = batches.train_loader(config, 1)
  epochs = [[crop for batch in take(iterator, 9) for crop in crops(batch)] for _ in range(4)]
  for epoch in epochs:
    assert sorted(epoch) == sorted(epochs[0]) and len(set(epoch)) == 9
  assert len(set(map(tuple, epochs))) > 1, "epochs repeat their order"


@pytest.mark.parametrize(("kind", "step"), [("text", 0), ("midi", 2), ("audio", 7)])
def test_a_restored_iterator_goes_on_as_if_nothing_had_happened(kind, step, folder, stored, tmp_path):
  config = settings(data_of(folder, kind), cache_dir=str(stored), context=9, shuffle_buffer=4)
  iterator = batches.train_loader(config, 3)
  take(iterator, step)
  iterator.save(tmp_path)
  expected = take(iterator, 8)
  restored = batches.train_loader(config, 3)
  take(restored, 2)  # What it did before must not matter.
  restored.restore(tmp_path)
  batches.assert_equal(take(restored, 8), expected)


def test_music_from_a_cache_is_augmented_as_ever(folder, stored):
  plain = settings(data_of(folder, "midi"), cache_dir=str(stored), context=30)
  moved = dataclasses.replace(plain, data=dataclasses.replace(plain.data, max_transposition=5))
  steps = next(batches.train_loader(moved, 64))["inputs"] - next(batches.train_loader(plain, 64))["inputs"]
  assert steps.min() < 0 < steps.max() and np.abs(steps).max() <= 5


def read(config):
  """Training and evaluation, each to be called."""
  return (
    lambda: next(batches.train_loader(config, 2)),
    lambda: evaluate(config),
  )


@pytest.mark.parametrize(
  "kind, changed, message",
  [
    ("audio", {"code_levels": 1}, "code_levels was 2 and is 1"),
    ("audio", {"codebook_size": 21}, "codebook_size was 20 and is 21"),
    ("text", {"sentencepiece": None}, "sentencepiece was 'crc32 .*' and is None"),
    ("text", {"sentencepiece": "words.model"}, "sentencepiece was 'crc32 .*' and is 'crc32 .*'"),
  ],
)
def test_a_cache_of_other_settings_is_refused(kind, changed, message, folder, stored):
  if changed.get("sentencepiece"):
    changed = {"sentencepiece": str(folder / changed["sentencepiece"])}
  for call in read(settings(dataclasses.replace(data_of(folder, kind), **changed), cache_dir=str(stored))):
    with pytest.raises(InputError, match=f"made under other settings.*{message}"):
      call()


def test_the_same_sentencepiece_model_may_lie_elsewhere(folder, stored, tmp_path):
  shutil.copy(folder / "letters.model", tmp_path / "moved.model")
  data = dataclasses.replace(data_of(folder, "text"), sentencepiece=str(tmp_path / "moved.model"))
  assert whole_documents(settings(data, cache_dir=str(stored)), "validation")


def test_a_cache_that_is_not_finished_or_not_there_is_refused(data, stored, tmp_path):
  shutil.copytree(stored, tmp_path / "unfinished")
  (tmp_path / "unfinished" / data.task / "COMPLETED").unlink()
  (tmp_path / "empty").mkdir()
  for name in ("unfinished", "empty", "nowhere"):
    for call in read(settings(data, cache_dir=str(tmp_path / name))):
      with pytest.raises(
        InputError, match=f"{name}' contains no finished cache of the task {data.task}.*cache_tasks.sh"
      ):
        call()


def test_a_split_that_is_not_stored_names_those_that_are(data, stored):
  with pytest.raises(InputError, match=f"{data.task} has no split 'test'.*train, validation"):
    evaluate(settings(data, cache_dir=str(stored)), split="test")


@pytest.mark.skipif(importlib.util.find_spec("apache_beam") is not None, reason="Beam is installed")
def test_caching_without_beam_says_where_to_get_it(folder, tmp_path):
  settings = (f"--config.data.files={folder / 'text'}", f"--output={tmp_path / 'cache'}")
  result = tiny.run_module("perceiver_ar_jax.data.cache", "--config=configs/text_files.py", *settings)
  tiny.expect_error(result, "apache_beam", "launch/cache_tasks.sh")
  assert not (tmp_path / "cache").exists(), "something was written"


def test_the_launcher_is_a_shell_script_without_mistakes_of_syntax():
  script = tiny.ROOT / "launch" / "cache_tasks.sh"
  result = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
  assert (result.returncode, result.stderr) == (0, "")


def test_a_second_cache_dir_in_one_process_is_its_own(folder, stored, tmp_path):
  store(dataclasses.replace(data_of(folder, "midi"), files=str(folder / "midi" / "train" / "[0-3].mid")), tmp_path)
  config = settings(data_of(folder, "midi"))
  for cache_dir, num_documents in ((stored, 9), (tmp_path, 4)):
    cached = dataclasses.replace(config, data=dataclasses.replace(config.data, cache_dir=str(cache_dir)))
    assert len(whole_documents(cached, "train")) == num_documents


def test_crops_of_cached_audio_count_frames_from_their_start(folder, tmp_path):
  write(tmp_path, {"t/a.npy": npy(np.arange(400).reshape(-1, 2) % 20), "validation/v.npy": npy([[1, 2]])})
  data = DataConfig(
    task="audio_codes",
    codebook_size=20,
    code_levels=2,
    files=str(tmp_path / "t"),
    validation_files=str(tmp_path / "validation"),
  )
  store(data, tmp_path / "cache")
  ones, others = (
    next(batches.train_loader(settings(data, context=10, cache_dir=where), 4))
    for where in (None, str(tmp_path / "cache"))
  )
  np.testing.assert_array_equal(ones["inputs"], others["inputs"])
  np.testing.assert_array_equal(ones["positions"], others["positions"])


def test_a_host_whose_files_are_empty_is_told(folder, tmp_path):
  store(dataclasses.replace(data_of(folder, "midi"), files=str(folder / "midi" / "train" / "[0-4].mid")), tmp_path)
  # Beam may leave files without documents; here they are all that host 1 of 2 gets.
  for n in (1, 3):
    (tmp_path / "midi_files" / f"train.tfrecord-0000{n}-of-00004").write_bytes(b"")
  with pytest.raises(InputError, match="Shard 1 of 2 has no record of midi_files.*fewer --shards"):
    next(batches.train_loader(settings(data_of(folder, "midi"), cache_dir=str(tmp_path)), 2, 1, 2))


def test_a_crop_of_a_long_text_does_not_encode_all_of_it(folder, tmp_path, monkeypatch):
  write(tmp_path, {"t/long.txt": b"tick tock " * 100_000, "v/v.txt": b"tick"})
  encoded = []
  plain = texts.SubwordTokenizer.encode
  monkeypatch.setattr(
    texts.SubwordTokenizer, "encode", lambda self, text: encoded.append(len(text)) or plain(self, text)
  )
  data = DataConfig(
    task="text_files",
    files=str(tmp_path / "t"),
    validation_files=str(tmp_path / "v"),
    sentencepiece=str(folder / "letters.model"),
  )
  next(batches.train_loader(settings(data), 4))
  assert sum(encoded) < 100_000
