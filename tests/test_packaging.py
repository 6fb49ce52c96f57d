"""What the wheel holds: every package of the repository that users import."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import itertools
import re
import subprocess
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import qdiff_diffusers
from qdiff_diffusers.cli.comfy import PARTS
from qdiff_diffusers.version import package_version

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
    extras = [lines for name, lines in project["optional-dependencies"].items() if name not in ("dev", "docs")]
    for requirement in map(Requirement, itertools.chain(project["dependencies"], *extras)):
        (least,) = [part.version for part in requirement.specifier if part.operator == ">="]
        assert Version(tested[requirement.name].removeprefix("==")) == Version(least), requirement


def stated_version() -> str:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def test_the_version_is_written_once():
    assert qdiff_diffusers.__version__ == stated_version()
    again = re.compile(rf"[^0-9.]{re.escape(stated_version())}[\"']")
    sources = [*(ROOT / "qdiff_diffusers").rglob("*.py"), *(ROOT / "comfy_nodes").rglob("*.py"), ROOT / "__init__.py"]
    assert not [path for path in sources if again.search(path.read_text())]
    assert f"\n## [{stated_version()}]" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize(
    ("project", "installed", "version"),
    [
        ('name = "qdiff-diffusers"\nversion = "1.2.3"\n', "9.9", "1.2.3"),  # a clone beside another that is installed
        ('name = "something-else"\nversion = "1.2.3"\n', "9.9", "9.9"),
        (None, "9.9", "9.9"),  # a wheel
        (None, None, "0+unknown"),  # a folder that was copied from one
    ],
)
def test_a_clone_knows_its_version_without_being_installed(project, installed, version, tmp_path, monkeypatch):
    def installed_version(name: str) -> str:
        if installed is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(importlib.metadata, "version", installed_version)
    if project is not None:
        (tmp_path / "pyproject.toml").write_text(f"[project]\n{project}")
    assert package_version(tmp_path / "qdiff_diffusers") == version


def test_constraints_leave_the_choice_of_torch_and_hold_for_one_python_only():
    """scripts/environment.sh installs torch by itself, and what its build brings along comes with it."""
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    constraints = {found.name: found for found in map(Requirement, lines)}
    assert {"diffusers", "transformers", "peft", "pytest"} <= constraints.keys()
    assert not constraints.keys() & {"torch", "triton", "qdiff-diffusers"}
    assert all(found.marker is not None and "python_version" in str(found.marker) for found in constraints.values())


def test_the_scripts_can_be_parsed():
    for script in (ROOT / ".ci" / "run", *sorted((ROOT / "scripts").glob("*.sh"))):
        subprocess.run(["bash", "-n", script], check=True)
