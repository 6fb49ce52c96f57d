"""Who may import whom: a room of the package knows those below it and nothing above, imports inside functions included.

The order is that of the table of rooms in docs/development/architecture.md.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "qdiff_diffusers"
PAGE = ROOT / "docs" / "development" / "architecture.md"
AT_THE_ROOT = {"__init__", "api", "config", "errors", "version"}
FILES = sorted((ROOT / PACKAGE).rglob("*.py"))
KERNELS = sorted((ROOT / "kernels" / "torch-ext").rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


def room_of(module: str) -> str:
    """``qdiff_diffusers.methods.aq`` -> "methods"; a file at the root is a room of its own."""
    return module.split(".")[1] if "." in module else "__init__"


@cache
def imported(path: Path, for_types: bool = True) -> frozenset[str]:
    """Modules of this package that a file imports anywhere: at its top, in a function, or only ``for_types``."""
    module = module_name(path)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found: set[str] = set()
    tree = ast.parse(path.read_text())
    if not for_types:
        tree.body = [node for node in tree.body if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = package.split(".")[: package.count(".") + 2 - node.level] if node.level else []
            origin = ".".join([*start, *filter(None, [node.module])])
            names = {f"{origin}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else origin for name in names}
    return frozenset(name for name in found if name in MODULES and name != module)


def rooms() -> list[str]:
    """The rooms in the order of the table, from the lowest to the highest."""
    table = PAGE.read_text().split("## Rooms")[1].split("\n## ")[0]
    cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    return [name.removesuffix(".py") for cell in cells for name in re.findall(rf"`{PACKAGE}/(\w+(?:\.py)?)/?`", cell)]


def upward() -> Iterator[str]:
    order = {room: number for number, room in enumerate(rooms())}
    for module, path in MODULES.items():
        for other in sorted(imported(path)):
            if order[room_of(other)] > order[room_of(module)]:
                yield f"{module} imports {other}"


def test_the_table_names_every_room_once():
    assert sorted(rooms()) == sorted({room_of(module) for module in MODULES})


def test_no_room_imports_one_above_it():
    assert not list(upward())


def test_only_what_users_meet_lies_at_the_root():
    assert {path.stem for path in (ROOT / PACKAGE).glob("*.py")} == AT_THE_ROOT


def test_no_two_files_import_each_other_by_any_way_round():
    reached: dict[str, frozenset[str]] = {}

    def visit(module: str, way: tuple[str, ...]) -> frozenset[str]:
        if module in way:
            pytest.fail(" -> ".join([*way[way.index(module) :], module]))
        if module not in reached:
            below = [visit(other, (*way, module)) for other in sorted(imported(MODULES[module], for_types=False))]
            reached[module] = frozenset({module}).union(*below)
        return reached[module]

    for module in MODULES:
        visit(module, ())


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_the_kernels_stand_alone(path):
    """They are published as a project of their own."""
    assert PACKAGE not in {
        name.split(".")[0] for name in re.findall(r"^\s*(?:from|import) ([\w.]+)", path.read_text(), re.MULTILINE)
    }
