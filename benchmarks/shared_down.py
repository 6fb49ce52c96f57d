"""Whether queries, keys and values should share SVDQuant's down projection, on the bundled diffusion transformer.

    python benchmarks/shared_down.py      # results/shared_down.{json,md}

The authors' program decomposes the three weights, one upon the other, and stores one ``low_rank_down`` for all. Stored once, it
buys half as much rank again at equal bits. Here: the squared error of the three weights, branch and INT4 residual together, over
that of branches of their own.
"""

from __future__ import annotations

import torch
from common import write
from diffusers import DiTTransformer2DModel
from torch import Tensor

from qdiff_diffusers.evaluation.demo import DEMO_MODEL
from qdiff_diffusers.methods.svdquant import quantize, residual_quantizer

RANKS = (2, 4, 8, 16, 32)


def error(weight: Tensor, rank: int) -> float:
    """Squared error of a weight in a branch and INT4 in groups of 64."""
    stored, tensors = quantize(weight, residual_quantize=residual_quantizer(weight_format="int4"), rank=rank)
    branch = tensors["low_rank_up"].float() @ tensors["low_rank_down"].float()
    return float((stored.dequantize(tensors, weight.shape[1]) + branch - weight).square().sum())


def main() -> None:
    model = DiTTransformer2DModel.from_pretrained(DEMO_MODEL / "transformer", torch_dtype=torch.float32)
    weights = [[getattr(b.attn1, n).weight.detach() for n in ("to_q", "to_k", "to_v")] for b in model.transformer_blocks]
    rows = []
    for rank in RANKS:
        own = sum(error(w, rank) for three in weights for w in three)
        rows.append(
            {
                "rank": rank,
                "bits": 16 * rank * 2 / weights[0][0].shape[0],
                "saved": 16 * rank * 2 / 3 / weights[0][0].shape[0],
                "same_rank": sum(error(torch.cat(three), rank) for three in weights) / own,
                "same_bits": sum(error(torch.cat(three), rank * 3 // 2) for three in weights) / own,
            }
        )
    columns = [("rank", "rank of each", ""), ("bits", "bits of the branch", ".2f"), ("saved", "bits saved at the same rank", ".2f")]
    columns += [("same_rank", "error, shared, same rank", ".3f"), ("same_bits", "error, shared, same bits", ".3f")]
    write("shared_down", rows, columns)


if __name__ == "__main__":
    main()
