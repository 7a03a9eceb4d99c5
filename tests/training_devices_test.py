"""Eight devices compute what one computes, and resume exactly."""

import json
import shutil

import jax
import numpy as np
import pytest

from perceiver_ar_jax import loop
from perceiver_ar_jax.config import InputError
from perceiver_ar_jax.evaluation import evaluate
from tests import tiny

pytestmark = pytest.mark.slow

# Widths and rows that eight devices can share; chunks that do not divide the context.
SHAPE = {
  "model__latent_width": 32,
  "model__attention": "streamed",
  "model__attention_chunk": 5,
  "train__batch_size": 16,
  "train__steps": 6,
  "train__optimizer__schedule": "constant",  # so that a shorter run is the first part of a longer one
}


def _train(workdir, **overrides) -> int:
  return loop.train(tiny.config(**SHAPE | overrides), workdir)


def _evaluate(workdir, **overrides) -> None:
  evaluate.evaluate(tiny.config(**SHAPE | overrides), workdir)


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
  """The workdir of a finished run on one device."""
  workdir = tmp_path_factory.mktemp("one")
  assert _train(workdir) == 0
  return workdir


def test_eight_devices_train_as_one_and_resume_exactly(one_device, eight_devices, tmp_path):
  """On a mesh of three axes; the run is resumed from a copy of its checkpoint of step 3."""
  mesh = {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2}
  whole, resumed = tmp_path / "whole", tmp_path / "resumed"
  assert eight_devices(_train, whole, **mesh) == 0
  shutil.copytree(whole, resumed)
  shutil.rmtree(resumed / "checkpoints" / "6")
  assert eight_devices(_train, resumed, **mesh) == 0
  losses, expected = tiny.losses(whole), tiny.losses(one_device)
  assert tiny.losses(resumed) == losses and losses.keys() == expected.keys()
  np.testing.assert_allclose([losses[step] for step in losses], [expected[step] for step in losses], rtol=1e-5)


def test_every_metric_of_an_evaluation_equals_that_of_one_device(one_device, eight_devices):
  expected = _metrics(one_device)
  mesh = {"mesh__data": 2, "mesh__fsdp": 2, "mesh__context": 2, "eval__batch_size": 4}
  (one_device / "eval-validation-6.json").unlink()
  eight_devices(_evaluate, one_device, **mesh)
  metrics = _metrics(one_device)
  assert len(metrics) > 30 and metrics.keys() == expected.keys()
  for name, value in expected.items():
    assert metrics[name] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-5)), name


def _metrics(workdir) -> dict:
  """The metrics of the evaluation after the last step, by path."""
  result = json.loads((workdir / "eval-validation-6.json").read_text())
  return {jax.tree_util.keystr(path): value for path, value in jax.tree.leaves_with_path(result)}


def test_a_batch_that_the_mesh_does_not_divide_is_explained(eight_devices, tmp_path):
  with pytest.raises(InputError, match="train.batch_size=12 is not divisible by 8"):
    eight_devices(_train, tmp_path, train__batch_size=12)
