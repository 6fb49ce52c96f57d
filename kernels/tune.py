"""Finds the fastest tile sizes for this machine's device and writes them to ``torch-ext/qdiff_kernels/configs/``.

    python kernels/tune.py                       # the GPU, all products, until every cell is tuned
    python kernels/tune.py --budget 500 --only integer4 --tokens 1,16,1024
    python kernels/tune.py --cpu                 # the CPU's thresholds instead

Each product starts from the best configuration of its neighbour (or the rule's) and changes one number at a time, keeping what is
faster, until nothing is. Results are checked against the torch reference before they are timed, and written after every product, so
that an interrupted run loses nothing and the next one goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent / "torch-ext"))
from qdiff_kernels import _dispatch, pack_bits, reference
from qdiff_kernels.gpu import configs, ops, weights
from qdiff_kernels.gpu.configs import LinearConfig
from qdiff_kernels.reference import Extras

CHOICES = {
    "splits": (1, 2, 3, 4, 6, 8, 12, 16),
    "block_tokens": (16, 32, 64, 128, 256),
    "block_rows": (16, 32, 64, 128, 256),
    "block_columns": (64, 128, 256),
    "warps": (2, 4, 8),
    "stages": (1, 2, 3, 4, 5),
    "two_pass": (False, True),
}
SHAPES = ((3072, 3072), (12288, 3072), (3072, 12288), (1152, 1152), (4608, 1152))
TOKENS = (1, 16, 64, 256, 1024, 4096)
# The products worth a table: (kind, how its weight is stored) by the key of weights and inputs.
PRODUCTS = (
    ("integer4", 64, ("bfloat16", "int8", "int4")),
    ("integer8", 0, ("bfloat16", "int8")),
    ("minifloat4", 32, ("bfloat16", "fp8")),
    ("minifloat8", 0, ("bfloat16", "fp8")),
    ("codebook2x8d8", 0, ("bfloat16", "int8")),
    ("codebook1x8d4", 0, ("bfloat16", "int8")),
    ("codebook4x8d8", 0, ("bfloat16", "int8")),
)


def random_weight(name: str, group: int, rows: int, columns: int, device: torch.device) -> tuple[str, tuple[Any, ...]]:
    """Format and op arguments of a random packed weight; ``group`` 0 is one scale per row."""
    bits = 8 if "codebook" in name else int(name[-1])
    groups = columns // group if group else 1
    scales = torch.rand(rows, groups, device=device).half() * 0.02 + 0.01
    size = group or columns
    if name.startswith("codebook"):
        books, vector = int(name[8]), int(name[-1])
        codes = pack_bits(torch.randint(0, 256, (rows, columns // vector * books), device=device), 8)
        table = torch.randint(-127 // books, 127 // books + 1, (books, 256, vector), device=device).to(torch.int8)
        return "codebook", (codes, table, scales, size)
    codes = pack_bits(torch.randint(0, 1 << bits, (rows, columns), device=device), bits)
    if name.startswith("integer"):
        return "integer", (codes, scales, None, bits, size)
    return "minifloat", (codes, scales, None, "e2m1" if bits == 4 else "e4m3", size)


def candidates(config: LinearConfig, field: str, tokens: int) -> Iterator[LinearConfig]:
    """The neighbours of a configuration along one number."""
    for choice in CHOICES[field]:
        if choice == getattr(config, field):
            continue
        if field == "block_tokens" and choice > max(16, 2 * tokens):
            continue
        if field == "splits" and choice > 1 and tokens > 256:
            continue
        yield replace(config, **{field: choice})


class Stopwatch:
    """Median time of a call with a cold L2 cache, as weights meet it in a model."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.module = torch.get_device_module(device.type) if device.type != "cpu" else None
        self.flush = torch.empty(256 << 20 if self.module else 1 << 20, dtype=torch.int8, device=device)

    def time(self, call: Any, repeats: int = 15) -> float:
        call()
        repeats = repeats if self.module else 1  # the interpreter's times mean nothing
        return statistics.median(self._once(call) for _ in range(repeats))

    def _once(self, call: Any) -> float:
        self.flush.zero_()
        if self.module is None:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        before, after = self.module.Event(enable_timing=True), self.module.Event(enable_timing=True)
        before.record()
        call()
        after.record()
        self.module.synchronize()
        return before.elapsed_time(after) / 1e3


def tune(
    name: str, group: int, inputs: str, tokens: int, shape: tuple[int, int], start: LinearConfig | None, watch: Stopwatch
) -> dict[str, Any]:
    """The table entry of one product."""
    rows, columns = shape
    kind, arguments = random_weight(name, group, rows, columns, watch.device)
    weight = getattr(weights, kind)(*arguments, columns)
    activations = inputs if inputs in ("int8", "int4", "fp8") else "none"
    extras = Extras(None, None, None, None, 0, activations)
    x = torch.randn(tokens, columns, device=watch.device, dtype=torch.bfloat16)
    dense = _dispatch._implementations[f"{kind}_dequantize"]["torch"](*arguments, columns, torch.float32)
    expected = reference.linear(x.float(), dense, extras)

    def run(config: LinearConfig) -> Tensor:
        return ops.product(weight, x, extras, config)

    def speed(config: LinearConfig) -> float:
        try:
            error = float((run(config).float() - expected).norm() / expected.norm())
        except Exception as problem:
            if type(problem).__name__ not in ("OutOfResources", "CompilationError", "PTXASError"):
                raise
            return float("inf")
        if error > 0.03:
            raise SystemExit(f"{name} {inputs} {tokens} {shape}: {config} is {error:.1%} off the reference")
        return watch.time(lambda: run(config))

    key = ops.weight_name(weight)
    best = start or configs.choose(key, inputs, tokens, rows, columns, watch.device)
    fastest, improved = speed(best), True
    while improved:
        improved = False
        for field in CHOICES:
            for other in candidates(best, field, tokens):
                if (seconds := speed(other)) < 0.98 * fastest:
                    best, fastest, improved = other, seconds, True
    dense = dense.bfloat16()
    baseline = watch.time(lambda: x @ dense.T)
    facts = {"tokens": tokens, "rows": rows, "columns": columns, "microseconds": round(fastest * 1e6, 2)}
    return {"key": f"{key} {inputs}", **facts, "times_bf16": round(baseline / fastest, 3), "config": asdict(best)}


def write(file: Path, table: dict[str, Any]) -> None:
    file.parent.mkdir(exist_ok=True)
    beside = file.with_suffix(".part")
    beside.write_text(json.dumps(table, indent=1) + "\n")
    beside.replace(file)


def tune_gpu(options: argparse.Namespace) -> None:
    device = torch.accelerator.current_accelerator() if options.device is None else torch.device(options.device)
    if device is None:
        raise SystemExit("tune.py needs a GPU; --cpu tunes the CPU's thresholds")
    file = options.output / f"{configs.device_name(device)}.json"
    table = json.loads(file.read_text()) if file.is_file() else {"linear": {}}
    table["facts"] = {"torch": torch.__version__, "device": configs.device_name(device), "date": time.strftime("%Y-%m-%d")}
    watch, deadline = Stopwatch(device), time.monotonic() + options.budget
    for name, group, kinds in PRODUCTS:
        for inputs in kinds:
            if options.only not in f"{name} {inputs}":
                continue
            for shape in options.shapes:
                start = None
                for tokens in options.tokens:
                    entries = [e for found in table["linear"].values() for e in found]
                    done = {(e["tokens"], e["rows"], e["columns"]) for e in entries if e.get("product") == f"{name} {inputs}"}
                    if (tokens, *shape) in done:
                        continue
                    if time.monotonic() > deadline:
                        print("time is up; run it again to go on")
                        return
                    entry = tune(name, group, inputs, tokens, shape, start, watch) | {"product": f"{name} {inputs}"}
                    start = LinearConfig(**entry["config"])
                    table["linear"].setdefault(entry.pop("key"), []).append(entry)
                    write(file, table)
                    print(f"{name:<16}{inputs:<10}{shape!s:<16}{tokens:>6}  {entry['times_bf16']:.2f}x bf16  {start}", flush=True)


def tune_cpu(options: argparse.Namespace) -> None:
    from qdiff_kernels.cpu.tune import measure_thresholds

    write(options.output / "cpu.json", measure_thresholds())


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def shapes(text: str) -> tuple[tuple[int, int], ...]:
    """``3072x12288`` is [out, in]."""
    return tuple((int(a), int(b)) for a, b in (part.split("x") for part in text.split(",")))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="tune the CPU's thresholds")
    parser.add_argument("--device", help="another device than the current accelerator, cuda:1 say")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds")
    parser.add_argument("--only", default="", help="part of a product's name: 'integer4 int8'")
    parser.add_argument("--tokens", type=numbers, default=TOKENS)
    parser.add_argument("--shapes", type=shapes, default=SHAPES)
    parser.add_argument("--output", type=Path, default=configs.FOLDER)
    chosen = parser.parse_args()
    tune_cpu(chosen) if chosen.cpu else tune_gpu(chosen)
