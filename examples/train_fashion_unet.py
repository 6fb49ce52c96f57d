"""Train the bundled convolutional model on Fashion-MNIST and write it as an ordinary diffusers folder.

    python examples/train_fashion_unet.py --out fashion-unet --minutes 60

diffusers' own ``UNet2DModel`` in pixel space (2.9 M parameters; attention at 16 x 16 and 8 x 8), trained like the DiT of
``train_fashion_dit.py``: v-prediction, cosine noise schedule, class labels dropped at random, moving average of the weights.
``DiTPipeline`` calls its model in a way that fits this one too, so ``DiffusionPipeline.from_pretrained(out)`` loads the result
and draws the classes that are asked for; the model stands in the pipeline's ``transformer``.
"""

from __future__ import annotations

from typing import Any

from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention, AttnProcessor
from diffusers.models.resnet import ResnetBlock2D
from diffusion_training import NULL_LABEL, USED_LABELS, main
from torch import nn

MODEL: dict[str, Any] = {
    "sample_size": 32,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (32, 64, 128),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 64,
    "num_class_embeds": NULL_LABEL + 1,
}


def new_model() -> UNet2DModel:
    """A fresh model. The last layer of each residual branch starts at zero, so that each block starts as the identity."""
    model = UNet2DModel(**MODEL)
    table = model.class_embedding.weight
    nn.init.zeros_(table)
    nn.init.normal_(table.data[USED_LABELS])
    nn.init.zeros_(model.conv_out.weight)
    for module in model.modules():
        if isinstance(module, ResnetBlock2D):
            nn.init.zeros_(module.conv2.weight)
        elif isinstance(module, Attention):
            nn.init.zeros_(module.to_out[0].weight)
            # On a CPU the backward pass of fused attention takes twice the time of plain matrix products.
            module.set_processor(AttnProcessor())
    return model


if __name__ == "__main__":
    main(new_model, __doc__, batch=32)
