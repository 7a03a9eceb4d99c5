"""Pipelines: exact resumption, hosts that share the data without loss or repetition, and errors that explain."""

import collections
import dataclasses

import numpy as np
import pytest
import tensorflow_datasets as tfds

from perceiver_ar_jax.config import DataConfig, InputError
from perceiver_ar_jax.data import images, registry
from tests import batches, tiny
from tests.batches import evaluate, take
from tests.tiny_imagenet import NUM_TRAIN, NUM_VALIDATION


def settings(task, data_dir=None, *, context=3072, latents=16, sizes=(34, 34, 5), encoding="learned", seed=0, **data):
  data = DataConfig(task=task, data_dir=None if data_dir is None else str(data_dir), **data)
  return batches.config(data, context=context, latents=latents, sizes=sizes, encoding=encoding, seed=seed)


def numbers(batch):
  """The pictures that the rows of a batch of whole 32x32 pictures show: see `data_dir`."""
  return [int(value) - 3 for value in batch["inputs"][:, 1]]


def whole(data_dir, **more):
  """Settings under which each row is one whole picture."""
  return settings("imagenet32", data_dir, min_crop=3073, **more)


def test_plain_tfds_reads_the_tiny_dataset(data_dir):
  loaded = tfds.load("downsampled_imagenet/32x32", data_dir=data_dir, split="train", download=False)
  assert sorted(int(row["image"][0, 0, 0]) for row in loaded.as_numpy_iterator()) == list(range(NUM_TRAIN))


def test_batches_have_the_shapes_of_the_contract(data_dir):
  batch = next(batches.train_loader(settings("imagenet32", data_dir), 4))
  described = {name: (value.dtype.name, value.shape) for name, value in batch.items()}
  assert described == {
    "inputs": ("int32", (4, 3072)),
    "positions": ("int32", (4, 3072, 3)),
    "targets": ("int32", (4, 16)),
    "weights": ("float32", (4, 16)),
  }
  np.testing.assert_array_equal(batch["targets"] > 0, batch["weights"] == 1)


def test_pictures_arrive_pixel_for_pixel(data_dir):
  stored = {
    int(row["image"][0, 0, 0]): row["image"]
    for row in tfds.load("downsampled_imagenet/32x32", data_dir=data_dir, split="train").as_numpy_iterator()
  }
  for task, order in (("imagenet32", "pixel_raster"), ("imagenet32_rgb_planes", "rgb_planes")):
    batch = next(batches.train_loader(settings(task, data_dir, min_crop=3073), 4))
    for inputs, targets in zip(batch["inputs"], batch["targets"]):
      image = images.to_image(np.append(inputs, targets[-1]), 32, order)
      np.testing.assert_array_equal(image, stored[int(image[0, 0, 0])])


def test_each_epoch_sees_each_record_once_in_a_new_order(data_dir):
  for buffer in (1000, 5):
    iterator = batches.train_loader(whole(data_dir, shuffle_buffer=buffer), 11)
    epochs = [numbers(next(iterator)) + numbers(next(iterator)) for _ in range(3)]
    assert all(sorted(epoch) == list(range(NUM_TRAIN)) for epoch in epochs), f"an epoch blurs with buffer {buffer}"
    assert len({tuple(epoch) for epoch in epochs}) == 3, "epochs repeat their order"


def test_the_seed_fixes_the_stream(data_dir):
  first, again, of_other_seed = (take(batches.train_loader(whole(data_dir, seed=seed), 4), 4) for seed in (1, 1, 2))
  batches.assert_equal(first, again)
  assert numbers(first[0]) != numbers(of_other_seed[0])


CASES = {
  "imagenet32": dict(task="imagenet32", shuffle_buffer=6),
  "photos32": dict(task="photos32"),
  "copy": dict(task="copy", context=31, sizes=(32,), min_crop=8),
}


# 22 records in batches of 4: step 5 is about to cross into epoch 2.
@pytest.mark.parametrize(
  "case, step",
  [("imagenet32", 0), ("imagenet32", 1), ("imagenet32", 5), ("imagenet32", 13), ("photos32", 3), ("copy", 3)],
)
def test_a_restored_iterator_goes_on_as_if_nothing_had_happened(case, step, data_dir, tmp_path):
  config = settings(data_dir=data_dir if case == "imagenet32" else None, **CASES[case])
  iterator = batches.train_loader(config, 4)
  take(iterator, step)
  iterator.save(tmp_path / "state")
  expected = take(iterator, 8)
  restored = batches.train_loader(config, 4)
  take(restored, 2)  # What it did before must not matter.
  restored.restore(tmp_path / "state")
  batches.assert_equal(take(restored, 8), expected)


def test_a_second_save_replaces_the_first(tmp_path):
  iterator = batches.train_loader(settings(**CASES["copy"]), 2)
  iterator.save(tmp_path)
  take(iterator, 3)
  iterator.save(tmp_path)
  expected = take(iterator, 2)
  restored = batches.train_loader(settings(**CASES["copy"]), 2)
  restored.restore(tmp_path)
  batches.assert_equal(take(restored, 2), expected)


RESUME = """
import pathlib, sys
import numpy as np
from perceiver_ar_jax import config as config_lib
from tests import batches
folder = pathlib.Path(sys.argv[1])
iterator = batches.train_loader(config_lib.Config.from_json((folder / "config.json").read_text()), 4)
iterator.restore(folder / "state")
np.savez(folder / "after.npz", *[next(iterator)["inputs"] for _ in range(6)])
"""


@pytest.mark.slow
def test_another_process_goes_on_with_the_same_batches(data_dir, tmp_path):
  config = settings("imagenet32", data_dir, shuffle_buffer=6)
  iterator = batches.train_loader(config, 4)
  take(iterator, 7)
  iterator.save(tmp_path / "state")
  (tmp_path / "config.json").write_text(config.to_json())
  result = tiny.python("-c", RESUME, str(tmp_path))
  assert result.returncode == 0, result.stderr
  with np.load(tmp_path / "after.npz") as after:
    for name in sorted(after.files):
      np.testing.assert_array_equal(after[name], next(iterator)["inputs"], err_msg=name)


def test_the_state_is_little_more_than_the_encoded_records_in_the_shuffle(data_dir, tmp_path):
  iterator = batches.train_loader(whole(data_dir, shuffle_buffer=1000), 4)
  take(iterator, 3)
  iterator.save(tmp_path)
  # A PNG of noise is 3.3 kB, and the pictures that are ready are of 3.1 kB; 1000 decoded sequences would be 61 MB.
  assert state_bytes(tmp_path) < (1000 + 2 * registry.PREFETCH) * 3500


@pytest.mark.slow
def test_the_state_does_not_grow_with_the_batch(tmp_path):
  iterator = batches.train_loader(settings("photos32"), 400)  # 20 MB a batch.
  take(iterator, 2)
  iterator.save(tmp_path)
  assert state_bytes(tmp_path) < 1_000_000


def state_bytes(folder):
  return sum(file.stat().st_size for file in folder.iterdir())


def test_a_state_of_another_stream_is_refused(tmp_path):
  batches.train_loader(settings(**CASES["copy"]), 2).save(tmp_path)
  with pytest.raises(InputError, match="seed was 0 and is 5"):
    batches.train_loader(settings(**CASES["copy"], seed=5), 2).restore(tmp_path)
  with pytest.raises(InputError, match="batch_size_per_shard was 2 and is 3"):
    batches.train_loader(settings(**CASES["copy"]), 3).restore(tmp_path)
  saved = tmp_path / "shard-00000-of-00001.json"
  saved.write_text(saved.read_text().replace('"cached": false', '"cached": true'))
  with pytest.raises(InputError, match="cached was True and is False"):
    batches.train_loader(settings(**CASES["copy"]), 2).restore(tmp_path)
  with pytest.raises(InputError, match="has no state for data.shards=2: set it back"):
    batches.train_loader(settings(**CASES["copy"]), 2, 0, 2).restore(tmp_path)
  with pytest.raises(FileNotFoundError, match="contains no state of a data iterator"):
    batches.train_loader(settings(**CASES["copy"]), 2).restore(tmp_path / "nowhere")


@pytest.mark.parametrize("hosts", [1, 2, 3])
def test_hosts_share_an_epoch_without_loss_or_repetition(hosts, data_dir):
  seen = []
  for host in range(hosts):
    mine = len(range(host, NUM_TRAIN, hosts))  # The first hosts have one more where the count does not divide.
    seen += numbers(next(batches.train_loader(whole(data_dir), mine, host, hosts)))
  assert sorted(seen) == list(range(NUM_TRAIN))


def test_hosts_crop_differently():
  config = settings("copy", context=63, sizes=(64,))
  ends = [(next(batches.train_loader(config, 16, host, 2))["inputs"] > 0).sum(axis=1).tolist() for host in range(2)]
  assert ends[0] != ends[1]


@pytest.mark.parametrize("stride, latents, context", [(1, 1, 30), (5, 8, 20), (8, 8, 64), (31, 31, 31)])
def test_evaluation_scores_every_token_of_a_split_once(stride, latents, context):
  config = settings("copy", context=context, latents=latents, sizes=(65,))
  (scored_batches,) = evaluate(config, stride=stride, num_latents=latents, max_sequences=10)
  scored = context + 1 - 1 - context // 2  # The mirrored half and EOS.
  assert sum(batch["weights"].sum() for batch in scored_batches) == 10 * scored
  assert {batch["inputs"].shape for batch in scored_batches} == {(4, context)}
  assert {batch["targets"].shape for batch in scored_batches} == {(4, latents)}
  # Each scored target's place in its sequence is its input's position, the latent's slot; each comes 10 times.
  places = collections.Counter()
  for batch in scored_batches:
    slots = batch["positions"][:, -latents:, 0]
    places.update(slots[batch["weights"] == 1].tolist())
  assert places == {place: 10 for place in range(context + 1 - scored, context + 1)}


def test_evaluation_scores_all_of_a_picture(data_dir):
  config = settings("imagenet32", data_dir, context=3072, latents=700)
  (scored,) = evaluate(config)
  weights = np.concatenate([batch["weights"] for batch in scored])
  assert weights.sum() == NUM_VALIDATION * 3072
  targets = np.concatenate([batch["targets"] for batch in scored])
  stored = np.stack(
    [
      row["image"]
      for row in tfds.load("downsampled_imagenet/32x32", data_dir=data_dir, split="validation").as_numpy_iterator()
    ]
  )
  np.testing.assert_array_equal(np.sort(targets[weights == 1]), np.sort(stored.ravel().astype(int) + 3))


@pytest.mark.parametrize("hosts, batch", [(2, 4), (3, 4), (3, 1), (4, 13)])
def test_hosts_share_an_evaluation_row_by_row(hosts, batch, data_dir):
  config = settings("imagenet32", data_dir, latents=1000)  # 4 windows a picture, 28 in all.
  (alone,) = evaluate(config, batch=1)
  shared = evaluate(config, hosts=hosts, batch=batch)
  steps = -(-len(alone) // (hosts * batch))
  assert [len(each) for each in shared] == [steps] * hosts, "hosts would wait for each other for ever"
  in_order = [
    {name: value[row] for name, value in shared[host][step].items()}
    for step in range(steps)
    for host in range(hosts)
    for row in range(batch)
  ]
  batches.assert_equal([{name: value[0] for name, value in batch.items()} for batch in alone], in_order[: len(alone)])
  filler = in_order[len(alone) :]
  assert all(row.pop("document") == -1 for row in filler)
  assert not any(value.any() for row in filler for value in row.values()), "the filler is not empty"


@pytest.mark.slow
def test_evaluation_is_the_same_each_time_and_can_be_cut_short():
  config = settings("photos32", latents=1024)
  first, again = evaluate(config, max_sequences=3), evaluate(config, max_sequences=3)
  batches.assert_equal(first[0], again[0])
  assert sum(batch["weights"].sum() for batch in first[0]) == 3 * 3072
  shorter = dataclasses.replace(
    config, eval=dataclasses.replace(config.eval, max_sequences=2, num_latents=2048, stride=512)
  )
  (scored,) = evaluate(shorter)
  assert scored[0]["targets"].shape == (4, 2048)
  assert sum(batch["weights"].sum() for batch in scored) == 2 * 3072
  assert sum((batch["weights"].sum(axis=1) > 0).sum() for batch in scored) == 2 * 3072 / 512


def test_a_missing_dataset_says_where_it_was_looked_for_and_how_to_get_it(tmp_path):
  for read in (
    lambda: batches.train_loader(settings("imagenet64", tmp_path), 2),
    lambda: evaluate(settings("imagenet64", tmp_path)),
  ):
    with pytest.raises(InputError) as error:
      read()
    for part in (str(tmp_path), "data.data_dir", "tfds build downsampled_imagenet/64x64", "photos32"):
      assert part in str(error.value)
  assert not any(tmp_path.iterdir()), "something was generated"


def test_unknown_splits_name_the_known_ones(data_dir):
  with pytest.raises(InputError, match="no split 'trian'. Did you mean 'train'.*validation"):
    batches.train_loader(settings("imagenet32", data_dir, train_split="trian"), 2)
  with pytest.raises(InputError, match="no split 'test'. .*Known: train, validation"):
    evaluate(settings("photos32"), split="test")


def test_parts_of_a_split_can_be_named(data_dir):
  rows = numbers(next(batches.train_loader(whole(data_dir, train_split="train[:5]"), 5)))
  assert len(set(rows)) == 5
  with pytest.raises(InputError, match="'train\\[:x' of .* cannot be read"):
    batches.train_loader(whole(data_dir, train_split="train[:x"), 5)


def test_more_hosts_than_records_is_an_error(data_dir):
  with pytest.raises(InputError, match="22 records, fewer than data.shards=23"):
    batches.train_loader(settings("imagenet32", data_dir), 2, 0, 23)


def test_an_endless_split_needs_a_limit():
  with pytest.raises(InputError, match="never ends: set eval.max_sequences"):
    evaluate(settings("copy", context=31, sizes=(32,)), split="train")


def test_a_vocabulary_that_is_too_small_is_an_error():
  config = settings("photos32")
  config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=256))
  with pytest.raises(InputError, match="259 token ids.*model.vocab_size=256 must be at least 259"):
    batches.train_loader(config, 2)


def test_positions_beyond_their_tables_are_an_error():
  with pytest.raises(InputError, match=r"up to \(33, 33, 4\), beyond model.position_sizes=\(33, 34, 5\)"):
    next(batches.train_loader(settings("photos32", sizes=(33, 34, 5), min_crop=3073), 2))
