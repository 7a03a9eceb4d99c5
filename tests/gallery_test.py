"""The gallery draws samples of each modality, and its page in the documentation is that of the stored samples."""

import json
import types

import numpy as np
import pytest
from PIL import Image

from benchmarks import gallery
from configs import copy, midi_files, text_files
from perceiver_ar_jax.config import resolve
from perceiver_ar_jax.data import music, rolls
from perceiver_ar_jax.sampling.prompts import Prompt
from perceiver_ar_jax.sampling.sampler import Sample, Sampler
from tests import tiny

FOLDER = tiny.ROOT / "docs" / "gallery"
SETTINGS = {"seed": 0, "temperature": 1.0, "top_p": 1.0}


def test_the_page_shows_the_stored_samples():
  sections = json.loads((FOLDER / "samples.json").read_text())
  assert FOLDER.with_suffix(".md").read_text() == gallery.page(sections, "gallery")
  items = [item for section in sections.values() for item in section["items"]]
  files = {item[kind] for item in items for kind in ("picture", "midi") if kind in item}
  assert {path.name for path in FOLDER.iterdir() if path.suffix != ".wav"} == files | {"samples.json"}
  assert sum((FOLDER / name).stat().st_size for name in files) < 1.5e6


def test_texts_are_shown_as_code():
  items = [{"caption": "continued:", "text": "## no heading\n\n  indented"}]
  page = gallery.page({"text": {"about": "Task text_files.", "items": items}}, "gallery")
  assert page.endswith("## text\n\nTask text_files.\n\ncontinued:\n\n    ## no heading\n\n      indented\n")


def test_the_prelude_has_eight_arpeggios_of_eight_notes():
  notes = music.decode(gallery.prelude())
  assert len(notes) == 64
  assert [note.pitch for note in notes[:8]] == [60, 64, 67, 72, 76, 67, 72, 76] == [note.pitch for note in notes[8:16]]
  assert notes[0].offset == pytest.approx(1.28) and notes[2].offset - notes[2].onset == pytest.approx(0.16)
  assert max(note.offset for note in notes) == pytest.approx(10.24)


def _sample(modality, prompt, events):
  task = types.SimpleNamespace(modality=modality)
  return Sample(Prompt(task, np.array(prompt), place=None), np.array([*prompt, *events]))


def test_performances_end_thirty_seconds_after_their_prompt():
  note_on, second = 3 + 60, 3 + 256 + 99
  cut, start = gallery.first_seconds(_sample("music", [2, note_on, second, second], [note_on, second] * 40))
  assert start == 2 and len(cut.events) == 4 + 60 + 1 and cut.events[-1] == note_on


def test_piano_rolls_end_thirty_seconds_after_their_prompt():
  key, end_of_frame = 3 + 40, rolls.VOCAB_SIZE - 1
  cut, start = gallery.first_seconds(_sample("rolls", [2, key, end_of_frame], [key, end_of_frame] * 200))
  assert start == 0.25 and (cut.events == end_of_frame).sum() == 1 + 30 * 4


@pytest.fixture
def sampler(monkeypatch):
  """Makes gallery.draw use random weights of a small model of a config."""

  def use(config, **model):
    small = {"latent_width": 16, "num_layers": 1, "num_cross_heads": 2, "num_self_heads": 2}
    config.model.update(small | {"num_latents": 16, "max_context": 48} | model)
    config.train.optimizer.update(warmup_steps=0)
    config.eval.update(stride=None)
    resolved = resolve(config)
    params = tiny.random_params(resolved.model)
    monkeypatch.setattr(Sampler, "from_workdir", lambda folder: Sampler(resolved, params))

  return use


def test_music_is_drawn_from_nothing_and_from_the_prelude(sampler, tmp_path, monkeypatch):
  monkeypatch.setattr(gallery, "_SECONDS", 1)
  sampler(midi_files.get_config())
  section = gallery.draw(tmp_path / "piano", tmp_path, SETTINGS, held_out=False)
  names = ["piano-0", "piano-1", "piano-prelude-0", "piano-prelude-1"]
  assert [item["midi"] for item in section["items"]] == [f"{name}.mid" for name in names]
  assert "seed 0, temperature 1, top_p 1" in section["about"]
  drawn = [music.read_notes((tmp_path / f"{name}.mid").read_bytes()) for name in names]
  assert drawn[2][:4, 0].tolist() == [60, 64, 67, 72] and drawn[2].tolist() != drawn[3].tolist()
  assert all(Image.open(tmp_path / f"{name}.png").width == 720 for name in names)


def test_texts_continue_held_out_documents(sampler, tmp_path):
  (tmp_path / "texts").mkdir()
  for name in ("a", "b"):
    (tmp_path / "texts" / f"{name}.txt").write_text(f"This is the text {name}. " * 40)
  config = text_files.get_config()
  config.data.update(files=str(tmp_path / "texts"), validation_fraction=0.5)
  sampler(config)
  section = gallery.draw(tmp_path / "text", tmp_path, SETTINGS, held_out=False)
  assert section["about"].startswith("Task text_files (texts), ")
  given, *continued = section["items"]
  assert given["caption"] == "A held-out document, its first 119 characters:"
  assert given["text"].startswith("This is the text ") and len(given["text"]) == 119
  assert [item["caption"] for item in continued] == ["continued:"] * 3, "there is one held-out document"
  assert len({item["text"] for item in continued}) == 3 and all(item["text"] for item in continued)


def test_numbers_are_skipped(sampler, tmp_path, capsys):
  sampler(copy.get_config(), position_sizes=(50,))
  assert gallery.draw(tmp_path, tmp_path, SETTINGS, held_out=False) is None
  assert "skipped, since samples of the task copy are numbers" in capsys.readouterr().out


def test_a_folder_without_a_model_is_skipped(tmp_path, capsys):
  assert gallery.draw(tmp_path, tmp_path, SETTINGS, held_out=False) is None
  assert "contains no run" in capsys.readouterr().out
