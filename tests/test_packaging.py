"""What the wheel holds: every package of the repository that users import."""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from qdiff_diffusers.cli.comfy import PARTS

tomllib = pytest.importorskip("tomllib")  # Python 3.11
ROOT = Path(__file__).parents[1]


def test_the_wheel_has_every_package():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    places = settings["package-dir"]
    for root in ("qdiff_diffusers", "qdiff_kernels"):
        folder = ROOT / places.get(root, root)
        files = folder.rglob("__init__.py")
        found = {".".join((root, *file.parent.relative_to(folder).parts)) for file in files}
        listed = {name for name in settings["packages"] if name.split(".")[0] == root}
        assert found <= listed, f"pyproject.toml does not list {', '.join(sorted(found - listed))}"


def test_the_wheel_has_the_node_pack():
    """Every folder of the pack with a module is a listed package, and every other file of it is package data."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    listed, data = set(settings["packages"]), settings["package-data"]
    for part in PARTS:
        name, folder = f"qdiff_diffusers.comfy_pack.{part}", ROOT / part
        assert settings["package-dir"][name] == part
        files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"]
        modules = {".".join((name, *path.parent.relative_to(folder).parts)) for path in files if path.suffix == ".py"}
        assert modules <= listed
        covered = {path for pattern in data[name] for path in folder.glob(pattern)}
        assert {path for path in files if path.suffix != ".py"} == covered


def test_the_oldest_versions_stated_are_those_that_are_tested():
    """docs/versions.md: ``scripts/versions.py`` installs these."""
    spec = importlib.util.spec_from_file_location("versions", ROOT / "scripts" / "versions.py")
    versions = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(versions)
    tested = versions.OLDEST | {
        "torch": versions.ROWS["oldest"].torch.removeprefix("torch"),
        "triton": versions.OLD_TRITON["triton"],
    }
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [lines for name, lines in project["optional-dependencies"].items() if name != "dev"]
    for requirement in map(Requirement, itertools.chain(project["dependencies"], *extras)):
        (least,) = [part.version for part in requirement.specifier if part.operator == ">="]
        assert Version(tested[requirement.name].removeprefix("==")) == Version(least), requirement
