"""What commands exit with: 1 only for the user's own mistakes, so that everything else is restarted."""

import errno
import sys

import jax
import pytest

from perceiver_ar_jax import command_line
from perceiver_ar_jax.config import InputError, TransientError


@pytest.mark.parametrize(
  ("outcome", "code", "explained"),
  [
    (0, 0, None),
    (143, 143, None),
    (InputError("a mistake"), 1, True),
    (TransientError("a full disk"), 75, True),
    (OSError(errno.ENOSPC, "No space left on device", "samples/1.png"), 75, True),
    (OSError(errno.ESTALE, "Stale file handle"), 75, True),
    (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"), 75, False),
    (RuntimeError("a bug"), 75, False),
    (KeyboardInterrupt(), 130, None),
  ],
)
def test_exit_codes(outcome, code, explained, monkeypatch, capsys):
  def command(config):
    if isinstance(outcome, int):
      return outcome
    raise outcome

  monkeypatch.setattr(command_line, "_resolve", lambda argv, required: None)
  monkeypatch.setattr(command_line.app, "run", lambda main, flags_parser: sys.exit(main([])))
  with pytest.raises(SystemExit) as exited:
    command_line.run(command, required=())
  assert exited.value.code == code
  stderr = capsys.readouterr().err
  assert not explained or stderr.startswith("Error: ") and stderr.count("\n") == 1
  assert ("Traceback" in stderr) == (explained is False)
