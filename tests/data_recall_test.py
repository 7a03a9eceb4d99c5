"""The recall task: what its documents contain, and settings that do not fit."""

import numpy as np
import pytest

from perceiver_ar_jax.config import InputError
from perceiver_ar_jax.data import SOS, recall
from perceiver_ar_jax.data.loader import TrainLoader
from perceiver_ar_jax.data.tasks import get_tasks
from tests import tiny


@pytest.mark.parametrize(("length", "pairs", "queries"), [(513, 64, 32), (100, 20, 10), (31, 10, 5), (41, 10, 10)])
def test_every_query_has_one_answer_and_it_is_earlier(length, pairs, queries):
  document = recall.document(np.random.default_rng(length), length, pairs, queries)
  events, scored = document.read(0, length), document.scored(0, length)
  assert len(events) == length and events[0] == SOS and events.max() < recall.vocab_size(pairs)
  is_key = (events > 3) & (events < 4 + 2 * pairs)
  first_query = length - 2 * queries
  answers = {}
  for index in np.flatnonzero(is_key[:first_query]):
    assert events[index] not in answers, "a key has two values"
    answers[events[index]] = events[index + 1]
  assert len(answers) == pairs and min(answers.values()) >= 4 + 2 * pairs
  asked = events[first_query::2]
  assert len(set(asked)) == queries
  np.testing.assert_array_equal(events[first_query + 1 :: 2], [answers[key] for key in asked])
  np.testing.assert_array_equal(np.flatnonzero(scored), np.arange(first_query + 1, length, 2))


def test_documents_are_reproducible_and_validation_shares_none_with_training():
  ((task, _),) = get_tasks(tiny.config(data__task="recall").data, 513)

  def events(number, validation):
    return task.open({"number": number, "validation": validation}).read(0, 513).tobytes()

  assert events(3, False) == events(3, False)
  assert len({events(number, validation) for number in range(50) for validation in (False, True)}) == 100


def test_training_scores_only_the_answers():
  config = tiny.config(
    data__task="recall",
    data__min_crop=513,
    model__vocab_size=196,
    model__max_context=512,
    model__num_latents=64,
    model__position_encoding="rotary",
    model__position_sizes=(),
  )
  batch = next(TrainLoader(config))
  assert batch["weights"][:, 1::2].all() and not batch["weights"][:, ::2].any()


@pytest.mark.parametrize(("length", "pairs", "queries"), [(20, 10, 5), (100, 10, 11)])
def test_settings_that_do_not_fit_are_refused(length, pairs, queries):
  with pytest.raises(InputError, match=f"recall_pairs={pairs} and data.recall_queries={queries}"):
    recall.document(np.random.default_rng(0), length, pairs, queries)
