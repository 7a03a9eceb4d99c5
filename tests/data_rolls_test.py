"""Piano rolls: their events, files in both formats, and what evaluation divides by."""

import io

import numpy as np
import pytest
import scipy.io

from perceiver_ar_jax.config import InputError
from perceiver_ar_jax.data import SOS, rolls, splits
from perceiver_ar_jax.data.documents import Unreadable
from perceiver_ar_jax.evaluation import evaluate
from perceiver_ar_jax.parallel.mesh import make_mesh
from perceiver_ar_jax.training import optimizer as optimizer_lib
from perceiver_ar_jax.training import step as step_lib
from tests import tiny

END = rolls.VOCAB_SIZE - 1


def _roll(frames, seed=0, density=0.05):
  return (np.random.default_rng(seed).random((frames, 88)) < density).astype(np.uint8)


def _mat(path, **rolls_of_split):
  arrays = {}
  for name, pieces in rolls_of_split.items():
    arrays[name] = np.empty((1, len(pieces)), object)
    arrays[name][0] = pieces
  scipy.io.savemat(path, arrays)
  return path


def test_a_frame_is_its_keys_in_order_and_an_end():
  roll = np.zeros((3, 88), np.uint8)
  roll[0, [40, 0]], roll[2, 87] = 1, 1
  document = rolls.document(roll)
  np.testing.assert_array_equal(document.read(0, len(document)), [SOS, 3, 43, END, END, 90, END])
  np.testing.assert_array_equal(document.scored(0, 7), [0, 0, 0, 0, 1, 1, 1])
  assert document.counts() == {"frames": 2}


def test_the_head_of_a_roll_has_the_frames_that_end_in_it():
  document = rolls.document(_roll(20, density=0.3))
  events = document.read(0, len(document))
  for num_scored in (1, 20, 200):
    head = document.head(num_scored)
    first, *later = np.flatnonzero(events[: len(head)] == END)
    assert head.num_scored == num_scored == len(head) - 1 - first and head.counts() == {"frames": len(later)}


def test_decoded_notes_are_the_roll():
  roll = _roll(50, density=0.3)
  document = rolls.document(roll)
  decoded = np.zeros_like(roll)
  for note in rolls.decode(document.read(0, len(document))):
    span = slice(round(note.onset * 4), round(note.offset * 4))
    assert not decoded[span, note.pitch - 21].any(), "a key that stays down is two notes"
    decoded[span, note.pitch - 21] = 1
  np.testing.assert_array_equal(decoded, roll)


def test_transposition_moves_every_key_or_none():
  roll = np.zeros((4, 88), np.uint8)
  roll[:, 30:34] = np.eye(4)
  events = rolls.document(roll).read(0, 9)
  np.testing.assert_array_equal(rolls.transpose(events, 5), rolls.document(np.roll(roll, 5, axis=1)).read(0, 9))
  np.testing.assert_array_equal(rolls.transpose(events, 60), events)


def test_both_formats_have_the_same_rolls(tmp_path):
  pieces = {"train": [_roll(9), _roll(5, 1)], "valid": [_roll(4, 2)], "test": [_roll(7, 3)]}
  mat = _mat(tmp_path / "a.mat", **{f"{name}data": values for name, values in pieces.items()})
  np.savez(tmp_path / "a.npz", **{f"{n}_{i}": roll for n, values in pieces.items() for i, roll in enumerate(values)})
  for path in (mat, tmp_path / "a.npz"):
    loaded = rolls.load(path.read_bytes(), path.name)
    for split, name in (("train", "train"), ("validation", "valid"), ("test", "test")):
      assert len(loaded[split]) == len(pieces[name])
      for ours, expected in zip(loaded[split], pieces[name]):
        np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize("name", ["a.mat", "a.npz"])
@pytest.mark.parametrize("content", [b"", b"MATLAB 5.0", b"PK\3\4broken", b"\0" * 300])
def test_damaged_files_are_unreadable(name, content):
  with pytest.raises(Unreadable, match=f"{name} "):
    rolls.load(content, name)


@pytest.mark.parametrize("array", [np.zeros((5, 12)), np.zeros(88), np.full((2, 88), "x")])
def test_arrays_of_other_shapes_are_unreadable(array):
  file = io.BytesIO()
  np.savez(file, train=array)
  with pytest.raises(Unreadable, match="88 columns"):
    rolls.load(file.getvalue(), "a.npz")


def test_the_loss_of_a_frame_is_the_sum_over_its_events(tmp_path):
  pieces = [_roll(9), _roll(5, 1)]
  path = _mat(tmp_path / "a.mat", traindata=pieces, validdata=pieces, testdata=pieces)
  config = tiny.config(
    data__task="piano_rolls", data__files=str(path), data__min_crop=1, model__vocab_size=rolls.VOCAB_SIZE
  )
  mesh = make_mesh(config.mesh)
  params = step_lib.init_state(
    config, optimizer_lib.make_optimizer(config.train.optimizer, config.train.steps), mesh
  ).params
  result = evaluate.Evaluator(config, mesh)(params, 0)
  scored = sum(int(document.num_scored) for _, document in splits.eval_documents(config))
  assert result["num_frames"] == 8 + 4 and result["num_tokens"] == scored
  # All logits are zero at first, so each event costs log(vocabulary).
  np.testing.assert_allclose(result["nats_per_frame"], scored * np.log(rolls.VOCAB_SIZE) / 12, rtol=1e-5)
  assert "nats/frame" in evaluate.Evaluator.describe(result)


def test_a_file_without_the_split_is_refused(tmp_path):
  path = _mat(tmp_path / "a.mat", traindata=[_roll(9)])
  config = tiny.config(data__task="piano_rolls", data__files=str(path), model__vocab_size=rolls.VOCAB_SIZE)
  with pytest.raises(InputError, match="no piano rolls of the split 'validation'"):
    list(splits.eval_documents(config))
