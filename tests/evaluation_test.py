"""Evaluation against the reference's, and its independence of how windows are batched."""

import functools
import json
import math
import pathlib
import re
import types

import jax
import numpy as np
import pytest

from perceiver_ar_jax.config import InputError
from perceiver_ar_jax.data import splits, texts, units
from perceiver_ar_jax.data.documents import Document, Unreadable
from perceiver_ar_jax.evaluation import evaluate, metrics
from perceiver_ar_jax.interop import haiku
from perceiver_ar_jax.parallel import distributed
from perceiver_ar_jax.parallel.mesh import make_mesh
from perceiver_ar_jax.sampling import write
from perceiver_ar_jax.training import step as step_lib
from tests import batches, golden, tiny


def _golden_model():
  case = golden.Case("train_and_eval")
  model, params = haiku.convert(case.tree("params"), case.kwargs)
  config = tiny.config(
    **{f"model__{name}": getattr(model, name) for name in model.__dataclass_fields__ if name != "embed_width"}
  )
  return case, config, params


@pytest.mark.slow
def test_block_evaluation_matches_the_reference():
  """The reference's windows, moved to the right edge, with weights on the newest `block` targets of each."""
  case, config, params = _golden_model()
  num_latents, block = config.model.num_latents, int(case["eval_block/eval_block_size"])
  step, totals = jax.jit(evaluate.make_eval_step(config)), metrics.Totals()
  names = ("inputs", "input_idxs", "targets", "input_lengths")
  for inputs, positions, targets, lengths in zip(*(case[f"eval_block/{name}"] for name in names)):
    counts = (inputs > 0).sum(axis=1)
    # A window's new targets are its last `block`; a document's first window may be shorter than that.
    new = np.minimum(lengths.max(axis=1), block)
    weights = (np.arange(num_latents) >= num_latents - new[:, None]).astype(np.float32)
    targets = golden.right_align(targets, counts)[:, -num_latents:]
    totals.add(step(params, _rows(inputs, positions, targets, weights * (targets > 0), counts)))
  _compare(totals, case, "eval_block")


@pytest.mark.slow
def test_incremental_evaluation_matches_the_reference():
  """One target a window: the event after its last input."""
  case, config, params = _golden_model()
  events, positions = (case[name][0].reshape(4, *case[name].shape[3:]) for name in ("events", "event_idxs"))
  counts = (events > 0).sum(axis=1) - 1
  targets = np.zeros((4, config.model.num_latents), np.int32)
  targets[:, -1] = events[np.arange(4), counts]
  inputs = np.where(np.arange(48) < counts[:, None], events[:, :-1], 0)
  weights = (targets > 0).astype(np.float32)
  totals = metrics.Totals()
  totals.add(
    jax.jit(evaluate.make_eval_step(config))(params, _rows(inputs, positions[:, :-1], targets, weights, counts))
  )
  _compare(totals, case, "eval_incremental")


def _rows(inputs, positions, targets, weights, counts) -> dict:
  """A batch of windows that the reference pads on the right."""
  return {
    "inputs": golden.right_align(inputs, counts),
    "positions": golden.right_align(positions, counts),
    "targets": targets,
    "weights": weights,
    "document": np.arange(len(counts), dtype=np.int32),
    "end": counts.astype(np.int32) + 1,
  }


def _compare(totals: metrics.Totals, case: golden.Case, name: str) -> None:
  result, tokens = totals.metrics("nats_per_token"), case[f"{name}/eval_num_examples"]
  assert result["num_tokens"] == tokens
  np.testing.assert_allclose(result["nats_per_token"] * tokens, case[f"{name}/eval_loss"], rtol=1e-5)
  assert round(result["accuracy"] * tokens) == case[f"{name}/eval_accuracy"]


def test_tokens_are_divided_by_place_in_the_document_and_by_context_seen():
  config = tiny.config()
  params = jax.tree.map(
    lambda leaf: np.zeros(leaf.shape, leaf.dtype), step_lib.abstract_params(config, make_mesh(config.mesh))
  )
  batch = {
    "inputs": np.where(np.arange(32) >= [[0], [22]], 5, 0).astype(np.int32),  # 32 and 10 inputs
    "positions": np.ones((2, 32, 1), np.int32),
    "targets": np.full((2, 4), 7, np.int32),
    "weights": np.array([[1, 1, 1, 1], [0, 1, 1, 1]], np.float32),
    "document": np.array([0, 1], np.int32),
    "end": np.array([65, 18], np.int32),  # targets are events 61 to 64, and 15 to 17
  }
  totals = metrics.Totals()
  totals.add(jax.jit(evaluate.make_eval_step(config))(params, batch))
  result, nats = totals.metrics("nats_per_token"), pytest.approx(math.log(259))
  assert result["by_position"] == [
    {"from": 0, "to": 16, "num_tokens": 1, "nats_per_token": nats},
    {"from": 16, "to": 32, "num_tokens": 2, "nats_per_token": nats},
    {"from": 32, "to": 64, "num_tokens": 3, "nats_per_token": nats},
    {"from": 64, "to": 128, "num_tokens": 1, "nats_per_token": nats},
  ]
  assert [(bucket["from"], bucket["num_tokens"]) for bucket in result["by_context"]] == [(0, 3), (16, 3), (32, 1)]


def test_the_interval_treats_documents_as_the_random_sample():
  sums = {
    "document": np.array([0, 1, 1, -1]),
    "nats": np.array([2.0, 3.0, 1.0, 9.0]),
    "correct": np.array([1.0, 0, 0, 9]),
    "tokens": np.array([1.0, 0.5, 0.5, 9]),
    "histogram": np.array([0, 0, 0, 1.0, 1.0]),
    **{f"{what}_by_{name}": np.ones((4, 25)) for what in ("nats", "tokens") for name in ("position", "context")},
  }
  totals = metrics.Totals()
  totals.add(sums)
  result = totals.metrics("bits_per_dim")
  # Two documents of one token each cost 2 and 4: standard error 1, times the 97.5% point of Student's t for one
  # degree of freedom, 12.706.
  assert result["nats_per_token"] == 3 and result["num_documents"] == 2 and result["num_windows"] == 3
  np.testing.assert_allclose(result["interval_95"]["nats_per_token"], [3 - 12.7062, 3 + 12.7062], rtol=1e-5)
  np.testing.assert_allclose(result["interval_95"]["bits_per_dim"], np.array([-9.7062, 15.7062]) / np.log(2), rtol=1e-5)
  assert result["accuracy"] == 0.5
  alone = metrics.Totals()
  alone.add({name: value[:1] if name != "histogram" else value for name, value in sums.items()})
  assert alone.metrics("bits_per_dim")["interval_95"] is None


def test_every_unit_is_computed_and_printed():
  sums = units.ScoredSums(tokens=4, nats=8 * math.log(2), correct=1, words=2, bytes=16, frames=2)
  expected = {
    "nats_per_token": (2 * math.log(2), "1.386 nats/token, 2.000 bits/token"),
    "bits_per_token": (2, "2.000 bits/token"),
    "bits_per_dim": (2, "2.000 bits/dim"),
    "bits_per_byte": (0.5, "0.500 bits/byte, 2.000 bits/token"),
    "word_perplexity": (16, "perplexity 16 per word, 2.000 bits/token"),
    "nats_per_frame": (4 * math.log(2), "2.773 nats/frame, 2.000 bits/token"),
    "accuracy": (0.25, "2.000 bits/token"),
  }
  one_long_word = units.compute_all(sums._replace(nats=1e6, words=1), "word_perplexity")
  assert np.isfinite(np.float32(one_long_word["word_perplexity"])), "TensorBoard stores float32"
  assert list(expected) == list(units.UNITS)
  for name, (value, summary) in expected.items():
    values = units.compute_all(sums, name)
    assert values[name] == pytest.approx(value)
    assert units.UNITS[name].summary.format_map(values) == summary
  assert "bits_per_dim" not in units.compute_all(sums, "bits_per_byte")
  without_text = units.compute_all(sums._replace(words=0, bytes=0), "bits_per_dim")
  assert list(without_text) == ["nats_per_token", "bits_per_token", "bits_per_dim", "accuracy"]


def test_metrics_do_not_depend_on_the_batch_and_are_written_to_a_file(copy_of_trained):
  (copy_of_trained / "eval-validation-12.json").unlink()
  results = [
    evaluate.evaluate(tiny.config(eval__batch_size=size, eval__stride=5, eval__max_sequences=7), copy_of_trained)
    for size in (1, 3, 64)
  ]
  assert results[0]["num_tokens"] == 7 * 16  # the mirrored half and EOS of each
  for result in results[1:]:
    for value, expected in zip(jax.tree.leaves(result), jax.tree.leaves(results[0]), strict=True):
      assert value == (expected if isinstance(expected, str) else pytest.approx(expected, rel=1e-6))
  assert (copy_of_trained / "eval-validation-12.json").exists()


def test_the_entropy_of_the_histogram_is_that_of_its_frequencies():
  config = tiny.config()
  evaluator = evaluate.Evaluator(config, make_mesh(config.mesh))

  def one_batch(params, batch):
    histogram = np.zeros(259, np.float32)
    histogram[[3, 4, 5]] = [2, 1, 1]
    rows = {"document": np.int32([0]), "nats": np.float32([4]), "correct": np.float32([1]), "tokens": np.float32([4])}
    names = [f"{what}_by_{name}" for what in ("nats", "tokens") for name in ("position", "context")]
    return {**rows, "histogram": histogram, **{name: np.ones((1, 25)) for name in names}}

  evaluator._step = one_batch
  result = evaluator({}, 0)
  assert result["histogram_entropy_bits"] == pytest.approx(1.5)
  assert result["nats_per_token"] == pytest.approx(1.0)
  assert result["accuracy"] == pytest.approx(0.25)


def test_a_fresh_model_costs_the_logarithm_of_the_vocabulary():
  assert _fresh_result(tiny.config())["nats_per_token"] == pytest.approx(np.log(259), rel=1e-6)


def test_another_model_and_an_empty_workdir_are_explained(trained, tmp_path):
  with pytest.raises(InputError, match="contains another model: model.num_layers was 2 and is 3"):
    evaluate.evaluate(tiny.config(model__num_layers=3), trained)
  with pytest.raises(InputError, match="contains no run"):
    evaluate.evaluate(tiny.config(), tmp_path)


def test_results_are_printed_before_a_file_that_cannot_be_written(copy_of_trained, capfd, monkeypatch):
  run = copy_of_trained
  result = json.loads((run / "eval-validation-12.json").read_text())
  (run / "eval-validation-12.json").unlink()
  for name in ("eval-validation-12.json", "score.json"):
    (run / name).mkdir()  # as a read-only folder: an OSError, also for root
  with pytest.raises(InputError, match="eval-validation-12.json cannot be written"):
    evaluate.evaluate(tiny.config(), run)
  assert "validation at step 12: " in capfd.readouterr().out

  sampler = types.SimpleNamespace(score=lambda text: result, task=types.SimpleNamespace(modality="text"))
  monkeypatch.setattr(write.Sampler, "from_workdir", lambda workdir, config: sampler)
  with pytest.raises(InputError, match="score.json cannot be written"):
    write.score(tiny.config(sample__prompt="a text"), run)
  assert "given at step 12: " in capfd.readouterr().out


def _texts(folder: pathlib.Path, contents: list[str], **overrides):
  """A config of text_files whose held-out files have these contents."""
  batches.write(folder, {"train.txt": "a text", **{f"held-out/{i}.txt": text for i, text in enumerate(contents)}})
  return tiny.config(
    data__task="text_files",
    data__files=str(folder / "train.txt"),
    data__validation_files=str(folder / "held-out"),
    model__position_encoding="rotary",
    model__position_sizes=(),
    eval__max_sequences=None,
    **overrides,
  )


def _fresh_result(config, **arguments):
  """The evaluation of a model that finds every token equally likely."""
  mesh = make_mesh(config.mesh)
  params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), step_lib.abstract_params(config, mesh))
  return evaluate.Evaluator(config, mesh)(params, 0, **arguments)


@pytest.mark.parametrize(
  ("contents", "max_tokens", "num_tokens", "num_bytes", "num_words"),
  [
    (["one two  three four"], 6, 6, 6, 2),  # "one tw"
    (["one two  three four"], 19, 19, 19, 4),  # all but EOS
    (["one two  three four"], 20, 20, 19, 4),
    (["one two  three four"], 999, 20, 19, 4),
    (["one two", "three", "four"], 13, 13, 12, 3),  # "one two" and EOS, "three"
    (["one two", "three", "four"], 14, 14, 12, 3),  # and its EOS
    (["one two", "three", "four"], 15, 15, 13, 4),  # "f"
  ],
)
def test_a_bound_in_tokens_cuts_documents_and_counts_only_what_is_scored(
  contents, max_tokens, num_tokens, num_bytes, num_words, tmp_path
):
  result = _fresh_result(_texts(tmp_path, contents, eval__max_tokens=max_tokens, eval__batch_size=2, eval__stride=3))
  assert (result["num_tokens"], result["num_bytes"], result["num_words"]) == (num_tokens, num_bytes, num_words)
  nats = num_tokens * math.log(259)
  assert result["bits_per_byte"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-6)
  assert result["word_perplexity"] == pytest.approx(math.exp(nats / num_words), rel=1e-5)


def test_a_bound_in_tokens_counts_scored_events_alone():
  result = _fresh_result(tiny.config(eval__max_sequences=None, eval__max_tokens=20))
  assert (result["num_tokens"], result["num_documents"]) == (20, 2)  # 16 of each copy are scored


def test_the_head_of_a_document_counts_scored_events():
  events = np.arange(3, 13, dtype=np.int32)
  whole = Document(events)
  assert whole.head(9) is whole and len(whole.head(8)) == 9
  counted = Document(events, count=lambda events: {"bytes": len(events)}).head(8)
  assert (counted.counts(), counted.counts(4), counted.head(5).counts()) == ({"bytes": 9}, {"bytes": 4}, {"bytes": 6})
  masked = Document(events, scored=np.arange(10) % 2 == 0)  # events 2, 4, 6 and 8
  head = masked.head(3)
  assert (len(head), head.num_scored, head.read(5, 7).tolist()) == (7, 3, [8, 9]) and masked.head(4) is masked


def test_progress_has_a_total(tmp_path, capfd, monkeypatch):
  monkeypatch.setattr(evaluate, "_SILENT_SECONDS", 0)
  monkeypatch.setattr(distributed, "progress_bar", functools.partial(distributed.progress_bar, mininterval=0))
  _fresh_result(_texts(tmp_path, ["x" * 999], eval__batch_size=1, eval__max_tokens=100))
  assert re.search(r"Evaluating: +\d+%.* 1/1 ", capfd.readouterr().err)


def test_a_held_out_file_that_cannot_be_read_is_left_out(tmp_path, capfd, monkeypatch):
  read_bytes = texts.read_bytes

  def refuse(path, *arguments):
    if path.endswith("1.txt"):
      raise Unreadable(f"{path} cannot be read: Permission denied")
    return read_bytes(path, *arguments)

  monkeypatch.setattr(texts, "read_bytes", refuse)
  assert _fresh_result(_texts(tmp_path, ["one", "two", "three"]))["num_documents"] == 2
  assert "1.txt cannot be read: Permission denied" in capfd.readouterr().err


def test_data_that_fails_to_be_read_fails_on_all_processes(capfd, monkeypatch):
  def batches_of_a_bad_disk(config, documents, rows):
    raise OSError("Input/output error")
    yield

  with monkeypatch.context() as patch:
    patch.setattr(splits, "eval_batches", batches_of_a_bad_disk)
    with pytest.raises(InputError, match=r"cannot be read \(OSError: Input/output error\)"):
      _fresh_result(tiny.config())
    assert "Traceback" in capfd.readouterr().err
  monkeypatch.setattr(distributed, "maximum", lambda value: 1)  # another process fails
  with pytest.raises(InputError, match="Another process cannot read held-out data"):
    _fresh_result(tiny.config())
