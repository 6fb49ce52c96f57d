"""docs/compatibility.md and the tests are the same list."""

from __future__ import annotations

import re
from pathlib import Path

from compat.conftest import METHODS

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "compatibility.md"
OUTCOMES = {"works", "refused", "skipped"}


def table() -> dict[str, list[str]]:
    """The page's cells by row; footnotes cut off."""
    lines = [line.strip("|").split("|") for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    return {re.sub(r" <sup>.*", "", row.strip()): [cell.strip() for cell in cells] for row, *cells in lines}


def test_every_row_is_a_test_and_every_test_is_a_row():
    marked = {
        row for path in HERE.glob("test_*.py") for row in re.findall(r'^@pytest\.mark\.row\("(.*)"\)$', path.read_text(), re.M)
    }
    assert len(marked) > 40
    assert marked == table().keys() - {""}


def test_every_cell_has_an_outcome_and_none_fails():
    page = table()
    assert page.pop("") == list(METHODS)
    assert all(len(cells) == len(METHODS) and set(cells) <= OUTCOMES for cells in page.values())
