"""Files of weights that are damaged, forged or of another model are refused, in one paragraph and without harm."""

import contextlib
import json
import pathlib
import random
import shutil
import struct
from unittest import mock

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from perceiver_ar_jax import Sampler, load_checkpoint
from perceiver_ar_jax.config import InputError
from perceiver_ar_jax.interop import export
from perceiver_ar_jax.training import pretrained
from tests import tiny


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
  """The folder of the trained run's weights."""
  folder, run = tmp_path_factory.mktemp("export") / "copy", load_checkpoint(trained)
  export.export_run(run.config, run.params, folder, dtype="float32", step=run.step)
  return folder


@pytest.fixture
def copied(exported, tmp_path):
  return pathlib.Path(shutil.copytree(exported, tmp_path / "copied"))


def _header(path: pathlib.Path) -> tuple[dict, bytes]:
  content = path.read_bytes()
  (size,) = struct.unpack("<Q", content[:8])
  return json.loads(content[8 : 8 + size]), content[8 + size :]


def _forge(path: pathlib.Path, header, values: bytes) -> None:
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  path.write_bytes(struct.pack("<Q", len(text)) + text + values)


def _without(name):
  def change(path):
    arrays = load_file(path)
    del arrays[name]
    save_file(arrays, path)

  return change


def _with(name, array, **metadata):
  return lambda path: save_file(load_file(path) | {name: array}, path, metadata or None)


def _with_entry(**entry):
  def change(path):
    header, values = _header(path)
    header["final_norm.bias"] |= entry
    _forge(path, header, values)

  return change


def _replaced(content):
  return lambda path: path.write_bytes(content)


def _truncated(path):
  path.write_bytes(path.read_bytes()[:-1])


def _longer(path):
  path.write_bytes(path.read_bytes() + b"\0")


def _pickled(path):
  path.write_bytes(b"\x80\x04cos\nsystem\n(S'touch harm'\ntR.")


def _folder(path):
  path.unlink()
  path.mkdir()


BIAS = np.zeros(16, np.float32)


@pytest.mark.parametrize(
  ("change", "words"),
  [
    (_replaced(b""), "is damaged"),
    (_replaced(b"\0" * 8), "is damaged"),
    (_replaced(struct.pack("<Q", 2**63) + b"{}"), "is damaged"),
    (_replaced(struct.pack("<Q", 1000) + b"{}"), "is damaged"),
    (_replaced(struct.pack("<Q", 2) + b"{}"), " and 54 others"),
    (_replaced(struct.pack("<Q", 2) + b"\xff\xfe"), "is damaged"),
    (_pickled, "is damaged"),
    (_truncated, "is damaged"),
    (_longer, "is damaged"),
    (_folder, "contains no model.safetensors"),
    (_with_entry(shape=[2**40, 2**40]), "is damaged"),
    (_with_entry(shape=[-1]), "is damaged"),
    (_with_entry(data_offsets=[0, 2**62]), "is damaged"),
    (_with_entry(data_offsets=[64, 0]), "is damaged"),
    (_with_entry(data_offsets=[0, 64]), "is damaged"),  # of another parameter
    (_with_entry(dtype="OBJECT"), "is damaged"),
    (_with_entry(dtype="I32"), "final_norm.bias is of type I32"),
    (_with_entry(shape=[4, 4]), "final_norm.bias has shape (4, 4), and the model's has (16,)"),
    (_without("final_norm.bias"), "lacks parameters final_norm.bias"),
    (_with("extra", BIAS), "has unknown parameters extra"),
    (_with("two\nlines\x1b[31m", BIAS), "has unknown parameters two\\nlines\\x1b[31m."),
    (_with("final_norm.bias", BIAS.astype(np.float64)), "final_norm.bias is of type F64"),
    (_with("final_norm.bias", BIAS[:8]), "final_norm.bias has shape (8,)"),
    (_with("final_norm.bias", BIAS, step="-3"), "its step '-3' is not a number"),
  ],
)
def test_a_file_that_is_damaged_or_of_another_model_is_refused(change, words, copied):
  change(copied / "model.safetensors")
  with pytest.raises(InputError) as caught:
    pretrained.read(tiny.config().model, copied)
  assert words in str(caught.value)


def test_the_command_ends_with_one_paragraph(copied):
  _truncated(copied / "model.safetensors")
  for mode in ("eval", "sample", "attention"):
    tiny.expect_error(tiny.main(f"--workdir={copied}", f"--mode={mode}"), "model.safetensors is damaged")
  result = tiny.run(copied.with_name("run"), train__init_from=copied)
  tiny.expect_error(result, "model.safetensors is damaged")


@pytest.mark.parametrize(
  "text", ["", "[]", "{}", '{"model": 3}', '{"model": {}}', "[" * 100_000, '{"model": {"x": 1}}', "\xff"]
)
def test_a_damaged_config_is_refused(text, copied):
  (copied / "config.json").write_text(text, encoding="latin1")
  tiny.expect_error(tiny.main(f"--workdir={copied}", "--mode=eval"), "config.json")
  with pytest.raises(InputError):
    Sampler.from_pretrained(copied)
  with pytest.raises(InputError):
    pretrained.load(copied)


def test_random_changes_of_the_header_raise_only_input_errors(copied):
  path, rng, refused = copied / "model.safetensors", random.Random(0), 0
  original, config = path.read_bytes(), tiny.config().model
  with mock.patch.object(pretrained, "parameters", mock.Mock(return_value=pretrained.parameters(config))):
    for _ in range(300):
      content = bytearray(original)
      for _ in range(rng.randint(1, 4)):
        content[rng.randrange(3000)] = rng.randrange(256)
      path.write_bytes(content[: rng.choice((len(content), rng.randrange(len(content))))])
      with contextlib.suppress(InputError):
        pretrained.read(config, copied)
        refused -= 1
      refused += 1
  assert refused > 250
