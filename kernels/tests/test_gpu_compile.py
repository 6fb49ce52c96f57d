"""The Triton kernels compile for GPUs that are not there, use their matrix units, and fit their registers.

In a process of its own, because this one may run kernels under the interpreter.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
MATRIX = {"cuda:80": "mma.sync", "cuda:90": "wgmma", "cuda:100": "tcgen05.mma", "hip:gfx942": "mfma"}


def compiled(tmp_path: Path, target: str, only: str) -> list[dict]:
    script = Path(__file__).with_name("compile_kernels.py")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, str(script), target, "--only", only, "--json", str(tmp_path / "rows.json")]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=script.parent)
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads((tmp_path / "rows.json").read_text())


@pytest.mark.parametrize("only", ["W4A8", "2-bit codebook A16 few tokens", "FP8 A8"])
def test_hopper_multiplies_with_its_matrix_units_and_spills_nothing(tmp_path, only):
    products = [row for row in compiled(tmp_path, "cuda:90", only) if row["kernel"] == "linear"]
    assert products
    for row in products:
        assert row["matrix"] == "wgmma"
        assert row["spills"] == 0


@pytest.mark.parametrize("target", ["cuda:80", "cuda:100", "hip:gfx942"])
def test_other_gpus_have_a_kernel_for_what_their_hardware_lacks_or_adds(tmp_path, target):
    rows = compiled(tmp_path, target, "FP4 A8")
    assert {row["kernel"] for row in rows} >= {"linear", "conv2d", "dequantize", "prepare"}
    products = [row for row in rows if row["kernel"] == "linear"]
    assert all(row["matrix"] == MATRIX[target] for row in products)
    assert all(row.get("block_scaled", False) == (target == "cuda:100") for row in products)


def test_kernels_take_groups_of_arguments():
    """A weight, inputs, what is added and tile sizes are one named argument each, whatever they consist of."""
    from qdiff_kernels.gpu import activations, conv2d, dequantize, linear

    kernels = (linear._linear_kernel, conv2d._conv2d_kernel, dequantize._dequantize_kernel, activations._prepare_kernel)
    assert all(len(kernel.arg_names) <= 11 for kernel in kernels)


@pytest.mark.serial
def test_a_representative_part_of_the_kernels_is_within_its_budgets():
    """Spills, issue, decoding and loads, of each way in which a layer runs; see kernels/tests/roofline/budgets.py."""
    root = Path(__file__).parents[2]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "benchmarks/gpu_static.py", "--check"]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
