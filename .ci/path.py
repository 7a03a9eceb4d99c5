"""Measures how far a reader has to go: lines per package, files on the path of a batch, files per extension point.

`make lint` runs it. It prints the three counts and ends with exit code 1 if a batch enters more than MAX_HOPS + 1 files
between the loader and the loss, or if a name of a table is written in other files than the table's.
"""

import ast
import itertools
import os
import pathlib
import sys
import threading

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "perceiver_ar_jax"
MAX_HOPS = 12
TABLES = {
  "optimizer": ("muon", ()),
  "schedule": ("cosine", ()),
  "kernel": ("splash", ()),
  "position encoding": ("fourier", ("interop/haiku.py",)),  # of another code base
  "unit": ("bits_per_byte", ("data/tasks.py",)),  # tasks choose units, as configs choose the others
  "task": ("copy", ()),
}
"""Extension point -> an entry of its table, and files that may name it too. config/ may name any, for defaults."""


def main() -> int:
  files = {path.relative_to(PACKAGE).as_posix(): path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")}
  packages = sorted({name.partition("/")[0] for name in files})
  lines = [sum(text.count("\n") for name, text in files.items() if name.partition("/")[0] == top) for top in packages]
  print("Lines:", ", ".join(f"{top} {count:,}" for top, count in zip(packages, lines)), f"; in all {sum(lines):,}")
  changes = [name for name, _ in itertools.groupby(_files_of_a_batch())]
  path = list(dict.fromkeys(changes))
  hops = len(path) - 1
  print(f"A batch: {' > '.join(path)}: {hops} hops of at most {MAX_HOPS} to files not entered before")
  print(f"  (with returns to files entered before: {len(changes) - 1} changes of file)")
  failed = hops > MAX_HOPS
  for point, (entry, users) in TABLES.items():
    named = [name for name in sorted(files) if not name.startswith("config/") and entry in _strings(files[name])]
    is_alone = len([name for name in named if name not in users]) == 1
    print(f"{point} {entry!r}: {', '.join(named)}{'' if is_alone else ': one file should name it'}")
    failed |= not is_alone
  return int(failed)


def _strings(text: str) -> set[str]:
  """The string constants of a module, without docstrings."""
  tree = ast.parse(text)
  docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
  constants = (node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in docstrings)
  return {node.value for node in constants if isinstance(node.value, str)}


def _files_of_a_batch() -> list[str]:
  """Returns the file of each call from the loader to the loss: a batch of one document, and the traced update.

  Settings (config/) are left out, and so is what is set up before the first batch.
  """
  os.environ["JAX_PLATFORMS"] = "cpu"
  sys.path.insert(0, str(ROOT))
  import jax

  from configs import copy
  from perceiver_ar_jax import config as config_lib
  from perceiver_ar_jax.data.loader import TrainLoader
  from perceiver_ar_jax.parallel.mesh import make_mesh
  from perceiver_ar_jax.training import optimizer as optimizer_lib
  from perceiver_ar_jax.training import step

  settings = copy.get_config()
  settings.train.batch_size = 1
  config = config_lib.resolve(settings)
  mesh, loader = make_mesh(config.mesh, jax.devices()[:1]), TrainLoader(config)
  optimizer = optimizer_lib.make_optimizer(config.train.optimizer, config.train.steps)
  abstract = step.abstract_state(config, optimizer, mesh)
  train_step, key = step.make_train_step(config, optimizer), jax.random.key(0)
  names = []

  def record(frame, event, arg):
    path = pathlib.PurePath(frame.f_code.co_filename)
    if event == "call" and path.is_relative_to(PACKAGE):
      names.append(path.relative_to(PACKAGE).as_posix())

  threading.setprofile(record)
  sys.setprofile(record)
  try:
    batch = next(loader)
    with jax.set_mesh(mesh):
      jax.eval_shape(train_step, abstract, batch, key)
  finally:
    sys.setprofile(None)
    threading.setprofile(None)
  forward = itertools.takewhile(lambda name: name != "training/optimizer.py", names)  # which follows the loss
  return [name for name in forward if not name.startswith("config/")]


if __name__ == "__main__":
  sys.exit(main())
