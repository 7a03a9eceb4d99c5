"""Train and evaluate Perceiver AR.

  python -m perceiver_ar_jax.main --config=configs/photos32.py --workdir=DIR [--mode=train|eval]

Every setting can be overridden: --config.train.steps=100 --config.model.num_layers=6. The same command goes
on with a run that was stopped.
"""

import signal
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from perceiver_ar_jax import config as config_lib

_CONFIG = config_flags.DEFINE_config_file("config", help_string="The experiment: a file such as configs/photos32.py.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, metrics, evaluations.")
_MODE = flags.DEFINE_enum("mode", "train", ["train", "eval"], "What to do.")


def _run(argv: list[str]) -> int:
  if len(argv) > 1:
    raise config_lib.InputError(f"Unexpected argument {argv[1]!r}: every setting is a flag, --config.name=value.")
  for name in ("config", "workdir"):
    if flags.FLAGS[name].value is None:
      raise config_lib.InputError(f"--{name} is missing. For example: --config=configs/photos32.py --workdir=/tmp/run")
  try:
    config = config_lib.resolve(_CONFIG.value)
  except OSError as error:  # raised at the first look into a config whose file could not be loaded
    raise config_lib.InputError(f"The file given as --config cannot be loaded: {error}") from error
  # Imported late, so that a misspelt flag is answered at once.
  from perceiver_ar_jax.evaluation import evaluate

  if _MODE.value == "eval":
    evaluate.evaluate(config, _WORKDIR.value)
    return 0
  from perceiver_ar_jax.training import loop

  return loop.train(config, _WORKDIR.value, evaluate.Evaluator)


def _parse(argv: list[str]) -> list[str]:
  """The arguments that are no flags; a mistake in the flags ends in one paragraph."""
  try:
    return flags.FLAGS(argv)
  except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
    return _fail(error)


def _fail(error: Exception):
  message = " ".join(str(error.args[0] if isinstance(error, KeyError) else error).split())
  print(f"Error: {message}", file=sys.stderr, flush=True)
  sys.exit(1)


def main(argv: list[str]) -> int:
  if not flags.FLAGS["verbosity"].present:
    logging.set_verbosity(logging.WARNING)  # libraries report every file they write; --verbosity=0 shows it
  try:
    return _run(argv)
  except config_lib.InputError as error:
    return _fail(error)
  except KeyboardInterrupt:
    return 128 + signal.SIGINT


if __name__ == "__main__":
  app.run(main, flags_parser=_parse)
