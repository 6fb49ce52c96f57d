"""benchmarks/gpu.py: it refuses without a GPU, goes on where it stopped, and has written every part when the part ends."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu.py"
MACHINE = {"gpu": "a GPU", "torch": "2.13", "triton": "3.9", "commit": "abc"}


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("gpu_benchmark", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_benchmark", module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def options(gpu, tmp_path):
    return gpu.Options("cuda", False, tmp_path)


def stored(folder: Path) -> dict:
    return json.loads((folder / "gpu.json").read_text())["parts"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line_and_ends_with_2(tmp_path):
    run = subprocess.run([sys.executable, SCRIPT, "-o", tmp_path / "out"], capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr.splitlines() == [
        "gpu.py needs a GPU, and torch sees none here; --device cpu --tiny tries the command without one"
    ]
    assert not (tmp_path / "out").exists()


def test_each_part_is_on_disk_when_it_ends(gpu, options):
    seen = []

    def part(name):
        def run(seconds):
            seen.append(stored(options.output) if (options.output / "gpu.json").exists() else None)
            return {"tests": 1}

        return gpu.Part(name, run)

    state = gpu.State(options.output / "gpu.json", MACHINE)
    gpu.run_stages({"correctness": [part("1"), part("2")], "tune": [part("3")]}, options, state, time.monotonic() + 600)
    assert seen[0] is None
    assert list(seen[1]["correctness"]) == ["1"]
    assert list(seen[2]["correctness"]) == ["1", "2"]
    assert list(stored(options.output)["tune"]) == ["3"]


def test_a_second_run_does_what_the_first_left(gpu, options):
    def interrupted(seconds):
        raise KeyboardInterrupt

    again, ran = [], lambda seconds: {"layer_seconds": 1.0}
    first = {"layers": [gpu.Part("a", ran), gpu.Part("b", lambda s: {"unfinished": True}), gpu.Part("c", interrupted)]}
    with pytest.raises(KeyboardInterrupt):
        gpu.run_stages(first, options, gpu.State(options.output / "gpu.json", MACHINE), time.monotonic() + 600)
    second = {"layers": [gpu.Part(name, lambda s, name=name: again.append(name) or {}) for name in "abc"]}
    state = gpu.State(options.output / "gpu.json", MACHINE)
    gpu.run_stages(second, options, state, time.monotonic() + 600)
    assert again == ["b", "c"]
    assert all(state.done("layers", name) for name in "abc")


def test_a_part_that_fails_is_named_and_tried_again_and_the_others_run(gpu, options):
    def broken(seconds):
        raise MemoryError("no room")

    ran = []
    parts = {"quantize": [gpu.Part("a", broken), gpu.Part("b", lambda s: ran.append("b") or {})]}
    state = gpu.State(options.output / "gpu.json", MACHINE)
    gpu.run_stages(parts, options, state, time.monotonic() + 600)
    assert ran == ["b"]
    assert "MemoryError: no room" in gpu.page(parts, state, options)
    assert not gpu.State(options.output / "gpu.json", MACHINE).done("quantize", "a")


def test_another_machine_or_commit_starts_anew_and_says_why(gpu, options):
    state = gpu.State(options.output / "gpu.json", MACHINE)
    state.add("layers", "a", {"seconds": 1.0})
    assert gpu.State(options.output / "gpu.json", MACHINE).done("layers", "a")
    other = gpu.State(options.output / "gpu.json", MACHINE | {"commit": "def"})
    assert other.changed == ["commit"]
    assert not other.done("layers", "a")


def test_stages_get_shares_and_what_does_not_fit_is_named_as_skipped(gpu, options):
    given = {}

    def part(name):
        return gpu.Part(name, lambda seconds: given.setdefault(name, seconds) and {"tests": 1})

    parts = {stage: [part(stage)] for stage in gpu.STAGES}
    gpu.run_stages(parts, options, gpu.State(options.output / "whole.json", MACHINE), time.monotonic() + 600)
    assert given["correctness"] == pytest.approx(600 * gpu.STAGES["correctness"] / sum(gpu.STAGES.values()), abs=5)
    assert given["quantize"] > 500  # what nobody used

    state = gpu.State(options.output / "gpu.json", MACHINE)
    gpu.run_stages(parts, options, state, time.monotonic() + 1)
    text = gpu.page(parts, state, options)
    assert "- models, skipped for want of time: models" in text


def test_failures_are_on_the_page(gpu, options):
    state = gpu.State(options.output / "gpu.json", MACHINE)
    state.add("correctness", "1 to 2 of 2", {"tests": 2, "failed": ["test_gpu.py::test_x"], "seconds": 1.0})
    state.add("tune", "tile sizes", {"failure": "Traceback\nRuntimeError: out of luck", "seconds": 1.0})
    text = gpu.page({"correctness": [], "tune": []}, state, options)
    assert "1 of 2 tests of the kernels passed" in text
    assert "test_gpu.py::test_x" in text
    assert "RuntimeError: out of luck" in text


def test_a_command_that_takes_too_long_is_unfinished_not_failed(gpu, options):
    ran = gpu.child([sys.executable, "-c", "import time; time.sleep(60)"], options, 1.0)
    assert ran.returncode == gpu.UNFINISHED
    assert gpu.failure(ran) == {}


@pytest.mark.serial
def test_the_plumbing_without_a_gpu(tmp_path):
    command = [sys.executable, SCRIPT, "--device", "cpu", "--tiny", "--only", "layers,models,quantize", "-o", tmp_path]
    first = subprocess.run(command, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr[-2000:]
    parts = stored(tmp_path)
    assert all(parts[stage] for stage in ("layers", "models", "quantize"))
    assert not any(part.get("failure") or part.get("unfinished") for stage in parts.values() for part in stage.values())
    assert "no number here means anything" in (tmp_path / "gpu.md").read_text()
    assert "qdiff-int4" in (tmp_path / "models_cpu.md").read_text()
    again = subprocess.run(command, capture_output=True, text=True)
    assert stored(tmp_path) == parts
    assert "layers: 64x32" in first.stdout and "layers: 64x32" not in again.stdout
