"""What every command shares: --config and --workdir, exit codes, and errors that end in one paragraph.

Exit codes: 0 done; 1 bad input or config; 75 a full disk, storage out of reach or an unexpected error (with a
traceback), so that a restart may help; 128 + signal after a signal.
"""

import contextlib
import pathlib
import platform
import signal
import sys
from collections.abc import Callable

import jax
from absl import app, flags, logging
from etils import epath
from ml_collections import config_dict, config_flags

import perceiver_ar_jax
from perceiver_ar_jax import config as config_lib
from perceiver_ar_jax.config import checks

_UNLOADABLE = (OSError, ImportError, SyntaxError, NameError)  # what a config file that cannot be run raises
_OF_RUN = pathlib.Path(__file__).parent / "training" / "of_run.py"
_CONFIG = config_flags.DEFINE_config_file(
  "config", help_string="The experiment: a file such as configs/photos32.py. Left out: that of the run in --workdir."
)
flags.declare_key_flag("config")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, metrics, evaluations.")
_VERSION = flags.DEFINE_bool("version", False, "Print the versions of this project, Python and JAX, and exit.")
_EXAMPLES = {"config": "configs/photos32.py", "workdir": "/tmp/run"}


def run(command: Callable[[config_lib.Config], int], required: tuple[str, ...]) -> None:
  """Parses the flags and exits with what `command` returns for the resolved config.

  Args:
    command: returns the exit code; what it raises becomes a message and the exit code above.
    required: names of flags that must be given, next to --config.
  """

  def main(argv: list[str]) -> int:
    if not flags.FLAGS["verbosity"].present:
      logging.set_verbosity(logging.ERROR)  # libraries report every file they write; --verbosity=0 shows it
    try:
      return command(_resolve(argv, required))
    except KeyboardInterrupt:
      return 128 + signal.SIGINT
    except Exception as error:
      explained = checks.for_user(error)
      if explained is None:
        sys.excepthook(type(error), error, error.__traceback__)
        return checks.EXIT_TRANSIENT
      return _fail(explained, 1 if isinstance(explained, config_lib.InputError) else checks.EXIT_TRANSIENT)

  app.run(main, flags_parser=_parse)


def _resolve(argv: list[str], required: tuple[str, ...]) -> config_lib.Config:
  if _VERSION.value:
    versions = {"perceiver_ar_jax": perceiver_ar_jax.__version__, "Python": platform.python_version()}
    print(", ".join(f"{name} {version}" for name, version in (versions | {"JAX": jax.__version__}).items()))
    sys.exit(0)
  if len(argv) > 1:
    raise config_lib.InputError(f"Unexpected argument {argv[1]!r}: every setting is a flag, --config.name=value.")
  for name in ("config", *required):
    if flags.FLAGS[name].value is None:
      example = " ".join(f"--{each}={_EXAMPLES.get(each, '...')}" for each in ("config", *required))
      raise config_lib.InputError(f"--{name} is missing. {flags.FLAGS[name].help} For example: {example}")
  try:
    return config_lib.resolve(_CONFIG.value)
  except _UNLOADABLE as error:  # raised at the first look into the config
    raise config_lib.InputError(
      f"The file given as --config cannot be loaded: {error}. (Run from the folder that holds configs/.)"
    ) from error


def _parse(argv: list[str]) -> list[str]:
  """The arguments that are no flags; a mistake in the flags ends in one paragraph."""
  try:
    for argument in argv[1:]:
      _check_name(argument)
    return flags.FLAGS([argv[0], *_config_of_run(argv[1:]), *argv[1:]])
  except (flags.Error, AttributeError, KeyError, TypeError, ValueError, *_UNLOADABLE) as error:
    return _fail(error)


def _config_of_run(arguments: list[str]) -> list[str]:
  """The flag --config that stands for the run in --workdir, where there is one and no --config is given."""
  given = dict(argument.lstrip("-").partition("=")[::2] for argument in arguments)
  workdir = given.get("workdir")
  if "config" in given or not workdir or not (epath.Path(workdir) / "config.json").exists():
    return []
  from perceiver_ar_jax.training import workdir as workdir_lib

  workdir_lib.load_config(epath.Path(workdir))  # says in one paragraph what is wrong with it
  return [f"--config={_OF_RUN}:{workdir}"]


def _check_name(argument: str) -> None:
  """Raises InputError for a config file that is not there or a setting that does not exist, naming the nearest."""
  name, _, value = argument.lstrip("-").partition("=")
  if name == "config" and value and not pathlib.Path(value.split(":")[0]).exists():
    there = list(map(str, pathlib.Path(value).parent.glob("*.py")))
    hint = (
      config_lib.nearest(value, there) if there else "Run from the folder that holds configs/, or give a whole path."
    )
    raise config_lib.InputError(f"--config={value} does not exist. {hint}")
  if name.startswith("config."):
    section, path = config_lib.defaults(), name.split(".")[1:]
    for position, word in enumerate(path):
      if word not in section:
        where = ".".join(path[: position + 1])
        raise config_lib.InputError(f"Unknown config key {where!r}. {config_lib.nearest(word, section)}")
      section = section[word] if isinstance(section[word], config_dict.ConfigDict) else {}


def _fail(error: Exception, code: int = 1):
  message = " ".join(str(error.args[0] if isinstance(error, KeyError) else error).split())
  with contextlib.suppress(OSError):  # standard error may be a file on the full disk
    print(f"Error: {message}", file=sys.stderr, flush=True)
  sys.exit(code)
