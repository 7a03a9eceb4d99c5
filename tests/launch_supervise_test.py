"""The supervisor starts again what died, and knows when not to."""

import os
import signal
import subprocess
import time

import pytest

from tests import tiny

SCRIPT = str(tiny.ROOT / "launch" / "supervise.sh")
ENVIRONMENT = os.environ | {"PAUSE_SECONDS": "0", "MAX_RESTARTS": "3"}


def _supervise(folder, codes: str) -> tuple[int, int]:
  """(exit code, starts) of a command that ends with one of `codes` after the other, and with the last one for ever."""
  program = 'echo x >> starts; n=$(wc -l < starts); set -- $CODES; exit "${!n:-${!#}}"'
  result = subprocess.run(
    [SCRIPT, "bash", "-c", program], cwd=folder, env=ENVIRONMENT | {"CODES": codes}, capture_output=True, timeout=30
  )
  return result.returncode, (folder / "starts").read_text().count("x")


@pytest.mark.parametrize(
  ("codes", "expected"),
  [("137 75 0", (0, 3)), ("0", (0, 1)), ("1", (1, 1)), ("134", (134, 4))],
  ids=["dies_twice", "done", "wrong_settings", "dies_for_ever"],
)
def test_what_dies_is_started_again(codes, expected, tmp_path):
  assert _supervise(tmp_path, codes) == expected


def test_a_signal_is_handed_on_and_ends_it(tmp_path):
  program = "trap 'sleep 0.2; exit 143' TERM; touch ready; while true; do sleep 0.05; done"
  process = subprocess.Popen([SCRIPT, "bash", "-c", program], cwd=tmp_path, env=ENVIRONMENT)
  while not (tmp_path / "ready").exists():
    time.sleep(0.02)
  process.send_signal(signal.SIGTERM)
  assert process.wait(10) == 143
