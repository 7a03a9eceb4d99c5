"""Settings of every test: exact float32 products, no silent broadcasting of ranks, quick compilation.

Most of a small test's time is compilation, and most tests of the training run compile the same program: so
compiled programs are kept (for child processes as well), and LLVM is told not to try hard.
"""

import os
import pathlib

_CACHE = pathlib.Path(__file__).parent.parent / ".pytest_cache" / "compiled"
os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=1"
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(_CACHE)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
  """A folder of prepared TFDS datasets that holds a tiny downsampled_imagenet/32x32."""
  from tests import tiny_imagenet  # imports TensorFlow, which most tests can do without

  folder = tmp_path_factory.mktemp("tfds")
  tiny_imagenet.write(folder)
  return folder
