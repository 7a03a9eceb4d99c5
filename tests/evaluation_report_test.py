"""The report of a run holds its curves, evaluations, samples and settings, and nothing that a browser would run."""

import json

import numpy as np
import pytest
from etils import epath
from PIL import Image

from perceiver_ar_jax.config import InputError
from perceiver_ar_jax.evaluation import report
from tests import tiny


def _run(workdir, lines):
  (workdir / "config.json").write_text(tiny.config().to_json())
  (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "lo')


def _step(step, loss):
  return {"step": step, "loss": loss, "learning_rate": 0.1, "tokens_per_second": 100.0 * step, "seconds": 0.5}


def test_a_report_shows_what_the_run_has_written(tmp_path):
  _run(
    tmp_path,
    [_step(1, 5.5) | {"model_flops_utilization": 0.25}, _step(2, 5.25), {"step": 2, "eval_nats_per_token": 5.125}],
  )
  result = {"split": "validation", "step": 2, "unit": "accuracy", "accuracy": 0.125, "nats_per_token": 5.125}
  result |= {"num_latents": 16, "stride": 8, "num_tokens": 4321, "interval_95": {"accuracy": [0.1, 0.15]}}
  (tmp_path / "eval-validation-2.json").write_text(json.dumps(result))
  (tmp_path / "samples").mkdir()
  Image.fromarray(np.zeros((2, 2, 3), np.uint8)).save(tmp_path / "samples" / "0.png")
  (tmp_path / "samples" / "1.txt").write_text("a <script>alert(1)</script>")
  page = report.write(epath.Path(tmp_path)).read_text()
  assert "2 of 12" in page and "5.2500 nats a token" in page and "150 tokens/s" in page and "25.0% of peak" in page
  assert "0.1250 accuracy" in page and "0.1 to 0.15" in page and "4,321" in page
  assert page.count("<svg") == 1 and "data:image/png;base64," in page and "shuffle_buffer" in page
  assert "<script" not in page and "&lt;script&gt;" in page


def test_a_run_that_is_not_there_or_has_logged_nothing_is_explained(tmp_path):
  with pytest.raises(InputError, match="contains no run"):
    report.write(tmp_path)
  _run(tmp_path, [])
  with pytest.raises(InputError, match="has logged no step yet"):
    report.write(tmp_path)
