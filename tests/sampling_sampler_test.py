"""Samples in Python and from the command line: all kinds of prompts, long samples, several devices, mistakes."""

import concurrent.futures
import dataclasses
import json
import pathlib
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
from etils import epath

from configs import image_files, midi_files, text_files
from perceiver_ar_jax import config as config_lib
from perceiver_ar_jax.config import InputError
from perceiver_ar_jax.data import EOS, NUM_SPECIAL, SOS, midi, music, tasks
from perceiver_ar_jax.evaluation import evaluate
from perceiver_ar_jax.parallel.mesh import make_mesh
from perceiver_ar_jax.sampling import prompts, write
from perceiver_ar_jax.sampling.sampler import Sampler
from perceiver_ar_jax.training import checkpoint, optimizer
from perceiver_ar_jax.training import step as step_lib
from perceiver_ar_jax.training import workdir as workdir_lib
from tests import tiny

MODEL = dict(
  latent_width=16, num_layers=1, num_cross_heads=2, num_self_heads=2, num_latents=16, max_context=48, dtype="float32"
)


def resolve(module, data=None, model=None, sample=None):
  config = module.get_config()
  config.model.update(MODEL | (model or {}))
  config.data.update(data or {})
  config.sample.update(sample or {})
  config.train.update(batch_size=2)
  config.train.optimizer.update(warmup_steps=0)
  config.eval.update(batch_size=2, stride=None)
  return config_lib.resolve(config)


def sampler(config) -> Sampler:
  """Returns a sampler of random weights whose logits differ by some nats."""
  params = tiny.random_params(config.model)
  params["to_logits"]["kernel"] *= 5
  return Sampler(config, params)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
  """A model of bytes whose task has a training text and an empty held-out text."""
  folder = tmp_path_factory.mktemp("texts")
  for name, content in (("a", "some"), ("b", "")):
    (folder / f"{name}.txt").write_text(content)
  return sampler(resolve(text_files, dict(files=str(folder), validation_files=str(folder / "b.txt"))))


def test_a_sample_continues_through_many_contexts_and_compiles_once(text):
  long = text("Once", length=200, num_samples=3, batch_size=3, seed=5)
  for sample in long:
    assert sample.value.startswith("Once") and sample.events[0] == SOS
    assert sample.num_new == 200 or sample.events[-1] == EOS
    assert (sample.events[1:-1] >= NUM_SPECIAL).all()
  assert max(sample.num_new for sample in long) > 2 * text.config.model.max_context
  again = text("Once", length=200, num_samples=3, batch_size=3, seed=5)
  assert [sample.value for sample in again] == [sample.value for sample in long]
  assert text("Once", length=50, num_samples=3, batch_size=3, seed=6)[0].value != long[0].value[:54]
  text("Another beginning, of another length.", length=20, num_samples=3, batch_size=3, temperature=0.5, top_k=7)
  assert text._draw._cache_size() == 1


@pytest.mark.slow
def test_samples_do_not_depend_on_the_batch_size(text):
  together = text("Ab", length=60, num_samples=3, batch_size=3)
  one_by_one = text("Ab", length=60, num_samples=3, batch_size=1)
  assert [sample.value for sample in together] == [sample.value for sample in one_by_one]


@pytest.mark.slow
def test_the_cache_is_exact_if_all_latents_are_recomputed_for_each_token(text):
  config = dataclasses.replace(text.config, sample=dataclasses.replace(text.config.sample, kept_latents=16))
  cached = Sampler(config, text.params)("Once", length=100, num_samples=2, temperature=0)
  config = dataclasses.replace(config, sample=dataclasses.replace(config.sample, cache=False))
  exact = Sampler(config, text.params)("Once", length=100, num_samples=2, temperature=0)
  np.testing.assert_array_equal(cached[0].events, exact[0].events)


def test_the_prompt_may_be_longer_than_the_context_and_rows_have_prompts_of_their_own(text, capsys):
  chosen = [
    *prompts.find(text.config, text.task, "x" * 100, 1),
    *prompts.find(text.config, text.task, "short", 1),
  ]
  first, second = text(chosen, length=30, num_samples=2, batch_size=2)
  assert "101 tokens is longer than the context" in capsys.readouterr().err
  assert first.value.startswith("x" * 100) and second.value.startswith("short")
  alone = text("short", length=30, num_samples=2, batch_size=2)[1]  # the same number, so the same random keys
  assert alone.events[:12].tolist() == second.events[:12].tolist()


def test_likelihoods_of_given_texts(text):
  result = text.score("What is the likelihood of this?")
  assert result["num_tokens"] == 32 and result["num_bytes"] == 31  # EOS is a token
  assert result["nats_per_token"] * 32 == pytest.approx(result["bits_per_byte"] * 31 * np.log(2))
  assert text.score("What is the likelihood of this?") == result


def test_an_empty_file_is_refused_and_one_of_spaces_is_scored(text, tmp_path):
  (tmp_path / "empty").write_text("")
  with pytest.raises(InputError, match="empty is empty"):
    text.score(tmp_path / "empty")
  (tmp_path / "spaces").write_text(" \n")
  result = text.score(tmp_path / "spaces")
  assert result["bits_per_byte"] == pytest.approx(result["bits_per_token"] * 3 / 2)  # EOS is a token


def test_scores_of_one_sampler_compile_once(text, monkeypatch):
  traces = []
  make_eval_step = evaluate.make_eval_step

  def counting(config):
    step = make_eval_step(config)

    def eval_step(params, batch):
      traces.append({name: x.shape for name, x in batch.items()})
      return step(params, batch)

    return eval_step

  monkeypatch.setattr(evaluate, "make_eval_step", counting)
  fresh = Sampler(text.config, text.params)
  results = [fresh.score(prompt) for prompt in ("One text.", "Another text.", "A third, of two windows" * 3)]
  assert len({result["bits_per_byte"] for result in results}) == 3
  assert len(traces) == 1


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """The current folder, with some files."""
  (tmp_path / "sub folder").mkdir()
  for name in ("a.txt", "b.txt", "README", "data", "sub folder/c"):
    (tmp_path / name).write_text(f"content of {name}")
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv("HOME", str(tmp_path))
  return tmp_path


def _contents(task, documents):
  return [task.decode(document.read(0, len(document))) for document in documents]


def test_in_python_a_str_is_a_text_and_a_path_is_a_file(text, folder):
  for prompt in ("a.txt", str(folder / "a.txt"), "/etc/passwd", "**", "*.txt", "~/a.txt", "@a.txt", "README"):
    assert _contents(text.task, prompts.read(text.task, prompt)) == [prompt]
    assert text.score(prompt)["num_bytes"] == len(prompt)
  assert text("a.txt", length=3, num_samples=3, batch_size=3)[0].value.startswith("a.txt")
  for path, names in (("a.txt", ["a.txt"]), ("~/README", ["README"]), ("*.txt", ["a.txt", "b.txt"])):
    expected = [f"content of {name}" for name in names]
    assert _contents(text.task, prompts.read(text.task, pathlib.Path(path))) == expected
  assert text.score(pathlib.Path("a.txt"))["num_bytes"] == len("content of a.txt")
  assert text(pathlib.Path("README"), length=3, num_samples=3, batch_size=3)[0].value.startswith("content of README")
  for path, problem in (("missing.txt", "does not exist"), ("sub folder", "is a folder"), ("*.mid", "matches no file")):
    for use in (text.score, text):
      with pytest.raises(InputError, match=problem):
        use(pathlib.Path(path))


def test_a_str_for_a_task_that_reads_files_is_an_error_with_the_fix(folder):
  task = tasks.get_tasks(config_lib.DataConfig(task="midi_files"), 100)[0][0]
  with pytest.raises(InputError, match=r"'a.mid' is a str, .* midi_files reads files: give pathlib.Path\('a.mid'\)"):
    prompts.read(task, "a.mid")


@pytest.mark.parametrize(
  ("setting", "contents"),
  [
    ("Once upon a time", ["Once upon a time"]),
    ("README", ["README"]),
    ("**", ["**"]),
    ("1/2 of it", ["1/2 of it"]),
    ("def f(a, b):\n  return a/b", ["def f(a, b):\n  return a/b"]),
    ("a.txt", ["content of a.txt"]),
    ("./README", ["content of README"]),
    ("~/README", ["content of README"]),
    ("@README", ["content of README"]),
    ("@data", ["content of data"]),
    ("@sub folder/c", ["content of sub folder/c"]),
    ("*.txt", ["content of a.txt", "content of b.txt"]),
    ("missing.txt", None),
    ("my missing file.TXT", None),
    ("missing/file", None),
    ("/missing file", None),
    ("../missing file", None),
    ("@missing", None),
    ("*.md", None),
  ],
)
def test_on_the_command_line_what_looks_like_a_path_is_a_file_that_must_exist(setting, contents, text, folder):
  if contents is None:
    with pytest.raises(InputError, match="does not exist|matches no file"):
      prompts.read(text.task, prompts.parse(text.task, setting))
  else:
    assert _contents(text.task, prompts.read(text.task, prompts.parse(text.task, setting))) == contents


def test_the_prompt_of_the_config_follows_the_rule_of_the_command_line(text, folder, monkeypatch):
  def with_prompt(prompt):
    return dataclasses.replace(text.config, sample=dataclasses.replace(text.config.sample, prompt=prompt, length=1))

  monkeypatch.setattr(Sampler, "from_workdir", lambda workdir, config: Sampler(config, text.params))
  with pytest.raises(InputError, match="missing.txt does not exist"):
    write.score(with_prompt("missing.txt"), folder)
  assert not (folder / "score.json").exists()
  assert write.score(with_prompt("a.txt"), folder)["num_bytes"] == len("content of a.txt")
  assert write.score(with_prompt("a text"), folder)["num_bytes"] == len("a text")
  with pytest.raises(InputError, match="missing.txt does not exist"):
    write.sample(with_prompt("missing.txt"), folder)
  assert not list((folder / "samples").iterdir())
  assert write.sample(with_prompt("@README"), folder)[0].value.startswith("content of README")


def test_every_call_writes_samples_of_its_own(text, tmp_path, monkeypatch):
  monkeypatch.setattr(Sampler, "from_workdir", lambda workdir, config: text)
  values = []
  for temperature in (0.0, 1.0):
    monkeypatch.setattr(text, "config", resolve(text_files, sample=dict(length=20, temperature=temperature)))
    values.append([sample.value for sample in write.sample(text.config, tmp_path)])
  assert values[0] != values[1]
  assert {path.name for path in (tmp_path / "samples").iterdir()} == {"0-0", "0-1", "samples.json"}
  for number in (0, 1):
    folder = tmp_path / "samples" / f"0-{number}"
    report = json.loads((folder / "samples.json").read_text())
    assert {path.name for path in folder.iterdir()} == {*report["files"], "samples.json"}
    assert [(folder / name).read_text() for name in report["files"]] == values[number]
    assert report["settings"]["temperature"] == number
  latest = json.loads((tmp_path / "samples" / "samples.json").read_text())
  assert latest["folder"] == "0-1" and latest["files"] == [f"0-1/{name}" for name in report["files"]]
  assert [sample["files"] for sample in latest["samples"]] == [[name] for name in latest["files"]]


def test_calls_at_the_same_time_get_different_folders(tmp_path):
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    folders = list(pool.map(lambda _: write._new_folder(epath.Path(tmp_path) / "samples", 7), range(32)))
  assert sorted(folder.name for folder in folders) == sorted(f"7-{number}" for number in range(32))


@pytest.mark.parametrize(
  ("prompt", "settings", "words"),
  [
    ("x", {"temperature": -0.5}, "temperature=-0.5 must be 0"),
    ("x", {"temperature": float("nan")}, "temperature=nan"),
    ("x", {"top_p": 0.0}, "top_p=0.0 must be in"),
    ("x", {"top_p": 1.5}, "top_p=1.5 must be in"),
    ("x", {"top_k": -1}, "top_k=-1"),
    ("x", {"length": 0}, "length=0 must be at least 1"),
    ("x", {"prompt_tokens": 0}, "prompt_tokens=0 must be at least 1"),
    ("x", {"seed": 2**32}, "sample.seed=4294967296 must be in"),
    ("x", {"seed": -1}, "sample.seed=-1 must be in"),
    ("x", {"temprature": 1}, "Unknown setting 'temprature'.*Did you mean 'temperature'"),
    ("  ", {}, "prompt is empty"),
    ("data", {}, "'validation' of text_files contains no document that can be read: .*b.txt has nothing to predict"),
    (np.array([], np.int32), {}, "no events"),
    (np.array([2, 999]), {}, "unknown token 999"),
  ],
)
def test_mistakes_are_named(text, prompt, settings, words):
  with pytest.raises(InputError, match=words):
    text(prompt, **settings)


@pytest.mark.slow
def test_transformer_xl_samples_without_a_cache_alone():
  xl = {
    "architecture": "transformer_xl",
    "position_encoding": "relative",
    "segment": 8,
    "conv_taps": 0,
    "qk_norm": False,
  }
  with pytest.raises(InputError, match="set --config.sample.cache=False"):
    Sampler(resolve(text_files, model=xl))
  exact = sampler(resolve(text_files, model=xl, sample={"cache": False}))
  (sample,) = exact("Once", length=5, num_samples=1, batch_size=1)
  assert sample.value.startswith("Once") and sample.num_new == 5


@pytest.mark.slow
def test_a_picture_is_completed_from_its_top_half(tmp_path):
  rng = np.random.default_rng(0)
  for index in range(4):
    PIL.Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(tmp_path / f"{index}.png")
  model = dict(max_context=192, position_sizes=(10, 10, 5))
  config = resolve(image_files, dict(files=str(tmp_path), image_size=8), model)
  samples = sampler(config)(tmp_path / "*.png", num_samples=5, batch_size=5)
  assert [len(sample.events) for sample in samples] == [193] * 5
  given = np.asarray(PIL.Image.open(tmp_path / "1.png"))
  np.testing.assert_array_equal(samples[1].value[:4], given[:4])
  assert (samples[1].value[4:] != given[4:]).mean() > 0.9
  assert write.picture(samples[0]).shape == (128, 128, 3)
  sheet = write.grid(samples)  # 4 rows: the given half, up to 2 completions, the original
  assert sheet.shape == (4 * 130 + 2, 4 * 130 + 2, 3)


@pytest.mark.slow
def test_music_and_codes_begin_with_files_and_keep_their_grammar(tmp_path):
  notes = [music.Note(60 + index, 64, 0.1 * index, 0.1 * index + 0.1) for index in range(6)]
  (tmp_path / "a.mid").write_bytes(midi.write(notes))
  config = resolve(midi_files, dict(files=str(tmp_path)), dict(num_cross_heads=1, rotary_fraction=0.5))
  (sample,) = sampler(config)(tmp_path / "a.mid", num_samples=1, length=40)
  assert [note.pitch for note in sample.value][:6] == [60, 61, 62, 63, 64, 65] and sample.num_new > 0
  write.write_files(epath.Path(tmp_path), sample, "new")
  assert (tmp_path / "new.png").exists() and len(music.read_notes((tmp_path / "new.mid").read_bytes()))

  from configs import audio_codes

  np.save(tmp_path / "a.npy", np.arange(20).reshape(10, 2) % 8)
  data = dict(files=str(tmp_path), codebook_size=8, code_levels=2, min_crop=1)
  config = resolve(audio_codes, data, dict(max_context=30, vocab_size=19))
  (sample,) = sampler(config)(tmp_path / "a.npy", num_samples=1, length=50, prompt_tokens=8)
  levels = (sample.events[1:] - NUM_SPECIAL) // 8
  np.testing.assert_array_equal(levels, np.arange(57) % 2)
  assert sample.value.shape == (28, 2)


def _draw(workdir) -> list[list[int]]:
  samples = Sampler.from_workdir(workdir)("data", num_samples=6, batch_size=6, temperature=0.7)
  return [sample.events.tolist() for sample in samples]


@pytest.mark.slow
def test_eight_devices_draw_what_one_draws(trained, eight_devices, tmp_path):
  config = json.loads((trained / "config.json").read_text())
  (tmp_path / "checkpoints").symlink_to(trained / "checkpoints")
  config["mesh"] = {"data": 2, "fsdp": 2, "tensor": 1, "context": 2}
  (tmp_path / "config.json").write_text(json.dumps(config))
  assert eight_devices(_draw, tmp_path) == _draw(trained)


def test_the_command_writes_samples_and_names_what_is_missing(copy_of_trained, tmp_path):
  result = tiny.run(copy_of_trained, "--mode=sample", "--config.sample.prompt=data", "--config.sample.num_samples=2")
  assert result.returncode == 0, result.stderr
  samples = copy_of_trained / "samples"
  report = json.loads((samples / "samples.json").read_text())
  assert report["seed"] == 0 and report["tokens_per_second"] > 0 and len(report["files"]) == 2
  assert all(len(np.load(samples / name)) == 33 for name in report["files"])
  with pytest.raises(InputError, match="contains no run"):
    Sampler.from_workdir(tmp_path)


def sample_without_tensorflow(folder: pathlib.Path) -> None:
  """Writes checkpoints of untrained models of bytes, pictures and music, and samples from them."""
  text = resolve(text_files, sample=dict(prompt="Once", length=20))
  image_model = dict(max_context=192, position_sizes=(10, 10, 5))
  images = resolve(image_files, dict(image_size=8), image_model)
  notes = resolve(midi_files, model=dict(num_cross_heads=1, rotary_fraction=0.5), sample=dict(length=20))
  for name, config in {"text": text, "images": images, "music": notes}.items():
    workdir, mesh = folder / name, make_mesh(config.mesh)
    params, rule = tiny.random_params(config.model), optimizer.make_optimizer(config.train.optimizer, 1)
    initial = step_lib.init_state(config, rule, mesh, params)
    with workdir_lib.own(config, epath.Path(workdir)), checkpoint.Checkpointer(epath.Path(workdir)) as checkpointer:
      checkpointer.save(initial, data=None)
    assert len(write.sample(config, workdir)) == 4
  write.score(text, folder / "text")
  imported = {"tensorflow", "tensorflow_datasets", "seqio"} & set(sys.modules)
  assert not imported, imported


@pytest.mark.slow
def test_samples_and_scores_need_no_tensorflow(tmp_path):
  call = f"import pathlib; from tests import {__name__.rpartition('.')[2]} as test"
  call += f"; test.sample_without_tensorflow(pathlib.Path({str(tmp_path)!r}))"
  result = subprocess.run([sys.executable, "-c", call], cwd=tiny.ROOT, capture_output=True, text=True)
  assert result.returncode == 0, result.stderr
  assert (tmp_path / "text" / "score.json").exists()
  assert {path.suffix for path in tmp_path.glob("*/samples/0-0/*")} >= {".txt", ".png", ".mid", ".json"}
