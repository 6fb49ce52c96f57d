"""Weight error of every preset against the rate-distortion limit.

    python benchmarks/rate_distortion.py [--real FILE.safetensors]

"Bits over" is the stored bits per weight, everything counted on a 3072 x 3072 layer, minus ``0.5 log2(1 / relative squared
error)``, what a Gaussian source needs for that error. Three kinds of weights: Gaussian; heavy-tailed (Student t with 5 degrees of
freedom, log-normal row scales, six outlier input channels, a rank-8 component); real (2-D weights of a trained checkpoint, by
default the bundled demo transformer's blocks).

Scales are the least-squares ones here (``unbiased=False``). By default a relative error D becomes D / (1 - D) in exchange for
weights that keep their gain, which is 0.06 bits at 2 bits and nothing above 3.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from common import write
from safetensors import safe_open
from torch import Tensor

import qdiff_diffusers
from qdiff_diffusers import AQConfig, FPConfig, QDiffConfig, RTNConfig, SVDQuantConfig, VQConfig
from qdiff_diffusers.methods import quantize_weight

DEMO = Path(qdiff_diffusers.__file__).parent / "demo_model/transformer/diffusion_pytorch_model.safetensors"
REFERENCE_SHAPE = (3072, 3072)
PRESETS: list[tuple[str, QDiffConfig]] = [
    *((f"rtn {b} g64", RTNConfig(bits=b)) for b in (2, 3, 4, 8)),
    *((f"aq {b:g}", AQConfig(bits=b)) for b in (1, 1.5, 2, 3, 4)),
    ("aq 2, effort 0", AQConfig(bits=2, effort=0)),
    *((f"vq {b:g}", VQConfig(bits=b)) for b in (2, 3, 4, 8)),
    ("vq 2, no row scales", VQConfig(bits=2, row_scales=False)),
    ("vq 2, no rotation", VQConfig(bits=2, rotation=False)),
    *((f"fp {b:g}", FPConfig(bits=b)) for b in (3, 4, 5, 6, 8)),
    *((f"fp {b:g} rotated", FPConfig(bits=b, rotation=True)) for b in (3, 4, 8)),
    *((name, FPConfig(weight_format=name)) for name in ("nvfp4", "mxfp4", "mxfp8")),
    *((f"svdquant {b:g}", SVDQuantConfig(bits=b)) for b in (2, 3, 4, 8)),
]


def gaussian(rows: int = 256, columns: int = 3072) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def heavy(rows: int = 256, columns: int = 3072) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    normal = torch.randn(rows, columns, generator=generator)
    chi = torch.randn(5, rows, columns, generator=generator).square().sum(0)
    weight = normal / (chi / 5).sqrt()
    weight *= torch.exp(0.35 * torch.randn(rows, 1, generator=generator))
    weight[:, torch.randperm(columns, generator=generator)[:6]] *= 6
    low_rank = torch.randn(rows, 8, generator=generator) @ torch.randn(8, columns, generator=generator)
    return weight + low_rank * 0.15


def real(path: Path, limit: int = 6) -> Iterator[Tensor]:
    """The ``limit`` largest 2-D weights of a checkpoint, embedding tables left out."""
    with safe_open(path, "pt") as file:
        shapes = {k: file.get_slice(k).get_shape() for k in file.keys() if k.endswith("weight") and "embed" not in k}  # noqa: SIM118
        matrices = sorted((k for k, s in shapes.items() if len(s) == 2), key=lambda k: -math.prod(shapes[k]))
        for name in matrices[:limit]:
            yield file.get_tensor(name).float()


def bits_over(config: QDiffConfig, weights: list[Tensor]) -> tuple[float, float]:
    """(stored bits on the last weight's reference layer, mean bits over the limit).

    Codebooks, scales and codes are counted on the reference layer. A low-rank branch is fitted to the layer at hand, so with
    one everything is counted on that.
    """
    over, stored = [], 0.0
    for weight in weights:
        spec, _, error = quantize_weight(weight, config)
        stored = spec.bits_per_weight(tuple(weight.shape) if spec.rank else REFERENCE_SHAPE)
        over.append(stored - 0.5 * math.log2(1 / error))
    return stored, sum(over) / len(over)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", type=Path, default=DEMO, help="safetensors file whose 2-D weights make the third column")
    args = parser.parse_args()
    sources = {"gaussian": [gaussian()], "heavy": [heavy()], "real": list(real(args.real))}
    rows = []
    for config in {type(config): config for _, config in PRESETS}.values():
        bits_over(config, sources["gaussian"])  # the first call of a method imports and compiles
    for name, preset in PRESETS:
        config = replace(preset, unbiased=False)
        row: dict[str, object] = {"preset": name}
        for source, weights in sources.items():
            start = time.perf_counter()
            row["bits"], row[source] = bits_over(config, weights)
            if source == "gaussian":
                row["speed"] = weights[0].numel() / 1e6 / (time.perf_counter() - start)
        rows.append(row)
        print(row, flush=True)
    columns = [("preset", "preset", ""), ("bits", "stored bits", ".3f"), ("gaussian", "Gaussian", ".2f")]
    columns += [("heavy", "heavy-tailed", ".2f"), ("real", "real", ".2f"), ("speed", "Mweights/s", ".1f")]
    write("rate_distortion", rows, columns, real=args.real.name)


if __name__ == "__main__":
    main()
