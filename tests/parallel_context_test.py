"""A long context sharded over devices: the same metrics, less memory per device, and only latents travel."""

import json

import numpy as np
import pytest

from tests import tiny
from tests.context_program import CONTEXT


@pytest.fixture(scope="module")
def measured():
  result = tiny.python("-m", "tests.context_program", num_devices=8)
  assert result.returncode == 0, result.stderr
  return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("mesh", ["context", "all"])
def test_training_and_evaluation_equal_those_of_one_device(mesh, measured):
  np.testing.assert_allclose(measured[mesh]["losses"], measured["one"]["losses"], rtol=1e-5)


@pytest.mark.parametrize("mesh", ["context", "all"])
def test_nothing_as_long_as_the_context_travels(mesh, measured):
  largest = measured[mesh]["largest_exchange"]
  assert 0 < largest < CONTEXT / 8, f"devices exchange an array of {largest} elements"


def test_each_device_holds_its_part_of_keys_and_values(measured):
  assert measured["context"]["temp_bytes"] < measured["one"]["temp_bytes"] / 6
