"""The user's own files: which are listed, which are skipped and why, and which are held out."""

import json
import os
import pathlib
import socket

import numpy as np
import pytest

from perceiver_ar_jax.config import Config, DataConfig, InputError
from perceiver_ar_jax.data import files, splits, tasks, texts, warn_once
from perceiver_ar_jax.data.documents import Unreadable
from perceiver_ar_jax.data.tf_cpu import tf
from tests import batches, tiny
from tests.batches import write


@pytest.fixture(autouse=True)
def no_messages_so_far():
  warn_once.reset()
  texts.check_file.cache_clear()


def listed(pattern, suffixes=(".txt",)):
  return [os.path.relpath(path, os.path.dirname(str(pattern))) for path in files.find_files(str(pattern), suffixes)]


def split_names(pattern, split, **settings):
  data = DataConfig(task="text_files", files=str(pattern), **settings)
  return [path.rsplit("/", 1)[-1] for path in files.split_files(data, split, (".txt",))]


# Listing


def test_a_glob_takes_any_ending_and_a_folder_those_it_knows(tmp_path):
  write(tmp_path, {"a.txt": b"a", "b.TXT": b"b", "c.log": b"c", "deep/er/d.txt": b"d", "[e]/e.txt": b"e"})
  everything = {*split_names(tmp_path, "train"), *split_names(tmp_path, "validation")}
  assert everything == {"a.txt", "b.TXT", "d.txt", "e.txt"}
  logs = {"validation_files": str(tmp_path / "a.txt")}
  assert split_names(tmp_path / "*.log", "train", **logs) == ["c.log"]
  assert split_names(tmp_path / "**" / "*.txt", "train", **logs) == ["e.txt", "d.txt"]


def test_hidden_files_are_left_out_unless_the_glob_names_them(tmp_path):
  write(tmp_path / "data", {"a.txt": b"a", ".b.txt": b"b", ".git/c.txt": b"c"})
  assert listed(tmp_path / "data") == ["data/a.txt"]
  assert files.find_files(f"{tmp_path}/data/**/*", ()) == [f"{tmp_path}/data/a.txt"]
  assert [pathlib.Path(path).name for path in files.find_files(str(tmp_path / "data" / ".git" / "*"), ())] == ["c.txt"]


@pytest.mark.parametrize("pattern", ["data", "data/**/*.txt", "**/*.txt", "*/**"])
def test_links_in_circles_list_each_real_file_once(pattern, tmp_path, monkeypatch):
  write(tmp_path, {"data/one.txt": b"1", "data/a/two.txt": b"2", "data/b/three.txt": b"3"})
  (tmp_path / "data/loop").symlink_to(".")
  (tmp_path / "data/a/up").symlink_to("..")
  (tmp_path / "data/b/up").symlink_to("../..")
  (tmp_path / "data/0_linked_folder").symlink_to("a")
  (tmp_path / "data/0_linked_file.txt").symlink_to("one.txt")
  monkeypatch.chdir(tmp_path)
  paths = [os.path.normpath(path) for path in files.find_files(pattern, (".txt",))]
  assert paths == ["data/a/two.txt", "data/b/three.txt", "data/one.txt"]


def test_links_to_other_places_are_followed(tmp_path):
  write(tmp_path, {"else/where/one.txt": b"1", "blob": b"2", "data/three.txt": b"3"})
  (tmp_path / "data/folder").symlink_to(tmp_path / "else")
  (tmp_path / "data/two.txt").symlink_to("../blob")
  assert listed(tmp_path / "data") == ["data/folder/where/one.txt", "data/three.txt", "data/two.txt"]


def test_a_link_to_a_folder_around_the_data_is_not_followed(tmp_path, capsys):
  write(tmp_path, {"secret.txt": b"1", "data/a.txt": b"2"})
  (tmp_path / "data/up").symlink_to("..")
  assert listed(tmp_path / "data") == ["data/a.txt"]
  assert "up links to" in capsys.readouterr().err


def special(folder):
  """Makes one of each kind of what is not a file; returns {name: reason}."""
  os.mkfifo(folder / "pipe.txt")
  (folder / "device.txt").symlink_to("/dev/zero")
  (folder / "dangling.txt").symlink_to("nowhere")
  (folder / "circle.txt").symlink_to("circle.txt")
  with socket.socket(socket.AF_UNIX) as server:
    here = os.getcwd()
    os.chdir(folder)  # the path of a socket must be short
    server.bind("socket.txt")
    os.chdir(here)
  return {
    "pipe.txt": "is a named pipe, not a regular file",
    "device.txt": "is a device, not a regular file",
    "socket.txt": "is a socket, not a regular file",
    "dangling.txt": "links to nowhere, which does not exist",
    "circle.txt": "Too many levels of symbolic links",
  }


@pytest.mark.parametrize("pattern", ["", "*", "**/*.txt"])
def test_what_is_not_a_file_is_skipped_with_the_reason(pattern, tmp_path, capsys):
  write(tmp_path, {"a.txt": b"a", "folder.txt/b.txt": b"b"})
  reasons = special(tmp_path)
  names = [pathlib.Path(path).name for path in files.find_files(f"{tmp_path}/{pattern}", (".txt",))]
  assert names == ["a.txt", "b.txt"] if pattern != "*" else ["a.txt"]
  messages = capsys.readouterr().err
  for name, reason in reasons.items():
    assert any(name in line and reason in line for line in messages.splitlines()), f"{name}: {messages}"


@pytest.mark.timeout(60)
@pytest.mark.parametrize("task", ["text_files", "image_files", "midi_files", "audio_codes"])
def test_special_files_named_by_the_user_are_refused_and_never_waited_for(task, tmp_path):
  reasons = special(tmp_path)
  ((task, _),) = tasks.get_tasks(DataConfig(task=task, files=str(tmp_path)), 12)
  for name, reason in reasons.items():
    with pytest.raises(Unreadable, match=reason):
      files.read_bytes(str(tmp_path / name))
    if task.modality != "text":  # for which what is not a file is a text
      with pytest.raises(InputError, match=f"{name}"):
        task.read(str(tmp_path / name))


def test_files_with_other_endings_are_reported_in_one_line(tmp_path, capsys):
  write(tmp_path, {"a.png": b"", "b.heic": b"", "c.HEIC": b"", "d/e.pdf": b"", "README": b"", ".hidden": b""})
  files.find_files(str(tmp_path), (".png",))
  files.find_files(str(tmp_path), (".png",))
  (line,) = capsys.readouterr().err.splitlines()
  assert "4 files" in line and ".heic 2" in line and ".pdf 1" in line and "no ending 1" in line


def test_a_name_that_is_not_utf8_is_skipped(tmp_path, capsys):
  write(tmp_path, {"t/b.txt": b"some"})
  with open(os.fsencode(tmp_path / "t") + b"/\xff.txt", "wb") as file:
    file.write(b"text")
  assert listed(tmp_path / "t") == ["t/b.txt"]
  (line,) = capsys.readouterr().err.splitlines()
  assert "is not UTF-8" in line


def test_a_folder_that_cannot_be_read_is_reported(tmp_path, capsys, monkeypatch):
  write(tmp_path, {"a.txt": b"a", "locked/b.txt": b"b"})
  scandir = os.scandir

  def refuse(path):  # tests may run as root, who may read everything
    if str(path).endswith("locked"):
      raise PermissionError(13, "Permission denied", str(path))
    return scandir(path)

  monkeypatch.setattr(os, "scandir", refuse)
  assert listed(tmp_path) == [f"{tmp_path.name}/a.txt"]
  assert "locked cannot be read: Permission denied" in capsys.readouterr().err


def test_remote_folders_and_globs_go_through_tensorflow(capsys):
  root = "ram://data_files_test"
  for name in ("a.txt", "deep/b.txt", "c.log"):
    tf.io.gfile.makedirs(f"{root}/{name}".rsplit("/", 1)[0])
    with tf.io.gfile.GFile(f"{root}/{name}", "w") as file:
      file.write(name)
  assert files.find_files(root, (".txt",)) == [f"{root}/a.txt", f"{root}/deep/b.txt"]
  assert files.find_files(f"{root}/*.log", (".txt",)) == [f"{root}/c.log"]
  assert files.read_bytes(f"{root}/a.txt", 2, 3) == b"txt" and files.file_size(f"{root}/a.txt") == 5
  data = DataConfig(task="text_files", files=root, validation_fraction=0.01)
  assert len(files.split_files(data, "validation", (".txt",))) == 1
  with pytest.raises(InputError, match="does not exist"):
    files.find_files(f"{root}/nothing", (".txt",))
  with pytest.raises(InputError, match="cannot be listed"):
    files.find_files("nosuchscheme://x", (".txt",))


# Splits


def write_same_names(folder, count=60):
  return write(folder, {f"Track{number:05d}/all_src.txt": b"x" for number in range(count)})


def held_out(pattern, **settings):
  """Paths of the held-out files below the folder `pattern`."""
  data = DataConfig(task="text_files", files=str(pattern), **settings)
  return [os.path.relpath(path, pattern) for path in files.split_files(data, "validation", (".txt",))]


def test_files_of_one_name_are_split_by_their_paths(tmp_path, capsys):
  write_same_names(tmp_path, 400)
  assert 8 <= len(held_out(tmp_path)) <= 36
  (line,) = capsys.readouterr().err.splitlines()
  assert line == f"Held out for validation: {len(held_out(tmp_path))} of 400 files (data.validation_fraction=0.05)."


def test_older_runs_whose_files_were_held_out_by_name_ask_for_them(tmp_path):
  folder = write(tmp_path / "files", {f"{name}.txt": b"x" for name in "abcd"})
  saved = json.loads(tiny.config(data__task="text_files", data__files=str(folder)).to_json())
  assert Config.from_json(json.dumps(saved)).data.validation_files is None
  explicit = saved | {"data": saved["data"] | {"split_rule": "path"}}
  assert Config.from_json(json.dumps(explicit)).data.validation_files is None
  implicit = {name: value for name, value in saved["data"].items() if name != "sentencepiece_fingerprint"}  # of 0.1.0
  for data in (implicit, saved["data"] | {"split_rule": "name"}):
    older = Config.from_json(json.dumps(saved | {"data": data}))
    assert Config.from_json(older.to_json()) == older
    for split in ("train", "validation"):
      with pytest.raises(InputError, match="held out files by a hash of their names.*--config.data.validation_files="):
        files.split_files(older.data, split, (".txt",))
    named = Config.from_json(json.dumps(saved | {"data": data | {"validation_files": f"{folder}/c.txt"}}))
    assert files.split_files(named.data, "validation", (".txt",)) == [f"{folder}/c.txt"]
    data = {name: value for name, value in data.items() if name != "files"}
    assert Config.from_json(json.dumps(saved | {"data": data})).data.validation_files is None


def test_files_that_join_later_move_no_other(tmp_path):
  settings = {"validation_fraction": 0.3}
  write(tmp_path, {f"{number}.txt": b"old" for number in range(60)})
  train, validation = (split_names(tmp_path, split, **settings) for split in ("train", "validation"))
  assert 8 <= len(validation) <= 28 and len(train) + len(validation) == 60 and not set(train) & set(validation)
  write(tmp_path, {f"new/{number}.txt": b"new" for number in range(60, 150)})
  assert set(train) <= set(split_names(tmp_path, "train", **settings))
  assert set(validation) <= set(split_names(tmp_path, "validation", **settings))


def test_a_link_that_joins_later_moves_no_file(tmp_path):
  write_same_names(tmp_path)
  before = held_out(tmp_path, validation_fraction=0.3)
  (tmp_path / "A").symlink_to("Track00007")
  (tmp_path / "Track00000" / "A.txt").symlink_to("../Track00001/all_src.txt")
  assert held_out(tmp_path, validation_fraction=0.3) == before


def test_the_split_is_the_same_wherever_the_folder_is_and_however_it_is_named(tmp_path, monkeypatch):
  folder, moved = write_same_names(tmp_path / "folder"), write_same_names(tmp_path / "another" / "place")
  (tmp_path / "link").symlink_to(moved)
  expected = held_out(folder)
  assert expected == held_out(moved) == held_out(f"{moved}/") == held_out(tmp_path / "link")
  monkeypatch.chdir(moved)
  assert expected == held_out(".") == held_out("../place")
  data = DataConfig(task="text_files", files="**/*.txt")
  assert [os.path.normpath(path) for path in files.split_files(data, "validation", ())] == expected
  data = DataConfig(task="text_files", files=f"{folder}/Track*/*")
  assert [os.path.relpath(path, folder) for path in files.split_files(data, "validation", ())] == expected


@pytest.mark.parametrize("fraction", [0.001, 0.05, 0.5])
def test_two_files_are_enough_to_hold_one_out(fraction, tmp_path):
  write(tmp_path, {"a.txt": b"a", "b.txt": b"b"})
  splits = [split_names(tmp_path, split, validation_fraction=fraction) for split in ("train", "validation")]
  assert sorted(map(len, splits)) == [1, 1] and splits[0] != splits[1]


@pytest.mark.parametrize("fraction", [0.001, 0.5])
def test_empty_files_are_never_held_out(fraction, tmp_path):
  write(tmp_path, {f"{number}.txt": b"" for number in range(40)} | {"full.txt": b"x"})
  assert held_out(tmp_path, validation_fraction=fraction) == ["full.txt"]
  write(tmp_path, {f"{number}.txt": b"x" for number in range(20)})
  assert all((tmp_path / name).stat().st_size for name in held_out(tmp_path, validation_fraction=fraction))


def test_named_validation_files_are_held_out_wherever_they_lie(tmp_path, capsys):
  write(tmp_path, {"in/a.txt": b"a", "in/b.txt": b"b", "in/deep/c.txt": b"c", "out/d.txt": b"d"})
  inside = {"validation_files": str(tmp_path / "in" / "**" / "c*")}
  assert split_names(tmp_path / "in", "train", **inside) == ["a.txt", "b.txt"]
  assert split_names(tmp_path / "in", "validation", **inside) == ["c.txt"]
  assert "Held out for validation: 1 of 3 files (data.validation_files=" in capsys.readouterr().err
  outside = {"validation_files": str(tmp_path / "out")}
  assert split_names(tmp_path / "in", "train", **outside) == ["a.txt", "b.txt", "c.txt"]
  assert split_names(tmp_path / "in", "validation", **outside) == ["d.txt"]


@pytest.mark.parametrize(
  "pattern, held",
  [("data", "./data/a.txt"), ("data", "{here}/data/a.txt"), ("./data", "data/a.txt"), ("{here}/data/*", "data/a.txt")],
)
def test_validation_files_may_be_spelled_in_another_way(pattern, held, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  write(tmp_path / "data", {f"{name}.txt": b"x" for name in "abc"})
  settings = {"validation_files": held.format(here=tmp_path)}
  assert split_names(pattern.format(here=tmp_path), "train", **settings) == ["b.txt", "c.txt"]


# Texts that are something else


HEADS = {
  "gzip": b"\x1f\x8b\x08\x00" + bytes(range(200)),
  "xz": b"\xfd7zXZ\x00\x00\x04",
  "zip": b"PK\x03\x04\x14\x00",
  "UTF-16": "a text".encode("utf-16"),
  "zero bytes": "no mark".encode("utf-16-le"),
  "only zero bytes": bytes(5000),
  "Latin-1": "Stra\xdfe".encode("latin-1"),
  "byte order mark": "a text".encode("utf-8-sig"),
}


@pytest.mark.parametrize("kind", HEADS)
def test_texts_that_are_something_else_are_warned_of_once(kind, tmp_path, capsys):
  write(tmp_path, {f"{number}.txt": HEADS[kind] for number in range(5)} | {"validation/v.txt": "naïve 猫".encode()})
  data = DataConfig(task="text_files", files=str(tmp_path), validation_files=str(tmp_path / "validation"))
  config = batches.config(data, context=16, latents=4, sizes=(300,))
  batch = next(batches.train_loader(config, 16))
  assert batch["weights"].any(axis=1).all()
  lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("Held out")]
  (line,) = lines
  assert ".txt is not plain UTF-8" in line
  list(splits.eval_batches(config, splits.eval_documents(config)))
  assert not capsys.readouterr().err


def test_a_text_that_may_not_be_read_is_skipped_in_training_and_evaluation(tmp_path, capsys, monkeypatch):
  write(
    tmp_path, {f"{split}/{name}.txt": b"some text" for split in ("train", "validation") for name in ("a", "locked")}
  )
  open_file = open

  def refuse(path, *args, **kwargs):
    if str(path).endswith("locked.txt"):
      raise PermissionError(13, "Permission denied", str(path))
    return open_file(path, *args, **kwargs)

  monkeypatch.setattr("builtins.open", refuse)
  data = DataConfig(task="text_files", files=f"{tmp_path}/train", validation_files=f"{tmp_path}/validation")
  config = batches.config(data, context=16, latents=4, sizes=(300,))
  for batch in batches.take(batches.train_loader(config, 4), 2):
    assert batch["weights"].any(axis=1).all()
  scored = sum(np.sum(batch["weights"]) for batch in splits.eval_batches(config, splits.eval_documents(config)))
  assert scored == len(b"some text") + 1
  messages = capsys.readouterr().err
  assert messages.count("locked.txt cannot be read: Permission denied") == 2
