"""Time and peak memory of quantizing a DiT-XL/2 while it loads, and of loading it back.

    python benchmarks/quantize_speed.py [--methods fp,svdquant,vq,aq]

The model has DiT-XL/2's real shapes (28 blocks, 1152 wide) and random bf16 weights; each method runs in a process of its own.
Memory is the peak of anonymous plus file-backed resident pages above what the process held before loading.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import torch
from common import RESULTS, write
from diffusers import DiTTransformer2DModel

from qdiff_diffusers import AQConfig, FPConfig, QDiffConfig, RTNConfig, SVDQuantConfig, VQConfig

CONFIGS: dict[str, QDiffConfig] = {
    "rtn": RTNConfig(bits=4),
    "fp": FPConfig(bits=4),
    "svdquant": SVDQuantConfig(weight_format="int4", group_size=64, rank=32),
    "vq": VQConfig(bits=2),
    "aq": AQConfig(bits=2),
}


def make_model(folder: Path, layers: int) -> None:
    """Random weights at DiT-XL/2's shapes, one class-table row instead of a thousand."""
    torch.manual_seed(0)
    model = DiTTransformer2DModel(num_layers=layers, num_attention_heads=16, attention_head_dim=72, num_embeds_ada_norm=1)
    model.to(torch.bfloat16).save_pretrained(folder)


class PeakMemory:
    """Peak resident memory of this process above its level at entry, in bytes, split by who backs the pages."""

    def __enter__(self) -> PeakMemory:
        self.process, self.stop = psutil.Process(), threading.Event()
        self.base, self.peak, self.peak_anonymous = self._now(), 0, 0
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()

    def _now(self) -> tuple[int, int]:
        info = self.process.memory_info()
        return info.rss, info.rss - info.shared

    def _watch(self) -> None:
        while not self.stop.wait(0.01):
            total, anonymous = self._now()
            self.peak = max(self.peak, total - self.base[0])
            self.peak_anonymous = max(self.peak_anonymous, anonymous - self.base[1])


def measure(method: str, folder: Path) -> dict[str, object]:
    """Quantize on load, save, reload; run in a fresh process."""
    config = CONFIGS[method]
    with PeakMemory() as memory:
        start = time.perf_counter()
        model = DiTTransformer2DModel.from_pretrained(folder, quantization_config=config, torch_dtype=torch.bfloat16)
        seconds = time.perf_counter() - start
    layers = model.config.quantization_config.layers
    weights = sum(torch.Size(layer.shape).numel() for layer in layers.values())
    packed = sum(layer.spec.nbytes(layer.shape) for layer in layers.values())
    resident = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    with tempfile.TemporaryDirectory() as saved:
        model.save_pretrained(saved)
        size = sum(f.stat().st_size for f in Path(saved).glob("*.safetensors"))
        before = {k: v for k, v in model.state_dict().items() if k.endswith("codes")}
        start = time.perf_counter()
        again = DiTTransformer2DModel.from_pretrained(saved)
        reload_seconds = time.perf_counter() - start
        exact = all(torch.equal(v, again.state_dict()[k]) for k, v in before.items())
    shard = (folder / "diffusion_pytorch_model.safetensors").stat().st_size
    return {
        "method": method,
        "layer": next(iter(layers.values())).spec.describe(),
        "bits": 8 * packed / weights,
        "weights_m": weights / 1e6,
        "seconds": seconds,
        "speed": weights / 1e6 / seconds,
        "peak_mb": memory.peak / 1e6,
        "peak_anonymous_mb": memory.peak_anonymous / 1e6,
        "peak_ratio": memory.peak / max(size, shard),
        "resident_mb": resident / 1e6,
        "disk_mb": size / 1e6,
        "shard_mb": shard / 1e6,
        "reload_seconds": reload_seconds,
        "exact": exact,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default=",".join(CONFIGS))
    parser.add_argument("--layers", type=int, default=28, help="blocks; fewer for a quick look")
    parser.add_argument("--keep", action="store_true", help="keep the earlier results of other methods")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one[0], Path(args.one[1]))))
        return
    rows = json.loads((RESULTS / "quantize_speed.json").read_text())["rows"] if args.keep else []
    rows = [row for row in rows if row["method"] not in args.methods.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder), args.layers)
        for method in args.methods.split(","):
            command = [sys.executable, __file__, "--one", method, folder]
            out = subprocess.run(command, capture_output=True, text=True)
            if out.returncode:
                raise SystemExit(out.stderr)
            rows.append({"layers": args.layers} | json.loads(out.stdout.splitlines()[-1]))
            print(rows[-1], flush=True)
    columns = [
        ("method", "method", ""),
        ("layers", "blocks", ""),
        ("layer", "format", ""),
        ("bits", "stored bits", ".3f"),
        ("seconds", "seconds", ".1f"),
    ]
    columns += [("speed", "Mweights/s", ".1f"), ("peak_mb", "peak MB", ".0f"), ("peak_ratio", "peak / largest file", ".2f")]
    columns += [("resident_mb", "resident MB", ".0f"), ("disk_mb", "on disk MB", ".0f"), ("reload_seconds", "reload s", ".2f")]
    write("quantize_speed", rows, columns)


if __name__ == "__main__":
    main()
