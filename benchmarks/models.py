"""Speed of whole models, ours and every installed peer, at the settings of the README's figures.

    pip install -r benchmarks/requirements.txt
    python benchmarks/models.py [any option of qdiff bench models]

Writes results/models_cpu.{json,md}, or results/models_cuda.{json,md} where there is a GPU.
"""

from __future__ import annotations

import sys

import torch
from common import RESULTS

from qdiff_diffusers.cli import main

OURS = "qdiff-aq2,qdiff-aq2-a8,qdiff-vq2-a8,qdiff-aq4-a8,qdiff-fp4,qdiff-fp4-a8,qdiff-int4-a8,qdiff-int8-a8,qdiff-svd4-a8"
PEERS = (
    "torchao-int8,torchao-int8-a8-compile,torchao-int4,bitsandbytes-nf4,gguf-Q4_0,"
    "sdnq-int8-a8,sdnq-int4,sdnq-uint4,sdnq-uint4-svd,orbitquant-w4a4"
)
CPU = ["--model", "dit-xl-2", "--only", f"torch,{OURS},{PEERS}", "--budget", "5"]
GPU = ["--model", "dit-xl-2", "--model", "flux", "--model", "sdxl-unet", "--budget", "2"]

if __name__ == "__main__":
    settings = GPU if torch.cuda.is_available() else CPU
    main(["bench", "models", *settings, "--output", str(RESULTS), *sys.argv[1:]])
