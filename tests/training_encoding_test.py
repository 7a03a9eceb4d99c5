"""A run refuses data settings under which its token ids or positions would mean something else."""

import dataclasses
import pathlib

import pytest

from perceiver_ar_jax.config import DataConfig, InputError, config_from_run
from perceiver_ar_jax.data import sources, splits, texts
from perceiver_ar_jax.evaluation import evaluate
from perceiver_ar_jax.sampling.sampler import Sampler
from perceiver_ar_jax.training import workdir as workdir_lib
from tests import batches, tiny


def config_of(**data):
  return dataclasses.replace(tiny.config(), data=DataConfig(**data))


def prepare(config, workdir):
  """Starts and ends a run in `workdir` before its first step."""
  with workdir_lib.own(config, workdir):
    pass


def begin(workdir, **data):
  """Makes `workdir` one of a run that has a checkpoint; returns its config."""
  prepare(config_of(**data), workdir)
  (workdir / "checkpoints" / "3").mkdir(parents=True)
  return config_from_run.load_config(workdir)


def write_model(path, seed):
  """A SentencePiece model; those of different seeds have equally many tokens."""
  import sentencepiece

  words = {1: "ba ko ri mu te", 2: "sha lo ne vi du"}[seed]
  with path.open("wb") as file:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter([words] * 20),
      model_writer=file,
      vocab_size=280,
      byte_fallback=True,
      hard_vocab_limit=False,
      minloglevel=2,
    )
  return str(path)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
  folder = tmp_path_factory.mktemp("models")
  return [write_model(folder / f"{seed}.model", seed) for seed in (1, 2)]


@pytest.mark.parametrize(
  ("task", "setting", "old", "new"),
  [
    ("image_files", "image_order", "pixel_raster", "rgb_planes"),
    ("image_files", "image_size", 32, 64),
    ("audio_codes", "codebook_size", 1024, 512),
    ("audio_codes", "code_levels", 8, 4),
    ("video_codes", "codebook_size", 1024, 1000),
  ],
)
def test_other_meanings_of_ids_and_positions_are_refused(task, setting, old, new, tmp_path):
  begin(tmp_path, task=task, **{setting: old})
  workdir_lib.check_model(config_of(task=task, files="elsewhere", **{setting: old}), tmp_path)
  changed = config_of(task=task, **{setting: new})
  for use in (workdir_lib.check_model, evaluate.restore, evaluate.evaluate, lambda c, w: Sampler.from_workdir(w, c)):
    with pytest.raises(InputError, match=f"another meaning: {setting} was {old!r} and is {new!r}"):
      use(changed, tmp_path)


def test_settings_that_the_task_does_not_use_may_differ(tmp_path):
  begin(tmp_path, task="photos32")
  workdir_lib.check_model(config_of(task="image_files", image_size=32, codebook_size=5), tmp_path)
  with pytest.raises(InputError, match="image_size was 32 and is 64"):
    workdir_lib.check_model(config_of(task="image_files"), tmp_path)
  with pytest.raises(InputError, match="image_order was 'pixel_raster' and is 'rgb_planes'"):
    workdir_lib.check_model(config_of(task="photos32_rgb_planes"), tmp_path)
  with pytest.raises(InputError, match="modality was 'image' and is 'text'"):
    workdir_lib.check_model(config_of(task="text_files"), tmp_path)


def test_another_sentencepiece_model_is_refused(models, tmp_path):
  saved = begin(tmp_path, task="text_files", sentencepiece=models[0])
  assert saved.data.sentencepiece_fingerprint == sources.sentencepiece_fingerprint(saved.data)
  for sentencepiece in (models[1], None):
    changed = config_of(task="text_files", sentencepiece=sentencepiece)
    for use in (workdir_lib.check_model, evaluate.evaluate, lambda c, w: Sampler.from_workdir(w, c)):
      with pytest.raises(InputError, match=r"data.sentencepiece_fingerprint was 'crc32 .*' and is "):
        use(changed, tmp_path)
    with pytest.raises(InputError, match="contains the checkpoints of another config: data.sentencepiece_fin"):
      prepare(changed, tmp_path)
  assert config_from_run.load_config(tmp_path) == saved, "a refused command has changed the run"


def test_a_model_replaced_at_its_path_is_refused_and_a_moved_one_is_not(models, tmp_path):
  path, moved, run = tmp_path / "a.model", tmp_path / "moved.model", tmp_path / "run"
  path.write_bytes(pathlib.Path(models[0]).read_bytes())
  saved = begin(run, task="text_files", sentencepiece=str(path))
  path.rename(moved)
  here = dataclasses.replace(saved, data=dataclasses.replace(saved.data, sentencepiece=str(moved)))
  workdir_lib.check_model(here, run)
  prepare(here, run)
  moved.write_bytes(pathlib.Path(models[1]).read_bytes())
  for use in (workdir_lib.check_model, prepare):
    with pytest.raises(InputError, match="data.sentencepiece_fingerprint was '.*' and is "):
      use(here, run)


def test_weights_load_without_the_model_and_text_does_not(tmp_path, models):
  path, run = tmp_path / "gone.model", tmp_path / "run"
  path.write_bytes(pathlib.Path(models[0]).read_bytes())
  saved = begin(run, task="text_files", sentencepiece=str(path))
  path.unlink()
  texts.tokenizer.cache_clear()
  workdir_lib.check_model(saved, run)
  with pytest.raises(InputError, match=r"gone.model cannot be read: No such file.*Set it to where the file is now"):
    next(splits.eval_batches(saved, splits.eval_documents(saved)))


def test_runs_without_a_fingerprint_load(models, tmp_path):
  saved = begin(tmp_path, task="text_files", sentencepiece=models[0])
  path = tmp_path / "config.json"
  lines = [line for line in path.read_text().splitlines() if "fingerprint" not in line]
  path.write_text("\n".join(lines))
  older = config_from_run.load_config(tmp_path)
  assert older.data.sentencepiece_fingerprint is None
  workdir_lib.check_model(older, tmp_path)
  # Which model an older run was trained with is known for sure only to its data position, so none is recorded here.
  prepare(older, tmp_path)
  assert config_from_run.load_config(tmp_path) == older != saved


def test_a_new_run_records_its_model_and_bytes_have_none(models, tmp_path):
  assert begin(tmp_path / "bytes", task="text_files").data.sentencepiece_fingerprint is None
  data = DataConfig(task="text_files", sentencepiece=models[0])
  config = batches.config(data, context=16, latents=4, sizes=(300,), vocab_size=300)
  prepare(config, tmp_path / "run")
  prepare(config, tmp_path / "run")
  assert config_from_run.load_config(tmp_path / "run").data.sentencepiece_fingerprint.startswith("crc32 ")
