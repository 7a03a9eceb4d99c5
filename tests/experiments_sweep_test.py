"""Sweeps: one checkpoint scored with more or less compute, and the cost of each point."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from flax import linen as nn

from perceiver_ar_jax import loop
from perceiver_ar_jax.config import InputError, ModelConfig
from perceiver_ar_jax.evaluation import evaluate
from perceiver_ar_jax.experiments import sweep
from perceiver_ar_jax.models import architectures
from tests import tiny


@pytest.fixture(scope="module")
def config(tmp_path_factory):
  """Bytes of 20 short texts, whose positions count in every window, so that any context makes sense."""
  folder = tmp_path_factory.mktemp("texts")
  for number in range(20):
    (folder / f"{number}.txt").write_text("".join(f"line {line} of text {number}\n" for line in range(3)))
  rotary = {"model__position_encoding": "rotary", "model__position_sizes": ()}
  return tiny.config(data__task="text_files", data__files=str(folder), eval__max_sequences=4, train__steps=3, **rotary)


@pytest.fixture(scope="module")
def trained(config, tmp_path_factory):
  workdir = epath.Path(tmp_path_factory.mktemp("run"))
  assert loop.train(config, workdir) == 0
  return workdir


def test_a_sweep_scores_every_combination(config, trained):
  rows = sweep.sweep(config, trained, {"num_latents": [4, 32], "layers": [1, 2]})
  assert [(row["num_latents"], row["layers"], row["stride"]) for row in rows] == [
    (4, 1, 4), (4, 2, 4), (32, 1, 16), (32, 2, 16)
  ]  # fmt: skip
  evaluation = dataclasses.replace(config.eval, num_latents=32, stride=16)
  expected = evaluate.evaluate(dataclasses.replace(config, eval=evaluation), trained)
  by_point = {(row["num_latents"], row["layers"]): row for row in rows}
  np.testing.assert_allclose(by_point[32, 2]["nats_per_token"], expected["nats_per_token"], rtol=1e-6)
  assert all(row["num_tokens"] == expected["num_tokens"] for row in rows)
  assert by_point[32, 2]["flops_per_token"] > by_point[4, 2]["flops_per_token"] > by_point[4, 1]["flops_per_token"]
  assert len({row["nats_per_token"] for row in rows}) == 4

  written = json.loads((trained / "sweep-validation-3.json").read_text())
  assert written == rows and (trained / "sweep-validation-3.png").exists()


def test_a_shorter_context_scores_shorter_windows(config, trained):
  short, long = sweep.sweep(config, trained, {"context": [16, 32], "num_latents": [16]})
  assert short["num_tokens"] == long["num_tokens"] and short["nats_per_token"] != long["nats_per_token"]
  assert short["flops_per_token"] < long["flops_per_token"]


@pytest.mark.parametrize("layers, after", [(1, ()), (2, (0,)), (3, (0, 1))])
def test_a_model_cut_down_keeps_its_first_layers(layers, after):
  shape = {"vocab_size": 9, "max_context": 6, "num_latents": 3, "latent_width": 4, "num_cross_heads": 1}
  shape |= {"num_self_heads": 1, "position_encoding": "rotary"}
  full = ModelConfig(**shape, num_layers=4, cross_attend_after=(0, 1, 3))
  params = tiny.random_params(full)
  cut = ModelConfig(**shape, num_layers=layers, cross_attend_after=after)
  kept = sweep.first_layers(cut, params)
  expected = nn.meta.unbox(architectures.abstract_params(cut))
  assert jax.tree.map(jnp.shape, kept) == jax.tree.map(jnp.shape, expected)
  jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[0], y[0]), kept["layers_0"], params["layers_0"])


def test_points_that_exceed_the_model_are_explained(config, trained):
  with pytest.raises(InputError, match="--layers=3 exceeds the 2 layers"):
    sweep.sweep(config, trained, {"layers": [1, 3]})
  with pytest.raises(InputError, match="--num_latents=64 exceeds a context of 32"):
    sweep.sweep(config, trained, {"num_latents": [64]})
