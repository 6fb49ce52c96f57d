"""The kernels as a project: laid out for the Hub, loaded from there, tuned."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

KERNELS = Path(__file__).parents[1]
# By the name of its distribution: the module's name is also that of this folder.
CLIENT = any(found.metadata["Name"] == "kernels" for found in importlib.metadata.distributions())

LOAD = """
import sys, torch
import qdiff_kernels as installed
{load}
assert kernel.__name__ != installed.__name__ and kernel.implementation is not installed.implementation
codes = kernel.pack_bits(torch.randint(0, 16, (5, 64)), 4)
x = torch.randn(3, 64)
arguments = (x, codes, torch.rand(5, 1), None, 4, 64, None, None, None, None, 0, "none")
assert torch.equal(kernel.integer_linear(*arguments), installed.integer_linear(*arguments))
assert kernel.integer_linear._qualname != installed.integer_linear._qualname
print("loaded", kernel.__name__)
"""


def packaged(tmp_path: Path) -> Path:
    subprocess.run([sys.executable, KERNELS / "package.py", tmp_path / "hub"], check=True, capture_output=True)
    return tmp_path / "hub"


def loaded(code: str) -> str:
    run = subprocess.run([sys.executable, "-c", LOAD.format(load=code)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout


def test_the_layout_has_a_folder_per_backend_and_a_card(tmp_path):
    hub = packaged(tmp_path)
    assert {f.name for f in (hub / "build").iterdir()} == {"torch-cpu", "torch-cuda", "torch-rocm", "torch-xpu"}
    metadata = json.loads((hub / "build" / "torch-cuda" / "metadata.json").read_text())
    assert metadata["name"] == "qdiff-kernels" and metadata["backend"] == {"type": "cuda"}
    assert metadata["id"] in (hub / "build" / "torch-cuda" / "_ops.py").read_text()
    assert list((hub / "build" / "torch-cuda" / "configs").glob("*.json"))
    assert (hub / "README.md").read_text().startswith("---\nlibrary_name: kernels")


def test_a_second_build_is_not_mixed_into_the_first(tmp_path):
    hub = packaged(tmp_path)
    again = subprocess.run([sys.executable, KERNELS / "package.py", hub], capture_output=True, text=True)
    assert again.returncode and "is there already" in again.stderr


def test_the_hub_kernel_works_beside_the_installed_package(tmp_path):
    """By file, under a name of its own, which is how the Hub's client imports it."""
    folder = packaged(tmp_path) / "build" / "torch-cpu"
    code = f"""
import importlib.util
spec = importlib.util.spec_from_file_location("from_the_hub", {str(folder / "__init__.py")!r})
kernel = importlib.util.module_from_spec(spec)
sys.modules["from_the_hub"] = kernel
spec.loader.exec_module(kernel)
"""
    assert "loaded from_the_hub" in loaded(code)


@pytest.mark.skipif(not CLIENT, reason="the Hub's kernels client is not installed")
def test_the_hubs_own_client_loads_it(tmp_path):
    hub = packaged(tmp_path)
    out = loaded(f"from pathlib import Path\nfrom kernels import get_local_kernel\nkernel = get_local_kernel(Path({str(hub)!r}))")
    assert "_qdiff_kernels_" in out


def test_importing_the_kernels_imports_no_compiler_and_touches_no_gpu():
    code = "import sys, qdiff_kernels, torch; bad = {'triton', 'numba'} & set(sys.modules); assert not bad, bad"
    code += "; assert not torch.cuda.is_initialized()"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs the tuner under the interpreter")
def test_the_tuner_writes_a_table_and_goes_on_where_it_stopped(tmp_path):
    pytest.importorskip("triton")
    command = [sys.executable, KERNELS / "tune.py", "--device", "cpu", "--only", "integer8 int8", "--tokens", "1"]
    command += ["--shapes", "16x64", "--output", tmp_path]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    first = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    entry = json.loads((tmp_path / "interpreter.json").read_text())["linear"]["integer8 row int8"][0]
    assert (entry["tokens"], entry["rows"], entry["columns"]) == (1, 16, 64)
    assert "bf16" in first.stdout
    assert not subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout
