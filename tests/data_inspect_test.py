"""--mode=data: its numbers are right where a person can count, and its examples show the model's inputs."""

import json
import tracemalloc

import numpy as np
import PIL.Image
import pytest

from perceiver_ar_jax.config import DataConfig, InputError
from perceiver_ar_jax.data import EOS, SOS, images, inspect, midi, music, render, tasks, warn_once
from perceiver_ar_jax.data.music import Note
from tests import batches, tiny
from tests.batches import write

DARK = [20, 20, 60]
"""The colour of 0 where values are shown as shades."""


@pytest.fixture(autouse=True)
def quick_and_fresh(monkeypatch):
  monkeypatch.setattr(inspect, "_RATE_SECONDS", 0.02)
  warn_once.reset()


def settings(folder, *, vocab_size=259, dims=1, **data):
  """Settings that train on the files in folder/train and hold out those in folder/validation."""
  data = DataConfig(files=str(folder / "train"), validation_files=str(folder / "validation"), **data)
  return batches.config(data, context=10, latents=4, sizes=(100,) * dims, vocab_size=vocab_size, batch_size=3)


def look(config, workdir):
  """(the report as stored, examples.txt, the size (width, height) of examples.png or None)"""
  returned = inspect.inspect(config, workdir)
  stored = json.loads((workdir / "data" / "report.json").read_text())
  assert stored == json.loads(json.dumps(returned)), "the report returned is not the report stored"
  picture = workdir / "data" / "examples.png"
  size = PIL.Image.open(picture, formats=["PNG"]).size if picture.exists() else None
  return stored, (workdir / "data" / "examples.txt").read_text(), size


def assert_holds(stats, **expected):
  assert {name: stats[name] for name in expected} == expected


SPLIT_PITCHES = [("train", 60), ("train", 61), ("train", 62), ("validation", 63)]
TEXTS = {"train/a.txt": "ab ab\n", "train/b.txt": "c", "validation/c.txt": "é, so", "validation/d.txt": ""}


def test_the_report_of_texts(tmp_path, capsys):
  report, examples, picture = look(settings(write(tmp_path / "texts", TEXTS), task="text_files"), tmp_path / "run")
  assert (report["task"], report["modality"]) == ("text_files", "text")
  assert report["batch"] == {
    "inputs": ["int32", 3, 10],
    "positions": ["int32", 3, 10, 1],
    "targets": ["int32", 3, 4],
    "weights": ["float32", 3, 4],
  }
  # SOS a b _ a b \n EOS and SOS c EOS
  assert_holds(report["train"], documents=2, all_documents=True, skipped=0, events=11, shortest=3, longest=8, median=5)
  assert_holds(report["train"], different_tokens=7, words=3, bytes=7)
  shares = [2 / 11] * 4 + [1 / 11] * 3  # SOS, EOS, a, b; _, \n, c
  assert report["train"]["histogram_entropy_bits"] == pytest.approx(-sum(share * np.log2(share) for share in shares))
  # SOS é (two bytes) , _ s o EOS; the empty text is left out
  assert_holds(report["validation"], documents=1, skipped=1, events=8, shortest=8, longest=8, different_tokens=8)
  assert_holds(report["validation"], words=2, bytes=6)
  assert_holds(report["train"], largest_position=[8])
  assert report["rate"]["tokens_per_second"] == pytest.approx(10 * report["rate"]["examples_per_second"]) != 0

  assert picture is None, "a text has no picture"
  assert "train, text_files: 8 events, the first of them:\nab ab\n" in examples
  assert "validation, text_files: 8 events, the first of them:\né, so\n" in examples
  printed = capsys.readouterr().out
  for words in ("train: documents 2, ", "skipped 0, events 11, shortest 3,", "validation: documents 1,", "bytes 7"):
    assert words in printed


def test_only_the_first_documents_of_a_large_split_are_read(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(inspect, "_MAX_DOCUMENTS", 2)
  texts = {f"train/{number}.txt": "x" * number for number in range(1, 6)} | {"validation/v.txt": "v"}
  report, *_ = look(settings(write(tmp_path / "texts", texts), task="text_files"), tmp_path / "run")
  assert_holds(report["train"], documents=2, all_documents=False, events=3 + 4, longest=4)
  assert_holds(report["validation"], documents=1, all_documents=True)
  assert "documents 2, all_documents False" in capsys.readouterr().out


def test_the_report_of_music(tmp_path):
  long, short = midi.write([Note(60, 64, 0.0, 2.5)]), midi.write([Note(72, 64, 0.0, 0.5)])
  files = {"train/a.mid": long, "train/b.midi": short, "validation/c.mid": short, "validation/d.mid": b"broken"}
  config = settings(write(tmp_path / "midi", files), task="midi_files", vocab_size=391)
  report, examples, (width, height) = look(config, tmp_path / "run")
  # SOS, velocity, on, 1 s, 1 s, 0.5 s, off, EOS and the same without the whole seconds
  assert_holds(report["train"], documents=2, skipped=0, events=8 + 6, shortest=6, longest=8, different_tokens=9)
  assert_holds(report["validation"], documents=1, skipped=1, events=6)
  assert "words" not in report["train"]
  assert "0.00 s    2.50 s  pitch  60  velocity" in examples
  # 250 steps of 10 ms by the one pitch, two lines high; below it two rolls of 50 steps.
  assert (width, height) == (250 + 4, 3 * (2 + 2) + 2)


def test_reading_that_takes_long_shows_its_progress(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(inspect, "_MAX_DOCUMENTS", 2)
  texts = TEXTS | {"train/c.txt": "left out", "validation/d.txt": "not empty"}
  config = settings(write(tmp_path / "texts", texts), task="text_files")
  look(config, tmp_path / "run")
  assert "Reading" not in capsys.readouterr().err, "there is a bar although reading took no time"
  monkeypatch.setattr(inspect, "_PROGRESS_DELAY_SECONDS", 0.0)
  look(config, tmp_path / "run")
  bars = capsys.readouterr().err
  assert "Reading train: 100%" in bars and "2/2" in bars and "Reading validation: 100%" in bars


def test_each_file_of_music_is_parsed_once(tmp_path, monkeypatch):
  parsed = []
  read_notes = music.read_notes
  monkeypatch.setattr(music, "read_notes", lambda content: parsed.append(content) or read_notes(content))
  files = {f"{split}/{pitch}.mid": midi.write([Note(pitch, 64, 0.0, 1.0)]) for split, pitch in SPLIT_PITCHES}
  look(settings(write(tmp_path / "midi", files), task="midi_files", vocab_size=391), tmp_path / "run")
  assert sorted(parsed) == sorted(files.values())


def test_a_second_report_counts_the_same_files_as_skipped(tmp_path):
  config = settings(write(tmp_path / "texts", TEXTS), task="text_files")
  for _ in range(2):
    report, *_ = look(config, tmp_path / "run")
    assert (report["train"]["skipped"], report["validation"]["skipped"]) == (0, 1)


def test_a_picture_of_long_music_takes_little_memory():
  day = music.encode([Note(60, 64, 0.0, 86_000.0), Note(61, 64, 85_000.0, 86_000.0)])
  tracemalloc.start()
  try:
    roll = render.picture(get_task("midi_files"), day)
    assert tracemalloc.get_traced_memory()[1] < 2**25
  finally:
    tracemalloc.stop()
  assert roll.shape == (2, 1000, 3) and (roll != DARK).any(axis=-1).all()


def test_the_report_of_pictures(tmp_path):
  folder = tmp_path / "images"
  for name, colour in (("train/a", 0), ("train/b", 255), ("validation/c", 255)):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.new("RGB", (4, 4), (colour,) * 3).save(folder / f"{name}.png")
  config = settings(folder, task="image_files", image_size=4, dims=3)
  report, examples, size = look(config, tmp_path / "run")
  assert_holds(report["train"], documents=2, skipped=0, events=2 * 49, shortest=49, longest=49, different_tokens=3)
  assert report["batch"]["positions"] == ["int32", 3, 10, 3]
  assert report["train"]["largest_position"] == [5, 5, 4], "x, y, channel"
  assert size == (3 * 130 + 2, 130 + 2), "enlarged to 128 pixels each"
  shown = np.asarray(PIL.Image.open(tmp_path / "run" / "data" / "examples.png"))
  assert [shown[2, left, 0] for left in (2, 132, 262)] == [0, 255, 255]
  assert "image_files: 49 events" in examples


def test_the_report_of_audio_codes(tmp_path):
  for name, values in (("train/a", [[0, 1], [2, 3], [0, 1]]), ("train/b", [[0, 1]]), ("validation/c", [[3, 3]])):
    path = tmp_path / f"{name}.npy"
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, np.array(values))
  config = settings(tmp_path, task="audio_codes", codebook_size=4, code_levels=2, vocab_size=11, dims=2)
  report, examples, picture = look(config, tmp_path / "run")
  assert_holds(report["train"], documents=2, skipped=0, events=7 + 3, shortest=3, longest=7, different_tokens=5)
  assert_holds(report["validation"], documents=1, events=3, different_tokens=3)
  assert picture is None
  assert "[2 3 8 5 10 3 8]" in " ".join(examples.split()).replace("[ ", "[")


def test_a_workdir_that_cannot_be_written_is_an_error(tmp_path):
  write(tmp_path, TEXTS | {"file": ""})
  for workdir in (tmp_path / "file", tmp_path / "file" / "run"):
    with pytest.raises(InputError, match=f"--workdir={workdir} cannot be written"):
      inspect.inspect(settings(tmp_path, task="text_files"), workdir)


def test_a_split_without_documents_is_an_error(tmp_path):
  write(tmp_path, {"train/a.txt": "a", "validation/b.txt": ""})
  with pytest.raises(InputError, match="'validation' of text_files contains no document that can be read"):
    inspect.inspect(settings(tmp_path, task="text_files"), tmp_path / "run")


def test_the_command_line_shows_texts(tmp_path):
  write(tmp_path, {"train/a.txt": "tick tock " * 500, "validation/b.txt": "no road leads on for ever"})
  result = tiny.main(
    *("--mode=data", "--config=configs/text_files.py"),
    *(f"--workdir={tmp_path / 'run'}", "--config.train.batch_size=2"),
    *(f"--config.data.files={tmp_path / 'train'}", f"--config.data.validation_files={tmp_path / 'validation'}"),
  )
  assert result.returncode == 0, result.stderr
  assert "train: documents 1, all_documents True, skipped 0, events 5002," in result.stdout
  assert "tokens/s" in result.stdout and "examples.txt" in result.stdout
  assert not (tmp_path / "run" / "checkpoints").exists(), "looking at the data began a training run"


# Pictures


def get_task(name, **data):
  ((task, _),) = tasks.get_tasks(DataConfig(task=name, **data), 100)
  return task


def test_a_grid_puts_pictures_side_by_side_and_then_below():
  white, black = np.full((1, 1, 3), 255, np.uint8), np.zeros((1, 2, 3), np.uint8)
  sheet = render.grid([white, black, white], columns=2)
  assert (sheet == sheet[..., :1]).all()
  # Cells of 1 x 2 with 2 pixels of grey between and around them.
  g = 128
  assert sheet[..., 0].tolist() == [
    [g, g, g, g, g, g, g, g, g, g],
    [g, g, g, g, g, g, g, g, g, g],
    [g, g, 255, g, g, g, 0, 0, g, g],
    [g, g, g, g, g, g, g, g, g, g],
    [g, g, g, g, g, g, g, g, g, g],
    [g, g, 255, g, g, g, g, g, g, g],
    [g, g, g, g, g, g, g, g, g, g],
    [g, g, g, g, g, g, g, g, g, g],
  ]
  assert render.grid([white], columns=8).shape == (5, 5, 3), "empty columns take space"


@pytest.mark.parametrize("order", images.ORDERS)
def test_a_picture_of_an_image_is_the_image(order):
  task = get_task("image_files", image_size=2, image_order=order)
  pixels = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
  document = images.document(pixels, order)
  enlarged = pixels.repeat(64, axis=0).repeat(64, axis=1)
  np.testing.assert_array_equal(render.picture(task, document.read(0, 13)), enlarged)
  for count in (11, 12):
    shown = render.picture(task, document.read(0, count))
    assert shown is None, "a part of a picture is shown as a whole"


def test_a_picture_of_music_has_time_to_the_right_and_pitch_upwards():
  events = music.encode([Note(62, 125, 0.0, 0.02), Note(60, 5, 0.03, 0.05)])
  roll = render.picture(get_task("midi_files"), events)
  assert roll.shape == (6, 5, 3), "pitches 60 to 62, two lines each"
  sounding = (roll != DARK).any(axis=-1)
  assert np.argwhere(sounding[::2]).tolist() == [[0, 0], [0, 1], [2, 3], [2, 4]]
  assert (roll[0, 0] > roll[4, 3]).all(), "loud is not brighter"
  silence = render.picture(get_task("midi_files"), np.array([SOS, EOS]))
  assert silence.size and (silence == DARK).all()


def test_a_text_has_no_picture_and_reads_as_it_is():
  task = get_task("text_files")
  events = np.array([SOS, ord("h") + 3, ord("i") + 3, EOS])
  assert render.picture(task, events) is None
  assert render.text(task, events) == "hi"


def test_inspect_counts_what_training_has_met_already(tmp_path):
  write(tmp_path, {"train/a.txt": "a", "train/b.txt": "", "validation/c.txt": "c"})
  report, *_ = look(settings(tmp_path, task="text_files"), tmp_path / "run")
  assert (report["train"]["documents"], report["train"]["skipped"]) == (1, 1)
