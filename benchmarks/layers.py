"""Speed of single layers, ours and every installed peer, at the settings of the README's figures.

    pip install -r benchmarks/requirements.txt
    python benchmarks/layers.py [any option of qdiff bench layers]

Writes results/layers_cpu.{json,md}, or results/layers_cuda.{json,md} where there is a GPU.
"""

from __future__ import annotations

import sys

import torch
from common import RESULTS

from qdiff_diffusers.cli import main

EVERY_TOKENS = "1,2,16,64,256,1024,4096"
CPU = ["--shapes", "3072x3072,1152x1152,1152x4608", "--tokens", EVERY_TOKENS, "--budget", "0.2"]
GPU = ["--shapes", "all", "--tokens", EVERY_TOKENS, "--budget", "0.1"]

if __name__ == "__main__":
    settings = GPU if torch.cuda.is_available() else CPU
    main(["bench", "layers", *settings, "--output", str(RESULTS), *sys.argv[1:]])
