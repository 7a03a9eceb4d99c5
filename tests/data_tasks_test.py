"""Tasks: every record becomes the document that the published layouts say, and unknown names are explained."""

import pathlib

import numpy as np
import pytest
import seqio

from perceiver_ar_jax.config import InputError
from perceiver_ar_jax.data import EOS, SOS, images, photos, tasks
from perceiver_ar_jax.data.tf_cpu import tf

GOLDEN = np.load(pathlib.Path(__file__).parent / "golden" / "data.npz")


def documents(name, split, *, count, events=12):
  """The first `count` documents of a task, as dicts of arrays."""
  task = tasks.get_task(name)
  records = task.source.get_dataset(split=split, shuffle=False).take(count)
  dataset = task.preprocess_postcache(records, {"events": events}, seed=0)
  return list(dataset.as_numpy_iterator())


def test_no_accelerator_is_left_to_tensorflow():
  assert [device.device_type for device in tf.config.get_visible_devices()] == ["CPU"]


def test_pixel_raster_takes_pixels_in_turn_and_rgb_planes_takes_colours_in_turn():
  picture = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
  raster = tasks.image_document(picture, 2, "pixel_raster")
  planes = tasks.image_document(picture, 2, "rgb_planes")
  assert list(raster["events"].numpy()) == [SOS, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14]
  assert list(planes["events"].numpy()) == [SOS, 3, 6, 9, 12, 4, 7, 10, 13, 5, 8, 11, 14]
  # (x, y, channel): the second pixel of the first row comes second, x + 1.
  assert raster["positions"].numpy()[:5].tolist() == [[1, 1, 1], [2, 2, 2], [2, 2, 3], [2, 2, 4], [3, 2, 2]]
  assert planes["positions"].numpy()[:5].tolist() == [[1, 1, 1], [2, 2, 2], [3, 2, 2], [2, 3, 2], [3, 3, 2]]


@pytest.mark.parametrize("order", images.ORDERS)
@pytest.mark.parametrize("row", [0, 1])
def test_image_layout_matches_the_reference(order, row):
  picture = GOLDEN["image/image"][row]
  document = tasks.image_document(picture, 4, order)
  np.testing.assert_array_equal(document["events"], GOLDEN[f"image/{order}/sos1/events"][row])
  np.testing.assert_array_equal(document["positions"], GOLDEN[f"image/{order}/sos1/event_idxs"][row])


@pytest.mark.parametrize("order", images.ORDERS)
def test_events_turn_back_into_the_picture(order):
  picture = GOLDEN["image/image"][0]
  events = tasks.image_document(picture, 4, order)["events"].numpy()
  np.testing.assert_array_equal(images.to_image(events, 4, order), picture)
  np.testing.assert_array_equal(images.to_image(events[1:], 4, order), picture)
  events[1] = EOS  # No colour: black, and nothing else changes.
  assert images.to_image(events, 4, order)[0, 0, 0] == 0
  np.testing.assert_array_equal(images.to_image(events, 4, order)[1:], picture[1:])
  with pytest.raises(ValueError, match="30 sub-pixels"):
    images.to_image(events[:30], 4, order)


def test_position_tables_are_just_large_enough():
  for order in images.ORDERS:
    positions = images.positions(5, order)
    assert tuple(positions.max(axis=0) + 1) == images.position_sizes(5)
    assert len(positions) == images.num_events(5)
    assert len(np.unique(positions, axis=0)) == len(positions)


@pytest.mark.parametrize("length", [3, 12, 13])
def test_copy_is_start_bytes_mirrored_bytes_end(length):
  (document,) = documents("copy", "train", count=1, events=length)
  events, scored = document["events"], document["scored"]
  assert len(events) == length and events[0] == SOS and events[-1] == EOS
  np.testing.assert_array_equal(events[1:-1], events[1:-1][::-1], err_msg="the bytes are not mirrored")
  assert document["positions"][:, 0].tolist() == list(range(1, length + 1))
  # What is scored is exactly what the events before it determine.
  assert scored.tolist() == [0] * (length // 2 + length % 2) + [1] * (length // 2)


@pytest.mark.parametrize("split", ["TRAIN", "VALIDATION", "TEST"])
def test_copy_has_the_published_layout(split):
  golden = zip(GOLDEN[f"mirrored12/raw/{split}/events"], GOLDEN[f"mirrored12/raw/{split}/event_idxs"])
  for events, positions in golden:
    ours = tasks.mirror(events[1:6], 12)
    np.testing.assert_array_equal(ours["events"], events)
    np.testing.assert_array_equal(ours["positions"], positions)


def test_copy_validation_is_finite_and_shares_nothing_with_training():
  train = {document["events"].tobytes() for document in documents("copy", "train", count=500)}
  validation = {document["events"].tobytes() for document in documents("copy", "validation", count=10_000)}
  assert len(train) == 500 and len(validation) == tasks.NUM_COPY_VALIDATION
  assert not train & validation
  assert tasks.get_task("copy").source.get_dataset("train", shuffle=False).cardinality() == tf.data.INFINITE_CARDINALITY


@pytest.mark.parametrize("size", [32, 64])
def test_photographs_are_varied_real_pixels(size):
  document, *_ = documents(f"photos{size}", "validation", count=1)
  assert document["events"].shape == (images.num_events(size),)
  crops = [
    images.to_image(row["events"], size, "pixel_raster") for row in documents(f"photos{size}", "validation", count=99)
  ]
  assert len(crops) == photos.NUM_CROPS["validation"]
  assert min(crop.std() for crop in crops) > 2, "a crop is nearly one colour"
  shares = np.bincount(np.stack(crops).ravel(), minlength=256) / np.stack(crops).size
  entropy_bits = -np.sum(shares[shares > 0] * np.log2(shares[shares > 0]))
  assert entropy_bits > 7.5, "the validation crops use few of the values, so a histogram alone would score well"


def test_photographs_of_the_splits_are_different():
  assert not set(photos.PHOTOGRAPHS["train"]) & set(photos.PHOTOGRAPHS["validation"])
  train = {row["events"].tobytes() for row in documents("photos32", "train", count=300)}
  validation = {row["events"].tobytes() for row in documents("photos32", "validation", count=300)}
  assert len(train) > 290 and not train & validation


def test_rgb_planes_of_a_photograph_hold_the_same_picture():
  raster, planes = documents("photos32", "train", count=3), documents("photos32_rgb_planes", "train", count=3)
  for one, other in zip(raster, planes):
    assert not np.array_equal(one["events"], other["events"])
    np.testing.assert_array_equal(
      images.to_image(one["events"], 32, "pixel_raster"), images.to_image(other["events"], 32, "rgb_planes")
    )


def test_crops_stay_inside_their_photograph():
  # The pyramid's rows are padded with black to a common size; a crop that strays would hold whole black columns.
  pixels, sides, _ = photos._pyramids("validation", 32)
  assert (sides >= 32).all() and (pixels[0, : sides[0, 0], : sides[0, 1]].max(axis=(1, 2)) > 0).all()
  for row in documents("photos32", "validation", count=64):
    crop = images.to_image(row["events"], 32, "pixel_raster")
    assert (crop[-1].max(axis=-1) > 0).any() and (crop[:, -1].max(axis=-1) > 0).any()


def test_a_missing_package_of_photographs_is_named():
  with pytest.raises(InputError, match="pip install scikit-image"):
    photos._load("skimage", "data/no_such_photograph.png")


def test_unknown_tasks_get_a_hint():
  with pytest.raises(InputError, match="Did you mean 'photos32'.*imagenet64_rgb_planes"):
    tasks.get_task("photo32")
  with pytest.raises(InputError, match="data.task='nothing'"):
    tasks.get_info("nothing")


def test_the_registered_tasks_say_how_they_are_scored():
  named = {
    f"{kind}{size}{order}" for kind in ("imagenet", "photos") for size in (32, 64) for order in ("", "_rgb_planes")
  }
  assert set(tasks.names()) >= named | {"copy"}
  assert tasks.get_info("imagenet64_rgb_planes") == tasks.TaskInfo(
    unit="bits_per_dim", modality="image", image_size=64, image_order="rgb_planes"
  )
  assert tasks.get_info("copy").unit == "accuracy"
  assert tasks.vocab_size(tasks.get_task("photos64")) == 259


def test_a_fork_adds_a_task_in_a_few_lines():
  def lines(split, shuffle_files):
    return tf.data.Dataset.from_tensor_slices({"text": ["ab", "c"]})

  def document(record):
    events_N = tf.concat([[SOS], tf.cast(tf.io.decode_raw(record["text"], tf.uint8), tf.int32) + 3, [EOS]], axis=0)
    return {"events": events_N, "positions": tf.range(1, tf.size(events_N) + 1)[:, None]}

  name = "lines_of_a_fork"
  tasks.add(
    name,
    source=seqio.FunctionDataSource(lines, splits=["train"]),
    preprocessors=[seqio.map_over_dataset(document)],
    info=tasks.TaskInfo(unit="bits_per_byte", modality="bytes"),
    vocab_size=259,
  )
  try:
    assert [row["events"].tolist() for row in documents(name, "train", count=9)] == [[2, 100, 101, 1], [2, 102, 1]]
  finally:
    seqio.TaskRegistry.remove(name)
    tasks._INFO.pop(name)


def test_a_task_with_an_unknown_unit_is_refused():
  with pytest.raises(ValueError, match="Did you mean 'bits_per_dim'"):
    tasks.TaskInfo(unit="bits_per_dims", modality="image")
