"""What keeping the gain of packed weights is worth on the demo model: PSNR with ``unbiased`` on and off.

python benchmarks/gain.py
"""

from __future__ import annotations

import torch
from common import write
from diffusers import DiffusionPipeline, PipelineQuantizationConfig

from qdiff_diffusers import FPConfig, QDiffConfig
from qdiff_diffusers.evaluation.demo import DEMO_MODEL
from qdiff_diffusers.evaluation.metrics import psnr
from qdiff_diffusers.evaluation.sampling import image_labels, image_seeds, sample

IMAGES = 10


def images(config: QDiffConfig | None) -> torch.Tensor:
    mapping = {"quantization_config": PipelineQuantizationConfig(quant_mapping={"transformer": config})} if config else {}
    pipe = DiffusionPipeline.from_pretrained(DEMO_MODEL, dtype=torch.float32, **mapping)
    return sample(pipe, image_labels(IMAGES, 10), image_seeds(IMAGES))


def main() -> None:
    reference = images(None)
    rows = []
    for bits in (3, 4):
        quality = {on: psnr(images(FPConfig(bits=bits, unbiased=on)), reference).mean().item() for on in (False, True)}
        rows.append({"preset": f"fp {bits}", "off": quality[False], "on": quality[True]})
    columns = [("preset", "preset", ""), ("off", "least squares, PSNR dB", ".1f"), ("on", "gain kept, PSNR dB", ".1f")]
    write("gain", rows, columns, images=IMAGES)


if __name__ == "__main__":
    main()
