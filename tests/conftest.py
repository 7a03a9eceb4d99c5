"""Settings of every test: exact float32 products, no silent broadcasting of ranks, quick compilation.

Most of a small test's time is compilation. So XLA does not optimize its code, uses its older emitters, and does not
split programs for several threads, which takes a sixth of the time (2.2 s instead of 15 s for the step of
tests/tiny.py, jax 0.10), and compiled programs are kept. Child processes inherit all of this.
"""

import concurrent.futures
import gc
import multiprocessing
import os
import pathlib
import shutil
from unittest import mock

_CACHE = pathlib.Path(__file__).parent.parent / ".pytest_cache" / "compiled"
os.environ["XLA_FLAGS"] = (
  "--xla_backend_optimization_level=0 --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
  " --xla_cpu_parallel_codegen_split_count=1"
)
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(_CACHE)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"

import pytest  # noqa: E402

from tests import tiny  # noqa: E402

_LONGEST = (
  *("parallel_processes", "notebook", "training_resume", "training_devices", "sampling_sampler", "training_step"),
  *("interop_export", "training_loop", "parallel_context", "models_golden", "main", "plan", "pretrained"),
  *("models_perceiver_ar", "parallel_mesh"),
)
_GARBAGE = (50_000, 10, 10)  # thresholds of its collection
_SLOW_FIXTURES = {"trained", "eight_devices"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
  """Sorts the longest files to the front, so that all workers finish at about the same time, and marks slow tests."""
  rank = {f"{name}_test": index for index, name in enumerate(_LONGEST)}
  items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))
  for item in items:
    if _SLOW_FIXTURES & {*item.fixturenames}:
      item.add_marker("slow")


def pytest_collection_finish():
  """Collects garbage rarely, and not in what is imported: it took up to half of the time that JAX traces."""
  gc.freeze()
  gc.set_threshold(*_GARBAGE)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
  """A folder of prepared TFDS datasets with a tiny downsampled_imagenet/32x32."""
  from tests import tiny_imagenet  # imports TensorFlow, which most tests do not need

  folder = tmp_path_factory.mktemp("tfds")
  tiny_imagenet.write(folder)
  return folder


@pytest.fixture(scope="session")
def file_cases(tmp_path_factory):
  """{name: Case} of own_files.py."""
  from tests import own_files  # imports TensorFlow

  return own_files.make_cases(tmp_path_factory.mktemp)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
  """The workdir of a finished run of tiny.config(), 12 steps; tests that change it use `copy_of_trained`."""
  from perceiver_ar_jax import loop  # imports TensorFlow

  workdir = tmp_path_factory.mktemp("trained")
  assert loop.train(tiny.config(), workdir) == 0
  return workdir


@pytest.fixture
def copy_of_trained(trained, tmp_path):
  """A copy of that workdir."""
  return pathlib.Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture(scope="session")
def eight_devices():
  """Calls functions of modules in a process with eight virtual devices: eight_devices(function, *arguments)."""
  import jax

  spawn = multiprocessing.get_context("spawn")
  with concurrent.futures.ProcessPoolExecutor(1, spawn, gc.set_threshold, _GARBAGE) as pool:
    with mock.patch.dict(os.environ, tiny.environment(8)):
      assert pool.submit(jax.device_count).result() == 8  # the process starts here

    def call(function, *arguments, **named):
      return pool.submit(function, *arguments, **named).result()

    yield call
