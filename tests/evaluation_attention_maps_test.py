"""Attention maps: they are what every kernel attends by, and pictures show them where they belong."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
from flax import linen as nn

from perceiver_ar_jax import PerceiverAR
from perceiver_ar_jax.config import DataConfig, InputError
from perceiver_ar_jax.data import EOS, NUM_SPECIAL, SOS, heat, images, music
from perceiver_ar_jax.data.documents import Document, count_positions
from perceiver_ar_jax.data.tasks import get_tasks
from perceiver_ar_jax.evaluation import attention_maps, evaluate
from perceiver_ar_jax.models.perceiver_ar import attention_map
from perceiver_ar_jax.parallel.mesh import make_mesh
from perceiver_ar_jax.sampling import prompts
from tests import tiny

LENGTH, PADDING = 32, 5


def model(**overrides):
  """(ModelConfig, weights, tokens with padding in the first row, their positions) of the tiny model."""
  config = tiny.config(**{f"model__{name}": value for name, value in overrides.items()}).model
  tokens = np.random.default_rng(0).integers(3, 259, (2, LENGTH)).astype(np.int32)
  tokens[0, :PADDING] = 0
  positions = np.where(tokens > 0, np.cumsum(tokens > 0, axis=1), 0)[..., None].astype(np.int32)
  variables = jax.jit(PerceiverAR(config).init)(jax.random.key(0), tokens, positions)
  assert list(variables) == ["params"]
  return config, nn.meta.unbox(variables["params"]), tokens, positions


YELLOW = [255, 230, 80]
ROTARY = {"position_encoding": "rotary", "position_sizes": ()}


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
def test_values_summed_up_by_the_map_are_what_the_kernel_gives(overrides):
  config, params, tokens, positions = model(attention_chunk=7, **overrides)
  module = PerceiverAR(config)

  @jax.jit
  def run(params):
    maps = [
      attention_map(config, params, tokens, positions, cross_attend=index)
      for index in range(1 + len(config.cross_attend_after))
    ]
    keys_values = module.apply({"params": params}, tokens, positions, method="keys_values")
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
  k_BxLxHxK, _ = module.apply({"params": params}, tokens, positions, method="keys_values")[0]
  found_BxHxL = attention_map(config, params, tokens, positions)
  for head in range(2):  # of 8 each
    query_K = np.asarray(query_BxMxE[0, -1, 8 * head : 8 * head + 8])
    scores_L = np.asarray(k_BxLxHxK[0, :, head]) @ query_K / np.sqrt(8)
    weights_L = np.exp(scores_L) * (tokens[0] > 0)
    np.testing.assert_allclose(found_BxHxL[0, head], weights_L / weights_L.sum(), atol=1e-6)


def test_bfloat16_models_have_maps_of_float32():
  config, params, tokens, positions = model(dtype="bfloat16")
  half, full = (
    np.asarray(jax.jit(functools.partial(attention_map, one))(params, tokens, positions))
    for one in (config, dataclasses.replace(config, dtype="float32"))
  )
  assert half.dtype == np.float32 and 0 < np.abs(half - full).max() < 0.01
  np.testing.assert_allclose(half.sum(axis=-1), 1, atol=1e-6)


def test_a_map_knows_nothing_of_what_comes_after_its_output():
  config = tiny.config()
  _, params, _, _ = model()
  events = np.random.default_rng(1).integers(3, 259, 60).astype(np.int32)
  changed = events.copy()
  changed[20:] = np.roll(changed[20:], 1)
  mesh = make_mesh(config.mesh)
  maps = [attention_maps.compute(config, mesh, params, Document(one), [19, 20, 50]) for one in (events, changed)]
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
  monkeypatch.setattr(attention_maps, "compute", lambda *arguments: [weights_HxL] * len(arguments[-1]))


def test_files_and_figures_of_each_output(restored, tmp_path):
  config = tiny.config(attention_map__outputs=(32, 31, 32))
  report = attention_maps.write(config, tmp_path, prompts.read)
  assert json.loads((tmp_path / "attention" / "attention.json").read_text()) == report
  assert [one["output"] for one in report["outputs"]] == [32, 31] and report["step"] == 7
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
  assert attention_maps._outputs((), 32) == [8, 16, 24, 32]
  assert attention_maps._outputs((), 3) == [1, 2, 3]
  assert attention_maps._outputs((5,), 32) == [5]


def test_mistakes_are_explained(restored, tmp_path):
  with pytest.raises(InputError, match="names 33, and the document has 32 outputs"):
    attention_maps.write(tiny.config(attention_map__outputs=(33,)), tmp_path, prompts.read)
  with pytest.raises(InputError, match="task copy has no files, so 'a.txt' cannot be read"):
    attention_maps.write(tiny.config(attention_map__prompt="a.txt"), tmp_path, prompts.read)
  (tmp_path / "attention").write_text("")
  with pytest.raises(InputError, match="cannot be written"):
    attention_maps.write(tiny.config(), tmp_path, prompts.read)
  for wrong, message in (
    ({"outputs": (0,)}, "whole numbers from 1 on"),
    ({"prompt": ""}, "attention_map.prompt is empty"),
    ({"cross_attend": 1}, r"attention_map.cross_attend=1 must lie in 0..0"),
  ):
    with pytest.raises(InputError, match=message):
      tiny.config(**{f"attention_map__{name}": value for name, value in wrong.items()})


def test_a_folder_without_a_run_is_explained(tmp_path):
  with pytest.raises(InputError, match="contains no run"):
    attention_maps.write(tiny.config(), tmp_path, prompts.read)


def task(name, **settings):
  return get_tasks(DataConfig(task=name, **settings), 100)[0][0]


def window(name, events, positions=None, **settings):
  events = np.array(events, np.int32)
  return heat.Window(
    task(name, **settings), events, count_positions(len(events)) if positions is None else positions, 0
  )


def one_hot(size, place):
  return np.eye(size, dtype=np.float32)[place]


@pytest.mark.parametrize("order", images.ORDERS)
def test_a_picture_is_hot_at_the_pixel_attended_to_and_shows_nothing_after_the_output(order):
  pixels = np.random.default_rng(0).integers(100, 200, (4, 4, 3)).astype(np.uint8)
  document = images.document(pixels, order)
  places = document.positions(0, 49).tolist()
  place, output = places.index([2 + 1, 2 + 0, 2 + 0]), places.index([2 + 2, 2 + 1, 2 + 0])  # red of (1, 0), of (2, 1)
  seen = window(
    "image_files", document.read(0, output + 1), document.positions(0, output + 1), image_size=4, image_order=order
  )
  centre = np.arange(4) * 64 + 32
  plain, hot = (
    heat._image(seen, weights)[np.ix_(centre, centre)] for weights in (np.zeros(output), one_hot(output, place))
  )
  assert plain[0, 1, 0] == pixels[0, 1, 0] and hot[0, 1].tolist() == [255, 150, 0]
  greys = np.ptp(hot.astype(int), axis=-1) == 0
  assert greys.sum() == 15 and not greys[0, 1]
  assert (plain[2:] == heat._UNSEEN).all() and (plain[1, 2] == heat._UNSEEN).all()
  framed = np.argwhere((heat._image(seen, np.zeros(output)) == heat._MARK).all(axis=-1))
  assert framed.min(axis=0).tolist() == [64, 128] and framed.max(axis=0).tolist() == [64 + 65, 128 + 65]


def test_characters_of_several_bytes_have_the_weight_of_all_and_the_output_comes_last():
  events = [SOS, *(np.frombuffer("aé\nb".encode(), np.uint8) + NUM_SPECIAL)]
  found, num_output = heat._characters(window("text_files", events), np.array([0.1, 0.2, 0.3, 0.15, 0.25]))
  assert num_output == 1
  assert [character for character, _ in found] == ["", "a", "é", "\n", "b"]
  np.testing.assert_allclose([weight for _, weight in found], [0.1, 0.2, 0.45, 0.25, 0])


def test_half_a_character_at_the_end_of_the_inputs_stands_before_the_output():
  events = [SOS, *(np.frombuffer("aé".encode(), np.uint8) + NUM_SPECIAL)]
  found, num_output = heat._characters(window("text_files", events), np.array([0.1, 0.2, 0.7]))
  assert found == [("", 0.1), ("a", 0.2), ("é", 0.7)] and num_output == 1


def test_a_character_that_begins_like_the_output_stays_whole():
  events = [SOS, *(np.frombuffer("éa".encode(), np.uint8) + NUM_SPECIAL), 0xC3 + NUM_SPECIAL]
  found, _ = heat._characters(window("text_files", events), np.array([0.1, 0.2, 0.3, 0.4]))
  assert [character for character, _ in found] == ["", "é", "a", "\ufffd"]


def test_a_page_shades_the_character_attended_to():
  events = [SOS, *(np.frombuffer(b"a b\nc", np.uint8) + NUM_SPECIAL)]
  width, height = heat._CELL
  page = heat._page(window("text_files", events), one_hot(5, 2))  # the space
  blank, hot = page[height // 2, width * 5], page[height // 2, 2 * width + width // 2]
  assert blank.tolist() == [250] * 3 and hot.tolist() == [255, 150, 0]
  assert page[height, 0].tolist() == list(heat._MARK)  # c, the output, begins the second line


def test_notes_are_told_by_the_events_that_begin_and_end_them():
  notes = [music.Note(60, 64, 0.0, 0.5), music.Note(64, 64, 0.25, 1.0)]
  events = [SOS, *music.encode(notes)]  # velocity, on 60, shift, on 64, shift, off 60, shift, off 64
  assert music.notes_of_events(events) == [(60, 2, 6), (64, 4, 8)]
  assert music.notes_of_events(events[:8]) == [(60, 2, 6), (64, 4, 8)]  # 8: none ends it
  assert music.steps(events).tolist() == [0, 0, 0, 25, 25, 50, 50, 100, 100]


def test_a_roll_heats_the_note_attended_to_and_marks_the_output():
  notes = [music.Note(60, 64, 0.0, 0.5), music.Note(64, 64, 0.25, 1.0)]
  seen = window("midi_files", [SOS, *music.encode(notes)], files="none")
  roll = heat._roll(seen, one_hot(8, 6))  # the end of pitch 60
  rows = {pitch: (65 - pitch) * heat._ROW_HEIGHT for pitch in (60, 64)}
  middle = heat._WIDTH * 3 // 8
  assert roll[rows[60], middle].tolist() == [255, 150, 0] and roll[rows[64], middle].tolist() == [110] * 3
  assert roll[rows[64], -1].tolist() == list(heat._MARK)  # which is note-off 64
  lit = (roll[-10] == YELLOW).all(axis=-1).nonzero()[0]
  assert abs(lit - heat._WIDTH // 2).max() <= 2  # at half a second of one


def test_a_plot_has_a_bar_as_high_as_each_weight():
  plot = heat._plot(np.array([0.0, 0.5, 0.25, 0.25]))
  heights = (plot == YELLOW).all(axis=-1).sum(axis=0)
  assert heights[[100, 300, 600, 900]].tolist() == [0, 48, 24, 24]
  many = heat._plot(one_hot(10_000, 5_000))
  assert np.flatnonzero((many == YELLOW).all(axis=-1).any(axis=0)).tolist() == [500]


def test_a_picture_has_a_panel_for_the_mean_and_one_for_each_of_a_few_heads():
  seen = window("copy", [SOS, 5, 6, 7])
  weights_HxN = np.eye(3, dtype=np.float32)
  panel = heat.picture(seen, weights_HxN[:1]).shape[0]
  assert abs(heat.picture(seen, weights_HxN).shape[0] - 4 * panel) < 10
  assert heat.picture(seen, np.tile(weights_HxN, (4, 1))).shape[0] == panel
