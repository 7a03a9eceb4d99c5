"""Official checkpoints: the file is read without running code from it, options are checked, weights are converted."""

import json
import os
import pathlib
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from perceiver_ar_jax.config import InputError
from perceiver_ar_jax.interop import haiku
from perceiver_ar_jax.models import architectures
from perceiver_ar_jax.training import pretrained
from tests import golden, tiny

KWARGS = golden.Case("a_abs_sinusoidal").kwargs


def _official_params(width=16, vocab=259):
  """Random weights of a model with one self-attention layer, under the official names."""
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


class ForgedArray:
  """An array of object pointers whose addresses are the file's bytes, if NumPy's own constructor made it."""

  def __reduce__(self):
    return np.ndarray, ((2,), np.dtype("O"), b"0123456789abcdef")


@pytest.mark.parametrize(
  ("content", "words"),
  [
    (b"not a pickle", "is not an official checkpoint.dill"),
    (b"", "is not an official checkpoint.dill"),
    (pickle.dumps({"params": 3}), "a int at the wrong place"),
    (pickle.dumps({"params": {"a": {"b": ForgedArray()}}}), "a NoneType at the wrong place"),
    (pickle.dumps({"params": {"a": {"b": np.array([{}])}}}), "arrays of type 'O8' are not numbers"),
    (pickle.dumps({"params": {"a": {"b": np.ones(1)}}, "global_step": "x"}), "a str at the wrong place"),
  ],
)
def test_other_files_are_refused(content, words, tmp_path):
  (tmp_path / "file").write_bytes(content)
  with pytest.raises(InputError, match=words):
    haiku.load(str(tmp_path / "file"))


def _string(text: bytes) -> bytes:
  return b"X" + len(text).to_bytes(4, "little") + text


def _nested(innermost: bytes, depth: int) -> bytes:
  """A tuple of twice the same tuple of twice the same ..., `depth` times: 2^depth visits without a memo."""
  return innermost + b"".join(b"q%ch%c\x86" % (index, index) for index in range(depth))


FROM_BYTES, DTYPE = b"cnumpy\n_frombuffer\n", b"cnumpy\ndtype\n" + _string(b"f4") + b"\x85R"
ARRAY = FROM_BYTES + b"(C\x04abcd" + DTYPE + b"K\x01\x85" + _string(b"C") + b"tR"
DEEP = _nested(b")", 60)


def _load(folder: pathlib.Path, program: bytes = b"N", parameter: bytes = ARRAY) -> np.ndarray:
  """Loads a pickle whose program first builds something else, and returns its one parameter."""
  keys = b"}".join(_string(key) for key in (b"params", b"module", b"name"))
  (folder / "file").write_bytes(program + b"0}" + keys + parameter + b"sss.")
  return haiku.load(str(folder / "file"))[0]["module"]["name"]


@pytest.mark.parametrize(
  "program",
  [
    _nested(b"]", 40),
    b"]q\0h\0a",  # a list that contains itself
    b"}" + DEEP + b"Ns",  # the key of a dictionary
    b"}(" + DEEP + b"N" + _string(b"a") + b"K\x01u",
    b"\x8f(" + DEEP + b"\x90",  # a set
    b"(" + DEEP + b"\x91",  # a frozenset
    b"cnumpy\ndtype\n" + DEEP + b"\x85R",
    DTYPE + b"K\x03" + DEEP + b"\x86b",  # the byte order of a type
    b"cbuiltins\neval\n" + _string(b"1+1") + b"\x85R",
    b"cbuiltins\neval\n" + DEEP + b"}\x92",
  ],
)
def test_nothing_nested_is_hashed_or_visited_and_no_name_is_looked_up(program, tmp_path):
  assert _load(tmp_path, program) == np.frombuffer(b"abcd", np.float32)


ATTRIBUTES = b"}" + _string(b"a") + b"K\x01s"
TARGETS = (FROM_BYTES, b"cnumpy\n_reconstruct\n", b"cx\nFlatMapping\n", b"}", b"]", b"K\x01")


@pytest.mark.parametrize(
  ("program", "words"),
  [
    *(
      (target + state + b"b", "sets the state of a")
      for target in TARGETS
      for state in (ATTRIBUTES, b"N" + ATTRIBUTES + b"\x86")
    ),
    (b"cnumpy\nscalar\ncnumpy\ndtype\n" + DEEP + b"\x85RC\x04abcd\x86R", "arrays of type '' are not numbers"),
    (DEEP + b"Nb", "sets the state of a tuple"),
    (DEEP + _string(b"a") + b"\x93", "requires str"),  # the module of a name
    (b"(" + DEEP + b"Nd", "KeyError"),
    (b"\x96" + (2**40).to_bytes(8, "little"), "EOFError"),  # the length of a bytearray
    (b"]NNs", "list indices"),
    (b"K\x01Na", "no attribute 'append'"),
    (b"P1\n", "persistent"),
    (b"R", "pop from empty list"),
  ],
)
def test_other_programs_are_refused(program, words, tmp_path):
  with pytest.raises(InputError, match=words):
    _load(tmp_path, program)


@pytest.mark.parametrize("name", [b"cnumpy\n_frombuffer\n", b"cbuiltins\neval\n", b"cx\nbfloat16\n"])
def test_a_name_is_not_a_parameter(name, tmp_path):
  with pytest.raises(InputError, match="at the wrong place"):
    _load(tmp_path, parameter=name)


class View:
  """Pickled as an array that is a view of the same bytes as others."""

  shared = bytes(4000)

  def __reduce__(self):
    return np.frombuffer(b"", np.uint8).__reduce_ex__(5)[0], (self.shared, np.dtype(np.float32), (1000,), "C")


@pytest.mark.parametrize("count", [1, 3])
def test_arrays_take_no_more_bytes_than_the_file(count, tmp_path):
  file = _write(tmp_path / "file", params={"a": {str(index): View() for index in range(count)}})
  if count == 1:
    np.testing.assert_array_equal(haiku.load(str(file))[0]["a"]["0"], np.zeros(1000, np.float32))
  else:
    with pytest.raises(InputError, match="larger than the file"):
      haiku.load(str(file))


def test_a_small_file_cannot_name_many_parameters(tmp_path):
  shared = {str(index): np.ones(1, np.float32) for index in range(1000)}
  file = _write(tmp_path / "file", params={str(index): shared for index in range(1000)})
  with pytest.raises(InputError, match="more than 100,000 parameters"):
    haiku.load(str(file))


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
  params = architectures.init_params(config, jax.random.key(0))["cross_attend_0"]
  assert params["attention"]["query"]["kernel"].value.shape == (32, 24)
  assert params["keys_values"]["value"]["kernel"].value.shape == (24, 24)
  assert params["attention"]["out"]["kernel"].value.shape == (24, 32)


def _convert(checkpoint, workdir):
  flags = tiny.flags(workdir, model__num_layers=1)
  return tiny.run_module("perceiver_ar_jax.interop.haiku", *flags, f"--checkpoint={checkpoint}")


@pytest.mark.slow
def test_the_command_exports_the_weights_to_a_folder(tmp_path):
  file = _write(tmp_path / "checkpoint.dill", params=_official_params(), global_step=7)
  config = tiny.config(model__num_layers=1, model__dropout=0.0)
  arguments = [flag for flag in tiny.flags("", model__num_layers=1, model__dropout=0.0) if "workdir" not in flag]
  arguments.append(f"--checkpoint={file}")
  result = tiny.run_module("perceiver_ar_jax.interop.haiku", *arguments, f"--output={tmp_path / 'weights'}")
  assert result.returncode == 0, result.stderr
  step, params = pretrained.read(config.model, tmp_path / "weights")
  assert step == 7
  jax.tree.map(np.testing.assert_array_equal, params, haiku.convert_params(_official_params(), config.model)[0])
  again = tiny.run_module("perceiver_ar_jax.interop.haiku", *arguments, f"--output={tmp_path / 'weights'}")
  tiny.expect_error(again, "is not empty")
  tiny.expect_error(tiny.run_module("perceiver_ar_jax.interop.haiku", *arguments), "either --workdir")


@pytest.mark.slow
def test_the_command_writes_a_run_that_evaluates_and_trains_on(tmp_path):
  file = _write(tmp_path / "checkpoint.dill", params=_official_params(), global_step=5)
  workdir = tmp_path / "run"
  result = _convert(file, workdir)
  assert result.returncode == 0, result.stderr
  assert "trained for 5 steps" in result.stdout

  assert tiny.run(workdir, "--mode=eval", model__num_layers=1).returncode == 0
  scores = json.loads((workdir / "eval-validation-0.json").read_text())
  assert scores["nats_per_token"] > 5.6  # random weights know less than nothing: log(259) = 5.56

  result = tiny.run(workdir, model__num_layers=1)
  assert result.returncode == 0 and "Resuming from the checkpoint of step 0" in result.stdout, result.stderr
  # A new model starts at log(259), since its logits are zero; this one starts from the weights of the file.
  assert tiny.losses(workdir)[1] > 5.6

  tiny.expect_error(_convert(file, workdir), "already contains a run")


def test_a_config_of_another_shape_is_refused(tmp_path):
  file = _write(tmp_path / "checkpoint.dill", params=_official_params(width=8))
  tiny.expect_error(_convert(file, tmp_path / "run"), "has shape (8,), and with --config it has (16,)")
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
