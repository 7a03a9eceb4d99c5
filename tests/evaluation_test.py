"""Evaluation against the reference's, and its independence of how windows are batched."""

import jax
import numpy as np
import pytest

from perceiver_ar_jax.config import InputError
from perceiver_ar_jax.evaluation import evaluate
from perceiver_ar_jax.interop import haiku
from perceiver_ar_jax.parallel.mesh import make_mesh
from perceiver_ar_jax.training import loop, state
from tests import golden, tiny


def _golden_model():
  case = golden.Case("train_and_eval")
  model, params = haiku.convert(case.tree("params"), case.kwargs)
  config = tiny.config(
    **{f"model__{name}": getattr(model, name) for name in model.__dataclass_fields__ if name != "embed_width"}
  )
  return case, config, params


def test_block_evaluation_matches_the_reference():
  """The reference's windows, moved to the right edge, with weights on the newest `block` targets of each."""
  case, config, params = _golden_model()
  num_latents, block = config.model.num_latents, int(case["eval_block/eval_block_size"])
  step = jax.jit(evaluate.make_eval_step(config))
  totals = {"nats": 0.0, "correct": 0.0, "tokens": 0.0}
  names = ("inputs", "input_idxs", "targets", "input_lengths")
  for inputs, positions, targets, lengths in zip(*(case[f"eval_block/{name}"] for name in names)):
    counts = (inputs > 0).sum(axis=1)
    # A window's new targets are its last `block`; a document's first window may be shorter than that.
    new = np.minimum(lengths.max(axis=1), block)
    weights = (np.arange(num_latents) >= num_latents - new[:, None]).astype(np.float32)
    targets = golden.right_align(targets, counts)[:, -num_latents:]
    sums = step(
      params,
      {
        "inputs": golden.right_align(inputs, counts),
        "positions": golden.right_align(positions, counts),
        "targets": targets,
        "weights": weights * (targets > 0),
      },
    )
    for name in totals:
      totals[name] += float(sums[name])
  assert totals["tokens"] == case["eval_block/eval_num_examples"]
  np.testing.assert_allclose(totals["nats"], case["eval_block/eval_loss"], rtol=1e-5)
  assert totals["correct"] == case["eval_block/eval_accuracy"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("run")
  assert loop.train(tiny.config(), workdir, evaluate.Evaluator) == 0
  return workdir


def test_the_figures_do_not_depend_on_the_batch_and_lie_in_a_file(trained):
  results = [
    evaluate.evaluate(tiny.config(eval__batch_size=size, eval__stride=5, eval__max_sequences=7), trained)
    for size in (1, 3, 64)
  ]
  for result in results[1:]:
    assert result["num_tokens"] == results[0]["num_tokens"] == 7 * 16  # the mirrored half and EOS of each
    np.testing.assert_allclose(result["nats_per_token"], results[0]["nats_per_token"], rtol=1e-6)
    assert result["accuracy"] == results[0]["accuracy"]
  assert (trained / "eval-validation-12.json").exists()


def test_the_entropy_of_the_histogram_is_that_of_its_frequencies(trained):
  config = tiny.config()
  evaluator = evaluate.Evaluator(config, make_mesh(config.mesh))

  def one_batch(params, batch):
    histogram = np.zeros(259, np.float32)
    histogram[[3, 4, 5]] = [2, 1, 1]
    return {"nats": np.float32(4.0), "correct": np.float32(1), "tokens": np.float32(4), "histogram": histogram}

  evaluator._step = one_batch
  result = evaluator({}, 0)
  assert result["histogram_entropy_bits"] == pytest.approx(1.5)
  assert result["nats_per_token"] == pytest.approx(1.0)
  assert result["accuracy"] == pytest.approx(0.25)


def test_a_fresh_model_costs_the_logarithm_of_the_vocabulary():
  config = tiny.config()
  mesh = make_mesh(config.mesh)
  shapes = state.abstract_params(config, mesh)
  params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
  assert evaluate.Evaluator(config, mesh)(params, 0)["nats_per_token"] == pytest.approx(np.log(259), rel=1e-6)


def test_another_model_and_an_empty_workdir_are_explained(trained, tmp_path):
  with pytest.raises(InputError, match="holds another model: model.num_layers is 2 there and 3 here"):
    evaluate.evaluate(tiny.config(model__num_layers=3), trained)
  with pytest.raises(InputError, match="holds no run"):
    evaluate.evaluate(tiny.config(), tmp_path)
