"""What quantizing FLUX.1's 11.8 billion weights takes: a layer of each of its shapes, counted as often as it occurs.

    python benchmarks/quantize_12b.py                  # one core
    python benchmarks/quantize_12b.py --threads 2      # adds the column of two cores; needs an idle machine
    python benchmarks/quantize_12b.py --device cuda

On one core seconds are those that the process computes, so that other programs hardly count; on several and on a GPU they are the
clock's. Random weights at FLUX.1's real shapes; quantizing takes the same time whatever they are, but for SVDQuant's early stop.
A layer is independent of all others, so the sum is what all layers take one after the other. "Hessian" is fitting layers to their
inputs. Recording trajectories and collecting second moments is not counted: that is the 16-bit model running, and depends on how
much is asked for.

Peak memory is that of one layer at work. The whole model adds what is packed already (its stored size) and, as a mapped file that
is not kept, the dense checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time

import torch
from common import RESULTS, write
from quantize_speed import PeakMemory

from qdiff_diffusers import AQConfig, FPConfig, QDiffConfig, RTNConfig, SVDQuantConfig
from qdiff_diffusers.methods import LayerInputs, quantize_weight

# [out, in] -> how many: 19 double and 38 single blocks, 3072 wide.
SHAPES = {
    (3072, 3072): 19 * 8 + 38 * 3,  # queries, keys, values and outputs of both streams
    (12288, 3072): 19 * 2 + 38,
    (3072, 12288): 19 * 2,
    (18432, 3072): 19 * 2,  # modulation
    (9216, 3072): 38,
    (3072, 15360): 38,
}
WEIGHTS = sum(rows * columns * count for (rows, columns), count in SHAPES.items())
CONFIGS: dict[str, QDiffConfig] = {
    "round-to-nearest 4-bit": RTNConfig(bits=4),
    "FP 4-bit": FPConfig(bits=4),
    "FP 4-bit, all 111 clips per row": FPConfig(bits=4, weight_format="exmy", group_size="row", scale_search="grid"),
    "NVFP4": FPConfig(weight_format="nvfp4"),
    "SVDQuant INT4 rank 32": SVDQuantConfig(weight_format="int4", rank=32),
    "SVDQuant NVFP4 rank 32": SVDQuantConfig(weight_format="nvfp4", rank=32),
    "AQ 2-bit": AQConfig(bits=2),
    "round-to-nearest 4-bit + Hessian": RTNConfig(bits=4),
    "FP 4-bit + Hessian": FPConfig(bits=4),
    "NVFP4 + Hessian": FPConfig(weight_format="nvfp4"),
    "SVDQuant INT4 rank 32 + Hessian": SVDQuantConfig(weight_format="int4", rank=32),
    "SVDQuant NVFP4 rank 32 + Hessian": SVDQuantConfig(weight_format="nvfp4", rank=32),
    "AQ 2-bit + Hessian": AQConfig(bits=2),
}
SAMPLES = 2048


def second_moments(columns: int, device: str) -> torch.Tensor:
    """float32 ``[columns, columns]``: correlated inputs of which some are a hundred times as large as others, of full rank."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.logspace(-1, 1, columns, device=device)
    x = torch.randn(SAMPLES, columns, generator=generator).to(device) * scale
    return (x.T @ x / SAMPLES).add_(torch.diag(0.1 * scale.square()))


def measure(name: str, shape: tuple[int, int], device: str) -> dict[str, float]:
    """Seconds, peak bytes and stored bits of one layer."""
    generator = torch.Generator().manual_seed(0)
    weight = (0.02 * torch.randn(shape, generator=generator)).to(torch.bfloat16).to(device)
    inputs = LayerInputs(second_moments(shape[1], device)) if name.endswith("Hessian") else None
    clock = time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    quantize_weight(weight[:256], CONFIGS[name])  # what is compiled at the first call, once on a machine
    with PeakMemory() as memory:
        start = clock()
        found = quantize_weight(weight, CONFIGS[name], inputs=inputs)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = clock() - start
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else memory.peak
    return {"seconds": seconds, "peak": peak, "bits": found.spec.bits_per_weight(shape)}


def row(name: str, device: str, threads: int) -> dict[str, object]:
    """The whole model with one config, measured in a process of its own."""
    cores = {"OMP_NUM_THREADS": str(threads), "NUMBA_NUM_THREADS": str(threads)} if device == "cpu" else {}
    command = [sys.executable, __file__, "--device", device, "--one", name]
    out = subprocess.run(command, capture_output=True, text=True, env=os.environ | cores)
    if out.returncode:
        raise SystemExit(out.stderr)
    found = {tuple(shape): facts for shape, facts in json.loads(out.stdout.splitlines()[-1])}
    total = sum(found[shape]["seconds"] * count for shape, count in SHAPES.items())
    bits = sum(f["bits"] * s[0] * s[1] * SHAPES[s] for s, f in found.items()) / WEIGHTS
    peak = max(f["peak"] for f in found.values())
    times = {"rate": total / WEIGHTS * 1e9, "minutes": total / 60} if threads == 1 else {"minutes_on_all": total / 60}
    layers = {f"{rows}x{columns}": facts for (rows, columns), facts in found.items()}
    memory = {"peak": peak / 1e9, "model": (bits / 8 * WEIGHTS + peak) / 1e9, "layers": layers} if threads == 1 else {}
    return {"config": name, "bits": bits, **times, **memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=1, help="cores to use; more than one adds a column to earlier results")
    parser.add_argument("--only", action="append", help="a config's name; the earlier results of others are kept")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps([(shape, measure(args.one, shape, args.device)) for shape in SHAPES]))
        return
    name = f"quantize_12b_{args.device}"
    path = RESULTS / f"{name}.json"
    earlier = json.loads(path.read_text())["rows"] if (args.only or args.threads > 1) and path.is_file() else []
    kept = {found["config"]: found for found in earlier}
    for config in args.only or CONFIGS:
        kept[config] = kept.get(config, {}) | row(config, args.device, args.threads)
        _write(name, [kept[known] for known in CONFIGS if known in kept])


def _write(name: str, rows: list[dict[str, object]]) -> None:
    columns = [("config", "config", ""), ("bits", "stored bits", ".2f"), ("rate", "s per billion weights", ".0f")]
    columns += [("minutes", "minutes for FLUX.1, one core", ".0f"), ("minutes_on_all", "all cores", ".0f")]
    columns += [("peak", "peak of a layer, GB", ".2f"), ("model", "with the packed model, GB", ".1f")]
    write(name, rows, columns, weights=WEIGHTS)


if __name__ == "__main__":
    main()
