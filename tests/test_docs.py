"""README.md and docs/: tables are those of the committed results, links lead somewhere, files that a page names exist."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import diffusers
import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MOST_LINES = 150  # of the README: a screen and a half of text, and two tables
PATH = re.compile(r"`((?:[\w.-]+/)+[\w.-]*|[\w-]+\.(?:py|md|sh|toml|yml))`")
TEST = re.compile(r"`(tests/[\w/]+\.py)(?:::(\w+))?`")
OUTSIDE = re.compile(r"^(https?:|mailto:|#)")
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^( *)```.*?^\1```", re.MULTILINE | re.DOTALL)
ROW = re.compile(r"^\|.*\|$")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.fixture
def benchmark(monkeypatch) -> Any:
    """``benchmark(name)``: that script of benchmarks/, imported."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


def test_every_marked_table_is_that_of_its_results_file(benchmark):
    update = benchmark("update_readme")
    shown = update.pages()
    assert len(shown) >= 4
    for page in shown:
        assert update.filled(page) == page.read_text(), f"{name_of(page)}: run python benchmarks/update_readme.py"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("<!-- table: ladder_aq_0.5bit -->\n<!-- end -->\n", "ladder_aq_0.5bit.md is missing or empty"),
        ("<!-- table: empty -->\n| a |\n<!-- end -->\n", "empty.md is missing or empty"),
        ("<!-- table: ladder_aq -->\nno end\n", "not closed"),
    ],
)
def test_a_mark_without_a_table_is_an_error(text, said, benchmark, tmp_path, monkeypatch):
    update = benchmark("update_readme")
    results = tmp_path / "results"
    results.mkdir()
    (results / "empty.md").write_text("\n")
    (tmp_path / "page.md").write_text(text)
    monkeypatch.setattr(update, "ROOT", tmp_path)
    monkeypatch.setattr(update, "RESULTS", results)
    with pytest.raises(SystemExit, match=re.escape(said)):
        update.filled(tmp_path / "page.md")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_table_is_empty(page):
    """A heading and its rule are followed by at least one row, and all lines have as many cells."""
    lines = [*FENCE.sub("", page.read_text()).splitlines(), ""]
    for number, line in enumerate(lines):
        if re.fullmatch(r"\|(\s*:?-+:?\s*\|)+", line):
            assert ROW.match(lines[number + 1]), f"the table under {lines[number - 1]!r} has no rows"


def test_tables_made_from_a_run_are_what_the_run_says(benchmark):
    """The markdown beside each results file has not been edited by hand, nor has the file been replaced without it."""
    ladders, speed = benchmark("ladders"), benchmark("speed_table")
    made = {f"ladder_{name}.md": ladders.page(name) for name in ladders.LISTS}
    made |= {f"speed_{name}.md": speed.page(name) for name in speed.TABLES}
    made["calibrated.md"] = benchmark("calibrated_table").table()
    made["comfyui.md"] = benchmark("comfyui_versions").render(json.loads((RESULTS / "comfyui.json").read_text()))
    for file, text in made.items():
        path = RESULTS / file
        assert path.is_file() == (text is not None), file
        assert text is None or path.read_text() == text, f"{file} is not what its results say"


def test_generated_pages_are_those_of_their_results(benchmark, monkeypatch):
    for name in ("compatibility", "model_classes"):
        assert (ROOT / "docs" / f"{name}.md").read_text() == (RESULTS / f"{name}.md").read_text()
        assert json.loads((RESULTS / f"{name}.json").read_text())
    record = json.loads((RESULTS / "compatibility.json").read_text())
    if record["facts"]["versions"]["diffusers"] == diffusers.__version__:
        assert benchmark("compatibility").render(record["cells"]) == (ROOT / "docs" / "compatibility.md").read_text()
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    versions = importlib.import_module("versions")
    assert versions.render(json.loads(versions.RESULTS.read_text())) == versions.PAGE.read_text()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_leads_to_a_file_of_the_repository(page):
    for target in LINK.findall(FENCE.sub("", page.read_text())):
        if OUTSIDE.match(target):
            continue
        path = (page.parent / target.partition("#")[0]).resolve()
        assert path.exists(), f"{name_of(page)} links to {target}"
        assert ROOT in (path, *path.parents), f"{name_of(page)} links outside the repository: {target}"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= MOST_LINES


@pytest.mark.parametrize("page", [*sorted((ROOT / "docs" / "development").glob("*.md")), ROOT / "CONTRIBUTING.md"], ids=name_of)
def test_every_file_that_the_development_pages_name_exists(page):
    text = FENCE.sub("", page.read_text())
    kernels = ROOT / "kernels" / "torch-ext" / "qdiff_kernels"
    beside = kernels / page.name[:3]  # cpu or gpu, whose files its page names without a folder
    places = (ROOT, beside, kernels) if page.name in ("cpu_kernels.md", "gpu_kernels.md") else (ROOT,)
    for name in PATH.findall(text):
        assert any((place / name).exists() for place in places), f"{name_of(page)} names {name}"
    if page.name == "architecture.md":
        assert len(set(PATH.findall(text))) > 40


def test_every_public_report_has_an_address_and_a_test():
    rows = [line for line in (ROOT / "docs" / "public_reports.md").read_text().splitlines() if line.startswith("| [")]
    assert len(rows) >= 10
    for row in rows:
        named = TEST.findall(row)
        assert named and "https://" in row, row
        for file, function in named:
            path = ROOT / file
            assert path.is_file() and f"def {function}(" in path.read_text(), f"{file} has no {function}"


def test_every_page_is_in_the_sites_menu_and_the_site_has_no_page_twice():
    """mkdocs says so too, but needs to be installed."""
    menu = re.findall(r": ([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    pages = {page.relative_to(ROOT / "docs").as_posix() for page in PAGES if page.name != "README.md"}
    assert len(menu) == len(set(menu)) and set(menu) == pages
