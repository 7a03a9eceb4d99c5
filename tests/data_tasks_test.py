"""Tasks: every record becomes the document that the published layouts say, and unknown names are explained."""

import dataclasses
import errno
import itertools
import pathlib
import re
import struct
import threading
import zlib

import numpy as np
import pytest
import seqio

from perceiver_ar_jax.config import DataConfig, InputError
from perceiver_ar_jax.data import EOS, SOS, images, loader, photos, registry, splits, tasks, texts, warn_once
from perceiver_ar_jax.data.documents import Document, Unreadable
from perceiver_ar_jax.data.tf_cpu import tf
from tests import tiny

GOLDEN = np.load(pathlib.Path(__file__).parent / "golden" / "data.npz")


def get_task(name, events=12, **data):
  ((task, share),) = tasks.get_tasks(DataConfig(task=name, **data), events)
  assert share == 1
  return task


def documents(name, split, *, count, events=12):
  """The first `count` documents of a task, as dicts of arrays."""
  seqio_task = registry.to_seqio(get_task(name, events))
  dataset = seqio_task.get_dataset(None, split, shuffle=False, use_cached=False)
  return list(dataset.take(count).as_numpy_iterator())


def test_no_accelerator_is_left_to_tensorflow():
  assert [device.device_type for device in tf.config.get_visible_devices()] == ["CPU"]


def whole(document):
  """(events, positions) of all of a document."""
  return document.read(0, len(document)), document.positions(0, len(document))


def test_pixel_raster_takes_pixels_in_turn_and_rgb_planes_takes_colors_in_turn():
  picture = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
  raster, raster_positions = whole(images.document(picture, "pixel_raster"))
  planes, planes_positions = whole(images.document(picture, "rgb_planes"))
  assert list(raster) == [SOS, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14]
  assert list(planes) == [SOS, 3, 6, 9, 12, 4, 7, 10, 13, 5, 8, 11, 14]
  # (x, y, channel): the second pixel of the first row comes second, x + 1.
  assert raster_positions[:5].tolist() == [[1, 1, 1], [2, 2, 2], [2, 2, 3], [2, 2, 4], [3, 2, 2]]
  assert planes_positions[:5].tolist() == [[1, 1, 1], [2, 2, 2], [3, 2, 2], [2, 3, 2], [3, 3, 2]]


@pytest.mark.parametrize("order", images.ORDERS)
@pytest.mark.parametrize("row", [0, 1])
def test_image_layout_matches_the_reference(order, row):
  events, positions = whole(images.document(GOLDEN["image/image"][row], order))
  np.testing.assert_array_equal(events, GOLDEN[f"image/{order}/sos1/events"][row])
  np.testing.assert_array_equal(positions, GOLDEN[f"image/{order}/sos1/event_idxs"][row])


@pytest.mark.parametrize("order", images.ORDERS)
def test_events_turn_back_into_the_picture(order):
  picture = GOLDEN["image/image"][0]
  events, _ = whole(images.document(picture, order))
  np.testing.assert_array_equal(images.to_image(events, 4, order), picture)
  np.testing.assert_array_equal(images.to_image(events[1:], 4, order), picture)
  events[1] = EOS  # No color: black, and nothing else changes.
  assert images.to_image(events, 4, order)[0, 0, 0] == 0
  np.testing.assert_array_equal(images.to_image(events, 4, order)[1:], picture[1:])
  with pytest.raises(ValueError, match="30 sub-pixels"):
    images.to_image(events[:30], 4, order)


def test_every_event_of_a_picture_has_a_position_of_its_own_in_tables_of_size_plus_2_and_5():
  for order in images.ORDERS:
    positions = images.positions(5, order)
    assert tuple(positions.max(axis=0) + 1) == (7, 7, 5)
    assert len(positions) == 1 + 5 * 5 * 3
    assert len(np.unique(positions, axis=0)) == len(positions)


@pytest.mark.parametrize("length", [3, 12, 13])
def test_copy_is_start_bytes_mirrored_bytes_end(length):
  document = get_task("copy", length).open({"number": 5, "validation": False})
  events, positions = whole(document)
  assert len(events) == length and events[0] == SOS and events[-1] == EOS
  np.testing.assert_array_equal(events[1:-1], events[1:-1][::-1], err_msg="the bytes are not mirrored")
  assert positions[:, 0].tolist() == list(range(1, length + 1))
  # What is scored is exactly what the events before it determine.
  scored = document.scored(0, length).astype(int).tolist()
  assert scored == [0] * (length // 2 + length % 2) + [1] * (length // 2)


@pytest.mark.parametrize("split", ["TRAIN", "VALIDATION", "TEST"])
def test_copy_has_the_published_layout(split):
  golden = zip(GOLDEN[f"mirrored12/raw/{split}/events"], GOLDEN[f"mirrored12/raw/{split}/event_idxs"])
  for events, positions in golden:
    ours_events, ours_positions = whole(tasks.mirror(events[1:6], 12))
    np.testing.assert_array_equal(ours_events, events)
    np.testing.assert_array_equal(ours_positions, positions)


def test_copy_validation_is_finite_and_shares_nothing_with_training():
  train = {document["events"].tobytes() for document in documents("copy", "train", count=500)}
  validation = {document["events"].tobytes() for document in documents("copy", "validation", count=10_000)}
  assert len(train) == 500 and len(validation) == tasks.NUM_GENERATED_VALIDATION
  assert not train & validation
  assert get_task("copy").source.get_dataset("train", shuffle=False).cardinality() == tf.data.INFINITE_CARDINALITY


@pytest.mark.parametrize("size", [32, 64])
def test_photographs_are_varied_real_pixels(size):
  document, *_ = documents(f"photos{size}", "validation", count=1)
  assert document["events"].shape == (1 + size * size * 3,)
  crops = [
    images.to_image(row["events"], size, "pixel_raster") for row in documents(f"photos{size}", "validation", count=99)
  ]
  assert len(crops) == photos.NUM_CROPS["validation"]
  assert min(crop.std() for crop in crops) > 2, "a crop is nearly one color"
  shares = np.bincount(np.stack(crops).ravel(), minlength=256) / np.stack(crops).size
  entropy_bits = -np.sum(shares[shares > 0] * np.log2(shares[shares > 0]))
  assert entropy_bits > 7.5, "the validation crops use few of the values, so a histogram alone would score well"


def test_photographs_of_the_splits_are_different():
  assert not set(photos.PHOTOGRAPHS["train"]) & set(photos.PHOTOGRAPHS["validation"])
  train = {row["events"].tobytes() for row in documents("photos32", "train", count=300)}
  validation = {row["events"].tobytes() for row in documents("photos32", "validation", count=300)}
  assert len(train) > 290 and not train & validation


def test_rgb_planes_of_a_photograph_hold_the_same_picture():
  rasters, planes = (documents(task, "train", count=3) for task in ("photos32", "photos32_rgb_planes"))
  for in_raster, in_planes in zip(rasters, planes):
    assert not np.array_equal(in_raster["events"], in_planes["events"])
    np.testing.assert_array_equal(
      images.to_image(in_raster["events"], 32, "pixel_raster"), images.to_image(in_planes["events"], 32, "rgb_planes")
    )


def test_crops_stay_inside_their_photograph():
  # The pyramid's rows are padded with black to a common size; a crop that strays would hold whole black columns.
  pixels, sides, _ = photos._pyramids("validation", 32)
  assert (sides >= 32).all() and (pixels[0, : sides[0, 0], : sides[0, 1]].max(axis=(1, 2)) > 0).all()
  for row in documents("photos32", "validation", count=64):
    crop = images.to_image(row["events"], 32, "pixel_raster")
    assert (crop[-1].max(axis=-1) > 0).any() and (crop[:, -1].max(axis=-1) > 0).any()


def test_tone_curves_of_photographs_differ_by_channel_and_leave_no_gaps(monkeypatch):
  gray = np.random.default_rng(0).integers(64, 192, (64, 64, 1), np.uint8).repeat(3, axis=2)
  monkeypatch.setattr(photos, "_pyramids", lambda *_: (gray[None], np.array([[64, 64]], np.int32), np.ones(1)))
  for number in range(4):
    crop = photos.crop({"number": tf.constant(number, tf.int64), "validation": tf.constant(False)}, 64).numpy()
    assert len({channel.tobytes() for channel in np.moveaxis(crop, 2, 0)}) == 3
    for channel in np.moveaxis(crop, 2, 0):
      assert np.diff(np.unique(channel)).max() <= 2, "values between two others never occur"
      assert np.corrcoef(channel.ravel(), crop[..., 0].ravel())[0, 1] > 0.95, "not a curve of the same picture"


def test_a_missing_package_of_photographs_is_named():
  with pytest.raises(InputError, match="pip install scikit-image"):
    photos._load("skimage", "data/no_such_photograph.png")


def test_unknown_tasks_get_a_hint():
  with pytest.raises(InputError, match="Did you mean 'photos32'.*imagenet64_rgb_planes"):
    get_task("photo32")


def test_the_registered_tasks_say_how_they_are_scored():
  named = {
    f"{kind}{size}{order}" for kind in ("imagenet", "photos") for size in (32, 64) for order in ("", "_rgb_planes")
  }
  text = {"pg19", "wikitext103", "enwik8", "text_files"}
  music = {"maestro_v1", "maestro_v3", "midi_files"}
  assert set(tasks.names()) >= named | text | music | {"copy", "image_files", "audio_codes", "video_codes"}
  units = {name: get_task(name).unit for name in ("imagenet64", "pg19", "wikitext103", "enwik8", "maestro_v3", "copy")}
  assert units == {
    "imagenet64": "bits_per_dim",
    "pg19": "word_perplexity",
    "wikitext103": "word_perplexity",
    "enwik8": "bits_per_byte",
    "maestro_v3": "nats_per_token",
    "copy": "accuracy",
  }
  sizes = {name: get_task(name).vocab_size for name in ("photos64", "pg19", "midi_files", "audio_codes", "video_codes")}
  assert sizes == {"photos64": 259, "pg19": 259, "midi_files": 391, "audio_codes": 8 * 1024 + 3, "video_codes": 1027}


def test_every_task_is_a_seqio_task_too():
  for name in tasks.names():
    assert set(seqio.get_mixture_or_task(name).output_features) == {"events", "positions"}


@pytest.fixture
def lines_of_a_fork():
  """A task as docs/extending.md makes one."""

  def lines(split, shuffle_files):
    return tf.data.Dataset.from_tensor_slices({"text": ["ab", "b", "c"]})

  def build(data, max_events):
    tokens = texts.tokenizer(data.sentencepiece)
    return registry.Task(
      name="lines_of_a_fork",
      source=seqio.FunctionDataSource(lines, splits=["train"]),
      document=lambda record: tokens.document(record["text"]),
      modality="text",
      unit="bits_per_byte",
      vocab_size=tokens.vocab_size,
      decode=tokens.decode,
    )

  registry.add("lines_of_a_fork", build)
  yield "lines_of_a_fork"
  seqio.TaskRegistry.remove("lines_of_a_fork")
  registry._BUILDERS.pop("lines_of_a_fork")


def test_counts_that_a_task_does_not_name_are_ignored(lines_of_a_fork):
  config = tiny.config(data__task=lines_of_a_fork, model__positions_from_data=False)
  document = Document(np.arange(3, 13, dtype=np.int32), count=lambda events: {"words": 2, "other": 5})
  batch = next(splits.eval_batches(config, [(get_task(lines_of_a_fork), document)]))
  assert batch["words"].sum() == 2 and batch["bytes"].sum() == 0 and "other" not in batch


def test_a_shard_without_a_record_of_a_source_of_unknown_size_is_refused(lines_of_a_fork):
  settings = {"data__shards": 4, "train__batch_size": 4, "model__positions_from_data": False}
  with pytest.raises(InputError, match="Shard 3 of 4 has no record of lines_of_a_fork: lower data.shards"):
    next(loader.TrainLoader(tiny.config(data__task=lines_of_a_fork, **settings)))


def test_the_position_in_a_seqio_task_can_be_saved(lines_of_a_fork, tmp_path):
  dataset = registry.to_seqio(get_task(lines_of_a_fork)).get_dataset(None, "train", shuffle=False, use_cached=False)
  iterator = iter(dataset)
  next(iterator)
  saved = tf.train.Checkpoint(iterator=iterator).write(str(tmp_path / "position"))
  restored = iter(dataset)
  tf.train.Checkpoint(iterator=restored).read(saved)
  np.testing.assert_array_equal(next(restored)["events"], next(iterator)["events"])


def test_a_fork_adds_a_task_in_a_few_lines(lines_of_a_fork):
  rows = documents(lines_of_a_fork, "train", count=9)
  assert [row["events"].tolist() for row in rows] == [[2, 100, 101, 1], [2, 101, 1], [2, 102, 1]]
  assert rows[0]["positions"].tolist() == [[1], [2], [3], [4]]


class Stuck(Exception):
  """What only one decoder raises."""


DECODER_ERRORS = [
  *(NotImplementedError("DDS"), struct.error("short"), zlib.error("bad"), AssertionError(), RecursionError("deep")),
  *(OSError("image file is truncated"), UnicodeDecodeError("utf-8", b"", 0, 1, "bad"), Stuck("once"), KeyError(3)),
]


def failing_task(error):
  def document(record):
    raise error

  return dataclasses.replace(get_task("copy"), document=document)


@pytest.mark.parametrize("error", DECODER_ERRORS, ids=lambda error: type(error).__name__)
def test_whatever_a_decoder_raises_costs_one_file(error, capsys):
  warn_once.reset()
  assert failing_task(error).open({"path": b"folder/a.xyz"}) is None
  line = capsys.readouterr().err
  assert line.startswith(f"Skipped: folder/a.xyz cannot be decoded ({type(error).__name__}: {error})")
  assert line.endswith(" (1 skipped so far).\n") and warn_once.count("skipped") == 1


@pytest.mark.parametrize(
  "error",
  [
    *(InputError("wrong settings"), MemoryError(), KeyboardInterrupt(), SystemExit(3)),
    *(OSError(number, "no") for number in (errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENOSPC)),
  ],
  ids=repr,
)
def test_errors_that_are_not_about_the_file_are_raised(error):
  warn_once.reset()
  with pytest.raises(type(error)):
    failing_task(error).open({"path": b"a.xyz"})
  assert warn_once.count("skipped") == 0


def test_each_skipped_file_counts_once_whichever_thread_meets_it(capsys):
  warn_once.reset()
  reasons = itertools.count()

  def document(record):
    raise Unreadable(f"{record['path']}: reason {next(reasons)}")

  task = dataclasses.replace(get_task("copy"), document=document)
  barrier = threading.Barrier(8)

  def read_all():
    barrier.wait()
    for _ in range(3):
      for number in range(50):
        assert task.open({"path": f"{number}.png"}) is None

  threads = [threading.Thread(target=read_all) for _ in range(8)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert warn_once.count("skipped") == 50
  lines = capsys.readouterr().err.splitlines()
  assert sorted(int(re.search(r"[(]([0-9]+) skipped so far", line)[1]) for line in lines) == list(range(1, 51))


def test_a_task_with_an_unknown_unit_is_refused():
  task = get_task("copy")
  with pytest.raises(ValueError, match="Did you mean 'bits_per_dim'"):
    dataclasses.replace(task, unit="bits_per_dims")


def test_a_mixture_names_its_tasks_and_their_shares():
  def shares(name):
    return {task.name: share for task, share in tasks.get_tasks(DataConfig(task=name), 12)}

  assert shares("pg19:3+text_files") == {"pg19": 0.75, "text_files": 0.25}
  assert shares("books_and_code") == {"pg19": 0.5, "text_files": 0.5}
  with pytest.raises(InputError, match="different vocabularies .*pg19: text, 259 ids; maestro_v3: music, 391 ids"):
    shares("pg19+maestro_v3")
  with pytest.raises(InputError, match="Did you mean 'enwik8'"):
    shares("pg19+enwik")
  with pytest.raises(InputError, match="'-1' is not a valid share"):
    shares("pg19:-1+enwik8")
