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
from qdiff_diffusers.calibration.allocation import sensitivities
from qdiff_diffusers.calibration.store import Store
from qdiff_diffusers.calibration.trajectories import record
from qdiff_diffusers.evaluation.subject import BUNDLED
from qdiff_diffusers.model.bit_allocation import kind_of, width_of
from qdiff_diffusers.model.selection import select_layers

SAMPLES, GUIDANCE = 10, 2.0


def measure(name: str) -> dict[tuple[str, int], list[float]]:
    """Sensitivities of a bundled model's layers, per weight, relative to the mean over all weights; by kind and width."""
    pipe = DiffusionPipeline.from_pretrained(str(BUNDLED[name]), dtype=torch.float32)
    model = pipe.transformer.eval()
    calibration = Calibration(class_labels=range(10), samples=SAMPLES, batch_size=SAMPLES, guidance_scale=GUIDANCE, timesteps=4)
    with tempfile.TemporaryDirectory() as folder:
        calls = Store(Path(folder), calibration.memory_limit, False)
        record(pipe, {"transformer": model}, calibration, {"transformer": calls})
        targets, _ = select_layers(model, AQConfig(bits=2, effort=0), [])
        losses = sensitivities(model, targets, calls, GUIDANCE)
    shapes = {layer: tuple(model.get_submodule(layer).weight.shape) for layer in losses}
    mean = sum(losses.values()) / sum(map(math.prod, shapes.values()))
    grouped: dict[tuple[str, int], list[float]] = defaultdict(list)
    for layer, loss in losses.items():
        grouped[kind_of(layer), width_of(shapes[layer])].append(max(loss / math.prod(shapes[layer]) / mean, 1e-9))
    return grouped


def main() -> None:
    rows: list[dict[str, Any]] = []
    for model in BUNDLED:
        for (kind, width), values in sorted(measure(model).items()):
            typical = math.exp(sum(map(math.log, values)) / len(values))
            row = {"model": model, "kind": kind, "width": width, "layers": len(values), "typical": typical}
            rows.append(row | {"least": min(values), "most": max(values)})
    columns = [("model", "model", ""), ("kind", "kind", ""), ("width", "channels", "d"), ("layers", "layers", "d")]
    columns += [("typical", "sensitivity (geometric mean)", ".3g"), ("least", "least", ".3g"), ("most", "most", ".3g")]
    write("sensitivity", rows, columns)


if __name__ == "__main__":
    main()
