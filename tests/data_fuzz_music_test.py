"""Damaged MIDI files and arrays of codes: any bytes are read or refused, in bounded time and memory."""

import io
import tracemalloc

import numpy as np
import pytest

from perceiver_ar_jax.config import DataConfig
from perceiver_ar_jax.data import codes, midi, tasks
from perceiver_ar_jax.data.documents import Unreadable
from perceiver_ar_jax.data.music import Note

CASES = 250
MAX_BYTES = 8 * 2**20
"""What reading a small file may allocate. The longest piece of music, a day, is 86,400 time shifts."""

MIDI = midi.write([Note(50 + place, 80, place / 4, place / 4 + 0.3) for place in range(12)])
CODES = np.arange(60).reshape(30, 2) % 16
VIDEO = CODES.reshape(5, 3, 4)


def saved(save, *arrays, **named):
  file = io.BytesIO()
  save(file, *arrays, **named)
  return file.getvalue()


def mutate(content: bytes, random: np.random.Generator) -> bytes:
  """Bytes replaced, inserted, removed, repeated and cut off."""
  data = bytearray(content)
  for _ in range(random.integers(1, 6)):
    place, size = int(random.integers(len(data) + 1)), int(random.integers(1, 9))
    match random.integers(6):
      case 0:
        data[place : place + 1] = random.bytes(1)
      case 1:
        data[place : place + size] = random.bytes(size)
      case 2:
        data[place:place] = random.choice([b"\0", b"\x7f", b"\xff", b"\x80", b"\xf0", b"\xff\x51\3"]) * size
      case 3:
        del data[place : place + size]
      case 4:
        data[place:place] = data[max(place - 4 * size, 0) : place]
      case 5:
        del data[len(data) - size :]
  return bytes(data)


def read_or_refuse(task, contents, folder):
  """Returns how many contents are read and how many refused; fails for other exceptions and for too much memory."""
  num_read = num_refused = 0
  tracemalloc.start()
  try:
    for number, content in enumerate(contents):
      path = folder / f"{task.name}-{number}"
      path.write_bytes(content)
      tracemalloc.reset_peak()
      before, _ = tracemalloc.get_traced_memory()
      try:
        document = task.read(str(path))
        events, positions = document.read(0, len(document)), document.positions(0, len(document))
        assert len(events) == len(positions) and 0 < events.min() and events.max() < task.vocab_size
        num_read += 1
      except Unreadable as error:
        assert str(path) in str(error)
        num_refused += 1
      peak = tracemalloc.get_traced_memory()[1] - before
      assert peak < MAX_BYTES, f"{peak:,} bytes for {content!r}"
  finally:
    tracemalloc.stop()
  return num_read, num_refused


def get_task(name):
  ((task, _),) = tasks.get_tasks(DataConfig(task=name, codebook_size=16, code_levels=2), 64)
  return task


@pytest.mark.parametrize(
  ("name", "content"),
  [
    ("midi_files", MIDI),
    ("audio_codes", saved(np.save, CODES)),
    ("audio_codes", saved(np.savez, codes=CODES, scales=CODES)),
    ("audio_codes", saved(np.savez_compressed, CODES)),
    ("video_codes", saved(np.save, np.asfortranarray(VIDEO))),
  ],
  ids=["MIDI", "npy", "npz", "compressed npz", "video"],
)
def test_mutated_files_are_read_or_refused(name, content, tmp_path):
  random = np.random.default_rng(len(content))
  num_read, num_refused = read_or_refuse(get_task(name), [mutate(content, random) for _ in range(CASES)], tmp_path)
  assert num_refused > CASES / 20 and num_read > CASES / 100, (
    "the mutations are too strong or too weak to test anything"
  )


def npy_header(shape, dtype="<i8"):
  file = io.BytesIO()
  np.lib.format.write_array_header_1_0(file, {"shape": shape, "fortran_order": False, "descr": dtype})
  return file.getvalue()


@pytest.mark.parametrize(
  "content",
  [
    *(
      npy_header(shape) + bytes(80) for shape in ((10**12, 2), (2**62, 2), (10**30, 2), (-5, 2), (-1, -10), (2, 10**9))
    ),
    npy_header((10, 1), "<u1") + bytes(9),
    npy_header((10, 2), "|V0"),
    npy_header((10, 2), "|O") + bytes(160),
    b"\x93NUMPY\1\0\xff\xff" + b"(" * 65535,
    b"\x93NUMPY\2\0\xff\xff\xff\xff{",
    b"\x93NUMPY\7\0\1\0{",
    b"PK\5\6" + bytes(18),
    b"PK\3\4",
  ],
)
def test_arrays_that_announce_more_than_they_contain_are_refused(content, tmp_path):
  assert read_or_refuse(get_task("audio_codes"), [content], tmp_path) == (0, 1)


def test_an_archive_that_unpacks_to_too_much_is_refused(tmp_path, monkeypatch):
  zeros = saved(np.savez_compressed, np.zeros((2**21, 2), np.int64))
  monkeypatch.setattr(codes, "_MAX_BYTES", 2**20)
  assert len(zeros) < 2**16
  assert read_or_refuse(get_task("audio_codes"), [zeros], tmp_path) == (0, 1)


def midi_file(track, num_tracks=1, size=None):
  size = len(track) if size is None else size
  return MIDI[:10] + num_tracks.to_bytes(2) + MIDI[12:14] + b"MTrk" + size.to_bytes(4) + track


NOTE = b"\x90\x40\x40"
DAY = b"\xa9\x99\xb8\0"  # 86,400,000 ticks of 1 ms


@pytest.mark.parametrize(
  ("content", "is_read"),
  [
    (midi_file(b"\0" + NOTE + DAY + b"\x40\0"), True),
    (midi_file(b"\0" + NOTE + DAY + b"\x40\0" + b"\1\x40\1"), False),
    (midi_file((b"\xff\xff\xff\x7f" + NOTE) * 500), False),
    (midi_file((b"\xff\xff\xff\x7f\xff\x51\3\xff\xff\xff") * 500 + b"\0" + NOTE), False),
    (midi_file(b"\0" + NOTE, size=2**32 - 1), False),
    (midi_file(b"\0" + NOTE, num_tracks=2**16 - 1), True),
    (midi_file(b"\0\xf0\xff\xff\xff\x7f"), False),
    (midi_file(b"\0\xff\x51\xff\xff\xff\x7f"), False),
    (midi_file(b"\xff" * 500), False),
    (midi_file(b"\0" + NOTE + b"\0\x40\x40" * 5000), True),
    (b"RIFF\xff\xff\xff\xffRMID" + b"junk\0\0\0\0" * 500, False),
  ],
  ids=[
    *("a day", "more than a day", "years of notes", "years of tempos", "an endless track", "65,535 tracks"),
    *("an endless sysex", "an endless tempo", "an endless number", "5,000 notes of one pitch", "RIFF without data"),
  ],
)
def test_midi_files_that_announce_too_much_are_bounded(content, is_read, tmp_path):
  assert read_or_refuse(get_task("midi_files"), [content], tmp_path) == ((1, 0) if is_read else (0, 1))
