"""Attention maps: the weights that every kernel attends with, and pictures that show them."""

import dataclasses
import functools
import io
import json

import jax
import numpy as np
import pytest

from perceiver_ar_jax import PerceiverAR
from perceiver_ar_jax.config import DataConfig, InputError
from perceiver_ar_jax.data import EOS, NUM_SPECIAL, SOS, images, music
from perceiver_ar_jax.data.documents import Document, count_positions
from perceiver_ar_jax.data.tasks import get_tasks
from perceiver_ar_jax.evaluation import evaluate
from perceiver_ar_jax.experiments import attention_pictures
from perceiver_ar_jax.models.perceiver_ar import attention_map
from perceiver_ar_jax.parallel.mesh import make_mesh
from tests import tiny

LENGTH, PADDING = 32, 5


@functools.cache
def model(**overrides):
  """(ModelConfig, weights, tokens with padding in the first row, their positions) of the tiny model."""
  config = tiny.config(**{f"model__{name}": value for name, value in overrides.items()}).model
  tokens = np.random.default_rng(0).integers(3, 259, (2, LENGTH)).astype(np.int32)
  tokens[0, :PADDING] = 0
  positions = np.where(tokens > 0, np.cumsum(tokens > 0, axis=1), 0)[..., None].astype(np.int32)
  return config, tiny.random_params(config), tokens, positions


ROTARY = {"position_encoding": "rotary", "position_sizes": ()}


@pytest.mark.slow
@pytest.mark.parametrize(
  "overrides",
  [
    {"attention": "reference"},
    {"attention": "streamed", "cross_attend_after": (0,)},
    {"attention": "streamed", **ROTARY},
    {"attention": "chunked", **ROTARY, "positions_from_data": False, "cross_attend_after": (0,)},
  ],
  ids=str,
)
def test_values_weighted_by_the_map_equal_the_kernels_output(overrides):
  config, params, tokens, positions = model(attention_chunk=7, **overrides)
  module = PerceiverAR(config)

  @jax.jit
  def run(params):
    maps = [
      attention_map(config, params, tokens, positions, cross_attention=index)
      for index in range(1 + len(config.cross_attend_after))
    ]
    keys_values = module.apply({"params": params}, tokens, positions, method="cross_keys_values")
    _, state = module.apply(
      {"params": params}, tokens, positions, capture_intermediates=lambda module, _: module.name == "attention"
    )
    return maps, [v_BxLxHxK for _, v_BxLxHxK in keys_values], state["intermediates"]

  maps, values, given = jax.tree.map(np.asarray, run(params))
  for index, (map_BxHxL, v_BxLxHxK) in enumerate(zip(maps, values, strict=True)):
    name = f"cross_attend_{index}"
    assert map_BxHxL.shape == (2, config.num_cross_heads, LENGTH) and map_BxHxL.dtype == np.float32
    np.testing.assert_allclose(map_BxHxL.sum(axis=-1), 1, atol=1e-6)
    assert not map_BxHxL[0, :, :PADDING].any() and (map_BxHxL[0, :, PADDING:] > 0).all() and (map_BxHxL[1] > 0).all()
    out = jax.tree.map(np.asarray, params[name]["attention"]["out"])
    expected_BxD = np.einsum("bhl,blhk->bhk", map_BxHxL, v_BxLxHxK).reshape(2, -1) @ out["kernel"] + out["bias"]
    (given_BxMxD,) = given[name]["attention"]["__call__"]
    np.testing.assert_allclose(given_BxMxD[:, -1], expected_BxD, atol=2e-6)


def test_the_map_is_the_softmax_of_the_last_querys_scores():
  config, params, tokens, positions = model()
  module = PerceiverAR(config)
  _, state = module.apply(
    {"params": params}, tokens, positions, capture_intermediates=lambda module, _: module.name == "query"
  )
  (query_BxMxE,) = state["intermediates"]["cross_attend_0"]["attention"]["query"]["__call__"]
  k_BxLxHxK, _ = module.apply({"params": params}, tokens, positions, method="cross_keys_values")[0]
  map_BxHxL = attention_map(config, params, tokens, positions)
  for head in range(2):  # of 8 each
    query_K = np.asarray(query_BxMxE[0, -1, 8 * head : 8 * head + 8])
    scores_L = np.asarray(k_BxLxHxK[0, :, head]) @ query_K / np.sqrt(8)
    weights_L = np.exp(scores_L) * (tokens[0] > 0)
    np.testing.assert_allclose(map_BxHxL[0, head], weights_L / weights_L.sum(), atol=1e-6)


def test_bfloat16_models_have_maps_of_float32():
  config, params, tokens, positions = model(dtype="bfloat16")
  half, full = (
    np.asarray(jax.jit(functools.partial(attention_map, variant))(params, tokens, positions))
    for variant in (config, dataclasses.replace(config, dtype="float32"))
  )
  assert half.dtype == np.float32 and 0 < np.abs(half - full).max() < 0.01
  np.testing.assert_allclose(half.sum(axis=-1), 1, atol=1e-6)


def test_a_map_does_not_depend_on_events_after_its_output():
  config = tiny.config()
  _, params, _, _ = model()
  events = np.random.default_rng(1).integers(3, 259, 60).astype(np.int32)
  changed = events.copy()
  changed[20:] = np.roll(changed[20:], 1)
  mesh = make_mesh(config.mesh)
  maps = [attention_pictures.compute(config, mesh, params, Document(x), [19, 20, 50]) for x in (events, changed)]
  for output in (0, 1):  # the second predicts the first event that was changed
    np.testing.assert_array_equal(maps[0][output], maps[1][output])
  assert (maps[0][0] > 0).sum() == 2 * 19 and (maps[0][2] > 0).sum() == 2 * LENGTH
  assert np.abs(maps[0][2] - maps[1][2]).max() > 1e-5


@pytest.fixture
def restored(monkeypatch):
  """A run at step 7, and maps that take half from the oldest slot and half from the newest."""
  monkeypatch.setattr(evaluate, "restore", lambda config, workdir: (make_mesh(config.mesh), 7, model()[1]))
  weights_HxL = np.zeros((2, LENGTH), np.float32)
  weights_HxL[:, [0, -1]] = 0.5
  monkeypatch.setattr(attention_pictures, "compute", lambda *arguments: [weights_HxL] * len(arguments[-1]))


def test_files_and_numbers_of_each_output(restored, tmp_path):
  config = tiny.config(attention_map__outputs=(32, 31, 32))
  report = attention_pictures.write(config, tmp_path)
  assert json.loads((tmp_path / "attention" / "attention.json").read_text()) == report
  assert [entry["output"] for entry in report["outputs"]] == [32, 31] and report["step"] == 7
  last = report["outputs"][0]
  assert (last["event"], last["inputs"], last["first_input"]) == (EOS, 32, 0)
  assert last["entropy_nats"] == pytest.approx(np.log(2)) and last["share_before_latents"] == pytest.approx(0.5)
  assert {path.name for path in (tmp_path / "attention").iterdir()} == {
    "7-31.npz", "7-31.png", "7-32.npz", "7-32.png", "attention.json"
  }  # fmt: skip
  numbers = np.load(tmp_path / "attention" / "7-31.npz")
  assert numbers["weights_HxL"].shape == (2, LENGTH)
  assert numbers["tokens_L"][:2].tolist() == [0, SOS] and numbers["places_L"][:3].tolist() == [-1, 0, 1]
  assert numbers["positions_LxP"][:3, 0].tolist() == [0, 1, 2]


def test_without_a_choice_outputs_are_spread_evenly():
  assert attention_pictures._outputs((), 32) == [8, 16, 24, 32]
  assert attention_pictures._outputs((), 3) == [1, 2, 3]
  assert attention_pictures._outputs((5,), 32) == [5]


def test_mistakes_are_explained(restored, tmp_path):
  with pytest.raises(InputError, match="contains 33, and the document has 32 outputs"):
    attention_pictures.write(tiny.config(attention_map__outputs=(33,)), tmp_path)
  with pytest.raises(InputError, match="task copy has no files: .* not .*a.txt"):
    attention_pictures.write(tiny.config(sample__prompt="a.txt"), tmp_path)
  (tmp_path / "attention").write_text("")
  with pytest.raises(InputError, match="cannot be written"):
    attention_pictures.write(tiny.config(), tmp_path)
  for wrong, message in (
    ({"outputs": (0,)}, "integers from 1 on"),
    ({"cross_attend": 1}, r"attention_map.cross_attend=1 must be in 0..0"),
  ):
    with pytest.raises(InputError, match=message):
      tiny.config(**{f"attention_map__{name}": value for name, value in wrong.items()})


def test_a_folder_without_a_run_is_explained(tmp_path):
  with pytest.raises(InputError, match="no run"):
    attention_pictures.write(tiny.config(), tmp_path)


def task(name, **settings):
  return get_tasks(DataConfig(task=name, **settings), 100)[0][0]


def window(name, events, positions=None, **settings):
  events = np.array(events, np.int32)
  positions = count_positions(len(events)) if positions is None else positions
  return attention_pictures.Window(task(name, **settings), events, positions, 0)


def one_hot(size, index):
  return np.eye(size, dtype=np.float32)[index]


def axes_of(window, weights_N):
  """The axes of the window's picture, drawn once so that errors of rendering are seen too."""
  figure = attention_pictures.picture(window, weights_N[None])
  figure.savefig(io.BytesIO())
  return figure.axes


@pytest.mark.parametrize("order", images.ORDERS)
def test_an_image_shows_the_weight_of_each_pixel_and_nothing_after_the_output(order):
  pixels = np.random.default_rng(0).integers(100, 200, (4, 4, 3)).astype(np.uint8)
  document = images.document(pixels, order)
  positions = document.positions(0, 49).tolist()
  attended, output = positions.index([2 + 1, 2 + 0, 2 + 0]), positions.index([2 + 2, 2 + 1, 2 + 0])  # (x, y, channel)
  events = document.read(0, output + 1)
  shown = window("image_files", events, document.positions(0, output + 1), image_size=4, image_order=order)
  inputs, attention, _ = axes_of(shown, one_hot(output, attended))
  known = inputs.images[0].get_array()
  assert known[0, 1, 0] == pixels[0, 1, 0] and (known[2:] == 40).all() and (known[1, 2] == 40).all()
  assert np.argwhere(attention.images[0].get_array()).tolist() == [[0, 1]]
  assert all(axes.patches[0].get_xy() == (1.5, 0.5) for axes in (inputs, attention)), "the output is framed"


def text_events(text):
  return [SOS, *(np.frombuffer(text, np.uint8) + NUM_SPECIAL)]


def test_characters_of_several_bytes_sum_their_weights_and_the_output_is_last():
  shown = window("text_files", text_events("aé\nb".encode()))
  characters, num_output = attention_pictures._characters(shown, np.array([0.1, 0.2, 0.3, 0.15, 0.25]))
  assert num_output == 1 and [character for character, _ in characters] == ["", "a", "é", "\n", "b"]
  np.testing.assert_allclose([weight for _, weight in characters], [0.1, 0.2, 0.45, 0.25, 0])


def test_an_incomplete_character_at_the_end_of_the_inputs_precedes_the_output():
  shown = window("text_files", text_events("aé".encode()))
  characters, num_output = attention_pictures._characters(shown, np.array([0.1, 0.2, 0.7]))
  assert characters == [("", 0.1), ("a", 0.2), ("é", 0.7)] and num_output == 1


def test_a_character_that_begins_like_the_output_stays_complete():
  shown = window("text_files", [*text_events("éa".encode()), 0xC3 + NUM_SPECIAL])
  characters, _ = attention_pictures._characters(shown, np.array([0.1, 0.2, 0.3, 0.4]))
  assert [character for character, _ in characters] == ["", "é", "a", "\ufffd"]


def test_a_text_colors_the_character_attended_to_and_frames_the_output():
  axes, _ = axes_of(window("text_files", text_events(b"a $\nc")), one_hot(5, 3))  # the dollar sign
  assert np.argwhere(axes.images[0].get_array() > 0).tolist() == [[0, 3]]
  assert [(text.get_text(), text.get_position()) for text in axes.texts] == [
    ("a", (1, 0)),
    ("$", (3, 0)),
    ("c", (0, 1)),
  ]
  assert [patch.get_xy() for patch in axes.patches] == [(-0.5, 0.5)]


def test_a_long_text_shows_its_last_rows():
  shown = window("text_files", text_events(b"".join(b"%d\n" % number for number in range(100)) + b"!"))
  axes, plot = axes_of(shown, one_hot(len(shown.events) - 1, 0))
  rows = {text.get_position()[1]: text.get_text() for text in axes.texts}
  assert len(rows) == 30 and rows[29] == "!" and rows[0] == "1", "71 to 99 and the output"
  assert not axes.images[0].get_array().any() and len(plot.collections[0].get_segments()) == len(shown.events) - 1


def test_notes_are_the_events_that_begin_and_end_them():
  notes = [music.Note(60, 64, 0.0, 0.5), music.Note(64, 64, 0.25, 1.0)]
  events = [SOS, *music.encode(notes)]  # velocity, on 60, shift, on 64, shift, off 60, shift, off 64
  assert music.notes_of_events(events) == [(60, 2, 6), (64, 4, 8)]
  assert music.notes_of_events(events[:8]) == [(60, 2, 6), (64, 4, 8)]  # 8: no event ends it
  assert music.steps(events).tolist() == [0, 0, 0, 25, 25, 50, 50, 100, 100]


def test_a_roll_colors_the_note_attended_to_and_marks_the_output():
  notes = [music.Note(60, 64, 0.0, 0.5), music.Note(64, 64, 0.25, 1.0)]
  shown = window("midi_files", [SOS, *music.encode(notes)], files="none")
  roll, plot = axes_of(shown, one_hot(8, 6))  # the end of pitch 60
  (lines,) = roll.collections
  drawn = {line[0, 1]: (*line[:, 0], weight) for line, weight in zip(lines.get_segments(), lines.get_array())}
  assert drawn == {60: (0, 0.5, 1), 64: (0.25, 1, 0)}
  assert roll.lines[0].get_ydata().tolist() == [64], "the output ends pitch 64"
  assert len(plot.collections[0].get_segments()) == 8


def test_a_roll_without_notes_is_drawn():
  roll, _ = axes_of(window("midi_files", [SOS, EOS], files="none"), np.ones(1))
  assert len(roll.collections[0].get_segments()) == 0


def test_all_else_is_a_plot_of_the_mean_over_heads():
  figure = attention_pictures.picture(window("copy", [SOS, 5, 6, 7]), np.array([[1, 0, 0], [0, 0, 1]], np.float32))
  (lines,) = figure.axes[0].collections
  assert [line[1].tolist() for line in lines.get_segments()] == [[0, 0.5], [1, 0], [2, 0.5]]
