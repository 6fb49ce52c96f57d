"""Quantize a pipeline for what its layers see on your prompts (or classes), and measure what that was worth.

    python examples/calibrate_your_own.py MODEL OUT --prompts prompts.txt --bits 2
    python examples/calibrate_your_own.py qdiff_diffusers/demo_model OUT --classes 0-9 --bits 2 --minutes 5     # needs no download

No training data is needed. Interrupted, the same command goes on where it was.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch

import qdiff_diffusers as qd


def classes(text: str) -> list[int]:
    """``0-9`` or ``1,4,7``."""
    first, dash, last = text.partition("-")
    return list(range(int(first), int(last) + 1)) if dash else [int(part) for part in text.split(",")]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub name of a pipeline")
    parser.add_argument("output", type=Path)
    seen = parser.add_mutually_exclusive_group(required=True)
    seen.add_argument("--prompts", type=Path, help="a text file with one prompt a line")
    seen.add_argument("--classes", type=classes, help="class labels, such as 0-9")
    parser.add_argument("--bits", type=float, default=2)
    parser.add_argument("--samples", type=int, default=16, help="trajectories to record: more is better than more steps")
    parser.add_argument("--steps", type=int, default=20, help="of each trajectory")
    parser.add_argument("--guidance", type=float, help="the guidance scale that you draw with")
    parser.add_argument("--minutes", type=float, help="tune all layers together for so long")
    args = parser.parse_args(arguments)

    calibration = qd.Calibration(
        prompts=args.prompts.read_text().splitlines() if args.prompts else None,
        class_labels=args.classes,
        samples=args.samples,
        steps=args.steps,
        guidance_scale=args.guidance,
        mixed=True,  # bits go where they lower the model's loss most
        tuning=qd.Tuning(minutes=args.minutes) if args.minutes else None,
    )
    bits = int(args.bits) if args.bits == int(args.bits) else args.bits
    folder = qd.quantize(args.model, qd.AQConfig(bits=bits), args.output, calibration=calibration, dtype=torch.bfloat16)

    for log in sorted(folder.glob("*/calibration.json")):
        layers = [entry for entry in json.loads(log.read_text()) if entry.get("output_errors")]
        gains = sorted(entry["output_errors"][0] / max(entry["output_errors"][-1], 1e-30) for entry in layers)
        info = qd.inspect_checkpoint(log.parent)
        print(f"{log.parent.name}: {info.bits_per_weight:.2f} bits; {len(layers)} layers, the error of whose outputs fell", end=" ")
        print(f"{gains[len(gains) // 2]:.1f} times (median)")


if __name__ == "__main__":
    main()
