"""Eight devices compute what one computes, and resume exactly."""

import json

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
  mesh = {"mesh__data": 2, "mesh__fsdp": 4}
  for workdir, stops in ((tmp_path / "whole", [6]), (tmp_path / "parts", [3, 6])):
    for steps in stops:
      assert eight_devices(_train, workdir, **mesh, train__steps=steps) == 0
  assert tiny.losses(tmp_path / "parts") == tiny.losses(tmp_path / "whole")
  _assert_same_losses(tmp_path / "whole", one_device)


def test_microbatches_on_a_mesh_of_three_axes_train_as_one_device(eight_devices, tmp_path):
  settings = {"model__dropout": 0.0}  # microbatches draw their own dropout
  mesh = {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2, "train__microbatches": 2}
  assert _train(tmp_path / "one", **settings) == 0
  assert eight_devices(_train, tmp_path / "eight", **settings, **mesh) == 0
  _assert_same_losses(tmp_path / "eight", tmp_path / "one")


def _assert_same_losses(workdir, expected_workdir) -> None:
  losses, expected = tiny.losses(workdir), tiny.losses(expected_workdir)
  assert losses.keys() == expected.keys()
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
