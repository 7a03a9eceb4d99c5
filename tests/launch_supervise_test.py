"""The supervisor restarts what died, and knows when not to."""

import os
import signal
import subprocess
import time

import pytest

from tests import tiny

pytestmark = pytest.mark.slow

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
  [("137 75 0", (0, 3)), ("0", (0, 1)), ("1", (1, 1)), ("75 1", (1, 2)), ("134", (134, 4))],
  ids=["dies_twice", "done", "bad_config", "full_disk_then_bad_config", "dies_for_ever"],
)
def test_what_dies_is_restarted(codes, expected, tmp_path):
  assert _supervise(tmp_path, codes) == expected


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
@pytest.mark.parametrize("whole_group", [False, True])
def test_a_signal_is_forwarded_once_and_ends_it(number, whole_group, tmp_path):
  """A terminal sends Ctrl-C and its own end to the whole process group."""
  name = signal.Signals(number).name.removeprefix("SIG")
  trap = f"trap 'echo x >> signals; sleep 0.2; exit {128 + number}' {name}"
  program = f"{trap}; touch ready; while true; do sleep 0.05; done"
  process = subprocess.Popen([SCRIPT, "bash", "-c", program], cwd=tmp_path, env=ENVIRONMENT, start_new_session=True)
  while not (tmp_path / "ready").exists():
    time.sleep(0.02)
  (os.killpg if whole_group else os.kill)(process.pid, number)
  assert process.wait(10) == 128 + number
  assert (tmp_path / "signals").read_text() == "x\n"
