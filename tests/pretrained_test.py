"""The weights in the repository: they score what their card states, and they can be sampled."""

import json
import shutil

import pytest

from perceiver_ar_jax.config import config_from_run
from perceiver_ar_jax.evaluation import evaluate
from tests import tiny

FOLDER = tiny.ROOT / "pretrained"


@pytest.fixture
def weights(request, tmp_path):
  return shutil.copytree(FOLDER / request.param, tmp_path / request.param)


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["photos32"], indirect=True)
def test_photographs_cost_what_the_card_states(weights):
  result = evaluate.evaluate(config_from_run.load_config(weights), weights)
  card = (weights / "README.md").read_text()
  assert f"| validation | 1500 | {result['bits_per_dim']:.3f} bits/dim |" in card
  for name, bits in result["compressors"].items():
    assert f"{bits:.3f}" in card, name


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["recall"], indirect=True)
def test_answers_are_recalled_as_the_card_states(weights):
  result = evaluate.evaluate(config_from_run.load_config(weights), weights)
  assert f"| {result['accuracy']:.4f} | 8,192 |" in (weights / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["photos32", "recall", "tinyshakespeare"], indirect=True)
def test_samples_are_drawn_by_one_command(weights):
  result = tiny.main(
    f"--workdir={weights}", "--mode=sample", "--config.sample.num_samples=1", "--config.sample.length=40"
  )
  assert result.returncode == 0, result.stderr
  assert len(json.loads((weights / "samples" / "samples.json").read_text())["samples"]) == 1


def test_weights_are_small():
  sizes = {path: path.stat().st_size for path in FOLDER.rglob("*.safetensors")}
  assert sizes and max(sizes.values()) < 7e6 and sum(sizes.values()) < 20e6
