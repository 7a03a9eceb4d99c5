"""Eight devices compute what one does, and resume as exactly; each run in a process of its own."""

import json

import jax
import numpy as np
import pytest

from tests import tiny

# Widths and rows that eight devices can share; chunks that do not divide the context.
SHAPE = {
  "model__latent_width": 32,
  "model__attention": "streamed",
  "model__attention_chunk": 5,
  "train__batch_size": 16,
  "train__steps": 6,
}


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
  """The finished run of one device."""
  workdir = tmp_path_factory.mktemp("one")
  result = tiny.run(workdir, **SHAPE)
  assert result.returncode == 0, result.stderr
  return workdir


@pytest.mark.parametrize(
  "mesh",
  [
    {"mesh__data": 8},
    {"mesh__data": 1, "mesh__fsdp": 8},
    {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2, "train__microbatches": 2, "model__dropout": 0.0},
  ],
  ids=["data", "fsdp", "all_with_microbatches"],
)
def test_losses_equal_those_of_one_device(mesh, one_device, tmp_path):
  expected = tiny.losses(one_device)
  if "model__dropout" in mesh:  # microbatches draw dropout of their own, so compare without it
    single = tiny.run(tmp_path / "single", **SHAPE, model__dropout=0.0)
    assert single.returncode == 0, single.stderr
    expected = tiny.losses(tmp_path / "single")
  result = tiny.run(tmp_path / "eight", num_devices=8, **SHAPE, **mesh)
  assert result.returncode == 0, result.stderr
  ours = tiny.losses(tmp_path / "eight")
  assert ours.keys() == expected.keys()
  np.testing.assert_allclose([ours[step] for step in ours], [expected[step] for step in ours], rtol=1e-5)


def test_every_figure_of_an_evaluation_equals_that_of_one_device(one_device):
  expected = _metrics(one_device)
  mesh = {"mesh__data": 2, "mesh__fsdp": 2, "mesh__context": 2, "eval__batch_size": 4}
  result = tiny.run(one_device, "--mode=eval", num_devices=8, **SHAPE, **mesh)
  assert result.returncode == 0, result.stderr
  ours = _metrics(one_device)
  assert len(ours) > 30 and ours.keys() == expected.keys()
  for name, value in expected.items():
    assert ours[name] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-5)), name


def _metrics(workdir) -> dict:
  """The metrics of the evaluation after the last step, by path."""
  result = json.loads((workdir / "eval-validation-6.json").read_text())
  return {jax.tree_util.keystr(path): value for path, value in jax.tree.leaves_with_path(result)}


def test_eight_devices_resume_exactly(tmp_path):
  mesh = {"mesh__data": 2, "mesh__fsdp": 4}
  for workdir, stops in ((tmp_path / "whole", [6]), (tmp_path / "parts", [3, 6])):
    for steps in stops:
      # A constant rate, so that the first part of a shorter run is the same run.
      result = tiny.run(
        workdir, num_devices=8, **{**SHAPE, **mesh, "train__steps": steps}, train__optimizer__schedule="constant"
      )
      assert result.returncode == 0, result.stderr
  assert tiny.losses(tmp_path / "parts") == tiny.losses(tmp_path / "whole")


def test_a_batch_that_the_mesh_does_not_divide_is_explained(tmp_path):
  result = tiny.run(tmp_path, num_devices=8, train__batch_size=12, model__latent_width=32)
  tiny.expect_error(result, "train.batch_size=12 does not divide over the 8 parts")
