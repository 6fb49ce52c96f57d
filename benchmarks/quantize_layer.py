"""What quantizing one layer costs on one core, with and without second moments of its inputs, and how good the result is.

    OMP_NUM_THREADS=1 python benchmarks/quantize_layer.py --as after [--only "INT4 + Hessian"] [--large]

Weights have rows of different size and heavy tails; inputs have a falling spectrum and channels of different size, so that second
moments tell codes something. Seconds are those that the process computes, which other programs on the machine hardly change, with
the wall clock's beside them; the best of three runs where one is short. Errors are squared and relative: of the weight, and of the
layer's output, ``tr((W - Q) H (W - Q)^T) / tr(W H W^T)``. Results of "before" and "after" are kept side by side: "before" is commit
08cab5e. Those committed of 1536 x 1536 were measured one after the other on a machine with little else to do, those of 3072 x 3072
while several times as many programs as it has cores kept it busy, which adds about a fifth to the seconds of one process too.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch
from common import RESULTS, write
from qdiff_kernels import matrix_layout
from torch import Tensor

from qdiff_diffusers import AQConfig, FPConfig, QDiffConfig, RTNConfig, SVDQuantConfig, VQConfig
from qdiff_diffusers.methods import LayerInputs, quantize_weight

SHAPE, LARGE = (1536, 1536), (3072, 3072)
CONFIGS: dict[str, QDiffConfig] = {
    "INT4": RTNConfig(bits=4),
    "FP 4-bit": FPConfig(bits=4),
    "NVFP4": FPConfig(weight_format="nvfp4"),
    "MXFP4": FPConfig(weight_format="mxfp4"),
    "FP 8-bit": FPConfig(bits=8),
    "FP 4-bit per row": FPConfig(bits=4, group_size="row"),
    "SVDQuant INT4 rank 32": SVDQuantConfig(weight_format="int4", rank=32),
    "SVDQuant NVFP4 rank 32": SVDQuantConfig(weight_format="nvfp4", rank=32),
    "AQ 2-bit": AQConfig(bits=2),
    "AQ 2-bit, own codebooks": AQConfig(bits=2, codebook="layer"),
    "VQ 2-bit": VQConfig(bits=2),
    "VQ 2-bit, own codebook": VQConfig(bits=2, codebook="layer"),
}
LARGE_CONFIGS = ("INT4", "NVFP4", "SVDQuant INT4 rank 32", "AQ 2-bit", "VQ 2-bit")
HESSIAN = " + Hessian"
SHORT = 3.0  # seconds below which a run is repeated


def problem(shape: tuple[int, int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight ``[rows, columns]`` and the second moments of its inputs."""
    rows, columns = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    tails = normal(4, rows, columns).square().mean(0).sqrt()  # Student's t of 4 degrees of freedom
    weight = 0.02 * normal(rows, columns) / tails * (0.3 * normal(rows, 1)).exp()
    spectrum = torch.arange(1, columns + 1, dtype=torch.float32).pow(-0.5)
    channels = (0.5 * normal(columns)).exp()
    x = (normal(2 * columns, columns) * spectrum) @ torch.linalg.qr(normal(columns, columns)).Q * channels
    return weight, x.T @ x / len(x)


def measure(config: QDiffConfig, weight: Tensor, hessian: Tensor, fitted: bool) -> dict[str, Any]:
    """Seconds and errors of quantizing ``weight`` by itself, or ``fitted`` to its inputs."""
    inputs = LayerInputs(hessian) if fitted else None
    small = LayerInputs(hessian[:256, :256].contiguous()) if fitted else None
    quantize_weight(weight[:256, :256], config, inputs=small)  # what is compiled or read at the first call
    seconds = wall = float("inf")
    for _ in range(3):
        began, start = time.perf_counter(), time.process_time()
        found = quantize_weight(weight, config, inputs=inputs)
        now, clock = time.process_time() - start, time.perf_counter() - began
        seconds, wall = min(seconds, now), min(wall, clock)
        if now > SHORT:
            break
    difference = matrix_layout(found.spec.dequantize(found.tensors, tuple(weight.shape))) - weight
    output = ((difference @ hessian) * difference).sum() / ((weight @ hessian) * weight).sum()
    error = difference.square().sum() / weight.square().sum()
    return {"seconds": seconds, "wall": wall, "error": float(error), "output_error": float(output)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--as", dest="label", choices=("before", "after"), default="after")
    parser.add_argument("--only", action="append", help="a row's name, such as 'INT4 + Hessian'; others keep their results")
    parser.add_argument("--large", action="store_true", help="3072 x 3072, for a few of the methods")
    args = parser.parse_args()
    torch.set_num_threads(1)
    shape = LARGE if args.large else SHAPE
    weight, hessian = problem(shape)
    path = RESULTS / "quantize_layer.json"
    rows = {(r["config"], r["shape"]): r for r in json.loads(path.read_text())["rows"]} if path.is_file() else {}
    names = [name + ending for name in (LARGE_CONFIGS if args.large else CONFIGS) for ending in ("", HESSIAN)]
    for name in names:
        if args.only and name not in args.only:
            continue
        size = f"{shape[0]} x {shape[1]}"
        found = measure(CONFIGS[name.removesuffix(HESSIAN)], weight, hessian, name.endswith(HESSIAN))
        row = rows.setdefault((name, size), {"config": name, "shape": size})
        row |= {f"{args.label} {key}": value for key, value in found.items()}
        if "before seconds" in row and "after seconds" in row:
            row["ratio"] = row["before seconds"] / row["after seconds"]
        print(name, size, {key: float(f"{value:.4g}") for key, value in found.items()}, flush=True)
    _write(list(rows.values()))


def _write(rows: list[dict[str, Any]]) -> None:
    columns = [("config", "config", ""), ("shape", "layer", "")]
    for label in ("before", "after"):
        columns += [(f"{label} seconds", f"CPU s, {label}", ".2f"), (f"{label} wall", f"wall s, {label}", ".2f")]
    columns += [("ratio", "times faster", ".1f")]
    columns += [(f"{label} output_error", f"output error, {label}", ".3e") for label in ("before", "after")]
    columns += [(f"{label} error", f"weight error, {label}", ".3e") for label in ("before", "after")]
    write("quantize_layer", rows, columns)


if __name__ == "__main__":
    main()
