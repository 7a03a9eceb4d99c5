"""The tables of results are those of the stored numbers."""

import json

from benchmarks import results
from tests import tiny


def test_tables_of_published_numbers_are_those_of_the_stored_ones():
  docs = tiny.ROOT / "docs"
  assert f"table by python -m benchmarks.results -->\n{results.published_table('')}<!-- end" in (
    tiny.ROOT / "README.md"
  ).read_text(encoding="utf-8")
  assert results.published_table("../") in (docs / "results.md").read_text(encoding="utf-8")
  rows = json.loads((docs / "results" / "published.json").read_text(encoding="utf-8"))
  named = {f"{name}.py" for row in rows for name in row["configs"]}
  assert {path.name for path in (tiny.ROOT / "configs").glob("*.py")} <= named


def test_a_number_is_shown_with_what_it_took():
  entry = {"value": "1.90", "parameters": "166M", "cost": "1,000,000 steps"}
  assert results._number(entry) == "1.90 (166M parameters, 1,000,000 steps)"
  assert results._number(entry | {"parameters": "6 layers", "cost": None}) == "1.90 (6 layers)"
  assert results._number(entry | {"parameters": None, "cost": None}) == "1.90"
