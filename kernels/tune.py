"""Finds the fastest tile sizes for this machine's device and writes them to ``torch-ext/qdiff_kernels/configs/``.

    python kernels/tune.py                       # the GPU, every format that a method chooses by itself, until all is tuned
    python kernels/tune.py --budget 500 --only "integer4 int8" --tokens 1,16,1024
    python kernels/tune.py --cpu                 # the CPU's thresholds instead

Each product starts from the best configuration of its neighbour (or the rule's) and changes one number at a time, keeping what is
faster, until nothing is. Results are checked against the torch reference before they are timed, and written after every product, so
that an interrupted run loses nothing and the next one goes on where it stopped. Calls are timed as CUDA graphs, which hold what the
device does and nothing of what the host does before it; a configuration that the device has no room for is skipped.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent / "torch-ext"))
from qdiff_kernels import _dispatch, reference
from qdiff_kernels.gpu import configs, ops, weights
from qdiff_kernels.gpu.configs import LinearConfig
from qdiff_kernels.gpu.weights import PackedWeight
from qdiff_kernels.reference import Extras

from qdiff_diffusers.bench.defaults import Default, default_layers
from qdiff_diffusers.bench.layers import capture

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
KINDS = ("none", "int8", "fp8", "int4")  # of activations; the kernels have no others
UNFIT = ("OutOfResources", "CompilationError", "PTXASError")  # names of errors that say a configuration is none for this device
BROKEN = 0.03  # relative error above which a result is wrong


class Product(NamedTuple):
    """A packed layer with random contents.

    Attributes:
        name: of the layer, for people.
        key: of the tuned table.
        dense: float32 ``[rows, columns]``, what the codes stand for.
    """

    name: str
    key: str
    weight: PackedWeight
    dense: Tensor
    extras: Extras

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.rows, self.weight.columns


def products(layers: list[Default], only: str, shape: tuple[int, int], device: torch.device) -> Iterator[Product]:
    """One for each key of the table, what methods choose unasked first.

    Args:
        only: words, all of which the name or the key must hold.
    """
    seen: set[str] = set()
    for layer in sorted(layers, key=lambda layer: not layer.headline):
        for activations in KINDS:
            if activations not in ("none", *layer.activations) or not _may_match(layer, only):
                continue
            product = random_product(layer, activations, shape, device)
            text = f"{product.name} {product.key}"
            if product.key not in seen and all(word in text for word in only.split()):
                seen.add(product.key)
                yield product


def _may_match(layer: Default, only: str) -> bool:
    """Whether making a product is worth it: a kind that ``only`` names is the layer's, or it names none."""
    kinds = [word for word in only.split() if word.startswith(("integer", "minifloat", "codebook"))]
    return all(word.startswith(layer.spec.format.kind) for word in kinds)


def random_product(layer: Default, activations: str, shape: tuple[int, int], device: torch.device) -> Product:
    """A layer's format and low-rank branch with random numbers in them. Its rotation happens before the product that is tuned."""
    spec = layer.spec
    generator = torch.Generator(device).manual_seed(0)

    def uniform(size: tuple[int, ...], low: float, high: float) -> Tensor:
        return torch.rand(size, generator=generator, device=device) * (high - low) + low

    tensors = {}
    for name, info in spec.tensors(shape).items():
        if name == "codes":
            codes = torch.randint(-128, 128, info.shape, generator=generator, device=device, dtype=torch.int8)
            finite = spec.format.kind == "minifloat" and spec.format.bits == 8  # without the exponent's top bit
            tensors[name] = codes & ~64 if finite else codes
        elif info.dtype == torch.int8 and name == "scales":
            tensors[name] = torch.randint(116, 121, info.shape, generator=generator, device=device, dtype=torch.int8)
        elif name in ("codebooks", "low_rank_down", "low_rank_up"):
            tensors[name] = uniform(info.shape, -0.1, 0.1).to(info.dtype)
        else:
            tensors[name] = uniform(info.shape, 0.01, 0.03).to(info.dtype)
    if len(getattr(spec.format, "encodings", ())) > 1:  # the sign of a scale says which of the two its group has
        signs = uniform(tensors["scales"].shape, -1, 1).sign()
        tensors["scales"] = (tensors["scales"].float() * signs).to(tensors["scales"].dtype)
    arguments = spec.format.op_arguments(tensors, shape[1])
    weight = getattr(weights, spec.format.kind)(*arguments, shape[1])
    dense = _dispatch._implementations[f"{spec.format.kind}_dequantize"]["torch"](*arguments, shape[1], torch.float32)
    extras = Extras(None, tensors.get("low_rank_down"), tensors.get("low_rank_up"), None, 0, activations)
    inputs = "bfloat16" if activations == "none" else activations
    return Product(layer.name, f"{ops.weight_name(weight)} {inputs}", weight, dense, extras)


@contextmanager
def exactly_as_configured() -> Iterator[None]:
    """In this context a configuration that the device has no room for is an error, not a reason to take a smaller one."""

    def launch_once(key: Any, config: LinearConfig, launch: Callable[[LinearConfig], Any], *_: Any, **__: Any) -> Any:
        return launch(config)

    with patch.object(configs, "fit", launch_once):
        yield


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

    def time(self, call: Callable[[], Any], repeats: int = 15) -> float:
        """Seconds; of a graph's replay where the device has graphs, since launching a call often takes longer than running it."""
        call()
        if self.module is None:
            return self._once(call)  # the interpreter's times mean nothing
        replay = capture(call) if self.device.type == "cuda" else call
        return statistics.median(self._once(replay) for _ in range(repeats))

    def _once(self, call: Callable[[], Any]) -> float:
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


def tune(product: Product, tokens: int, start: LinearConfig | None, watch: Stopwatch) -> dict[str, Any] | None:
    """The table entry of one product and number of tokens, ``None`` if no configuration near the start runs on the device.

    Raises:
        SystemExit: a configuration computes something else than the reference.
    """
    weight, extras = product.weight, product.extras
    rows, columns = product.shape
    name, inputs = product.key.rsplit(" ", 1)
    x = torch.randn(tokens, columns, device=watch.device, dtype=torch.bfloat16)
    expected = reference.linear(x.float(), product.dense, extras)

    def speed(config: LinearConfig) -> float:
        try:
            with exactly_as_configured():
                error = float((ops.product(weight, x, extras, config).float() - expected).norm() / expected.norm())
                if not error <= BROKEN:
                    raise SystemExit(f"{product.key} {tokens} {product.shape}: {config} is {error:.1%} off the reference")
                return watch.time(lambda: ops.product(weight, x, extras, config))
        except Exception as problem:
            if type(problem).__name__ not in UNFIT:
                raise
            return float("inf")

    best = start or configs.choose(name, inputs, tokens, rows, columns, watch.device)
    fastest, improved = speed(best), True
    while improved:
        improved = False
        for field in CHOICES:
            for other in candidates(best, field, tokens):
                if (seconds := speed(other)) < 0.98 * fastest:
                    best, fastest, improved = other, seconds, True
    if fastest == float("inf"):
        return None
    dense = product.dense.bfloat16()
    baseline = watch.time(lambda: x @ dense.T)
    facts = {"tokens": tokens, "rows": rows, "columns": columns, "microseconds": round(fastest * 1e6, 2)}
    return facts | {"times_bf16": round(baseline / fastest, 3), "layer": product.name, "config": asdict(best)}


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
    for shape in options.shapes:
        for product in products(default_layers(), options.only, shape, device):
            start = None
            for tokens in options.tokens:
                entries = table["linear"].setdefault(product.key, [])
                if (tokens, *shape) in {(e["tokens"], e["rows"], e["columns"]) for e in entries}:
                    continue
                if time.monotonic() > deadline:
                    print("time is up; run it again to go on")
                    return
                entry = tune(product, tokens, start, watch)
                if entry is None:
                    print(f"{product.key:<28}{shape!s:<16}{tokens:>6}  nothing near the rule's configuration runs here", flush=True)
                    continue
                start = LinearConfig(**entry["config"])
                entries.append(entry)
                write(file, table)
                print(f"{product.key:<28}{shape!s:<16}{tokens:>6}  {entry['times_bf16']:.2f}x bf16  {start}", flush=True)


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
    parser.add_argument("--only", default="", help="words of a product's key or layer: 'integer4 int8', 'svdquant 4'")
    parser.add_argument("--tokens", type=numbers, default=TOKENS)
    parser.add_argument("--shapes", type=shapes, default=SHAPES)
    parser.add_argument("--output", type=Path, default=configs.FOLDER)
    chosen = parser.parse_args()
    tune_cpu(chosen) if chosen.cpu else tune_gpu(chosen)
