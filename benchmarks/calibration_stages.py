"""Where a calibration's time goes: CPU seconds of one thread for each of its stages, on the bundled models.

    python benchmarks/calibration_stages.py                       # a column "after" for this code
    python benchmarks/calibration_stages.py --as before           # the same for other code: run by that checkout's Python

Columns that were measured before stay in ``results/calibration_stages.json``. In a fresh checkout the first fits include some
seconds in which numba compiles its loops; compare columns that were both measured in fresh checkouts, or neither.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, write
from diffusers import DiffusionPipeline

from qdiff_diffusers import Calibration, FPConfig, QDiffConfig, SVDQuantConfig, quantize
from qdiff_diffusers.calibration import layerwise, run
from qdiff_diffusers.calibration.trajectories import call_model
from qdiff_diffusers.evaluation.subject import BUNDLED

CASES: dict[str, tuple[str, QDiffConfig, bool]] = {
    "UNet, SVDQuant INT4 rank 16": ("unet", SVDQuantConfig(bits=4, rank=16), True),
    "UNet, FP8 with static FP8 inputs, no Hessian": (
        "unet",
        FPConfig(bits=8, activations="fp8", activation_scales="static"),
        False,
    ),
    "transformer, SVDQuant INT4 rank 16": ("dit", SVDQuantConfig(bits=4, rank=16), True),
    "transformer, FP8 with static FP8 inputs, no Hessian": (
        "dit",
        FPConfig(bits=8, activations="fp8", activation_scales="static"),
        False,
    ),
}
STAGES = {
    "fingerprints": "digests of the inputs",
    "recording": "trajectories",
    "model": "the model's own calls, again",
    "statistics": "second moments and samples",
    "fits": "fits of the layers",
    "saving": "finished layers to the workspace",
    "rest": "everything else",
    "total": "**together**",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--as", dest="column", choices=("before", "after"), default="after")
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    torch.set_num_threads(1)
    path = RESULTS / "calibration_stages.json"
    known = json.loads(path.read_text())["rows"] if path.is_file() else []
    times = {(row["case"], row["stage"]): row for row in known}
    rows = []
    for case, (subject, config, hessian) in CASES.items():
        found = measure(BUNDLED[subject], config, hessian, args.samples, args.steps)
        for stage, name in STAGES.items():
            row = {"case": case, "stage": name, "before": None, "after": None} | times.get((case, name), {})
            rows.append(row | {args.column: found[stage]})
    columns = [("case", "model, format", ""), ("stage", "stage", ""), ("before", "before", ".1f"), ("after", "after", ".1f")]
    write("calibration_stages", rows, columns, samples=args.samples, steps=args.steps)


def measure(source: Path, config: QDiffConfig, hessian: bool, samples: int, steps: int) -> dict[str, float]:
    """CPU seconds of each stage."""
    spent: dict[str, float] = defaultdict(float)
    pipe = DiffusionPipeline.from_pretrained(str(source), dtype=torch.float32)
    settings: dict[str, Any] = {"class_labels": list(range(10)), "samples": samples, "steps": steps, "batch_size": 10}
    calls: list[Any] = []

    def collecting(collect: Callable[..., Any]) -> Callable[..., Any]:
        def collect_and_compare(model: Any, names: Any, store: Any, *rest: Any, **more: Any) -> Any:
            calls.append((model, store))
            return collect(model, names, store, *rest, **more)

        return collect_and_compare

    originals = [
        (run, "input_facts"),
        (run, "record"),
        (layerwise, "collect"),
        (layerwise, "quantize_weight"),
        (layerwise, "_write"),
    ]
    stages = ("fingerprints", "recording", "statistics", "fits", "saving")
    kept = [getattr(module, name) for module, name in originals]
    try:
        for (module, name), stage, function in zip(originals, stages, kept, strict=True):
            setattr(module, name, timed(collecting(function) if name == "collect" else function, spent, stage))
        with tempfile.TemporaryDirectory() as folder:
            start = time.process_time()
            calibration = Calibration(**settings, guidance_scale=2.0, hessian=hessian, workspace=Path(folder) / "work")
            quantize(pipe, config, calibration=calibration)
            spent["total"] = time.process_time() - start
    finally:
        for (module, name), function in zip(originals, kept, strict=True):
            setattr(module, name, function)
    dense = DiffusionPipeline.from_pretrained(str(source), dtype=torch.float32).transformer
    start = time.process_time()
    with torch.no_grad():
        for _, store in calls:
            for call in store:
                call_model(dense, call["inputs"])
    spent["model"] = time.process_time() - start
    spent["statistics"] -= spent["model"]
    spent["rest"] = spent["total"] - sum(spent[stage] for stage in STAGES if stage not in ("total", "rest"))
    return {stage: round(spent[stage], 2) for stage in STAGES}


def timed(function: Callable[..., Any], spent: dict[str, float], stage: str) -> Callable[..., Any]:
    """``function``, whose CPU seconds are added to ``spent[stage]``."""

    def run_timed(*args: Any, **kwargs: Any) -> Any:
        start = time.process_time()
        try:
            return function(*args, **kwargs)
        finally:
            spent[stage] += time.process_time() - start

    return run_timed


if __name__ == "__main__":
    main()
