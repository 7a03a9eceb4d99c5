"""Checks the length of files and packages, and the vocabulary of prose; `make lint` runs it.

python .ci/check.py            # prints every violation and ends with exit code 1 if there is one
python .ci/check.py FILE...    # the vocabulary of these files only
"""

import ast
import io
import pathlib
import re
import sys
import tokenize

ROOT = pathlib.Path(__file__).parent.parent
FOLDERS = (".ci", "benchmarks", "configs", "docs", "examples", "perceiver_ar_jax", "tests")
MAX_FILE_LINES = 400
MAX_PACKAGE_LINES = {"perceiver_ar_jax/experiments": 800, "perceiver_ar_jax": 9_000}
"""Lines of Python, without packages listed before. The target of perceiver_ar_jax is 7,500: lower the limit with it."""
PROSE = (
  ".ci/*.py",
  ".github/**/*.yml",
  "*.md",
  "benchmarks/*.py",
  "configs/**/*.py",
  "docs/**/*.md",
  "docs/*.py",
  "examples/*",
  "launch/*",
  "perceiver_ar_jax/**/*.py",
  "tests/*.py",
)
"""Files whose prose is checked."""
QUOTES_RETIRED_WORDS = "lint_test.py"
VAGUE_NAMES = {"found", "made", "one", "other", "own", "some", "there"}
"""Not allowed as names of variables and arguments: they do not say what they hold."""


def main(arguments: list[str]) -> int:
  files = [path.relative_to(ROOT) for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
  prose = [
    path.relative_to(ROOT)
    for pattern in PROSE
    for path in sorted(ROOT.glob(pattern))
    if path.name != QUOTES_RETIRED_WORDS
  ]
  violations, words = [] if arguments else _lengths(files), _retired_words()
  for path in map(pathlib.Path, arguments) if arguments else prose:
    violations += _vocabulary(path, (ROOT / path).read_text(encoding="utf-8"), words)
  print("\n".join(violations) or "Lengths and vocabulary: no violations.")
  return 1 if violations else 0


def _lengths(files: list[pathlib.Path]) -> list[str]:
  lines = {path: len((ROOT / path).read_text(encoding="utf-8").splitlines()) for path in files}
  violations = [
    f"{path}: {count} lines exceed {MAX_FILE_LINES}: split the file"
    for path, count in lines.items()
    if count > MAX_FILE_LINES
  ]
  for package, limit in MAX_PACKAGE_LINES.items():
    inside = [path for path in lines if path.is_relative_to(package)]
    total = sum(lines.pop(path) for path in inside)
    print(f"{package}: {total:,} lines of at most {limit:,}")
    if total > limit:
      violations.append(f"{package}: {total:,} lines exceed {limit:,}")
  return violations


def _retired_words() -> list[tuple[re.Pattern, str]]:
  lines = (ROOT / ".ci" / "retired_words.txt").read_text(encoding="utf-8").splitlines()
  pairs = [line.split("\t") for line in lines if line and not line.startswith("#")]
  return [(re.compile(rf"\b(?:{words})\b".replace(" ", r"\s+"), re.IGNORECASE), instead) for words, instead in pairs]


def _vocabulary(path: pathlib.Path, text: str, words: list[tuple[re.Pattern, str]]) -> list[str]:
  is_python = path.suffix == ".py"
  violations = []
  parts = _python_prose(text) if is_python else _markdown_prose(text) if path.suffix == ".md" else [(1, text)]
  for number, prose in parts:
    for pattern, instead in words:
      for match in pattern.finditer(prose):
        line = number + prose[: match.start()].count("\n")
        violations.append(f"{path}:{line}: {' '.join(match[0].split())!r}: write {instead!r}")
  if is_python:
    for node in ast.walk(ast.parse(text)):
      name = getattr(node, "arg", None) if isinstance(node, ast.arg) else getattr(node, "id", None)
      is_definition = isinstance(node, ast.arg) or isinstance(getattr(node, "ctx", None), ast.Store)
      if is_definition and name in VAGUE_NAMES:
        violations.append(f"{path}:{node.lineno}: the name {name!r} does not say what it holds")
  return violations


def _python_prose(text: str):
  """Yields (line number, text) of comments and strings, f-strings without their expressions."""
  for token in tokenize.generate_tokens(io.StringIO(text).readline):
    if tokenize.tok_name[token.type] in ("COMMENT", "STRING", "FSTRING_MIDDLE"):
      yield token.start[0], re.sub(r"\{[^{}]*\}", "", token.string)


def _markdown_prose(text: str):
  """Yields (line number, text) of a page without code."""
  blank = r"(?ms)^```.*?^```$|^    .*?$|`[^`\n]*`|\]\([^)\s]*\)"
  yield 1, re.sub(blank, lambda match: "\n" * match[0].count("\n"), text)


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
