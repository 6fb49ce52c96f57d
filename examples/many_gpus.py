"""Share a list of prompts (or classes) among the GPUs of a machine: each holds the packed model and draws its part.

    accelerate launch --num_processes 4 examples/many_gpus.py QUANTIZED_FOLDER --prompts prompts.txt
    torchrun --nproc-per-node 2 examples/many_gpus.py QUANTIZED_FOLDER --classes 0,1,2,3      # on a CPU, too

One model over several GPUs is diffusers' own `device_map="balanced"`, and works with packed models. Calibration shares its work
in the same way: start the script that calls `qdiff_diffusers.quantize(..., calibration=...)` with `torchrun`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="a quantized pipeline: folder or Hub name")
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--prompts", type=Path, help="a text file with one prompt a line")
    asked.add_argument("--classes", help="class labels, such as 0,1,2")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--output", type=Path, default=Path("pictures"))
    args = parser.parse_args(arguments)

    wanted = args.prompts.read_text().splitlines() if args.prompts else [int(part) for part in args.classes.split(",")]
    processes = PartialState()  # one process per GPU
    pipe = DiffusionPipeline.from_pretrained(args.folder, torch_dtype=torch.bfloat16).to(processes.device)
    pipe.set_progress_bar_config(disable=not processes.is_main_process)
    args.output.mkdir(parents=True, exist_ok=True)
    with processes.split_between_processes(list(enumerate(wanted))) as mine:
        for number, subject in mine:
            generator = torch.Generator().manual_seed(number)  # the same picture however the list is divided
            settings = {"num_inference_steps": args.steps, "guidance_scale": args.guidance, "generator": generator}
            picture = pipe([subject], **settings).images[0]
            picture.save(args.output / f"{number:04}.png")
    processes.wait_for_everyone()


if __name__ == "__main__":
    main()
