"""What the documentation promises: links lead somewhere, nothing is missing, and snippets of extending.md work."""

import ast
import dataclasses
import importlib.util
import pathlib
import re
import types
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from perceiver_ar_jax.config import Config, DataConfig, OptimizerConfig
from perceiver_ar_jax.data import units
from perceiver_ar_jax.models import architectures, attention, perceiver_ar, positions
from perceiver_ar_jax.training import optimizer
from tests import tiny

ROOT = pathlib.Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md")])
_SPEC = importlib.util.spec_from_file_location("reference", DOCS / "reference.py")
reference = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(reference)


def _prose(path):
  """The text of a page without its code."""
  text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
  return re.sub(r"(?m)^    .*$", "", text)


def _anchors(path):
  """Names of the headings of a page, as GitHub and mkdocs make them of words, digits and hyphens."""
  headings = re.findall(r"(?m)^#+ (.+)$", _prose(path))
  return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page):
  for target in re.findall(r"\]\(([^)\s]+)\)", _prose(page)):
    if re.match(r"[a-z]+:", target):
      continue
    path, _, anchor = target.partition("#")
    linked = (page.parent / path).resolve() if path else page
    assert linked.exists(), f"{page.name} links to {target}"
    if anchor and linked.suffix == ".md":
      assert anchor in _anchors(linked), f"{page.name} links to {target}, whose headings are {sorted(_anchors(linked))}"


def test_every_config_is_documented():
  documented = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
  missing = [path for path in (ROOT / "configs").rglob("*.py") if f"{path.relative_to(ROOT)}" not in documented]
  assert not missing


def test_the_site_has_every_page():
  nav = re.findall(r": ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), flags=re.MULTILINE)
  assert len(nav) == len(set(nav))
  assert set(nav) == {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")} | {reference.PAGE}


def _settings(cls, prefix=""):
  hints = typing.get_type_hints(cls)
  for field in dataclasses.fields(cls):
    if dataclasses.is_dataclass(hints[field.name]):
      yield from _settings(hints[field.name], f"{prefix}{field.name}.")
    else:
      yield prefix + field.name, field


def test_the_page_of_settings_has_them_all_with_their_defaults():
  sections = reference.sections(reference.source())
  documented = {section.prefix + field.name: field for section in sections for field in section.fields}
  settings = dict(_settings(Config))
  assert sorted(documented) == sorted(settings)
  for name, field in settings.items():
    default = documented[name].default
    assert (dataclasses.MISSING if default is None else ast.literal_eval(default)) == field.default, name
  page = reference.page(reference.source())
  assert "`rotary_max_wavelength`</span> | int or None, `None` | Rotary: longest wavelength" in page


def test_a_setting_without_words_is_an_error():
  with pytest.raises(ValueError, match="Config.seed has no docstring"):
    reference.sections("class Config:\n  seed: int = 0\n  model: str\n  'Which.'\n")


@pytest.mark.parametrize(
  ("repo_url", "expected"),
  [
    ("", "See step.py (`tests/step.py`), [the\nconfigs](config.md), [a](b.md#c), ![d](../d.png)."),
    (
      "https://host/me/fork/",
      "See [step.py](https://host/me/fork/blob/HEAD/tests/step.py#L3), [the\nconfigs](config.md),"
      " [a](b.md#c), ![d](../d.png).",
    ),
  ],
)
def test_links_out_of_the_site_become_addresses_or_paths(repo_url, expected):
  page = types.SimpleNamespace(file=types.SimpleNamespace(src_uri="extending.md"))
  text = "See [step.py](../tests/step.py#L3), [the\nconfigs](../perceiver_ar_jax/config), [a](b.md#c), ![d](../d.png)."
  site = types.SimpleNamespace(repo_url=repo_url)
  assert reference.on_page_markdown(text, page=page, config=site, files=None) == expected


def _snippet(beginning):
  """The code in extending.md that defines what `beginning` names."""
  blocks = re.findall(r"```python\n(.*?)```", (DOCS / "extending.md").read_text(encoding="utf-8"), flags=re.DOTALL)
  (snippet,) = [block for block in blocks if beginning in block]
  return snippet


def test_the_task_of_the_snippet_makes_documents():
  names = {}
  exec(_snippet("def counting"), names)
  task = names["counting"](DataConfig(task="counting"), 257)
  document = task.open({"number": np.int64(254), "validation": np.bool_(False)})
  assert task.decode(document.read(0, 12)) == "508 509 510"
  assert document.read(0, 1) == [2]


def test_the_kernel_of_the_snippet_equals_reference():
  names = dict(vars(attention))
  exec(_snippet("def xla"), names)
  rng = np.random.default_rng(0)
  q, k, v = (jnp.asarray(rng.normal(size=(2, length, 3, 4)), jnp.float32) for length in (4, 13, 13))
  valid = np.arange(13) >= np.array([[0], [3]])
  ours, expected = (
    kernel(q, attention.Keys.from_arrays(k, v), valid) for kernel in (names["xla"], attention.reference)
  )
  np.testing.assert_allclose(ours, expected, atol=2e-6)


def test_the_position_encoding_of_the_snippet_runs_in_the_model(monkeypatch):
  names = dict(vars(positions))
  exec(_snippet("def binary"), names)
  np.testing.assert_array_equal(
    names["binary"](np.array([[5, 2]]), size=8, width=4), [[[1, -1, 1, 1], [-1, 1, -1, -1]]]
  )
  monkeypatch.setitem(positions.ENCODINGS, "binary", positions.Encoding(table=names["binary"]))
  config = tiny.config(model__position_encoding="binary", model__position_sizes=(40,)).model
  assert architectures.num_params(config) > 0


def test_the_optimizer_and_the_schedule_of_the_snippets_update_weights(monkeypatch):
  monkeypatch.setattr(optimizer, "OPTIMIZERS", dict(optimizer.OPTIMIZERS))
  monkeypatch.setattr(optimizer, "SCHEDULES", dict(optimizer.SCHEDULES))
  names = dict(vars(optimizer))
  exec(_snippet('OPTIMIZERS["lion"]'), names)
  exec(_snippet('SCHEDULES["linear"]'), names)
  config = OptimizerConfig(name="lion", schedule="linear", learning_rate=0.5, end_learning_rate=0.1)
  rule = optimizer.make_optimizer(config, steps=4)
  weights = {"kernel": jnp.ones(3)}
  updates, _ = rule.update({"kernel": jnp.ones(3)}, rule.init(weights), weights)
  np.testing.assert_allclose(updates["kernel"], -0.5)
  np.testing.assert_allclose(optimizer.make_schedule(config, 4)(4), 0.1)


def test_the_unit_of_the_snippet_is_computed_and_printed(monkeypatch):
  monkeypatch.setattr(units, "UNITS", dict(units.UNITS))
  exec(_snippet('UNITS["perplexity"]'), dict(vars(units)))
  values = units.compute_all(units.ScoredSums(tokens=2, nats=2 * np.log(5), correct=0), "perplexity")
  assert units.UNITS["perplexity"].summary.format_map(values) == "perplexity 5 per token"


def test_the_model_of_the_snippet_caps_its_logits(monkeypatch):
  names = {}
  exec(_snippet("class Capped"), names)
  capped = architectures.Architecture(names["Capped"], perceiver_ar.check, perceiver_ar.flops)
  monkeypatch.setitem(architectures.ARCHITECTURES, "capped", capped)
  model = architectures.make_model(tiny.config(model__architecture="capped").model)
  tokens, positions_1xLx1 = jnp.ones((1, 32), jnp.int32), jnp.arange(1, 33)[None, :, None]
  variables = nn.meta.unbox(model.init(jax.random.key(0), tokens, positions_1xLx1))
  variables["params"]["to_logits"]["bias"] += 1e3
  np.testing.assert_allclose(model.apply(variables, tokens, positions_1xLx1), 30.0, rtol=1e-5)
