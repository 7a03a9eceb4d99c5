"""Codes of audio and video: small arrays written out, round trips of random ones, and files without codes."""

import concurrent.futures
import functools
import gc
import io
import re
import time

import numpy as np
import pytest

from perceiver_ar_jax.config import DataConfig
from perceiver_ar_jax.data import EOS, NUM_SPECIAL, PAD, SOS, codes, tasks
from perceiver_ar_jax.data.documents import Document, Unreadable

AUDIO = np.array([[1, 2], [3, 4], [5, 6], [7, 8]])
"""4 frames of 2 levels; with a codebook of 10 the second level's codes are 10 higher, and ids 3 higher than that."""
AUDIO_EVENTS = [SOS, 4, 15, 6, 17, 8, 19, 10, 21]


def whole(document):
  """(events, positions) of all of a document."""
  return document.read(0, len(document)), document.positions(0, len(document))


def audio_document(codes_FxQ, codebook_size):
  positions = functools.partial(codes.audio_positions, codes_FxQ.shape[1])
  return Document(codes.flatten_audio(codes_FxQ, codebook_size), positions)


def npy(array, **more):
  """Bytes of a .npy file."""
  file = io.BytesIO()
  np.save(file, array, **more)
  return file.getvalue()


def npz(*unnamed, **named):
  """Bytes of a .npz file."""
  file = io.BytesIO()
  np.savez(file, *unnamed, **named)
  return file.getvalue()


def test_audio_goes_frame_by_frame_and_each_level_has_ids_of_its_own():
  document = audio_document(AUDIO, 10)
  assert len(document) == 9
  assert document.read(0, 9).tolist() == AUDIO_EVENTS, "no EOS: the recording does not end with its file"
  assert document.read(3, 6).tolist() == [6, 17, 8]
  ((task, _),) = tasks.get_tasks(DataConfig(task="audio_codes", code_levels=2, codebook_size=10), 64)
  ids = [np.flatnonzero(allowed).tolist() for allowed in task.allowed()]
  assert ids == [list(range(3, 13)), list(range(13, 23))] and task.vocab_size == 23
  assert codes.to_audio(AUDIO_EVENTS, 2, 10).tolist() == AUDIO.tolist()


def test_audio_positions_at_the_start_are_frame_and_level_from_2_on():
  document = audio_document(AUDIO, 10)
  assert document.positions(0, 6).tolist() == [[1, 1], [2, 2], [2, 3], [3, 2], [3, 3], [4, 2]]
  assert document.positions(1, 4).tolist() == [[2, 2], [2, 3], [3, 2]], "without SOS the frames count the same"


def test_audio_positions_in_the_middle_count_frames_from_the_first_that_is_read():
  document = audio_document(AUDIO, 10)
  assert document.positions(3, 7).tolist() == [[2, 2], [2, 3], [3, 2], [3, 3]]
  assert document.positions(4, 8).tolist() == [[2, 3], [3, 2], [3, 3], [4, 2]], "a frame in part counts as the first"


@pytest.mark.parametrize("levels", [1, 2, 4, 8])
def test_audio_positions_fit_the_table_wherever_a_context_begins(levels):
  context = 16
  document = audio_document(np.zeros((60, levels), int), 10)
  for start in range(len(document) - context):
    positions = document.positions(start, start + context)
    assert positions.max(axis=0)[0] < context / levels + 3, f"the stretch from {start} needs a larger table of frames"
    assert positions.max(axis=0)[1] < levels + 2
    assert len(np.unique(positions, axis=0)) == context, f"two events of the stretch from {start} share a position"


def test_a_crop_of_audio_has_the_events_and_positions_of_its_stretch():
  events, positions, _ = audio_document(AUDIO, 10).crop(0.999, longest=3, shortest=2)
  assert events.tolist() == [19, 10, 21] and positions.tolist() == [[2, 3], [3, 2], [3, 3]]


@pytest.mark.parametrize(("levels", "codebook_size"), [(1, 1), (1, 1024), (2, 10), (8, 1024), (32, 7)])
def test_random_audio_comes_back(levels, codebook_size):
  random = np.random.default_rng(levels)
  for frames in (1, 2, 50):
    given = random.integers(0, codebook_size, (frames, levels))
    events, _ = whole(audio_document(given, codebook_size))
    assert events.dtype == np.int32 and events.max() < levels * codebook_size + NUM_SPECIAL
    np.testing.assert_array_equal(codes.to_audio(events, levels, codebook_size), given)


def test_audio_of_a_stretch_leaves_out_the_frames_at_its_ends_that_are_not_whole():
  assert codes.to_audio(AUDIO_EVENTS[4:8], 2, 10).tolist() == [[5, 6]]  # of frames 2 to 4: 4, 5 6, 7
  assert codes.to_audio(AUDIO_EVENTS[3:8], 2, 10).tolist() == [[3, 4], [5, 6]]
  assert codes.to_audio(AUDIO_EVENTS[4:9], 2, 10).tolist() == [[5, 6], [7, 8]]
  assert codes.to_audio(AUDIO_EVENTS[4:6], 2, 10).shape == (0, 2), "no frame is whole"


def test_every_stretch_of_audio_gives_the_frames_that_are_whole_in_it():
  levels = 3
  given = np.random.default_rng(0).integers(0, 5, (6, levels))
  events, _ = whole(audio_document(given, 5))
  for start in range(len(events)):
    for end in range(start, len(events) + 1):
      first, last = -(-max(start - 1, 0) // levels), max(end - 1, 0) // levels
      frames = codes.to_audio(events[start:end], levels, 5)
      np.testing.assert_array_equal(frames, given[first : max(first, last)], err_msg=f"events {start} to {end}")


def test_a_sampled_id_of_the_wrong_level_is_the_same_code_of_the_right_one():
  assert codes.to_audio([SOS, 4, 5, 6, 17], 2, 10).tolist() == [[1, 2], [3, 4]]  # 5: code 2 of level 0, not level 1


def test_specials_amid_sampled_codes_are_left_out():
  assert codes.to_audio([PAD, SOS, 4, EOS, 15, PAD], 2, 10).tolist() == [[1, 2]]
  assert codes.to_video([PAD, SOS, 3, EOS, 4, PAD], 1, 2).tolist() == [[[0, 1]]]


def test_whatever_a_model_samples_can_be_turned_into_codes():
  random = np.random.default_rng(0)
  for length in [*range(12), 100, 1000]:
    events = random.integers(-5, 4 * 10 + NUM_SPECIAL, length)
    sound = codes.to_audio(events, 4, 10)
    assert sound.shape[1:] == (4,) and sound.size <= length
    assert not sound.size or 0 <= sound.min() <= sound.max() < 10
    film = codes.to_video(events, 2, 3)
    assert film.shape[1:] == (2, 3) and film.size <= length and (not film.size or film.min() >= 0)
  for nothing in ([], [PAD] * 9, [SOS, EOS], [22] * 9):
    assert codes.to_audio(np.array(nothing, int), 4, 10).shape == (0, 4)


def test_video_goes_in_raster_order_with_time_row_and_column():
  events, positions = whole(codes.video_document(np.arange(8).reshape(2, 2, 2), "film.npy"))
  assert events.tolist() == [SOS, 3, 4, 5, 6, 7, 8, 9, 10]
  first_frame = [[2, 2, 2], [2, 2, 3], [2, 3, 2], [2, 3, 3]]
  second_frame = [[3, 2, 2], [3, 2, 3], [3, 3, 2], [3, 3, 3]]
  assert positions.tolist() == [[1, 1, 1], *first_frame, *second_frame]
  assert events.dtype == positions.dtype == np.int32


def test_random_video_comes_back_without_a_last_frame_in_part():
  given = np.random.default_rng(0).integers(0, 1024, (5, 3, 4))
  events, positions = whole(codes.video_document(given, "film.npy"))
  np.testing.assert_array_equal(codes.to_video(events, 3, 4), given)
  np.testing.assert_array_equal(codes.to_video(events[:-1], 3, 4), given[:4])
  assert codes.to_video(events[:12], 3, 4).shape == (0, 3, 4)
  assert positions.max(axis=0).tolist() == [6, 4, 5]


@pytest.mark.parametrize("shape", [(6,), (2, 3), (1, 2, 3, 1)])
def test_video_of_other_dimensions_is_refused(shape):
  with pytest.raises(Unreadable, match=re.escape(f"film.npy has the shape {shape}")):
    codes.video_document(np.zeros(shape, int), "film.npy")


@pytest.mark.parametrize(
  "content",
  [npy(AUDIO), npz(AUDIO), npz(sound=AUDIO), npz(codes=AUDIO, scales=np.ones(3)), npy(AUDIO.astype(np.uint8))],
  ids=["npy", "npz of one", "npz of one with a name", "npz with codes among others", "npy of small integers"],
)
def test_files_that_hold_codes_are_read(content):
  np.testing.assert_array_equal(codes.load(content, "a.npy", 10), AUDIO)


def test_codes_from_the_first_to_the_last_of_the_codebook_are_in_range():
  assert codes.load(npy(np.array([0, 9])), "a.npy", 10).tolist() == [0, 9]


@pytest.mark.parametrize(
  ("content", "words"),
  [
    (npz(AUDIO, AUDIO), "arr_0, arr_1: name one of them codes"),
    (npz(left=AUDIO, right=AUDIO), "left, right: name one of them codes"),
    (npz(), "not a .npy or .npz file of codes"),
    (npy(AUDIO.astype(np.float32)), "contains float32"),
    (npy(AUDIO > 3), "contains bool"),
    (npy(AUDIO - 2), "codes from -1 to 6, outside 0..9 (data.codebook_size)"),
    (npy(AUDIO + 2), "codes from 3 to 10, outside 0..9 (data.codebook_size)"),
    (npy(np.array([AUDIO, None], object), allow_pickle=True), "not a .npy or .npz file of codes"),
    (npz(codes=np.array([1, None], object)), "not a .npy or .npz file of codes"),
    (npy(np.zeros((0, 8), int)), "contains no codes"),
    (b"", "not a .npy or .npz file of codes"),
    (npy(AUDIO)[:-1], "not a .npy or .npz file of codes"),
    (npz(AUDIO)[:-30], "not a .npy or .npz file of codes"),
    (b"1 2\n3 4\n", "not a .npy or .npz file of codes"),
  ],
  ids=[
    "two arrays without names",
    "two arrays, none of them codes",
    "no array",
    "floats",
    "booleans",
    "a negative code",
    "a code beyond the codebook",
    "pickled objects",
    "pickled objects in a npz",
    "an array of nothing",
    "an empty file",
    "the last byte is missing",
    "the end of the archive is missing",
    "a text",
  ],
)
def test_other_files_are_refused_by_name(content, words):
  with pytest.raises(Unreadable, match=f"folder/a.npz .*{re.escape(words)}"):
    codes.load(content, "folder/a.npz", 10)


class Bomb:
  """What a pickle runs when it is opened."""

  went_off = False

  def __reduce__(self):
    return Bomb._go_off, ()

  @staticmethod
  def _go_off():
    Bomb.went_off = True


def test_nothing_in_a_file_is_ever_run():
  content = npy(np.array([Bomb()], object), allow_pickle=True)
  with pytest.raises(Unreadable):
    codes.load(content, "a.npy", 10)
  assert not Bomb.went_off
  np.load(io.BytesIO(content), allow_pickle=True)
  assert Bomb.went_off, "the file is harmless, so the test proves nothing"


def as_layout(codes_FxQ, layout, axes=0):
  """An array of this layout, with leading axes of 1."""
  array = codes_FxQ if layout == "frames_levels" else codes_FxQ.T
  return array.reshape((1,) * axes + array.shape)


LAYOUTS = ("frames_levels", "levels_frames")
OTHER = dict(zip(LAYOUTS, reversed(LAYOUTS)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("frames", [1, 3, 4, 5, 1000])
def test_the_setting_alone_says_which_axis_is_which(layout, frames):
  given = np.arange(frames * 4).reshape(frames, 4)
  for axes in (0, 1, 2):
    read = codes.audio_frames(as_layout(given, layout, axes if frames > 1 else 0), 4, layout, "a.npy")
    np.testing.assert_array_equal(read, given)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_first_levels_are_used_of_a_file_that_has_more(layout):
  given = np.arange(100 * 8).reshape(100, 8)
  np.testing.assert_array_equal(codes.audio_frames(as_layout(given, layout), 3, layout, "a.npy"), given[:, :3])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("frames", "levels"), [(1000, 8), (9, 8), (1000, 32), (75, 9)])
def test_a_shape_that_contradicts_the_setting_is_refused_with_the_other_setting(layout, frames, levels):
  array = as_layout(np.zeros((frames, levels), int), OTHER[layout])
  words = f"a.npy has the shape {array.shape}, which as {layout.replace('_', ' x ')} would be {frames:,} levels of only"
  with pytest.raises(Unreadable, match=re.escape(words) + f".*set data.code_layout={OTHER[layout]}$"):
    codes.audio_frames(array, 8, layout, "a.npy")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fewer_levels_than_asked_for_are_refused(layout):
  words = f"is 4 levels, fewer than data.code_levels=8: lower it, or set data.code_layout={OTHER[layout]}"
  for frames in (6, 100):
    with pytest.raises(Unreadable, match=rf"a\.npy has the shape .*{re.escape(words)}$"):
      codes.audio_frames(as_layout(np.zeros((frames, 4), int), layout), 8, layout, "a.npy")


@pytest.mark.parametrize("shape", [(), (7,), (2, 4, 100), (1, 2, 4, 100)])
def test_audio_of_other_dimensions_is_refused(shape):
  with pytest.raises(
    Unreadable, match=re.escape(f"a.npy has the shape {shape}, and codes of audio are frames x levels")
  ):
    codes.audio_frames(np.zeros(shape, int), 4, "frames_levels", "a.npy")


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64"])
def test_the_largest_code_of_every_integer_type_keeps_its_id(dtype):
  largest = min(np.iinfo(dtype).max, 1023)
  given = np.full((2, 2), largest, dtype)
  assert codes.flatten_audio(given, 1024).tolist() == [SOS, *[largest + 3, largest + 1027] * 2]


def test_files_of_the_audio_task_become_documents_and_others_are_skipped_by_name(tmp_path, capsys):
  for name, array in (("a", AUDIO.T[None]), ("b", AUDIO / 10), ("c", AUDIO.T)):
    np.save(tmp_path / f"{name}.npy", array)
  data = DataConfig(
    task="audio_codes",
    files=str(tmp_path),
    validation_files=f"{tmp_path}/c.npy",
    codebook_size=10,
    code_levels=2,
    code_layout="levels_frames",
  )
  ((task, _),) = tasks.get_tasks(data, 8)
  good, bad = (task.open(record) for record in task.source.get_dataset("train").as_numpy_iterator())
  assert good.read(0, 9).tolist() == AUDIO_EVENTS and task.vocab_size == 23 and task.position_dims == 2
  assert task.decode(good.read(0, 9)).tolist() == AUDIO.tolist()
  assert bad is None and f"{tmp_path}/b.npy contains float64" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.uint64, np.int64])
def test_codes_keep_their_values_whatever_their_type(kind):
  video = codes.video_document(np.array([[[253, 255]]], kind), "v")
  assert video.read(0, 3).tolist() == [2, 256, 258]
  assert codes.flatten_audio(np.array([[253, 255]], kind), 256).tolist() == [2, 256, 514]


def test_files_are_read_in_several_threads_while_garbage_is_collected():
  file = io.BytesIO()
  np.save(file, AUDIO)
  before = gc.get_threshold()
  gc.callbacks.append(lambda *_: time.sleep(0))  # JAX has one, too; threads may switch in it
  gc.set_threshold(20)
  try:
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
      for array in pool.map(lambda _: codes.load(file.getvalue(), "x.npy", 10), range(2400)):
        np.testing.assert_array_equal(array, AUDIO)
  finally:
    gc.callbacks.pop()
    gc.set_threshold(*before)
