"""What the site makes itself, as an mkdocs hook: the page of all settings, and links to files outside docs/.

The page comes from perceiver_ar_jax/config as it stands, read and not imported, so it is never stale and a build of
the site needs nothing but mkdocs.
"""

import ast
import pathlib
import posixpath
import re
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parent.parent
SOURCE = ROOT / "perceiver_ar_jax" / "config"
PAGE = "config.md"

_INTRODUCTION = """# Configs

A config file such as [configs/photos32.py](../configs/photos32.py) sets some of the fields below, and each can be set
on the command line as well: `--config.train.steps=100 --config.model.num_layers=6`. Lists are written
`--config.model.position_sizes="(34, 34, 5)"`, and `None` where a field allows it. A misspelt name, a value of another
type and settings that cannot work together end in one paragraph that names the fix, with exit code 1. What a run
resolved to is in its `config.json`.

A field's full name begins with its section: `num_layers` of `model` is `model.num_layers`. A field without a default
must be set, and every file in configs/ sets it.
"""


class Field(NamedTuple):
  """One setting."""

  name: str
  type: str
  default: str | None
  """Its expression; None: the setting has no default."""
  text: str


class Section(NamedTuple):
  """The settings of one dataclass."""

  prefix: str
  """Of their names, such as "train.optimizer."."""
  text: str
  fields: list[Field]


def source() -> str:
  """The text of all modules of config."""
  return "\n".join(path.read_text(encoding="utf-8") for path in sorted(SOURCE.glob("*.py")))


def sections(text: str) -> list[Section]:
  """The settings that `Config` holds in the text of its modules, section by section.

  Raises:
    ValueError: a field has no docstring under it.
  """
  classes = {node.name: node for node in ast.parse(text).body if isinstance(node, ast.ClassDef)}
  return _sections(classes, "Config", "")


def _sections(classes: dict[str, ast.ClassDef], name: str, prefix: str) -> list[Section]:
  body = classes[name].body
  own, nested = [], []
  for node, after in zip(body, [*body[1:], None]):
    if not isinstance(node, ast.AnnAssign):
      continue
    assert isinstance(node.target, ast.Name)
    field, kind = node.target.id, ast.unparse(node.annotation)
    if kind in classes:
      nested += _sections(classes, kind, f"{prefix}{field}.")
      continue
    text = after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else None
    if not isinstance(text, str):
      raise ValueError(f"{name}.{field} has no docstring under it.")
    default = ast.unparse(node.value) if node.value else None
    own.append(Field(field, kind, default, " ".join(text.split())))
  return [Section(prefix, ast.get_docstring(classes[name]) or "", own), *nested]


def page(text: str) -> str:
  """The page of settings, in Markdown."""
  parts = [_INTRODUCTION]
  for section in sections(text):
    title = f"`{section.prefix.rstrip('.')}`" if section.prefix else "The experiment"
    rows = [f"| {_name(section.prefix, field)} | {_kind(field)} | {_escaped(field.text)} |" for field in section.fields]
    table = "\n".join(["| setting | type, default | meaning |", "|---|---|---|", *rows])
    parts.append(f"## {title}\n\n{_escaped(section.text)}\n\n{table}\n")
  return "\n".join(parts)


def _name(prefix: str, field: Field) -> str:
  return f'<span id="{prefix}{field.name}" style="white-space: nowrap">`{field.name}`</span>'


def _kind(field: Field) -> str:
  kind = field.type.replace(" | ", " or ").replace("tuple[int, ...]", "ints").replace("tuple[float, ...]", "floats")
  return f"{kind}, must be set" if field.default is None else f"{kind}, `{field.default}`"


def _escaped(text: str) -> str:
  return text.replace("<", "&lt;").replace("|", "\\|").replace("**", "`**`")


# The hook.


def on_files(files, config):
  """Adds the page of settings to the site."""
  from mkdocs.structure.files import File

  files.append(File.generated(config, PAGE, content=page(source())))
  return files


def on_page_markdown(markdown, page, config, files):
  """The page with links that lead out of docs/ turned into the repository's address, or, without one, into the path.

  So pages link to code as they do on a checkout, where the links work too. config has its page instead.
  """
  del files

  def link(match):
    words, target = match.groups()
    path, _, anchor = target.partition("#")
    inside = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page.file.src_uri), path))
    if inside.startswith("docs/") or "://" in target or not path:
      return match[0]
    if inside == "perceiver_ar_jax/config":
      return f"[{words}]({'../' * page.file.src_uri.count('/')}{PAGE})"
    if config.repo_url:
      return f"[{words}]({config.repo_url.rstrip('/')}/blob/HEAD/{inside}{'#' + anchor if anchor else ''})"
    return f"{words} (`{inside}`)" if words != inside else f"`{inside}`"

  return re.sub(r"(?<!!)\[([^\]]*)\]\(([^)\s]+)\)", link, markdown)
