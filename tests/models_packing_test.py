"""Packed rows: the losses and gradients of their documents are those of documents in rows of their own."""

import dataclasses
import functools
from itertools import starmap
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from perceiver_ar_jax import ModelConfig, PerceiverAR
from perceiver_ar_jax.config import MeshConfig
from perceiver_ar_jax.models import attention, keys, positions
from perceiver_ar_jax.parallel.mesh import make_mesh
from perceiver_ar_jax.training.loss import token_losses
from tests import tiny

CONTEXT, LATENTS = 24, 12
CONFIG = ModelConfig(
  vocab_size=20,
  max_context=CONTEXT,
  num_latents=LATENTS,
  num_layers=2,
  latent_width=16,
  num_cross_heads=2,
  num_self_heads=2,
  position_encoding="learned",
  position_sizes=(CONTEXT + 1,),
  attention="streamed",
  attention_chunk=5,
)
ROWS = [[5, 4, 10], [3, 2], [24]]  # inputs of the documents of each row, from the right
ALL = [(row, index) for row, lengths in enumerate(ROWS) for index in range(len(lengths))]


def _num_latents(row, index):
  """Latents for a document in a row of its own: as in its packed row if it extends beyond the latents, or all."""
  free = LATENTS - sum(ROWS[row][:index])
  return free if ROWS[row][index] > free else LATENTS


def _documents():
  """{(row, index): events}."""
  rng = np.random.default_rng(0)
  return {(row, index): rng.integers(3, 20, ROWS[row][index] + 1).astype(np.int32) for row, index in ALL}


def _batch(rows, num_latents=LATENTS):
  """The arrays of a batch whose rows contain these documents, from the right."""
  batch = {name: np.zeros((len(rows), CONTEXT), np.int32) for name in ("inputs", "places", "targets", "segments")}
  for row, documents in enumerate(rows):
    end = CONTEXT
    for number, events in enumerate(documents, start=1):
      start = end - len(events) + 1
      values = events[:-1], np.arange(1, len(events)), events[1:], number
      for name, value in zip(batch, values):
        batch[name][row, start:end] = value
      end = start
  return batch | {"targets": batch["targets"][:, CONTEXT - num_latents :]}


def _losses(config, params, batch, *, packed, **settings):
  """float32[B, M]: the loss of each target, 0 on padding."""
  segments = {"segments_BxL": jnp.asarray(batch["segments"])} if packed else {}
  inputs, targets = jnp.asarray(batch["inputs"]), jnp.asarray(batch["targets"])
  places = jnp.asarray(batch["places"])[..., None]
  logits = PerceiverAR(config).apply(
    {"params": params}, inputs, places, num_latents=targets.shape[1], **segments, **settings
  )
  return jnp.where(targets > 0, token_losses(logits, targets).cross_entropy, 0)


def _compare(config, gradients=False):
  params, documents = tiny.random_params(dataclasses.replace(config, attention="reference")), _documents()
  packed = _batch([[documents[row, index] for index in range(len(lengths))] for row, lengths in enumerate(ROWS)])
  by_latents = {
    count: [each for each in ALL if _num_latents(*each) == count] for count in {*starmap(_num_latents, ALL)}
  }
  single = {count: _batch([[documents[each]] for each in alike], count) for count, alike in by_latents.items()}

  def packed_losses(params):
    losses = _losses(config, params, packed, packed=True)
    return losses.sum(), losses

  def single_losses(params):
    losses = {count: _losses(config, params, batch, packed=False) for count, batch in single.items()}
    return sum(each.sum() for each in losses.values()), losses

  evaluate = functools.partial(jax.value_and_grad, has_aux=True) if gradients else (lambda fn: lambda p: (fn(p), ()))
  (total, losses), grads = jax.jit(evaluate(packed_losses))(params)
  (single_total, by_count), single_grads = jax.jit(evaluate(single_losses))(params)
  np.testing.assert_allclose(total, single_total, rtol=1e-5)
  for count, alike in by_latents.items():
    for (row, index), expected in zip(alike, by_count[count], strict=True):
      scored = min(count, ROWS[row][index])
      end = LATENTS - sum(ROWS[row][:index])
      ours = losses[row, end - scored : end]
      assert np.all(ours > 0)
      np.testing.assert_allclose(ours, expected[count - scored :], rtol=2e-5, err_msg=f"document {row, index}")
  for ours, expected in zip(jax.tree.leaves(grads), jax.tree.leaves(single_grads), strict=True):
    np.testing.assert_allclose(ours, expected, atol=1e-4 * max(1, np.abs(expected).max()))


def _without_gpu():
  """cuDNN's call with the same mask on any platform."""
  plain = jax.nn.dot_product_attention
  return mock.patch.object(
    jax.nn, "dot_product_attention", lambda *args, implementation, **named: plain(*args, **named)
  )


@pytest.mark.parametrize("kernel", ["reference", "chunked", "streamed", "cudnn"])
def test_losses_are_those_of_single_documents_with_every_kernel(kernel):
  with _without_gpu():
    _compare(dataclasses.replace(CONFIG, attention=kernel))


def _compare_with_heads_on_two_devices():
  mesh = make_mesh(MeshConfig(tensor=2), jax.devices()[:2])
  with _without_gpu(), jax.set_mesh(mesh):
    _compare(dataclasses.replace(CONFIG, attention="cudnn"))


def test_losses_are_those_of_single_documents_where_devices_have_different_heads(eight_devices):
  eight_devices(_compare_with_heads_on_two_devices)


@pytest.mark.slow
def test_losses_are_those_of_single_documents_with_splash(monkeypatch):
  kernel = attention.Kernel(functools.partial(attention.splash, interpret=True), shards_context=False)
  monkeypatch.setitem(attention.KERNELS, "splash", kernel)
  _compare(dataclasses.replace(CONFIG, attention="splash", num_layers=1))


ROTARY = dataclasses.replace(CONFIG, position_encoding="rotary", position_sizes=())


@pytest.mark.parametrize(
  "config",
  [
    ROTARY,  # with one projection per id: 20 ids, 24 inputs
    dataclasses.replace(ROTARY, positions_from_data=False),
    dataclasses.replace(CONFIG, positions_from_data=False),
    dataclasses.replace(CONFIG, conv_taps=3, attention="reference"),
  ],
  ids=["rotary", "rotary, own positions", "learned, own positions", "convolution"],
)
def test_losses_are_those_of_single_documents_with_every_part_of_the_model(config):
  _compare(config)


@pytest.mark.slow
def test_gradients_are_those_of_single_documents():
  _compare(dataclasses.replace(CONFIG, conv_taps=3, cross_attend_after=(0,), qk_norm=True), gradients=True)


def test_no_dropout_shows_a_document_to_another_one():
  config = dataclasses.replace(CONFIG, latent_dropout=0.4, cross_attend_dropout=0.5, dropout=0.1)
  params, documents = tiny.random_params(config), _documents()
  row = [documents[0, index] for index in range(3)]

  @jax.jit
  def losses(batch):
    dropout = {"deterministic": False, "rngs": {"dropout": jax.random.key(3)}}
    return _losses(config, params, batch, packed=True, **dropout)[0]

  before = losses(_batch([row]))
  ends = [12, 7, 3, 0]  # of the documents among the latents
  for changed in range(3):
    row_after = [events if index != changed else (events - 3 + 7) % 17 + 3 for index, events in enumerate(row)]
    differs = losses(_batch([row_after])) != before
    for index in range(3):
      assert differs[ends[index + 1] : ends[index]].any() == (index == changed), f"document {changed} and {index}"


def test_a_query_attends_to_earlier_keys_of_its_segment_that_are_not_hidden():
  # Two documents of two inputs and three, after padding; the third input is a latent that was dropped.
  valid = jnp.array([[0, 2, 2, -1, 1, 1]])
  queries = keys.query_segments(valid, 4)
  assert queries.tolist() == [[2, 1, 1, 1]]
  visible = keys.visible(jnp.arange(6), 4, 6, valid, True, queries)
  assert visible[0, 0].astype(int).tolist() == [
    [0, 1, 1, 0, 0, 0],
    [0, 0, 0, 1, 0, 0],
    [0, 0, 0, 0, 1, 0],
    [0, 0, 0, 0, 1, 1],
  ]


def test_own_positions_count_back_from_the_end_of_each_document():
  tokens, segments = jnp.array([[0, 5, 5, 5, 5, 5]]), jnp.array([[0, 2, 2, 2, 1, 1]])
  assert positions.terminal_relative(tokens, segments)[0, :, 0].tolist() == [0, 2, 1, 0, 1, 0]
