"""What becomes of a short tuning when its choices are made hard: all in the end, or a few at a time (docs/calibration.md).

    python benchmarks/settling.py      # benchmarks/results/settling.{json,md}

One block of the bundled transformer, block-wise, 100 steps. "soft" is the mean loss of the last 50 steps, "hard" that of what is
stored, on a sample of calls; were it not below the loss before, nothing would be kept.
"""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import write

import qdiff_diffusers
from qdiff_diffusers import Calibration, FPConfig, QDiffConfig, Tuning, VQConfig
from qdiff_diffusers.calibration import trainable
from qdiff_diffusers.evaluation.build import quiet_diffusers
from qdiff_diffusers.evaluation.subject import BUNDLED

STEPS = 100
OTHERS = [f"transformer_blocks.{i}." for i in (0, 1, 3, 4, 5)]
VQ = VQConfig(bits=2, codebook="layer", rotation=False, row_scales=False, modules_to_not_convert=OTHERS)
FP = FPConfig(bits=4, weight_format="exmy", group_size="tensor", scale_search="grid", unbiased=False, modules_to_not_convert=OTHERS)
CASES: list[tuple[str, QDiffConfig, dict[str, Any]]] = [
    ("VQ4DiT 2 bit, n=2", VQ, {"assignments": "candidates", "candidates": 2, "code_lr": 0.05}),
    ("VQ4DiT 2 bit, n=2, no regulariser", VQ, {"assignments": "candidates", "candidates": 2, "code_lr": 0.05, "regularizer": 0.0}),
    ("VQ4DiT 2 bit, n=2, slower", VQ, {"assignments": "candidates", "candidates": 2, "code_lr": 0.02}),
    ("VQ4DiT 2 bit, n=3, slower", VQ, {"assignments": "candidates", "candidates": 3, "code_lr": 0.02}),
    ("FP4, learned rounding", FP, {"assignments": "rounding"}),
    ("FP4, learned rounding, faster", FP, {"assignments": "rounding", "code_lr": 0.05}),
]


def measure(config: QDiffConfig, settings: dict[str, Any], settled_by: float, recordings: str) -> dict[str, Any]:
    """The losses of one tuning."""
    tuning = Tuning(steps=STEPS, objective="blocks", dense=False, **settings)
    calibration = Calibration(
        class_labels=range(10), samples=20, batch_size=10, guidance_scale=2.0, hessian=False, recordings=recordings, tuning=tuning
    )
    before, trainable.SETTLED_BY = trainable.SETTLED_BY, settled_by
    try:
        with tempfile.TemporaryDirectory() as folder, quiet_diffusers():
            out = Path(folder) / "out"
            qdiff_diffusers.quantize(
                str(BUNDLED["dit"]), config, out, calibration=calibration, components=["transformer"], dtype=torch.float32
            )
            log = [e for e in json.loads((out / "transformer" / "calibration.json").read_text()) if "block" in e]
    finally:
        trainable.SETTLED_BY = before
    return {"before": log[-1]["loss_before"], "soft": log[-2]["loss"], "hard": log[-1]["loss_after"]}


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as recordings:
        for name, config, settings in CASES:
            row: dict[str, Any] = {"name": name}
            for key, share in (("end", math.inf), ("settling", trainable.SETTLED_BY)):
                found = measure(config, settings, share, recordings)
                row |= {"before": found["before"], f"soft {key}": found["soft"], f"hard {key}": found["hard"]}
            rows.append(row)
            print(row, flush=True)
    columns = [("name", f"{STEPS} steps", ""), ("before", "before", ".5f")]
    columns += [("soft end", "all in the end: soft", ".5f"), ("hard end", "hard", ".5f")]
    columns += [("soft settling", "a few at a time: soft", ".5f"), ("hard settling", "hard", ".5f")]
    write("settling", rows, columns, steps=STEPS)


if __name__ == "__main__":
    main()
