"""An mkdocs hook: generates the page of all settings, and rewrites links to files outside docs/.

The page is generated from the source of perceiver_ar_jax/config, which is parsed and not imported, so that it is never
stale and a build of the site needs only mkdocs.
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

A config file such as [configs/photos32.py](../configs/photos32.py) sets some of the fields below. Each field can also
be set on the command line: `--config.train.steps=100 --config.model.num_layers=6`. Tuples are written
`--config.model.position_sizes="(34, 34, 5)"`; `None` is accepted where the type allows it. A misspelled name, a value
of the wrong type or incompatible settings end with exit code 1 and one paragraph that names the fix. The `config.json`
of a run contains all resolved settings.

The full name of a field begins with its section: `num_layers` of `model` is `model.num_layers`. A field without a
default must be set; every file in configs/ sets it.
"""


class Field(NamedTuple):
  """One setting."""

  name: str
  type: str
  default: str | None
  """The expression of the default; None: the setting has no default."""
  text: str


class Section(NamedTuple):
  """The settings of one dataclass."""

  prefix: str
  """Prefix of their names, such as "train.optimizer."."""
  text: str
  fields: list[Field]


def source() -> str:
  """Returns the source of all modules of config."""
  return "\n".join(path.read_text(encoding="utf-8") for path in sorted(SOURCE.glob("*.py")))


def sections(text: str) -> list[Section]:
  """Returns the settings of `Config`, section by section, from the source of its modules.

  Raises:
    ValueError: a field has no docstring below it.
  """
  classes = {node.name: node for node in ast.parse(text).body if isinstance(node, ast.ClassDef)}
  return _sections(classes, "Config", "")


def _sections(classes: dict[str, ast.ClassDef], name: str, prefix: str) -> list[Section]:
  body = classes[name].body
  fields, nested = [], []
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
      raise ValueError(f"{name}.{field} has no docstring below it.")
    default = ast.unparse(node.value) if node.value else None
    fields.append(Field(field, kind, default, " ".join(text.split())))
  return [Section(prefix, ast.get_docstring(classes[name]) or "", fields), *nested]


def page(text: str) -> str:
  """Returns the page of settings, in Markdown."""
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


# The functions that mkdocs calls.


def on_files(files, config):
  """Adds the page of settings to the site."""
  from mkdocs.structure.files import File

  files.append(File.generated(config, PAGE, content=page(source())))
  return files


def on_page_markdown(markdown, page, config, files):
  """Returns the page with links to files outside docs/ replaced by URLs of the repository, or by paths without one.

  In a checkout the original links work. A link to perceiver_ar_jax/config becomes a link to the page of settings.
  """
  del files

  def link(match):
    label, target = match.groups()
    path, _, anchor = target.partition("#")
    inside = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page.file.src_uri), path))
    if inside.startswith("docs/") or "://" in target or not path:
      return match[0]
    if inside == "perceiver_ar_jax/config":
      return f"[{label}]({'../' * page.file.src_uri.count('/')}{PAGE})"
    if config.repo_url:
      return f"[{label}]({config.repo_url.rstrip('/')}/blob/HEAD/{inside}{'#' + anchor if anchor else ''})"
    return f"{label} (`{inside}`)" if label != inside else f"`{inside}`"

  return re.sub(r"(?<!!)\[([^\]]*)\]\(([^)\s]+)\)", link, markdown)
