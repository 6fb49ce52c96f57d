"""FLUX.1 for a GPU with 8 GB: quantize once, then draw.

    python examples/quantize_flux.py flux-small                                    # needs the Hub, 40 GB of disk, an hour of CPU
    python examples/quantize_flux.py flux-small --prompt "a lighthouse at dusk"    # a folder that is there is not made again

The transformer (12 B weights) is stored in 3.5 bits, 5.2 GB, the T5 text encoder (4.8 B) in 4.5, 2.7 GB; both are quantized layer
by layer while they load. `enable_model_cpu_offload` keeps one of them at a time on the GPU. More memory? `--bits 4` looks better.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, FluxPipeline, PipelineQuantizationConfig

from qdiff_diffusers import FPConfig, SVDQuantConfig, inspect_checkpoint


def quantize(source: str, folder: Path, bits: int) -> None:
    """Write ``folder``: the pipeline with two quantized components. ``from_pretrained(folder)`` needs no settings."""
    mapping: dict[str, Any] = {"transformer": SVDQuantConfig(bits=bits), "text_encoder_2": FPConfig(bits=4)}
    pipe = FluxPipeline.from_pretrained(
        source, quantization_config=PipelineQuantizationConfig(quant_mapping=mapping), torch_dtype=torch.bfloat16
    )
    pipe.save_pretrained(folder)
    for name in mapping:
        info = inspect_checkpoint(folder / name)
        print(f"{name}: {info.bits_per_weight:.2f} bits per quantized weight")


def draw(folder: Path, prompt: str, steps: int, size: int, output: Path) -> None:
    """One picture."""
    pipe = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16)
    if torch.cuda.is_available():
        pipe.enable_model_cpu_offload()
    generator = torch.Generator().manual_seed(0)
    pipe(prompt, num_inference_steps=steps, height=size, width=size, generator=generator).images[0].save(output)
    print(output)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the quantized pipeline is, or is written")
    parser.add_argument("--source", default="black-forest-labs/FLUX.1-schnell", help="Hub name or folder of the 16-bit pipeline")
    parser.add_argument("--bits", type=int, default=3, help="of the transformer's weights")
    parser.add_argument("--prompt", help="draw this")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--size", type=int, default=1024, help="pixels")
    parser.add_argument("--output", type=Path, default=Path("flux.png"))
    args = parser.parse_args(arguments)
    if not args.folder.exists():
        quantize(args.source, args.folder, args.bits)
    if args.prompt:
        draw(args.folder, args.prompt, args.steps, args.size, args.output)


if __name__ == "__main__":
    main()
