"""What the wheel holds: every package of the repository that users import."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import itertools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import qdiff_diffusers
from qdiff_diffusers.cli.comfy import PARTS
from qdiff_diffusers.version import package_version

tomllib = pytest.importorskip("tomllib")  # Python 3.11
ROOT = Path(__file__).parents[1]
SHIPPED = ("qdiff_autoload.py", "qdiff_diffusers", "kernels/torch-ext/qdiff_kernels", "comfy_nodes")
OURS = {"qdiff_autoload", "qdiff_diffusers", "qdiff_kernels"}
OF_COMFYUI = {"comfy", "comfy_api", "comfy_kitchen", "folder_paths"}
DISTRIBUTIONS = {"PIL": "pillow", "yaml": "pyyaml", "huggingface_hub": "huggingface-hub"}  # of modules with another name
# What can be compared with where it is installed; nothing of it is imported before it is asked for.
PEERS = {"bitsandbytes", "gemlite", "gguf", "lpips", "optimum", "orbitquant", "sdnq", "torchao"}


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


def imported(tree: ast.AST, always: bool = True) -> Iterator[tuple[str, bool]]:
    """Top-level names of the packages that a module imports, and whether it does so whenever it is imported itself."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name.partition(".")[0], always) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield str(node.module).partition(".")[0], always
        else:
            yield from imported(node, always and not isinstance(node, ast.FunctionDef | ast.Lambda))


def imports() -> dict[str, set[bool]]:
    found: dict[str, set[bool]] = {}
    for place in SHIPPED:
        for path in [ROOT / place] if place.endswith(".py") else (ROOT / place).rglob("*.py"):
            for name, always in imported(ast.parse(path.read_text(encoding="utf-8"))):
                if name not in sys.stdlib_module_names and name not in OURS | OF_COMFYUI:
                    found.setdefault(DISTRIBUTIONS.get(name, name), set()).add(always)
    return found


def test_everything_that_is_imported_is_declared_and_everything_declared_is_imported():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [lines for name, lines in project["optional-dependencies"].items() if name not in ("dev", "docs")]
    declared = {Requirement(line).name for line in itertools.chain(project["dependencies"], *extras)}
    found = imports()
    assert found.keys() - PEERS == declared
    assert {name for name in PEERS if True in found.get(name, set())} == set()
    assert found.keys() >= PEERS


def test_comfyui_installs_what_pyproject_asks_for():
    """requirements.txt: the dependencies but torch, which ComfyUI chooses, and what its nodes use besides."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [line for line in project["dependencies"] if Requirement(line).name != "torch"]
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert sorted(map(str, map(Requirement, lines))) == sorted(
        map(str, map(Requirement, wanted + extras["transformers"] + extras["cpu"]))
    )


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
