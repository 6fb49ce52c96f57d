"""Host time of a packed layer on a GPU: what Python does before the last kernel of the layer is launched. No GPU is needed.

    python benchmarks/host_time.py      # benchmarks/results/host_time.{json,md}

Triton gets a driver that launches nothing, so that its own work (binding arguments, looking up the compiled kernel) is counted on
CPU tensors; the vendor's products are replaced by an empty result. Left out are the driver's launches and the device guard, a few
microseconds each. Small copies that would run on the GPU run on the CPU instead, on a layer of 256 x 256 weights, where they take
about as long as their launch does; what is launched is what 3072 x 3072 weights would get. Each number is the fastest of many
calls: the machine may be shared.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from common import write
from qdiff_kernels import use
from qdiff_kernels.gpu import configs, ops
from qdiff_kernels.gpu.linear import Units
from torch import Tensor, nn
from triton.backends.compiler import GPUTarget

from qdiff_diffusers.config import QDiffConfig
from qdiff_diffusers.layers import pack_layer
from qdiff_diffusers.methods import quantize_weight

SIZE = 256  # input and output channels
PLANNED = 3072  # for which launches are planned
TOKENS = (1, 512, 4096)
BATCH, BATCHES = 20, 100
PROCESSORS = 132
LAYERS: dict[str, dict[str, Any]] = {
    "SVDQuant 4": {"method": "svdquant", "bits": 4},
    "SVDQuant 4, INT8 inputs": {"method": "svdquant", "bits": 4, "activations": "int8"},
    "SVDQuant 4, INT4 inputs, rotated": {"method": "svdquant", "bits": 4, "activations": "int4", "rotation": True},
    "FP4": {"method": "fp", "bits": 4},
    "FP4, FP8 inputs": {"method": "fp", "bits": 4, "activations": "fp8"},
    "FP8 rows, FP8 inputs": {"method": "fp", "weight_format": "e4m3", "group_size": "row", "activations": "fp8"},
    "AQ 2": {"method": "aq", "bits": 2, "effort": 0},
    "AQ 2, INT8 inputs": {"method": "aq", "bits": 2, "effort": 0, "activations": "int8"},
    "VQ 2": {"method": "vq", "bits": 2, "restarts": 1},
    "RTN 8": {"method": "rtn", "bits": 8},
}


class NoDriver:
    """What Triton asks of a GPU's driver: it compiles for an H200 and launches nothing."""

    def __init__(self) -> None:
        self.utils = SimpleNamespace(
            load_binary=lambda name, kernel, shared, device: (0, 0, 0, 0, 1024),
            unload_module=lambda module: None,
            get_device_properties=lambda device: {"max_shared_mem": 232448},
        )
        self.launcher_cls = lambda source, metadata: lambda *args: None

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """CPU tensors take the path of an H200's."""
    kept: dict[str, Any] = {name: getattr(ops, name) for name in ("runs_on", "matrix_units", "F", "_project")}
    processors, choose = configs.processors, configs.choose
    ops.runs_on = lambda tensor: True
    ops.matrix_units = lambda device: Units(bf16=True, fp8=True, block_scaled=False)  # type: ignore[assignment]
    ops.F = SimpleNamespace(linear=_no_product)  # type: ignore[assignment]
    configs.choose = lambda weight, inputs, tokens, rows, columns, device: choose(weight, inputs, tokens, PLANNED, PLANNED, device)
    ops._project = lambda x, down: x.new_empty(x.shape[0], down.shape[0])
    configs.processors = lambda name: PROCESSORS  # type: ignore[assignment]
    triton.runtime.driver.set_active(NoDriver())  # type: ignore[arg-type]
    try:
        with use("triton"):
            yield
    finally:
        for name, value in kept.items():
            setattr(ops, name, value)
        configs.processors, configs.choose = processors, choose


def _no_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def microseconds(call: Callable[[], object]) -> float:
    """The fastest of many calls, in batches, so that the clock's own time does not count."""
    for _ in range(BATCH):
        call()
    best = float("inf")
    for _ in range(BATCHES):
        start = time.perf_counter()
        for _ in range(BATCH):
            call()
        best = min(best, (time.perf_counter() - start) / BATCH)
    return best * 1e6


def measure(settings: dict[str, Any]) -> dict[str, float]:
    """Host time of one layer, microseconds by number of tokens."""
    dense = nn.Linear(SIZE, SIZE).bfloat16()
    spec, tensors, _ = quantize_weight(dense.weight.detach(), QDiffConfig(**settings))
    layer = pack_layer(dense, spec, torch.bfloat16, tensors)
    found = {}
    for tokens in TOKENS:
        x = torch.zeros(tokens, SIZE, dtype=torch.bfloat16)
        with as_on_a_gpu():
            found[f"tokens_{tokens}"] = microseconds(lambda x=x: layer(x))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="part of a layer's name")
    parser.add_argument("--save", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        tiny = nn.Linear(8, 8)
        x = torch.zeros(1, 8)
        rows.append({"layer": "nn.Linear, 8 x 8, product included", "tokens_1": microseconds(lambda: tiny(x))})
        for name, settings in LAYERS.items():
            if options.only in name:
                rows.append({"layer": name} | measure(settings))
                print(rows[-1], flush=True)
    columns = [("layer", "layer", ""), *((f"tokens_{n}", f"{n} token{'s' * (n > 1)}, us", ".0f") for n in TOKENS)]
    if options.save:
        write("host_time", rows, columns, triton=triton.__version__)


if __name__ == "__main__":
    main()
