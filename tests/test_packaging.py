"""What the wheel holds: every package of the repository that users import."""

from __future__ import annotations

from pathlib import Path

import pytest

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
