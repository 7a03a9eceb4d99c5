"""Official checkpoints: the file is read without running code from it, options are checked, weights are converted."""

import io
import json
import os
import pathlib
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from perceiver_ar_jax.config import InputError
from perceiver_ar_jax.interop import haiku, unpickle
from perceiver_ar_jax.models import architectures
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
    (b"not a pickle", "not a readable pickle"),
    (pickle.dumps({"params": 3}), "which contains 'params'"),
    (pickle.dumps({"params": {"a": {"b": ForgedArray()}}}), "which contains 'params'"),
    (pickle.dumps({"params": {"a": {"b": np.array([{}])}}}), "arrays of type 'O8' are not numbers"),
    (pickle.dumps({"params": {"a": {"b": np.ones(1)}}, "global_step": "x"}), "not an official checkpoint"),
  ],
)
def test_other_files_are_refused(content, words, tmp_path):
  (tmp_path / "file").write_bytes(content)
  with pytest.raises(InputError, match=words):
    haiku.load(str(tmp_path / "file"))


def _load(*program: bytes):
  return unpickle.load(io.BytesIO(b"".join(program) + b"."))


def _string(text: bytes) -> bytes:
  return b"X" + len(text).to_bytes(4, "little") + text


def _nested(innermost: bytes, depth: int) -> bytes:
  """A tuple of twice the same tuple of twice the same ..., `depth` times: 2^depth visits without a memo."""
  return innermost + b"".join(b"q%ch%c\x86" % (index, index) for index in range(depth))


FROM_BYTES, DTYPE = b"cnumpy\n_frombuffer\n", b"cnumpy\ndtype\n" + _string(b"f4") + b"\x85R"


def test_shared_references_are_visited_once():
  tree = _load(_nested(b"]", 40))
  assert tree[0] is tree[1]
  assert _load(_nested(b"N", 40))[0][0][0][0]  # None
  own_item = _load(b"]q\0h\0a")
  assert own_item == [None]


def test_nothing_nested_is_hashed_or_printed():
  deep = _nested(b")", 60)
  assert _load(b"}", deep, b"Ns") == {}
  assert _load(b"}(", deep, b"N", _string(b"a"), b"K\x01u") == {"a": 1}
  assert _load(b"\x8f(", deep, b"\x90") is None  # a set
  assert _load(b"(", deep, b"\x91") is None  # a frozenset
  code = [b"cnumpy\ndtype\n", deep, b"\x85R"]
  assert _load(*code) is None
  with pytest.raises(TypeError, match="expected string"):
    _load(b"cnumpy\nscalar\n", *code, b"C\x04abcd\x86R")
  assert _load(DTYPE, b"K\x03", deep, b"\x86b") is None  # the byte order of a type
  with pytest.raises(pickle.UnpicklingError, match="requires str"):
    _load(deep, _string(b"a"), b"\x93")  # the module of a name


def test_names_become_none_and_cannot_be_changed():
  assert _load(FROM_BYTES) is None
  assert _load(b"cbuiltins\neval\n") is None
  assert _load(b"cbuiltins\neval\n", _string(b"1+1"), b"\x85R") is None
  attributes = b"}" + _string(b"a") + b"K\x01s"
  for changes in (attributes, b"N" + attributes + b"\x86"):
    for target in (FROM_BYTES, b"cnumpy\n_reconstruct\n", b"cx\nFlatMapping\n", b"}", b"]", b"K\x01"):
      with pytest.raises(pickle.UnpicklingError, match="calls set_state of a"):
        _load(target, changes, b"b")
  assert not hasattr(unpickle._Array, "a") and not hasattr(unpickle._Mapping, "a")


@pytest.mark.parametrize(
  ("program", "words"),
  [
    ([b"K\x01Na"], "calls extend of a int"),
    ([b"]NNs"], "calls update of a list"),
    ([b"N" * 11], "more than 10 instructions"),
    ([b"P1\n"], "PERSID, which is not supported"),
    ([b"R"], "pop from empty list"),
  ],
)
def test_other_programs_are_refused(program, words, monkeypatch):
  if "instructions" in words:
    monkeypatch.setattr(unpickle, "MAX_INSTRUCTIONS", 10)
  with pytest.raises(Exception, match=words):
    _load(*program)


def test_arrays_take_no_more_bytes_than_the_file():
  raw = b"B" + (4000).to_bytes(4, "little") + bytes(4000)
  array = FROM_BYTES + b"(h\0" + DTYPE + b"M\xe8\x03\x85" + _string(b"C") + b"tR"  # of the bytes at place 0 of the memo
  (value,) = _load(raw, b"q\x000(", array, b"l")
  np.testing.assert_array_equal(value, np.zeros(1000, np.float32))
  with pytest.raises(pickle.UnpicklingError, match="larger than the file"):
    _load(raw, b"q\x000(", array * 3, b"l")


def test_a_small_file_cannot_name_many_parameters(tmp_path):
  shared = {str(index): np.ones(1, np.float32) for index in range(1000)}
  file = _write(tmp_path / "file", params={str(index): shared for index in range(1000)})
  with pytest.raises(InputError, match="not an official checkpoint"):
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
