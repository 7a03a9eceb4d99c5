"""What docs/serving.md promises of a Sampler: lists of prompts, iterators, threads, and many calls without a trace."""

import concurrent.futures
import gc

import jax
import numpy as np
import pytest
from jax import monitoring

from configs import text_files
from perceiver_ar_jax.config import InputError
from perceiver_ar_jax.data import SOS, warn_once
from perceiver_ar_jax.sampling.sampler import Sampler
from tests.sampling_sampler_test import resolve, sampler


@pytest.fixture(scope="module")
def text():
  """A model of bytes."""
  return sampler(resolve(text_files))


def test_a_list_has_texts_files_and_events_of_different_lengths(text, tmp_path):
  (tmp_path / "file.txt").write_text("from a file")
  given = ["data", "a longer beginning, of more tokens", tmp_path / "file.txt", np.array([SOS, 70], np.int32)]
  samples = text(given, length=5, batch_size=3)
  values = ["data", "a longer beginning, of more tokens", "from a file", text.task.decode([SOS, 70])]
  assert len(samples) == 4
  for sample, value in zip(samples, values):
    assert sample.value.startswith(value) and 1 <= sample.num_new <= 5
  assert len(text(given, num_samples=2, length=1)) == 2
  for wrong, words in (([], "list of prompts is empty"), ([2, 40], "The prompt 2 is not a text"), ([""], "is empty")):
    with pytest.raises(InputError, match=words):
      text(wrong)


def _in_new_thread(function, *arguments):
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    return pool.submit(function, *arguments).result()


def test_tokens_arrive_block_by_block_in_any_thread(text):
  expected = text(["Once", "Another"], length=60, batch_size=2)
  growing = text.stream(["Once", "Another"], length=60, batch_size=2)
  steps = []
  while (samples := _in_new_thread(next, growing, None)) is not None:  # as a web server resumes iterators
    steps.append(samples)
    text("between", length=3, num_samples=1)  # other calls do not disturb it
  counts = [sum(sample.num_new for sample in samples) for samples in steps]
  assert counts[0] == 0 and counts == sorted(counts) and len(counts) > 10
  for before, after in zip(steps, steps[1:]):
    for old, new in zip(before, after):
      np.testing.assert_array_equal(new.events[: len(old.events)], old.events)
  assert [sample.value for sample in steps[-1]] == [sample.value for sample in expected]
  one_by_one = [len(samples) for samples in text.stream("Once", length=3, num_samples=3, batch_size=1)]
  assert set(one_by_one) == {1, 2, 3} and one_by_one == sorted(one_by_one)
  with pytest.raises(InputError, match="Unknown setting"):
    text.stream("Once", lenght=3)


def test_threads_get_what_they_would_get_alone(text):
  """From a sampler that has compiled nothing yet."""
  fresh = Sampler(text.config, text.params)
  beginnings = [f"{'x' * number} {number}" for number in range(12)]

  def call(index):
    sample = fresh([beginnings[index]], length=30, seed=index, batch_size=2)[0]
    return sample.value, fresh.score(beginnings[index])["nats_per_token"]

  with concurrent.futures.ThreadPoolExecutor(6) as pool:
    results = list(pool.map(call, range(12)))
  for index, (value, nats) in enumerate(results):
    assert value == text([beginnings[index]], length=30, seed=index, batch_size=2)[0].value
    assert nats == text.score(beginnings[index])["nats_per_token"]


def test_many_calls_compile_and_keep_nothing(text):
  """Prompts of every length up to and beyond the context, texts of many scored lengths, and abandoned iterators."""
  compiled = []
  monitoring.register_event_duration_secs_listener(lambda event, *_, **__: compiled.append(event))
  context = text.config.model.max_context

  def calls(number):
    for index in range(number):
      prompt = "y" * (1 + index % (context + 8))
      text([prompt], length=1 + index % 3, seed=index, temperature=0.5 + index / 100, top_k=index % 5, batch_size=2)
      if index % 10 == 0:
        text.score(prompt)
        next(text.stream([prompt], length=20, batch_size=2))
    gc.collect()
    return len(jax.live_arrays()), warn_once.count("shortened")

  before = calls(context + 8)
  assert before[1] == 1  # one warning, whatever the lengths
  compiled.clear()
  assert calls(100) == before
  assert not compiled
  text(["y"], length=1, batch_size=7)
  assert any("backend_compile" in event for event in compiled)  # of another batch size: the counter counts
