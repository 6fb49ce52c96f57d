"""What an error in each kind of layer does to the output of the bundled models.

    python benchmarks/sensitivity.py      # benchmarks/results/sensitivity.{json,md}

Each layer in turn is quantized by itself; its share is the model's loss on calls from its own trajectories, over the layer's
relative squared weight error and over its share of the weights. 1 is the mean over all weights of a model.
"""

from __future__ import annotations

import math
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from common import write
from diffusers import DiffusionPipeline

from qdiff_diffusers import AQConfig, Calibration
from qdiff_diffusers.budget import kind_of
from qdiff_diffusers.calibration.allocation import sensitivities
from qdiff_diffusers.calibration.store import Store
from qdiff_diffusers.calibration.trajectories import record
from qdiff_diffusers.evaluation.subject import BUNDLED
from qdiff_diffusers.selection import select_layers

SAMPLES, GUIDANCE = 10, 2.0


def measure(name: str) -> dict[str, float]:
    """Sensitivity of each layer of a bundled model, per weight, relative to the mean over all weights."""
    pipe = DiffusionPipeline.from_pretrained(str(BUNDLED[name]), dtype=torch.float32)
    model = pipe.transformer.eval()
    calibration = Calibration(class_labels=range(10), samples=SAMPLES, batch_size=SAMPLES, guidance_scale=GUIDANCE, timesteps=4)
    with tempfile.TemporaryDirectory() as folder:
        calls = Store(Path(folder), calibration.memory_limit, False)
        record(pipe, {"transformer": model}, calibration, {"transformer": calls})
        targets, _ = select_layers(model, AQConfig(bits=2, effort=0), [])
        losses = sensitivities(model, targets, calls, GUIDANCE)
    sizes = {layer: model.get_submodule(layer).weight.numel() for layer in losses}
    mean = sum(losses.values()) / sum(sizes.values())
    return {layer: loss / sizes[layer] / mean for layer, loss in losses.items()}


def main() -> None:
    kinds: dict[str, dict[str, list[float]]] = {}
    for model in BUNDLED:
        grouped: dict[str, list[float]] = defaultdict(list)
        for layer, value in measure(model).items():
            grouped[kind_of(layer)].append(value)
        kinds[model] = dict(grouped)
    rows: list[dict[str, Any]] = []
    for kind in sorted(set().union(*kinds.values())):
        row: dict[str, Any] = {"kind": kind}
        for model, grouped in kinds.items():
            if values := grouped.get(kind):
                row |= {model: math.exp(sum(map(math.log, values)) / len(values)), f"{model}_layers": len(values)}
                row |= {f"{model}_least": min(values), f"{model}_most": max(values)}
        rows.append(row)
    columns = [("kind", "kind", "")]
    for model in kinds:
        columns += [(f"{model}_layers", f"{model}: layers", "d"), (model, "sensitivity", ".2f")]
        columns += [(f"{model}_least", "least", ".2f"), (f"{model}_most", "most", ".2f")]
    write("sensitivity", rows, columns)


if __name__ == "__main__":
    main()
