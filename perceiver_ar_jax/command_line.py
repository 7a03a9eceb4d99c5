"""The part that all commands share: --config and --workdir, exit codes, and errors that end in one paragraph.

Exit codes: 0 done; 1 bad input or config; 75 a full disk, storage out of reach or an unexpected error (with a
traceback), so that a restart may help; 128 + signal after a signal.

Nothing here imports JAX, TensorFlow or other slow libraries, so that --help and mistakes are answered at once.
"""

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

import perceiver_ar_jax
from perceiver_ar_jax import config as config_lib
from perceiver_ar_jax.config import checks, config_from_run

_UNLOADABLE = (OSError, ImportError, SyntaxError, NameError)  # raised by a config file that cannot be executed
_CONFIG = config_flags.DEFINE_config_file(
  "config",
  help_string="The experiment: a file such as configs/photos32.py. Default: the config of the run in --workdir.",
)
flags.declare_key_flag("config")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, metrics, evaluations.")
_VERSION = flags.DEFINE_bool("version", False, "Print the versions of this project, Python and JAX, and exit.")
_EXAMPLES = {"config": "configs/photos32.py", "workdir": "/tmp/run"}


class _OrNone(flags.ArgumentParser):
  """Parses "None" as None and everything else as `parser` does; resolving the config refuses None where it must."""

  def __init__(self, parser: flags.ArgumentParser):
    self._parser = parser

  def parse(self, argument):
    return None if argument == "None" else self._parser.parse(argument)


for _kind, _parser in ((int, flags.IntegerParser()), (float, flags.FloatParser()), (str, flags.ArgumentParser())):
  config_flags.register_flag_parser_for_type(_kind, _OrNone(_parser))


def run(command: Callable[[config_lib.Config], int], required: tuple[str, ...]) -> None:
  """Parses the flags and exits with the code that `command` returns for the resolved config.

  Args:
    command: returns the exit code; its errors are reported and determine the exit code.
    required: names of the flags that must be given, besides --config.
  """

  def main(argv: list[str]) -> int:
    if not flags.FLAGS["verbosity"].present:
      logging.set_verbosity(logging.ERROR)  # libraries report every file they write; --verbosity=0 shows it
    try:
      return command(_resolve(argv, required))
    except KeyboardInterrupt:
      return 128 + signal.SIGINT
    except Exception as error:
      if isinstance(error, BrokenPipeError) and not _stdout_has_reader():
        raise
      explained = checks.for_user(error)
      if explained is None:
        sys.excepthook(type(error), error, error.__traceback__)
        return checks.EXIT_TRANSIENT
      return _fail(explained, 1 if isinstance(explained, config_lib.InputError) else checks.EXIT_TRANSIENT)

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
    versions = {"perceiver_ar_jax": perceiver_ar_jax.__version__, "Python": platform.python_version()}
    versions["JAX"] = importlib.metadata.version("jax")
    print(", ".join(f"{name} {version}" for name, version in versions.items()))
    sys.exit(0)
  if len(argv) > 1:
    raise config_lib.InputError(f"Unexpected argument {argv[1]!r}: every setting is a flag, --config.name=value.")
  for name in ("config", *required):
    if flags.FLAGS[name].value is None:
      example = " ".join(f"--{flag}={_EXAMPLES.get(flag, '...')}" for flag in ("config", *required))
      raise config_lib.InputError(f"--{name} is missing. {flags.FLAGS[name].help} For example: {example}")
  try:
    config = config_lib.resolve(_CONFIG.value)
  except _UNLOADABLE as error:  # raised when the config is first read
    raise config_lib.InputError(
      f"The file given as --config cannot be loaded: {error}. (Run from the folder that contains configs/.)"
    ) from error
  return config_from_run.keep_split_rule(config, WORKDIR.value) if WORKDIR.value else config


def _parse(argv: list[str]) -> list[str]:
  """Parses the flags and returns the other arguments; a mistake in a flag ends in one paragraph."""
  try:
    arguments = _normalise(argv[1:])
    for argument in arguments:
      _check(*_split(argument))
    sys.argv = [argv[0], *_config_of_run(arguments), *arguments]  # config_flags looks for overrides there
    return flags.FLAGS(sys.argv)
  except BrokenPipeError:  # --help | head
    raise
  except (flags.Error, AttributeError, KeyError, TypeError, ValueError, *_UNLOADABLE) as error:
    return _fail(error)


def _split(argument: str) -> tuple[str, str]:
  """Returns the name and the value of a flag."""
  name, _, value = argument.lstrip("-").partition("=")
  return name, value


def _normalise(arguments: list[str]) -> list[str]:
  """Rewrites `--name value` as --name=value, and ~/ at the beginning of a value as the home folder.

  Settings of the config that are paths expand ~ themselves.
  """
  result, rest = [], iter(arguments)
  for argument in rest:
    if argument == "--":
      return [*result, argument, *rest]
    name, value = _split(argument)
    if argument.startswith("-") and "=" not in argument and _takes_value(name):
      value = next(rest, None)
      if value is not None:
        argument = f"--{name}={value}"
    if argument.startswith("-") and value and value.startswith("~") and not name.startswith("config."):
      argument = f"--{name}={os.path.expanduser(value)}"
    result.append(argument)
  return result


def _takes_value(name: str) -> bool:
  if name.startswith("config."):
    return not isinstance(_default_of(name), bool)
  return name in flags.FLAGS and not flags.FLAGS[name].boolean


def _config_of_run(arguments: list[str]) -> list[str]:
  """Returns the flag --config for the run in --workdir, if it contains one and --config is not given."""
  given = dict(map(_split, arguments))
  workdir = given.get("workdir")
  if "config" in given:
    return []
  if not workdir or not config_from_run.exists(workdir):
    if any(name.startswith("config.") for name in given):  # which absl would call unknown flags
      raise config_lib.InputError(
        f"--config is missing, and --workdir={workdir or ''} contains no run whose config could be used. For example:"
        f" --config={_EXAMPLES['config']}"
      )
    return []
  config_from_run.load_config(workdir)  # raises InputError if it cannot be read
  return [f"--config={config_from_run.__file__}:{workdir}"]


def _check(name: str, value: str) -> None:
  """Raises InputError for a path that does not exist or a setting that is unknown, with the nearest known name."""
  if name == "config" and value and not pathlib.Path(value.split(":")[0]).exists():
    siblings = list(map(str, pathlib.Path(value).parent.glob("*.py")))
    hint = "Run from the folder that contains configs/, or give an absolute path."
    raise config_lib.InputError(
      f"--config={value} does not exist. {config_lib.nearest(value, siblings) if siblings else hint}"
    )
  if name.removeprefix("config.data.") in config_lib.DATA_PATHS and value not in ("", "None"):
    if "://" not in value and not glob.has_magic(value) and not os.path.exists(os.path.expanduser(value)):
      raise config_lib.InputError(f"--{name}={value} does not exist: give the path of an existing file or folder.")
  if name.startswith("config."):
    _default_of(name)


def _default_of(name: str):
  """Returns the default of a setting, given as config.SECTION.NAME; raises InputError if it is unknown."""
  value, path = config_lib.defaults(), name.split(".")[1:]
  for position, word in enumerate(path):
    known = value if isinstance(value, config_dict.ConfigDict) else {}
    if word not in known:
      key = ".".join(path[: position + 1])
      raise config_lib.InputError(f"Unknown config key {key!r}. {config_lib.nearest(word, known)}")
    value = known[word]
  return value


def _fail(error: Exception, code: int = 1):
  message = " ".join(str(error.args[0] if isinstance(error, KeyError) else error).split())
  with contextlib.suppress(OSError):  # standard error may be a file on the full disk
    print(f"Error: {message}", file=sys.stderr, flush=True)
  sys.exit(code)
