"""The checks of .ci/check.py find what they look for."""

import importlib.util
import pathlib

import pytest

from tests import tiny

_SPEC = importlib.util.spec_from_file_location("check", tiny.ROOT / ".ci" / "check.py")
check = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(check)


@pytest.mark.parametrize(
  ("name", "text", "words"),
  [
    ("a.py", "x = 1  # training goes on\n", ["a.py:1: 'goes on'"]),
    ("a.py", 'def f():\n  """Returns x.\n\n  A run that holds no\n  step.\n  """\n', ["a.py:4: 'holds no'"]),
    ("a.py", 'found = f"{anew} 3 nats a token"\n', ["'nats a token'", "the name 'found'"]),
    ("a.py", "def f(one):\n  return [other for other in one.pieces]\n", ["the name 'one'", "the name 'other'"]),
    ("a.py", "pieces = 1  # there is no room for a figure\n", []),
    ("a.md", "Text\n\n    goes on\n\n`pieces`, [link](anew.md)\n", []),
    ("a.md", "Text\n\n    code\n\nThe run goes\non.\n", ["a.md:5: 'goes on'"]),
  ],
)
def test_retired_words_and_vague_names_are_found_in_prose(name, text, words):
  violations = check._vocabulary(pathlib.Path(name), text, check._retired_words())
  assert len(violations) == len(words), violations
  assert all(word in "\n".join(violations) for word in words), violations


def test_long_files_and_packages_are_found(monkeypatch, tmp_path):
  monkeypatch.setattr(check, "ROOT", tmp_path)
  monkeypatch.setattr(check, "MAX_FILE_LINES", 3)
  monkeypatch.setattr(check, "MAX_PACKAGE_LINES", {"a/b": 3, "a": 5})
  files = {"a/x.py": 3, "a/y.py": 3, "a/b/z.py": 4}
  for name, count in files.items():
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("x\n" * count)
  violations = check._lengths([pathlib.Path(name) for name in files])
  assert [line.split(":")[0] for line in violations] == ["a/b/z.py", "a/b", "a"]
