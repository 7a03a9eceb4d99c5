"""The weights in the repository: they score what their card states, and they can be sampled."""

import json
import shutil

import pytest

from perceiver_ar_jax.config import config_from_run
from perceiver_ar_jax.evaluation import evaluate
from tests import tiny

FOLDER = tiny.ROOT / "pretrained"


@pytest.fixture
def photos32(tmp_path):
  return shutil.copytree(FOLDER / "photos32", tmp_path / "photos32")


@pytest.mark.slow
def test_photographs_cost_what_the_card_states(photos32):
  config = config_from_run.load_config(photos32)
  result = evaluate.evaluate(config, photos32)
  card = (photos32 / "README.md").read_text()
  assert f"| validation | 480 | {result['bits_per_dim']:.3f} bits/dim |" in card
  for name, bits in result["compressors"].items():
    assert f"{bits:.3f}" in card, name


@pytest.mark.slow
def test_photographs_are_sampled_by_one_command(photos32):
  result = tiny.main(
    f"--workdir={photos32}", "--mode=sample", "--config.sample.num_samples=1", "--config.sample.length=40"
  )
  assert result.returncode == 0, result.stderr
  assert len(json.loads((photos32 / "samples" / "samples.json").read_text())["samples"]) == 1


def test_weights_are_small():
  sizes = {path: path.stat().st_size for path in FOLDER.rglob("*.safetensors")}
  assert sizes and max(sizes.values()) < 6e6 and sum(sizes.values()) < 20e6
