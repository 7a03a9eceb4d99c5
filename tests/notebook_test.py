"""The notebook for newcomers runs from anywhere, and its output is what its text says."""

import os
import pathlib
import re

import nbclient
import nbformat
import pytest

from tests import tiny

NOTEBOOK = tiny.ROOT / "examples" / "quickstart.ipynb"
FEWER_STEPS = """import functools
from perceiver_ar_jax.training import memory
from tests import tiny

COPY_STEPS, PHOTO_STEPS, TEXT_STEPS = 1000, 10, 40

def small_photos(get_config=photos32.get_config):
  config = get_config()
  config.model.update(num_latents=128, num_layers=1, latent_width=32, max_context=768, position_sizes=(18, 18, 5))
  config.data.task = "photos16"
  return config

tasks.add("photos16", functools.partial(tasks._photos, 16, "pixel_raster"))
photos32.get_config = small_photos
memory.lower = tiny.optimized()(memory.lower)
"""
"""Enough to learn copying, with a smaller model of smaller photos, which only has to run; XLA optimizes the updates."""


def test_it_is_kept_without_outputs():
  notebook = nbformat.read(NOTEBOOK, as_version=4)
  nbformat.validate(notebook)
  assert not [cell.id for cell in notebook.cells if cell.get("outputs") or cell.get("execution_count")]


@pytest.mark.slow
def test_its_output_is_what_its_text_says(tmp_path):
  """One test, so that the notebook is executed once: in a folder that is not a checkout."""
  shown = execute(tmp_path)
  accuracy, guessing = numbers(r"([\d.]+)% right; guessing would give ([\d.]+)%", shown["copy-score"])
  assert accuracy > 95 and guessing == 0.4
  right, total = numbers(r"(\d+) of (\d+) bytes are right", shown["copy-samples"])
  assert total == 15 * 64 and right > 0.99 * total
  twin, peak = numbers(r"twin is event (\d+); .* at event (\d+)", shown["attention"])
  assert twin == peak == 4
  bits = [float(number) for number in re.findall(r"([\d.]+) bits/byte", printed(shown["text-score"]))]
  assert len(bits) == 3 and bits[0] < bits[2] - 1, "code is likelier than noise"
  assert printed(shown["model"]).count("%") == 5
  for cell in ("attention", "photos-samples"):
    displayed = [output.data for output in shown[cell] if output.output_type == "display_data"]
    assert ["image/png" in data for data in displayed] == [True], cell


def execute(folder: pathlib.Path) -> dict[str, list]:
  """{cell id: its outputs} of the notebook with fewer steps, run in `folder`, which gets its runs."""
  notebook = nbformat.read(NOTEBOOK, as_version=4)
  (settings,) = [i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ())]
  fewer = nbformat.v4.new_code_cell(f"{FEWER_STEPS}RUNS = pathlib.Path({str(folder)!r})")
  notebook.cells.insert(settings + 1, fewer)
  client = nbclient.NotebookClient(notebook, timeout=500, resources={"metadata": {"path": str(folder)}})
  path = os.pathsep.join(filter(None, [str(tiny.ROOT), os.environ.get("PYTHONPATH")]))
  client.execute(env=os.environ | {"PYTHONPATH": path})
  return {cell.id: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}


def printed(outputs: list) -> str:
  return "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")


def numbers(pattern: str, outputs: list) -> tuple[float, ...]:
  """The groups of the only match."""
  (groups,) = re.findall(pattern, printed(outputs))
  return tuple(map(float, groups))
