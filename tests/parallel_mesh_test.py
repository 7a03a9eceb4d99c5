"""Meshes of devices that are not here, and which process holds which rows."""

import platform
import types

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from perceiver_ar_jax.config import InputError, MeshConfig
from perceiver_ar_jax.parallel import distributed, sharding
from perceiver_ar_jax.parallel import mesh as mesh_lib
from perceiver_ar_jax.parallel.mesh import AXES, make_mesh, rows_of_processes
from tests import tiny


class _Device(types.SimpleNamespace):
  """What mesh construction asks of a device."""

  __hash__ = object.__hash__


def _devices(slices: int, each: int) -> list[_Device]:
  """Devices of two a process, numbered through."""
  return [
    _Device(id=n, process_index=n // 2, slice_index=n // each, platform="gpu", device_kind="fake")
    for n in range(slices * each)
  ]


@pytest.fixture
def grids(monkeypatch):
  """Meshes as plain arrays of devices, since JAX's own class takes none that are not there."""
  monkeypatch.setattr("perceiver_ar_jax.parallel.mesh.Mesh", lambda grid, axes, axis_types: grid)


def test_one_axis_reaches_across_slices_and_the_others_stay_within(grids):
  grid = make_mesh(MeshConfig(data=4, fsdp=2), _devices(slices=2, each=4))
  slices = np.vectorize(lambda device: device.slice_index)(grid)
  assert slices.shape == (4, 2, 1, 1)
  assert slices[:, :, 0, 0].tolist() == [[0, 0], [0, 0], [1, 1], [1, 1]]


def test_an_axis_that_slices_do_not_divide_is_explained(grids):
  with pytest.raises(InputError, match="3 slices: mesh.data=2.* must be a multiple of 3"):
    make_mesh(MeshConfig(data=2, fsdp=3), _devices(slices=3, each=2))


def _mesh(*sizes: int):
  """Something with the shape and devices of a mesh, two devices a process."""
  devices = np.array(_devices(1, int(np.prod(sizes)))).reshape(sizes)
  return types.SimpleNamespace(devices=devices, shape=dict(zip(AXES, sizes)))


def test_processes_hold_the_rows_of_their_devices():
  assert rows_of_processes(_mesh(2, 2, 1, 1), 8) == [[0, 1, 2, 3], [4, 5, 6, 7]]
  assert rows_of_processes(_mesh(2, 1, 1, 4), 4) == [[0, 1], [0, 1], [2, 3], [2, 3]], "context spans two processes"
  assert rows_of_processes(Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1, 1), AXES), 3) == [[0, 1, 2]]


@pytest.mark.parametrize(
  ("arguments", "words"),
  [
    (("here:1", 2, None), "--process_id must be set too"),
    (("here:1", 2, 2), "--process_id=2 must be in 0..1"),
    (("here", 2, 0), "--coordinator=here must be host:port"),
  ],
)
def test_wrong_flags_of_several_processes_are_explained(arguments, words):
  with pytest.raises(InputError, match=words):
    distributed.initialize(*arguments)


@pytest.mark.parametrize(
  ("environment", "expected"),
  [
    ({}, False),
    ({"SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_STEP_NUM_TASKS": "2"}, True),
    ({"SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "n1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "2"}, False),
    ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2"}, False),  # a shell inside an allocation
  ],
)
def test_only_a_slurm_step_of_several_tasks_joins_others(environment, expected, monkeypatch):
  for name in ("SLURM_PROCID", "SLURM_STEP_NODELIST", "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"):
    monkeypatch.delenv(name, raising=False)
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  joined = []
  monkeypatch.setattr(jax.distributed, "initialize", lambda **settings: joined.append(settings))
  monkeypatch.setattr(distributed, "_on_tpu", lambda: False)
  distributed.initialize()
  assert bool(joined) == expected


@pytest.mark.parametrize(
  ("cores", "rows", "settings", "devices"),
  [
    (2, [8, 8], {}, 2),
    (6, [8, 256], {}, 4),  # the largest number of cores that divides both batches
    (64, [64, 64], {}, 8),
    (4, [3], {}, 3),
    (4, [8], {"mesh__fsdp": 2}, 1),  # the mesh states what the user wants
    (8, [8], {"model__latent_width": 2048, "model__num_layers": 8}, 1),  # copies of the weights would take gigabytes
  ],
)
def test_batches_are_split_over_the_cores_of_a_cpu(monkeypatch, cores, rows, settings, devices):
  updates = {}
  monkeypatch.setattr(mesh_lib.os, "sched_getaffinity", lambda process: range(cores))
  monkeypatch.setattr(mesh_lib.jax.config, "update", updates.__setitem__)
  monkeypatch.delenv("XLA_FLAGS")
  mesh_lib.use_cpu_cores(tiny.config(**settings), rows)
  assert updates == {"jax_num_cpu_devices": devices}


@pytest.mark.parametrize(
  ("name", "value"), [("XLA_FLAGS", "--xla_force_host_platform_device_count=3"), ("JAX_NUM_CPU_DEVICES", "3")]
)
def test_settings_of_jax_take_precedence(monkeypatch, name, value):
  monkeypatch.setattr(mesh_lib.jax.config, "update", lambda *arguments: pytest.fail("changed"))
  monkeypatch.setenv(name, value)
  mesh_lib.use_cpu_cores(tiny.config(), [8])


@pytest.mark.parametrize(("mode", "rows"), [("train", [4, 3]), ("eval", [4]), ("sample", [5])])
def test_each_mode_splits_its_own_batches_over_the_cores(monkeypatch, trained, mode, rows):
  def stop(config, batch_sizes):
    raise InputError(f"{batch_sizes}")

  monkeypatch.setattr(mesh_lib, "use_cpu_cores", stop)
  settings = {"eval__batch_size": 4, "train__batch_size": 6, "train__microbatches": 2, "sample__batch_size": 5}
  tiny.expect_error(tiny.run(trained, f"--mode={mode}", **settings), f"{rows}")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is a function of glibc")
def test_freed_buffers_are_reused_without_page_faults():
  code = """
import resource
from perceiver_ar_jax.parallel.mesh import keep_host_memory
keep_host_memory()
for _ in range(9):
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  b"x" * 2**26  # 64 MiB: 16,384 pages
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
  assert int(tiny.python("-c", code).stdout) < 1000


@pytest.mark.parametrize("axes", sharding.RULES.values(), ids=sharding.RULES)
def test_axes_that_share_a_dimension_are_in_the_order_of_the_mesh(axes):
  assert list(axes) == sorted(axes, key=AXES.index)


@pytest.mark.slow
def test_training_on_two_devices_gives_the_same_losses(trained, tmp_path, monkeypatch):
  monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "2")
  _, *arguments = tiny.command(tmp_path, train__checkpoint_every=12)
  result = tiny.python(*arguments)
  assert result.returncode == 0, result.stderr
  losses, expected = tiny.losses(tmp_path), tiny.losses(trained)
  assert losses.keys() == expected.keys()
  np.testing.assert_allclose(list(losses.values()), list(expected.values()), rtol=1e-5)
