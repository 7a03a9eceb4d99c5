"""Ablations: every variant with every seed, once, and a page of the results."""

import json
import pathlib
import runpy
import subprocess

import pytest
from etils import epath

from perceiver_ar_jax.config import InputError, resolve
from perceiver_ar_jax.experiments import ablate
from perceiver_ar_jax.models import architectures
from perceiver_ar_jax.training import metrics

_FILE = '''"""Are two layers better than one?

Unknown.
"""

from configs import copy
from tests import tiny

VARIANTS = {"one": "a layer", "two": "two layers"}


def get_config(variant="one"):
  config = copy.get_config()
  config.update_from_flattened_dict(tiny.OVERRIDES)
  config.model.num_layers = 1 if variant == "one" else 2
  config.train.steps = 4
  config.eval.every = 2
  return config
'''


class _Runs:
  """Replaces main.py in processes of their own: writes the files of a finished run, and records the calls.

  The files are those of the run in `trained`, but with two evaluations, the config of the command, and a loss that
  depends on its seed.
  """

  def __init__(self, trained):
    self.trained, self.calls, self.fail = trained, [], False

  def __call__(self, command):
    settings = dict(word.lstrip("-").split("=", 1) for word in command if "=" in word)
    path, _, variant = settings["config"].partition(":")
    self.calls.append((variant, settings["config.seed"]))
    if self.fail:
      return subprocess.CompletedProcess(command, 1)
    config = runpy.run_path(path)["get_config"](variant)
    config.seed = int(settings["config.seed"])
    workdir = pathlib.Path(settings["workdir"])
    workdir.mkdir(parents=True)
    (workdir / "config.json").write_text(resolve(config).to_json())
    *steps, evaluation = metrics.read_entries(epath.Path(self.trained))
    lines = [*steps[:2], evaluation | {"step": 2, "eval_accuracy": 0.0}, *steps[2:4], evaluation | {"step": 4}]
    (workdir / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    result = json.loads((self.trained / "eval-validation-12.json").read_text())
    result["nats_per_token"] += config.seed
    (workdir / "eval-validation-4.json").write_text(json.dumps(result))
    return subprocess.CompletedProcess(command, 0)


@pytest.fixture
def runs(trained, monkeypatch):
  runs = _Runs(trained)
  monkeypatch.setattr(ablate.subprocess, "run", runs)
  return runs


@pytest.mark.slow
def test_every_variant_and_seed_runs_once_and_a_failed_run_is_repeated(runs, tmp_path):
  path, workdir = tmp_path / "layers.py", epath.Path(tmp_path / "runs")
  path.write_text(_FILE)
  runs.fail = True
  with pytest.raises(InputError, match="one with seed 0 ended with exit code 1"):
    ablate.ablate(str(path), workdir, ["0"], [])
  runs.fail, runs.calls = False, []
  results = ablate.ablate(str(path), workdir, ["0", "1"], [])
  assert runs.calls == [("one", "0"), ("one", "1"), ("two", "0"), ("two", "1")]
  again = ablate.ablate(str(path), workdir, ["0", "1"], [])
  assert len(runs.calls) == 4 and again == results

  (seed_0, seed_1), two = results["runs"]["one"], results["runs"]["two"][0]
  assert two["step_flops"] > seed_0["step_flops"] and two["num_params"] > seed_0["num_params"]
  assert seed_0["result"]["accuracy"] == seed_0["curve"][-1][1] and [step for step, _ in seed_0["curve"]] == [2, 4]
  assert seed_1["result"]["nats_per_token"] == seed_0["result"]["nats_per_token"] + 1
  page = (workdir / "README.md").read_text()
  assert page.startswith("# Are two layers better than one?\n\nUnknown.") and "| one | 0.0" in page
  assert "two: two layers" in page and "--seeds=0,1" in page and (workdir / "README.png").exists()
  assert json.loads((workdir / "README.json").read_text())["runs"]["two"][1]["seed"] == 1


def test_files_without_variants_are_explained(tmp_path):
  with pytest.raises(InputError, match="does not define VARIANTS"):
    ablate.ablate("configs/copy.py", epath.Path(tmp_path), ["0"], [])


def test_the_unit_is_interpolated_between_evaluations():
  curve = [10.0, 20.0], [4.0, 3.0]
  assert [ablate._interpolate(curve, cost) for cost in (5, 10, 15, 20)] == ["-", "4.0000", "3.5000", "3.0000"]


@pytest.mark.parametrize(
  "name", ["context", "order", "dropout", "positions", "baselines_text", "baselines_copy", "maestro"]
)
def test_every_variant_of_the_shipped_ablations_is_a_config(name):
  module = runpy.run_path(f"configs/ablations/{name}.py")
  configs = {variant: resolve(module["get_config"](variant)) for variant in module["VARIANTS"]}
  assert len({config.to_json() for config in configs.values()}) == len(configs), "two variants are the same"
  totals = [architectures.train_flops(config) * config.train.steps for config in configs.values()]
  if name.startswith("baselines"):
    assert min(totals) > 0.97 * max(totals), "variants must have the same training FLOPs"
