"""Plans: names of slices, what a compiled program moves, what fits and what to change, and the real compiler."""

import ast
import dataclasses
import importlib
import importlib.util
import json

import pytest

from benchmarks import plans
from perceiver_ar_jax import config as config_lib
from perceiver_ar_jax.config import InputError
from perceiver_ar_jax.parallel import chips, flops, hlo, plan, plan_search
from perceiver_ar_jax.parallel.mesh import AXES
from tests import tiny

GIB = 2**30


def _config(name="imagenet64", **overrides):
  config = importlib.import_module(f"configs.{name}").get_config()
  for path, value in overrides.items():
    section, field = path.split("__")
    config[section][field] = value
  return config_lib.resolve(config)


# Slices


@pytest.mark.parametrize(
  ("name", "meant", "num_chips"),
  [
    ("v5e:16x16", "v5e:16x16", 256),
    ("v5litepod-256", "v5e:16x16", 256),
    ("V6E-8", "v6e:2x4", 8),
    ("v4-128", "v4:4x4x4", 64),  # two cores a chip
    ("v5p-1024", "v5p:8x8x8", 512),
    ("v5e:1x1", "v5e:1x1", 1),
    ("h100:8", "h100:1x8", 8),
    ("a100:4x8", "a100:4x8", 32),
    ("2xv5litepod-256", "2xv5e:16x16", 512),
  ],
)
def test_names_of_slices(name, meant, num_chips):
  topology = chips.parse(name)
  assert (str(topology), topology.num_chips) == (meant, num_chips)


@pytest.mark.parametrize(
  ("name", "words"),
  [
    ("v5d:2x2", ["v5d:2x2", "Did you mean 'v5"]),
    ("v5e", ["names no slice", "v5e:16x16"]),
    ("cuda:8", ["cuda:8", "h100:4x8"]),
    ("h100:2x2x2", ["how many nodes", "h100:4x8"]),
    ("h100:0x8", ["how many nodes"]),
    ("v4:4x4", ["needs 3 numbers", "v4:4x4x8"]),
    ("v5e:3x3", ["even"]),
    ("v4-100", ["no usual size", "v4-128"]),
    ("2xh100:8", ["how many nodes"]),
  ],
)
def test_names_of_no_slice_are_explained(name, words):
  with pytest.raises(InputError) as error:
    chips.parse(name)
  assert all(word in str(error.value) for word in words), error.value


def test_between_nodes_gpus_have_the_network():
  assert chips.parse("h100:8").sent_bandwidth == 450e9
  assert chips.parse("h100:2x8").sent_bandwidth == 50e9
  assert chips.parse("v5e:16x16").sent_bandwidth == 200e9


# What a compiled program moves


MODULE = """HloModule jit_step, num_partitions=8

%fused (param_0.1: f32[4,100], param_1.1: s32[]) -> f32[100] {
  %param_0.1 = f32[4,100]{1,0} parameter(0)
  %param_1.1 = s32[] parameter(1)
  %slice.1 = f32[1,100]{1,0} dynamic-slice(%param_0.1, %param_1.1), dynamic_slice_sizes={1,100}
  ROOT %bitcast.1 = f32[100]{0} bitcast(%slice.1)
}

%fused_start (param_0.2: bf16[10]) -> (bf16[10], bf16[40]) {
  %param_0.2 = bf16[10]{0} parameter(0)
  %gather.1 = bf16[40]{0} all-gather(%param_0.2), channel_id=7, replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}
  ROOT %tuple.2 = (bf16[10]{0}, bf16[40]{0}) tuple(%param_0.2, %gather.1)
}

%fused_done (param_0.3: bf16[40]) -> bf16[40] {
  %param_0.3 = bf16[10]{0} parameter(0)
  ROOT %gather.2 = bf16[40]{0} all-gather(%param_0.3), channel_id=7, replica_groups=mesh['a'=2,'b'=4] {'b'}
}

%all-reduce-scatter (param_0.4: f32[80]) -> f32[10] {
  %param_0.4 = f32[80]{0} parameter(0)
  %sum.2 = f32[80]{0} all-reduce(%param_0.4), channel_id=9, replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  %where = s32[] constant(0)
  ROOT %slice.2 = f32[10]{0} dynamic-slice(%sum.2, %where), dynamic_slice_sizes={10}
}

%condition (carry: (s32[], f32[4,100])) -> pred[] {
  %carry.1 = (s32[], f32[4,100]{1,0}) parameter(0)
  %limit = s32[] constant(4)
  %index.1 = s32[] get-tuple-element(%carry.1), index=0
  ROOT %less = pred[] compare(%index.1, %limit), direction=LT
}

%body (carry.2: (s32[], f32[4,100])) -> (s32[], f32[4,100]) {
  %carry.3 = (s32[], f32[4,100]{1,0}) parameter(0)
  %index.2 = s32[] get-tuple-element(%carry.3), index=0
  %stack = f32[4,100]{1,0} get-tuple-element(%carry.3), index=1
  %row = f32[100]{0:T(128)S(1)} fusion(%stack, %index.2), kind=kLoop, calls=%fused
  %sum.1 = f32[100]{0:T(128)S(1)} all-reduce(%row), channel_id=3, replica_groups=[4,2]<=[8], to_apply=%add
  ROOT %tuple.1 = (s32[], f32[4,100]{1,0}) tuple(%index.2, %stack)
}

ENTRY %main (x: f32[4,100], y: bf16[10]) -> f32[4,100] {
  %x = f32[4,100]{1,0} parameter(0)
  %y = bf16[10]{0} parameter(1)
  %zero = s32[] constant(0)
  %start = (bf16[10]{0:S(1)}, bf16[40]{0:S(1)}) fusion(%y), kind=kCustom, calls=%fused_start
  %part = bf16[10]{0:S(1)} get-tuple-element(%start), index=0
  %done = bf16[40]{0:S(1)} fusion(%part), kind=kCustom, calls=%fused_done
  %whole = f32[80]{0:S(1)} broadcast(%zero), dimensions={}
  %scattered = f32[10]{0:S(1)} fusion(%whole), kind=kCustom, calls=%all-reduce-scatter
  %started = (bf16[10]{0:S(1)}, bf16[20]{0:S(1)}) all-gather-start(%part), channel_id=11, replica_groups=[4,2]<=[8]
  %ended = bf16[20]{0:S(1)} all-gather-done(%started)
  %tuple.3 = (s32[], f32[4,100]{1,0}) tuple(%zero, %x)
  %loop = (s32[], f32[4,100]{1,0}) while(%tuple.3), condition=%condition, body=%body
  %more = (s32[], f32[4,100]) while(%loop), condition=%unread, body=%body, backend_config={"known_trip_count":{"n":"2"}}
  %out = f32[4,100]{1,0} get-tuple-element(%more), index=1
  ROOT %twice = f32[4,100]{1,0} add(%out, %out), metadata={op_name="jit(step)/model/add"}
}
"""


def test_traffic_counts_loops_slices_on_chip_memory_and_each_collective_once():
  """Four trips and two: each reads a row of 400 bytes and an index of 4 from HBM to on-chip memory, and sums it."""
  moved = hlo.traffic(MODULE)
  assert moved.collectives == {
    "all-reduce": 6 * 400 * 2 * 1 / 2,  # four trips and two of 400 bytes, twice (n - 1) / n of it
    "reduce-scatter": 320 * 7 / 8,  # of the all-reduce that each of eight keeps a part of
    "all-gather": 80 * 3 / 4 + 40 / 2,  # 80 bytes over four, once, though it stands in two fusions; 40 over two
  }
  assert moved.sent_bytes == sum(moved.collectives.values())
  # The loop; the operand y; the last addition reads its operand twice and writes it.
  assert moved.hbm_bytes == 6 * (400 + 4) + 20 + 3 * 1600
  assert moved.largest[0] == (1600, "f32[4,100] of jit(step)/model/add")


# What fits, and what to change


def _figures(**changes):
  """What the compiler's process reports: 2 GiB of state and 1 GiB of batch, 3 of temporary memory."""
  return {
    "mesh": {"data": 1, "fsdp": 256, "tensor": 1, "context": 1},
    "num_params": 100,
    "weight_bytes": GIB,
    "optimizer_bytes": GIB,
    "batch_bytes": GIB,
    "argument_bytes": 3 * GIB,
    "temp_bytes": 3 * GIB,
    "output_bytes": 0,
    "code_bytes": GIB,
    "compile_seconds": 1.0,
    "traffic": {"hbm_bytes": 819e9, "sent_bytes": 100e9, "sent_bytes_by_collective": {}},
    "largest": [[GIB, "f32[8] of dot"]],
  } | changes


def test_a_plan_adds_up_and_names_the_bound():
  config, topology = _config(), chips.parse("v5e:16x16")
  result = plan.assemble(config, topology, _figures())
  assert (result["peak_bytes"], result["fits"]) == (7 * GIB, True)
  assert result["bound"] == "hbm" and result["step_seconds"] == 1.0
  assert result["roofline_seconds"]["interconnect"] == 0.5
  executed = flops.train_step(config).executed
  assert result["roofline_seconds"]["compute"] == pytest.approx(executed / (256 * 197e12))
  assert "fits: 7.00 GiB of 15.75 GiB" in plan.describe(result)
  assert not plan.assemble(config, topology, _figures(temp_bytes=12 * GIB))["fits"]


def test_what_does_not_fit_is_explained_with_its_largest_arrays_and_a_way_out():
  config = _config(model__attention="reference", model__remat="dots")
  refused = (
    "RESOURCE_EXHAUSTED: E1000: the total memory required for HLO temporaries (41.5G) exceeds available HBM (15.75G)."
  )
  figures = _figures(refused=refused, mesh={"data": 256, "fsdp": 1, "tensor": 1, "context": 1})
  figures = {name: value for name, value in figures.items() if name not in ("temp_bytes", "argument_bytes")}
  result = plan.assemble(config, chips.parse("v5e:16x16"), figures)
  assert not result["fits"] and result["temp_bytes"] == int(41.5 * GIB)
  message = plan.refusal(config, result)
  for words in (
    "imagenet64 does not fit v5e:16x16",
    "45.50 GiB",
    "exceeds available HBM (15.75G)",
    "1.00 GiB f32[8] of dot",
    "--config.mesh.data=1 --config.mesh.fsdp=256",
    "--config.model.attention=streamed",
    "--config.model.remat=full",
    "--config.train.microbatches=4",
    "plan.search=true",
  ):
    assert words in message
  assert "\n" not in message


# Search


def _sizes(config):
  return {axis: getattr(config.mesh, axis) for axis in AXES}


def test_candidates_divide_chips_and_batch_and_leave_out_what_arithmetic_excludes():
  config, topology = _config(), chips.parse("v5e:4x4")
  found = plan_search.candidates(config, topology)
  for candidate in found:
    mesh, rows = candidate.config.mesh, candidate.config.train.batch_size // candidate.config.train.microbatches
    assert mesh.data * mesh.fsdp * mesh.tensor * mesh.context == 16
    assert rows % (mesh.data * mesh.fsdp) == 0
    assert candidate.least_bytes <= topology.chip.hbm_bytes
  # 770M weights, two moments and gradients in float32 are 11.5 GiB: no room for activations of 128 rows next to them.
  assert not any(c.config.mesh.fsdp == 1 and c.config.train.microbatches == 1 for c in found)
  first = [c.least_seconds for c in found[: len({c.kind for c in found})]]
  assert first == sorted(first) and len({c.kind for c in found[: len(first)]}) == len(first), "best of each kind first"
  with pytest.raises(InputError, match="Nothing fits v5e:1x1"):
    plan_search.candidates(
      dataclasses.replace(config, model=dataclasses.replace(config.model, num_layers=200)), chips.parse("v5e:1x1")
    )
  slices = chips.parse("2xv5e:2x4")
  assert all(c.config.mesh.data % 2 == 0 for c in plan_search.candidates(config, slices)), "data reaches across"
  with pytest.raises(InputError, match="mesh.context=3 does not divide the 16 chips of v5e:4x4"):
    plan_search.candidates(_config(mesh__context=3), topology)
  with pytest.raises(InputError, match="divides over no mesh of 16 chips"):
    plan_search.candidates(_config(train__batch_size=3), topology)


def test_search_compiles_few_drops_what_cannot_be_better_and_ranks_the_rest(capsys):
  config = _config(train__batch_size=256)
  config = dataclasses.replace(config, plan=dataclasses.replace(config.plan, max_compiles=5))
  compiled = []

  def compile_plan(candidate, topology):
    compiled.append(candidate)
    mesh = _sizes(candidate)
    if len(compiled) == 1:
      return plan.assemble(candidate, topology, _figures(mesh=mesh, temp_bytes=100 * GIB))
    if len(compiled) == 2:
      raise InputError("The compiler ended with code -6.")
    moved = {"hbm_bytes": 819e9 * (10 - len(compiled)), "sent_bytes": 0}
    return plan.assemble(candidate, topology, _figures(mesh=mesh, traffic=moved))

  best, lines = plan_search.search(config, chips.parse("v5e:4x4"), compile_plan)
  assert len(compiled) == len(lines) == 5
  assert (
    best["step_seconds"] == 5.0 and "5.000 s" in lines[0] and "does not fit" in lines[-2] and "code -6" in lines[-1]
  )
  first = plan_search.Candidate(compiled[0], 0, {})
  assert not any(plan_search.Candidate(other, 0, {}).needs_no_less_than(first) for other in compiled[1:])
  assert "5 of at most 5" in capsys.readouterr().out
  assert f"--config.model.remat={best['remat']}" in plan.describe(best | {"candidates": lines})


def test_search_ends_where_no_other_can_be_faster():
  compiled = []

  def compile_plan(candidate, topology):
    compiled.append(candidate)
    moved = {"hbm_bytes": 0, "sent_bytes": 0}
    return plan.assemble(candidate, topology, _figures(mesh=_sizes(candidate), traffic=moved))

  _, lines = plan_search.search(_config(train__batch_size=256), chips.parse("v5e:4x4"), compile_plan)
  assert len(lines) == len(compiled) == 1  # it takes no longer than compute, and no other has less to compute


# The committed table


def test_the_page_shows_the_stored_plans_and_the_published_config_fits_with_room():
  stored = json.loads((tiny.ROOT / "docs" / "plans.json").read_text())
  assert plans.table(stored) in (tiny.ROOT / "docs" / "pods.md").read_text(), "python -m benchmarks.plans --table"
  assert stored["imagenet64-v5e-256"]["overrides"] == [] and stored["imagenet64-v5e-256"]["peak_bytes"] <= 8.0e9
  for name, planned in stored.items():
    experiment, topology, _ = plans.PLANS[name]
    overrides = dict(text.split("=", 1) for text in planned["overrides"])
    config = _config(experiment, **{path.replace(".", "__"): _value(value) for path, value in overrides.items()})
    assert planned["num_devices"] == chips.parse(topology).num_chips
    assert planned["step_flops"] == flops.train_step(config).useful, f"{name} is out of date: plan it anew"


def _value(text):
  try:
    return ast.literal_eval(text)
  except ValueError:
    return text


# The command


@pytest.mark.parametrize(
  ("arguments", "words"),
  [
    ([], ["--mode=plan needs", "v5e:16x16"]),
    (["--config.plan.topology=v5x:4x4"], ["v5x:4x4", "Did you mean"]),
  ],
)
def test_mistakes_end_in_one_paragraph(arguments, words, tmp_path):
  result = tiny.run(tmp_path, "--mode=plan", *arguments)
  tiny.expect_error(result, *words)


@pytest.mark.parametrize(("topology", "extra"), [("v5e:2x2", "plan"), ("h100:8", "cuda12")])
def test_a_missing_compiler_is_named(topology, extra, monkeypatch, tmp_path):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  config = tiny.config()
  config = dataclasses.replace(config, plan=dataclasses.replace(config.plan, topology=topology))
  with pytest.raises(InputError, match=f"pip install -e '.\\[{extra}\\]'"):
    plan.plan(config, tmp_path)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu, the TPU's compiler, is not installed")
def test_the_real_compiler_plans_refuses_and_knows_no_such_slice(tmp_path):
  """One plan that fits, through the command; a mesh that does not; several slices; a memory that does not."""
  mesh = {"mesh__data": 2, "mesh__fsdp": 2}
  result = tiny.run(tmp_path, "--mode=plan", "--config.plan.topology=v5e:2x2", **mesh)
  assert result.returncode == 0, result.stderr
  written = json.loads((tmp_path / "plan.json").read_text())
  assert (written["topology"], written["num_devices"], written["fits"]) == ("v5e:2x2", 4, True)
  assert written["mesh"] == {"data": 2, "fsdp": 2, "tensor": 1, "context": 1}
  config = tiny.config(**mesh)
  assert written["num_params"] == flops.num_params(config.model)
  assert 0 < written["temp_bytes"] < written["peak_bytes"] < written["hbm_bytes"]
  assert written["argument_bytes"] == pytest.approx(
    sum(written[f"{name}_bytes"] for name in ("weight", "optimizer", "batch")), rel=0.5, abs=2**20
  )
  assert written["step_flops"] == flops.train_step(config).useful
  assert set(written["traffic"]["sent_bytes_by_collective"]) and written["bound"] in written["roofline_seconds"]
  with pytest.raises(InputError, match="The mesh .* there are 4"):
    plan.compile_plan(tiny.config(mesh__data=3), chips.parse("v5e:2x2"))
  with pytest.raises(InputError, match="form 2 slices, over which the axis mesh.across_slices=data"):
    plan.compile_plan(tiny.config(mesh__fsdp=8, train__batch_size=8), chips.parse("2xv5e:2x2"))
  several = plan.compile_plan(tiny.config(mesh__data=2, mesh__fsdp=4), chips.parse("2xv5e:2x2"))
  assert several["fits"] and several["num_devices"] == 8
  large = tiny.config(
    model__max_context=2**17, model__num_latents=2**15, model__position_sizes=(2**17 + 2,), model__attention="reference"
  )
  refused = plan.compile_plan(large, chips.parse("v5e:2x2"))
  assert not refused["fits"] and refused["temp_bytes"] > 15.75 * GIB
  assert "131072" in refused["largest"][0][1], "the scores of all latents and inputs are the largest array"


@pytest.mark.skipif(importlib.util.find_spec("jax_cuda12_plugin") is None, reason="JAX's CUDA plugin is not installed")
def test_the_real_compiler_plans_for_gpus_that_are_not_here():
  config = tiny.config(mesh__data=2, mesh__fsdp=2, model__dtype="bfloat16")
  planned = plan.compile_plan(config, chips.parse("h100:2x2"))
  assert planned["fits"] and planned["num_devices"] == 4 and planned["temp_bytes"] > 0
  assert planned["traffic"]["sent_bytes"] > 0


@pytest.mark.parametrize(
  "kind, name",
  [
    ("TPU v4", "v4"),
    ("TPU v5 lite", "v5e"),
    ("TPU v5", "v5p"),
    ("TPU v5p", "v5p"),
    ("TPU v6 lite", "v6e"),
    ("NVIDIA H100 80GB HBM3", "h100"),
    ("NVIDIA A100-SXM4-40GB", "a100"),
    ("cpu", None),
  ],
)
def test_devices_are_known_by_what_jax_calls_them(kind, name):
  assert chips.of_device(kind) is chips.CHIPS.get(name)
