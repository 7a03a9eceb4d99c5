"""The benchmark measures the production step of any config."""

from benchmarks import step
from tests import tiny


def test_a_step_is_measured_at_any_context():
  config = step.at_context(tiny.config(), 64)
  assert config.model.position_sizes == (66,)
  figures = step.measure(config, steps=2, seconds=60)
  assert figures["context"] == 64 and len(figures["all_seconds"]) == 2
  assert figures["targets_per_second"] > 0 and figures["temp_bytes"] > 0
  # Weights, two moments of each, and two counts of steps.
  assert figures["state_bytes"] == 4 * (3 * figures["num_params"] + 2)
