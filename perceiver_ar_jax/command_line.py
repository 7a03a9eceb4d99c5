"""The part that all commands share: --config and --workdir, exit codes, and errors that end in one paragraph.

main.py documents the exit codes. Nothing here imports JAX, TensorFlow or other slow libraries, so that --help and
mistakes are answered at once.
"""

import argparse
import contextlib
import glob
import importlib.metadata
import io
import os
import pathlib
import platform
import select
import signal
import sys
from collections.abc import Callable, Iterator

from absl import app, flags, logging
from ml_collections import config_dict, config_flags

from perceiver_ar_jax import config as config_lib
from perceiver_ar_jax.config import checks, config_from_run

_UNLOADABLE = (OSError, ImportError, SyntaxError, NameError)  # raised by a config file that cannot be executed
_INVALID_FLAGS = (flags.Error, argparse.ArgumentError, AttributeError, LookupError, TypeError, ValueError)
_HELP = "The experiment: a file such as configs/photos32.py. Default: the config of the run in --workdir."
_CONFIG = config_flags.DEFINE_config_file("config", help_string=_HELP)
flags.declare_key_flag("config")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, metrics, evaluations.")
_VERSION = flags.DEFINE_bool("version", False, "Print the versions of this project, Python and JAX, and exit.")
_PATHS = ("config", "workdir", "output", "checkpoint")  # flags of this or another command


class _OrNone(flags.ArgumentParser):
  """Parses "None" as None, which resolving the config may refuse, and everything else as `parser` does."""

  def __init__(self, parser: flags.ArgumentParser):
    self.parse = lambda argument: None if argument == "None" else parser.parse(argument)


for _kind, _parser in ((int, flags.IntegerParser()), (float, flags.FloatParser()), (str, flags.ArgumentParser())):
  config_flags.register_flag_parser_for_type(_kind, _OrNone(_parser))


def run(command: Callable[[config_lib.Config], int], required: tuple[str, ...]) -> None:
  """Parses the flags and exits with the code that `command` returns for the config, or that of its error.

  `required` are names of flags that must be given, besides --config.
  """

  def main(argv: list[str]) -> int:
    if not flags.FLAGS["verbosity"].present:
      logging.set_verbosity(logging.ERROR)  # libraries report every file they write; --verbosity=0 shows it
    try:
      return command(_resolve(argv, required))
    except (Exception, KeyboardInterrupt) as error:
      if isinstance(error, BrokenPipeError) and not _stdout_has_reader():
        raise
      return checks.report(error)

  with _tolerant_stdout():
    app.run(main, flags_parser=_parse)


@contextlib.contextmanager
def _tolerant_stdout() -> Iterator[None]:
  """A context in which stdout replaces characters it cannot encode, and a closed reader (| head) ends the program."""
  if isinstance(sys.stdout, io.TextIOWrapper):
    sys.stdout.reconfigure(errors="replace")
  try:
    try:
      yield
    finally:
      sys.stdout.flush()
  except BrokenPipeError:
    if _stdout_has_reader():  # another pipe is broken
      raise
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes stdout again when it ends
    sys.exit(128 + signal.SIGPIPE)


def _stdout_has_reader() -> bool:
  stdout = select.poll()
  stdout.register(sys.stdout, 0)
  return not stdout.poll(0)


def _resolve(argv: list[str], required: tuple[str, ...]) -> config_lib.Config:
  if _VERSION.value:
    ours, jax = map(importlib.metadata.version, ("perceiver_ar_jax", "jax"))
    print(f"perceiver_ar_jax {ours}, Python {platform.python_version()}, JAX {jax}")
    sys.exit(0)
  others = " ".join(argv[1:])
  checks.require(not others, f"Unexpected argument {others!r}: every setting is a flag, --config.name=value.")
  for name in ("config", *required):
    checks.require(flags.FLAGS[name].value is not None, f"--{name} is missing. {flags.FLAGS[name].help}")
  for name, value in config_flags.get_override_values(flags.FLAGS["config"]).items():
    if name.removeprefix("data.") in config_lib.DATA_PATHS and value and "://" not in value:
      exists = glob.has_magic(value) or os.path.exists(os.path.expanduser(value))
      checks.require(exists, f"--config.{name}={value} does not exist: give an existing file or folder.")
  try:
    return config_lib.resolve(_CONFIG.value)
  except _UNLOADABLE as error:  # raised when the config is first read
    fix = "run from the folder that contains configs/"
    raise config_lib.InputError(f"The file given as --config cannot be loaded ({error}): {fix}.") from error


def _parse(argv: list[str]) -> list[str]:
  """Parses the flags and returns the other arguments; a mistake in a flag ends in one paragraph."""
  try:
    sys.argv = [argv[0], *_with_config(argv[1:])]  # config_flags looks for overrides there
    return flags.FLAGS(sys.argv)
  except BrokenPipeError:  # --help | head
    raise
  except config_lib.TransientError as error:  # the run's config.json is out of reach
    return sys.exit(checks.report(error))
  except (*_INVALID_FLAGS, *_UNLOADABLE) as error:
    message = str(error.args[0] if isinstance(error, KeyError) else error)
    return sys.exit(checks.report(config_lib.InputError(message)))


def _with_config(arguments: list[str]) -> list[str]:
  """Returns the arguments with --config, by default that of the run in --workdir, and with ~ expanded in paths."""
  parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
  for name in _PATHS:
    parser.add_argument(f"--{name}", f"-{name}", type=os.path.expanduser)
  given, others = parser.parse_known_args(arguments)
  path, workdir = given.config, given.workdir
  if path and not os.path.exists(path.split(":")[0]):
    siblings = list(map(str, pathlib.Path(path).parent.glob("*.py")))
    hint = config_lib.nearest(path, siblings) if siblings else "Run from the folder that contains configs/."
    raise config_lib.InputError(f"--config={path} does not exist. {hint}")
  if not path and workdir and config_from_run.config_path(workdir).exists():
    config_from_run.load_config(workdir)  # raises InputError if it cannot be read
    given.config = path = f"{config_from_run.__file__}:{workdir}"
  overrides = [argument for argument in others if argument.lstrip("-").startswith("config.")]  # unknown flags to absl
  problem = f"--config is missing, and --workdir={workdir or ''} contains no run"
  checks.require(bool(path) or not overrides, f"{problem}: give a config, such as --config=configs/photos32.py.")
  for override in overrides:
    section, key = config_lib.defaults(), override.partition("=")[0].partition(".")[2]
    for word in key.split("."):
      known = section if isinstance(section, config_dict.ConfigDict) else {}
      checks.require(word in known, f"Unknown config key {key!r}. {config_lib.nearest(word, known)}")
      section = known[word]
  return [f"--{name}={value}" for name, value in vars(given).items() if value] + others
