"""What the wheel holds: every package of the repository that users import."""

from __future__ import annotations

from pathlib import Path

import pytest

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
