"""What look-up tables save on paper, layer kind by layer kind, and what the clock says.

    python benchmarks/operations.py      # benchmarks/results/operations.{json,md}

Counts are of `qdiff_kernels.cpu.lookup_operations`, per token or output pixel. Times are of one thread, the weights not in any
cache: a bfloat16 layer of torch, sums by look-up tables, and the register sums that our layers use. Codes are random.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from common import write
from qdiff_kernels.cpu import lookup_operations
from qdiff_kernels.cpu.lookup import lookup_sums
from torch import nn

from qdiff_diffusers.bench.timing import Call, Spread, make_timer, race
from qdiff_diffusers.formats import LayerSpec
from qdiff_diffusers.layers import pack_layer
from qdiff_diffusers.methods.vectors import codebook_format

SECONDS = 2.0  # for each call
PIXELS = 32  # side of the image that a convolution is timed on
ENTRIES_BITS = 8


class Kind(NamedTuple):
    """A layer of a model: ``taps`` is 1 for a linear layer, 9 for a 3 x 3 convolution."""

    name: str
    rows: int
    columns: int
    taps: int = 1


KINDS = [
    Kind("DiT-XL/2 attention", 1152, 1152),
    Kind("DiT-XL/2 feed forward, up", 4608, 1152),
    Kind("DiT-XL/2 feed forward, down", 1152, 4608),
    Kind("DiT-XL/2 modulation", 6912, 1152),
    Kind("FLUX attention", 3072, 3072),
    Kind("FLUX feed forward, up", 12288, 3072),
    Kind("SDXL 3 x 3 convolution, 320", 320, 320, 9),
    Kind("SDXL 3 x 3 convolution, 1280", 1280, 1280, 9),
]
# (number of codebooks, vector size): what the presets use, and AQUATIC-Diff's one kernel per vector
SHAPES = [(2, 8), (4, 16), (4, 24)]
KERNEL_SHAPES = [(2, 9)]


def count(kind: Kind, books: int, size: int) -> dict[str, float]:
    """Operations of one token or output pixel.

    A table over channels is made once per input pixel and serves all taps; one over a whole 3 x 3 kernel serves one output pixel.
    """
    by_kernel = kind.taps > 1 and size % kind.taps == 0
    rows, columns = (kind.rows, kind.columns * kind.taps) if by_kernel else (kind.rows * kind.taps, kind.columns)
    return lookup_operations(rows, columns, books, 1 << ENTRIES_BITS, size, tokens=1)


def measure(kind: Kind, books: int, size: int) -> dict[str, float | None]:
    """Milliseconds of one token (linear) or one image (convolution)."""
    dense = _dense(kind).bfloat16()
    shape = tuple(dense.weight.shape)
    weight_format = codebook_format((books, ENTRIES_BITS, size), "layer", "row", (shape[0], dense.weight[0].numel()))
    spec = LayerSpec(weight_format, kernel_vectors=size == kind.taps)
    ours = _packed(kind, spec, shape)
    x = torch.randn(1, kind.columns) if kind.taps == 1 else torch.randn(1, kind.columns, PIXELS, PIXELS)
    x = x.bfloat16()
    calls = {"ours_ms": Call(lambda: ours(x))}
    if kind.taps == 1:
        codes = torch.randint(-128, 128, (kind.rows, kind.columns // size * books), dtype=torch.int8)
        codebooks, token = torch.randn(books, 1 << ENTRIES_BITS, size).half(), torch.randn(kind.columns // size, size)
        calls["tables_ms"] = Call(lambda: lookup_sums(codes, codebooks, token))
    with torch.inference_mode():
        for call in calls.values():  # compiles
            call.run()
        races = race(calls, Call(lambda: dense(x)), make_timer(torch.device("cpu"), cold=True), SECONDS)
    out: dict[str, float | None] = {name: Spread.of(one.seconds).median * 1e3 for name, one in races.items()}
    return out | {"dense_ms": Spread.of(races["ours_ms"].baseline).median * 1e3}


def _dense(kind: Kind) -> nn.Linear | nn.Conv2d:
    if kind.taps == 1:
        return nn.Linear(kind.columns, kind.rows)
    return nn.Conv2d(kind.columns, kind.rows, 3, padding=1)


def _packed(kind: Kind, spec: LayerSpec, shape: tuple[int, ...]) -> nn.Module:
    tensors = {}
    for name, info in spec.tensors(shape).items():
        if info.dtype in (torch.int8, torch.uint8):
            tensors[name] = torch.randint(0, 127, info.shape).to(info.dtype)
        else:
            tensors[name] = torch.rand(info.shape).to(info.dtype)
    return pack_layer(_dense(kind).bfloat16(), spec, torch.bfloat16, tensors).eval()


def main() -> None:
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for kind in KINDS:
        for books, size in SHAPES + (KERNEL_SHAPES if kind.taps > 1 else []):
            if kind.columns % size and size != 9:
                continue
            counts = count(kind, books, size)
            row: dict[str, Any] = {"layer": kind.name, "codebooks": f"{books}x{ENTRIES_BITS}, d={size}"}
            row |= {"bits": books * ENTRIES_BITS / size, "saved": counts["multiplications_saved"]} | counts
            row["operations"] = (counts["lookup_multiplications"] + counts["lookup_additions"]) / (
                counts["dense_multiplications"] + counts["dense_additions"]
            )
            rows.append(row | measure(kind, books, size))
            print(row["layer"], row["codebooks"], {k: v for k, v in rows[-1].items() if k.endswith("_ms")}, flush=True)
    columns = [("layer", "layer", ""), ("codebooks", "codebooks", ""), ("bits", "code bits per weight", ".2f")]
    columns += [("saved", "multiplications: dense over tables", ".2f"), ("operations", "all operations: tables over dense", ".2f")]
    columns += [("dense_ms", "bfloat16, ms", ".2f"), ("tables_ms", "tables, ms", ".2f"), ("ours_ms", "our layer, ms", ".2f")]
    write("operations", rows, columns)


if __name__ == "__main__":
    main()
