"""Plans: names of topologies, what fits and what to change, and the real compiler."""

import ast
import importlib
import importlib.util
import json
import types

import jax
import pytest

from benchmarks import plans
from perceiver_ar_jax import config as config_lib
from perceiver_ar_jax import plan
from perceiver_ar_jax.config import InputError
from perceiver_ar_jax.models import architectures, attention
from perceiver_ar_jax.parallel.chips import CHIPS, parse_topology, peak_flops
from tests import tiny

GIB = 2**30


def _config(name="imagenet64", **overrides):
  config = importlib.import_module(f"configs.{name}").get_config()
  for path, value in overrides.items():
    section, field = path.split("__")
    config[section][field] = value
  return config_lib.resolve(config)


# Topologies


@pytest.mark.parametrize(
  ("name", "expected", "num_chips"),
  [
    ("v5e:16x16", "v5e:16x16", 256),
    ("V6E:2x4", "v6e:2x4", 8),
    ("v4:4x4x4", "v4:4x4x4", 64),
    ("v5e:1x1", "v5e:1x1", 1),
    ("2xv5e:16x16", "2xv5e:16x16", 512),
  ],
)
def test_names_of_topologies(name, expected, num_chips):
  topology = parse_topology(name)
  assert (str(topology), topology.num_chips) == (expected, num_chips)


@pytest.mark.parametrize(
  ("name", "words"),
  [
    ("v5d:2x2", ["v5d:2x2", "Did you mean 'v5"]),
    ("v5e", ["not a slice", "v5e:16x16"]),
    ("v5e:2x0", ["not a size of v5e"]),
    ("v5e:4", ["2 numbers"]),
    ("cuda:8", ["cuda:8", "v4:4x4x8"]),
    ("v4:4x4", ["v4:4x4x8, 3 numbers"]),
    ("v4-128", ["v4-128", "not a slice", "v4:4x4x8"]),
  ],
)
def test_unknown_topologies_are_explained(name, words):
  with pytest.raises(InputError) as error:
    parse_topology(name)
  assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
  "kind, peak",
  [
    ("TPU v4", CHIPS["v4"].peak_flops),
    ("TPU v5 lite", CHIPS["v5e"].peak_flops),
    ("TPU v5", CHIPS["v5p"].peak_flops),
    ("TPU v5p", CHIPS["v5p"].peak_flops),
    ("TPU v6 lite", CHIPS["v6e"].peak_flops),
    ("NVIDIA H100 80GB HBM3", 989e12),
    ("NVIDIA A100-SXM4-40GB", 312e12),
    ("cpu", None),
  ],
)
def test_chips_are_recognized_by_jax_device_kinds(kind, peak):
  assert peak_flops(kind) == peak


# What fits, and what to change


def _measured(**changes):
  """The compiler's result: 3 GiB of state and batch, 3 GiB of temporary memory, 1 GiB of code."""
  return {
    "mesh": {"data": 1, "fsdp": 256, "tensor": 1, "context": 1},
    "num_params": 100,
    "argument_bytes": 3 * GIB,
    "temp_bytes": 3 * GIB,
    "peak_bytes": 7 * GIB,
    "compile_seconds": 1.0,
  } | changes


def test_a_plan_compares_bytes_and_states_the_compute_bound_limit():
  config, topology = _config(), parse_topology("v5e:16x16")
  result = plan.assemble(config, topology, _measured())
  assert result["fits"]
  assert result["step_flops"] == architectures.train_flops(config)
  assert result["compute_bound_seconds"] == pytest.approx(architectures.train_flops(config) / (256 * 197e12))
  assert not plan.assemble(config, topology, _measured(peak_bytes=16 * GIB))["fits"]


# The committed table


def test_the_page_shows_the_stored_plans_and_they_match_the_configs():
  stored = json.loads((tiny.ROOT / "docs" / "plans.json").read_text())
  assert plans.table(stored) in (tiny.ROOT / "docs" / "pods.md").read_text(), "python -m benchmarks.plans --table"
  assert stored["imagenet64-v5e-256"]["overrides"] == [] and stored["imagenet64-v5e-256"]["peak_bytes"] <= 8.0e9
  for name, planned in stored.items():
    experiment, topology_name, _ = plans.PLANS[name]
    overrides = dict(text.split("=", 1) for text in planned["overrides"])
    config = _config(experiment, **{path.replace(".", "__"): _value(value) for path, value in overrides.items()})
    topology = parse_topology(topology_name)
    assert planned["num_devices"] == topology.num_chips
    assert planned["step_flops"] == architectures.train_flops(config), f"{name} is out of date: plan it again"
    peak_flops = topology.num_chips * topology.chip.peak_flops
    assert planned["compute_bound_seconds"] == pytest.approx(planned["step_flops"] / peak_flops)


def _value(text):
  try:
    return ast.literal_eval(text)
  except ValueError:
    return text


# The command


def _plan(config, topology):
  topology = parse_topology(topology)
  return plan.assemble(config, topology, plan.compile_plan(config, topology))


def _planning(topology, **overrides):
  return tiny.config(plan__topology=topology, **overrides)


@pytest.mark.parametrize(
  ("topology", "words"), [(None, "--mode=plan needs the chips.*v5e:16x16"), ("v5x:4x4", "v5x:4x4.*Did you mean")]
)
def test_a_missing_or_unknown_topology_is_explained(topology, words, tmp_path):
  with pytest.raises(InputError, match=words):
    plan.plan(_planning(topology), tmp_path)


def test_a_missing_compiler_is_named(monkeypatch, tmp_path):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(InputError, match=r"pip install -e '.\[plan\]'"):
    plan.plan(_planning("v5e:2x2"), tmp_path)


@pytest.mark.parametrize("sizes", [(34, 34, 5), ()])
def test_the_step_is_lowered_with_the_dimensions_of_its_positions(sizes, monkeypatch):
  def lower(config, optimizer, state, batch, mesh):
    raise InputError(f"{batch['positions'].shape}")

  encoding = "learned+rotary" if sizes else "rotary"
  config = _config("photos32", model__position_encoding=encoding, model__position_sizes=sizes)
  described = types.SimpleNamespace(devices=jax.devices()[:1])
  monkeypatch.setattr(plan.topologies, "get_topology_desc", lambda **settings: described)
  monkeypatch.setattr(plan.step_lib, "lower", lower)
  with pytest.raises(InputError, match="8, 3072, 3"):
    plan.measure(config, parse_topology("v5e:2x2"))


@pytest.mark.parametrize("fits", [True, False])
def test_plan_json_is_written_whether_or_not_the_step_fits(fits, monkeypatch, tmp_path, capsys):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
  refused = (
    {} if fits else {"refused": "RESOURCE_EXHAUSTED: E1000: 99G of HLO temporaries exceeds available HBM (15.75G)."}
  )
  measured = _measured(peak_bytes=(1 if fits else 103) * GIB, **refused)
  monkeypatch.setattr(plan, "compile_plan", lambda config, topology: measured)
  if fits:
    assert plan.plan(_planning("v5e:2x2"), tmp_path) == 0
  else:
    with pytest.raises(InputError) as error:
      plan.plan(_planning("v5e:2x2"), tmp_path)
    words = ("does not fit v5e:2x2", "103.00 GiB", "exceeds available HBM (15.75G)", "model.attention=streamed")
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value), error.value
  written = json.loads((tmp_path / "plan.json").read_text())
  printed = capsys.readouterr().out
  assert written["fits"] == fits and ("fits: 1.00 GiB of 15.75 GiB per chip" in printed) == fits
  assert ("DOES NOT FIT: 103.00 GiB" in printed) != fits
  contract = "topology num_devices mesh num_params argument_bytes temp_bytes peak_bytes hbm_bytes fits compile_seconds"
  assert {*contract.split(), "step_flops", "compute_bound_seconds"} <= written.keys()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu, the TPU's compiler, is not installed")
def test_the_real_compiler_plans_and_refuses(tmp_path):
  """One plan that fits, with splash in its layers; a mesh that does not; several slices; too large a step."""
  mesh = {"mesh__data": 2, "mesh__fsdp": 2}
  shapes = {"model__max_context": 512, "model__num_latents": 256, "model__position_sizes": (514,)}
  config = _planning("v5e:2x2", **mesh, **shapes)
  assert attention.choose("TPU v5 lite", config.model.dtype, (256, 2, 8), 256, False, False, 512) == "splash"
  assert plan.plan(config, tmp_path) == 0
  written = json.loads((tmp_path / "plan.json").read_text())
  assert (written["topology"], written["num_devices"], written["fits"]) == ("v5e:2x2", 4, True)
  assert written["mesh"] == {"data": 2, "fsdp": 2, "tensor": 1, "context": 1}
  assert written["num_params"] == architectures.num_params(config.model)
  assert 0 < written["temp_bytes"] < written["peak_bytes"] < written["hbm_bytes"]
  state_bytes = 3 * 4 * written["num_params"] / 2  # weights and two moments, sharded over two
  assert written["argument_bytes"] == pytest.approx(state_bytes, rel=0.5, abs=2**20)
  with pytest.raises(InputError, match="must be the number of devices, 4"):
    plan.compile_plan(tiny.config(mesh__data=3), parse_topology("v5e:2x2"))
  with pytest.raises(InputError, match="form 2 slices: mesh.data=1, the only axis that spans slices"):
    plan.compile_plan(tiny.config(mesh__fsdp=8, train__batch_size=8), parse_topology("2xv5e:2x2"))
  multislice = _plan(tiny.config(mesh__data=2, mesh__fsdp=4), "2xv5e:2x2")
  assert multislice["fits"] and multislice["num_devices"] == 8
  large = tiny.config(
    model__max_context=2**17, model__num_latents=2**15, model__position_sizes=(2**17 + 2,), model__attention="reference"
  )
  refused = _plan(large, "v5e:2x2")
  assert not refused["fits"] and refused["temp_bytes"] > 15.75 * GIB
