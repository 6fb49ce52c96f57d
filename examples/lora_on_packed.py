"""Adapters on a packed model work as on a dense one: load, scale, switch off, fuse, save.

python examples/lora_on_packed.py QUANTIZED_FOLDER ADAPTER --prompt "a cat" --scale 0.8 --fused-to FOLDER
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline


def draw(pipe: Any, prompt: str, steps: int, size: int) -> Any:
    """From the same noise every time."""
    generator = torch.Generator().manual_seed(0)
    return pipe(prompt, num_inference_steps=steps, height=size, width=size, generator=generator).images[0]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="a quantized pipeline: folder or Hub name")
    parser.add_argument("adapter", help="a LoRA: file, folder or Hub name")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--size", type=int, default=1024, help="pixels")
    parser.add_argument("--output", type=Path, default=Path("lora"), help="folder for the pictures")
    parser.add_argument("--fused-to", type=Path, help="also write the model with the adapter in it")
    args = parser.parse_args(arguments)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = DiffusionPipeline.from_pretrained(args.folder, torch_dtype=torch.bfloat16).to(device)
    pictures = {"without": draw(pipe, args.prompt, args.steps, args.size)}
    pipe.load_lora_weights(args.adapter, adapter_name="mine")
    pipe.set_adapters("mine", args.scale)
    pictures["with"] = draw(pipe, args.prompt, args.steps, args.size)
    pipe.disable_lora()
    pictures["switched-off"] = draw(pipe, args.prompt, args.steps, args.size)  # the first one again, bit for bit
    args.output.mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        picture.save(args.output / f"{name}.png")
    if args.fused_to:
        pipe.enable_lora()
        pipe.fuse_lora()  # the adapter becomes part of the layers' 16-bit low-rank branches; codes and scales stay as they are
        pipe.unload_lora_weights()
        pipe.save_pretrained(args.fused_to)
    print(args.output)


if __name__ == "__main__":
    main()
