"""Official checkpoints: the file is read without running code from it, options are checked, weights are converted."""

import json
import os
import pathlib
import pickle

import jax.numpy as jnp
import numpy as np
import pytest

from perceiver_ar_jax.config import InputError
from perceiver_ar_jax.interop import haiku
from perceiver_ar_jax.models import architectures
from tests import golden, tiny

KWARGS = golden.Case("a_abs_sinusoidal").kwargs


def _official_params(width=16, vocab=259):
  """Random weights of a model with one self-attention layer, under the names of the original release."""
  rng = np.random.default_rng(0)

  def dense(inputs, outputs):
    return {"w": rng.normal(size=(inputs, outputs)).astype(np.float32) / 4, "b": np.zeros(outputs, np.float32)}

  def norm():
    return {"scale": np.ones(width, np.float32), "offset": np.zeros(width, np.float32)}

  params = {
    "perceiver_ar/~/embed": {"embeddings": rng.normal(size=(vocab, width)).astype(np.float32)},
    "perceiver_ar/~/linear": dense(width, width),
    "perceiver_ar/layer_norm": norm(),
    "perceiver_ar/~/logits": dense(width, vocab),
  }
  for block, norms in (("cross_attention", 3), ("self_attention", 2)):
    path = f"perceiver_ar/~/{block}"
    for number in range(norms):
      params[f"{path}/layer_norm" + (f"_{number}" if number else "")] = norm()
    for number in range(4):
      params[f"{path}/attention/linear" + (f"_{number}" if number else "")] = dense(width, width)
    params[f"{path}/dense/linear"] = dense(width, 4 * width)
    params[f"{path}/dense/linear_1"] = dense(4 * width, width)
  return params


class FlatMapping(dict):
  """Pickled like Haiku's class of this name: its content in a slot."""

  def __reduce__(self):
    return FlatMapping, (), {"_mapping": dict(self)}


class Optimizer:
  """Any object of the optimizer's state."""

  def __init__(self):
    self.moments = np.ones(3)


class Malicious:
  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return os.system, (f"touch {self.path}",)


def _write(path: pathlib.Path, protocol: int = pickle.DEFAULT_PROTOCOL, **state) -> pathlib.Path:
  path.write_bytes(pickle.dumps(state, protocol))
  return path


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_a_checkpoint_file_is_read_and_nothing_in_it_is_run(protocol, tmp_path):
  arrays = {
    "numpy": np.arange(6.0).reshape(2, 3),
    "jax": jnp.arange(4, dtype=jnp.float32),
    "half": np.asarray(jnp.ones(2, jnp.bfloat16)),
  }
  file = _write(
    tmp_path / "checkpoint.dill",
    params=FlatMapping({"a/b": FlatMapping(arrays)}),
    opt_state=(Optimizer(), Malicious(tmp_path / "harm")),
    global_step=np.int64(7),
    protocol=protocol,
  )
  params, step = haiku.load(str(file))
  assert step == 7
  assert not (tmp_path / "harm").exists(), "loading ran what was in the file"
  for name, value in arrays.items():
    np.testing.assert_array_equal(np.asarray(params["a/b"][name], np.float32), np.asarray(value, np.float32))


def _string(text: bytes) -> bytes:
  return b"X" + len(text).to_bytes(4, "little") + text


FROM_BYTES, DTYPE = b"cnumpy\n_frombuffer\n", b"cnumpy\ndtype\n" + _string(b"f4") + b"\x85R"
ARRAY = FROM_BYTES + b"(C\x04abcd" + DTYPE + b"K\x01\x85" + _string(b"C") + b"tR"


def _load(folder: pathlib.Path, program: bytes = b"N", parameter: bytes = ARRAY) -> np.ndarray:
  """Loads a pickle whose program first builds something else, and returns its one parameter."""
  keys = b"}".join(_string(key) for key in (b"params", b"module", b"name"))
  (folder / "file").write_bytes(program + b"0}" + keys + parameter + b"sss.")
  return haiku.load(str(folder / "file"))[0]["module"]["name"]


@pytest.mark.parametrize("module", [b"os", b"posix", b"builtins", b"numpy", b"perceiver_ar_jax.interop.haiku"])
@pytest.mark.parametrize("name", [b"system", b"eval", b"ndarray", b"load", b"_Unpickler", b"__builtins__.eval"])
def test_no_name_is_looked_up(module, name, tmp_path):
  harm = _string(f"touch {tmp_path}/harm".encode())
  calls = {
    "GLOBAL, REDUCE": b"c%b\n%b\n%b\x85R" % (module, name, harm),
    "STACK_GLOBAL, NEWOBJ": _string(module) + _string(name) + b"\x93" + harm + b"\x85\x81",
    "NEWOBJ_EX": b"c%b\n%b\n%b\x85}\x92" % (module, name, harm),
    "INST": b"(%bi%b\n%b\n" % (harm, module, name),
    "OBJ": b"(c%b\n%b\n%bo" % (module, name, harm),
  }
  for call in calls.values():
    assert _load(tmp_path, call) == np.frombuffer(b"abcd", np.float32)
  assert not (tmp_path / "harm").exists()


ATTRIBUTES = b"}" + b"".join(_string(name) + b"N" + b"s" for name in (b"find_class", b"_create", b"__new__"))
TARGETS = (FROM_BYTES, b"cnumpy\n_reconstruct\n", b"cx\nFlatMapping\n", b"cx\ny\n", b"}", b"]", b"K\x01")


@pytest.mark.parametrize("state", [ATTRIBUTES, b"N" + ATTRIBUTES + b"\x86"])
@pytest.mark.parametrize("target", TARGETS)
def test_no_attribute_of_a_class_or_value_can_be_set(target, state, tmp_path):
  with pytest.raises(InputError, match="is damaged"):
    _load(tmp_path, target + state + b"b")
  assert _load(tmp_path) == np.frombuffer(b"abcd", np.float32)


class ForgedArray:
  """An array of object pointers whose addresses are the file's bytes, if NumPy's own constructor made it."""

  def __init__(self, build):
    self._build = build

  def __reduce__(self):
    arguments = ((2,), np.dtype("O"), b"0123456789abcdef")
    if self._build == "ndarray":
      return np.ndarray, arguments
    reconstruct = np.zeros(1).__reduce__()[0]
    return reconstruct, (np.ndarray, (0,), b"b"), (1, (2,), np.dtype("O"), False, arguments[2])


@pytest.mark.parametrize(
  "content",
  [
    b"not a pickle",
    b"",
    pickle.dumps(3),
    pickle.dumps({"params": 3}),
    pickle.dumps({"params": {"a": {"b": 3}}}),
    pickle.dumps({"params": {"a": {3: np.ones(1)}}}),
    pickle.dumps({"params": {"a": {"b": ForgedArray("ndarray")}}}),
    pickle.dumps({"params": {"a": {"b": ForgedArray("reconstruct")}}}),
    pickle.dumps({"params": {"a": {"b": np.array([{}])}}}),
    pickle.dumps({"params": {"a": {"b": np.ones(1)}}, "global_step": "x"}),
    pickle.dumps({"params": {"a": {"b": np.ones(100)}}})[:-200],
    b"P1\n.",
  ],
)
def test_other_files_and_damaged_ones_are_refused(content, tmp_path):
  (tmp_path / "file").write_bytes(content)
  with pytest.raises(InputError, match=r"is not an official checkpoint.dill, or is damaged \(\w+: "):
    haiku.load(str(tmp_path / "file"))


@pytest.mark.parametrize("name", [b"cnumpy\n_frombuffer\n", b"cbuiltins\neval\n", b"cx\nbfloat16\n"])
def test_a_name_is_not_a_parameter(name, tmp_path):
  with pytest.raises(InputError, match="instead of ndarray"):
    _load(tmp_path, parameter=name)


def test_a_missing_file_is_named():
  with pytest.raises(InputError, match="--checkpoint=/nowhere/x.dill cannot be read: No such file"):
    haiku.load("/nowhere/x.dill")


@pytest.mark.parametrize(
  ("option", "value"),
  [
    ("num_latents_per_position", 2),
    ("initial_query_embed_style", "mlp"),
    ("fraction_heads_to_rotate", 0.5),
    ("use_negative_rotary_positions", True),
    ("train_input_positions", 5),
    ("position_encoding", "linear"),
    ("activation_name", "swish"),
    ("activation_name", None),
    ("no_such_option", 1),
    ("cross_attend_widening_factor", 7),
  ],
)
def test_options_that_cannot_be_converted_are_named(option, value):
  with pytest.raises(InputError, match=option):
    haiku.convert({}, KWARGS | {option: value})


def test_a_missing_parameter_is_named():
  case = golden.Case("a_abs_sinusoidal")
  params = case.tree("params")
  del params["perceiver_ar/~/self_attention_1/dense/linear"]
  with pytest.raises(InputError, match="self_attention_1/dense/linear/w"):
    haiku.convert(params, case.kwargs)


def test_options_left_out_have_the_official_defaults():
  names = ("num_classes", "input_idx_size", "max_context_length", "position_encoding_type")
  with pytest.raises(InputError, match="lacks the parameter embed/embeddings"):  # past all options
    haiku.convert({}, {name: KWARGS[name] for name in names} | {"max_context_length": 2048, "input_idx_size": [-1]})
  assert haiku._config(KWARGS | {"learnable_position_embeddings": True}).position_encoding == "learned"


def test_the_cross_attend_is_as_wide_as_the_option_says():
  case = golden.Case("n_shape_q_embed_ne_z")
  assert case.kwargs["cross_attention_shape_for_attn"] == "q"
  assert haiku._config(case.kwargs).cross_width == 32
  config = haiku._config(case.kwargs | {"cross_attention_shape_for_attn": "kv"})
  params = architectures.abstract_params(config)["cross_attend_0"]
  assert params["attention"]["query"]["kernel"].value.shape == (32, 24)
  assert params["keys_values"]["value"]["kernel"].value.shape == (24, 24)
  assert params["attention"]["out"]["kernel"].value.shape == (24, 32)


def _convert(checkpoint, workdir):
  flags = tiny.flags(workdir, model__num_layers=1)
  return tiny.run_module("perceiver_ar_jax.interop.haiku", *flags, f"--checkpoint={checkpoint}")


@pytest.mark.slow
def test_the_command_writes_weights_that_can_be_evaluated_and_trained_further(tmp_path):
  file = _write(tmp_path / "checkpoint.dill", params=_official_params(), global_step=5)
  folder = tmp_path / "weights"
  result = _convert(file, folder)
  assert result.returncode == 0, result.stderr
  assert "trained for 5 steps" in result.stdout

  assert tiny.run(folder, "--mode=eval", model__num_layers=1).returncode == 0
  scores = json.loads((folder / "eval-validation-5.json").read_text())
  assert scores["nats_per_token"] > 5.6  # random weights know less than nothing: log(259) = 5.56

  result = tiny.run(tmp_path / "run", model__num_layers=1, train__init_from=folder)
  assert result.returncode == 0 and "Starting from the weights of step 5" in result.stdout, result.stderr
  # A new model starts at log(259), since its logits are zero; this one starts from the weights of the file.
  assert tiny.losses(tmp_path / "run")[1] > 5.6

  tiny.expect_error(_convert(file, folder), "is not empty: give a new folder")


def test_a_config_of_another_shape_is_refused(tmp_path):
  file = _write(tmp_path / "checkpoint.dill", params=_official_params(width=8))
  result = _convert(file, tmp_path / "run")
  path = "cross_attend_0/attention/out/bias"
  tiny.expect_error(result, f"not those of the model: {path} (8,), {path} (16,)")
  assert not (tmp_path / "run").exists()


def test_parameters_without_a_place_are_named(tmp_path):
  params = _official_params()
  params |= {path.replace("self_attention", "self_attention_1"): value for path, value in params.items()}
  result = _convert(_write(tmp_path / "checkpoint.dill", params=params), tmp_path / "run")
  tiny.expect_error(result, "does not have: self_attention_1/attention/linear/b")


@pytest.mark.parametrize("name", ["a_abs_sinusoidal", "b_rotary_half", "d_abs_random_image_idxs"])
def test_every_official_parameter_has_a_place(name):
  case = golden.Case(name)
  assert haiku.convert_params(case.tree("params"), haiku._config(case.kwargs))[1] == []
