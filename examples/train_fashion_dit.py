"""Train the demo's diffusion transformer on Fashion-MNIST and write it as an ordinary diffusers folder.

    python examples/train_fashion_dit.py --out fashion-dit --minutes 60
    python examples/train_fashion_dit.py --out better --init fashion-dit --lr 5e-4 --minutes 30

diffusers' own ``DiTTransformer2DModel`` in pixel space (8 M parameters, 64 tokens), v-prediction, cosine noise schedule,
class labels dropped at random for classifier-free guidance, exponential moving average of the weights. One hour gives clothes
at 20 DDIM steps even on two CPU cores; a GPU needs minutes. ``DiffusionPipeline.from_pretrained(out)`` loads the result.
"""

from __future__ import annotations

from typing import Any

from diffusers import DiTTransformer2DModel
from diffusion_training import NULL_LABEL, USED_LABELS, main
from torch import nn

MODEL: dict[str, Any] = {
    "sample_size": 32,
    "patch_size": 4,
    "in_channels": 1,
    "out_channels": 1,
    "num_layers": 6,
    "num_attention_heads": 4,
    "attention_head_dim": 64,
    "num_embeds_ada_norm": NULL_LABEL,
    "activation_fn": "gelu-approximate",
    "norm_type": "ada_norm_zero",
}


def new_model() -> DiTTransformer2DModel:
    """A fresh model with the initialisation of the DiT paper (Peebles and Xie 2022, adaLN-Zero)."""
    model = DiTTransformer2DModel(**MODEL)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    for block in model.transformer_blocks:
        embedder = block.norm1.emb
        for linear in (embedder.timestep_embedder.linear_1, embedder.timestep_embedder.linear_2):
            nn.init.normal_(linear.weight, std=0.02)
        table = embedder.class_embedder.embedding_table.weight
        nn.init.zeros_(table)
        nn.init.normal_(table.data[USED_LABELS], std=0.02)
        nn.init.zeros_(block.norm1.linear.weight)
    for linear in (model.proj_out_1, model.proj_out_2):
        nn.init.zeros_(linear.weight)
    return model


if __name__ == "__main__":
    main(new_model, __doc__)
