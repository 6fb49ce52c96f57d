"""Tiny models of real architectures, each with inputs for one forward pass. Random weights, milliseconds to build and run.

Every linear layer is at least 32 wide, so that groups, vectors and rotations have something to work on.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    WanTransformer3DModel,
)
from torch import nn

Inputs = dict[str, Any]


def flux() -> nn.Module:
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )


def flux_inputs() -> Inputs:
    return {
        "hidden_states": torch.randn(1, 16, 4),
        "encoder_hidden_states": torch.randn(1, 8, 32),
        "pooled_projections": torch.randn(1, 32),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(8, 3),
    }


def sd3() -> nn.Module:
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=32,
        out_channels=4,
        pos_embed_max_size=8,
    )


def sd3_inputs() -> Inputs:
    return {
        "hidden_states": torch.randn(1, 4, 8, 8),
        "encoder_hidden_states": torch.randn(1, 6, 32),
        "pooled_projections": torch.randn(1, 32),
        "timestep": torch.tensor([500]),
    }


def dit() -> nn.Module:
    return DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
    )


def dit_inputs() -> Inputs:
    return {"hidden_states": torch.randn(2, 4, 8, 8), "timestep": torch.tensor([5, 500]), "class_labels": torch.tensor([1, 2])}


def pixart() -> nn.Module:
    return PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        cross_attention_dim=32,
        caption_channels=32,
        use_additional_conditions=False,
    )


def pixart_inputs() -> Inputs:
    return {
        "hidden_states": torch.randn(1, 4, 8, 8),
        "encoder_hidden_states": torch.randn(1, 6, 32),
        "timestep": torch.tensor([500]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def sdxl_unet() -> nn.Module:
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 1),
        projection_class_embeddings_input_dim=80,
        cross_attention_dim=32,
        norm_num_groups=8,
    )


def sdxl_unet_inputs() -> Inputs:
    return {
        "sample": torch.randn(1, 4, 8, 8),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": torch.randn(1, 6, 32),
        "added_cond_kwargs": {"text_embeds": torch.randn(1, 32), "time_ids": torch.ones(1, 6)},
    }


def wan() -> nn.Module:
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=24,
        in_channels=4,
        out_channels=4,
        text_dim=32,
        freq_dim=32,
        ffn_dim=64,
        num_layers=2,
        rope_max_seq_len=32,
    )


def wan_inputs() -> Inputs:
    return {
        "hidden_states": torch.randn(1, 4, 2, 8, 8),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 6, 32),
    }


def vae() -> nn.Module:
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(32, 32),
        latent_channels=4,
        norm_num_groups=8,
        sample_size=16,
    )


def vae_inputs() -> Inputs:
    return {"sample": torch.randn(1, 3, 16, 16)}


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Inputs]]] = {
    "flux": (flux, flux_inputs),
    "sd3": (sd3, sd3_inputs),
    "dit": (dit, dit_inputs),
    "pixart": (pixart, pixart_inputs),
    "sdxl_unet": (sdxl_unet, sdxl_unet_inputs),
    "wan": (wan, wan_inputs),
    "vae": (vae, vae_inputs),
}


def make(name: str, seed: int = 0) -> nn.Module:
    """A tiny model in evaluation mode. Zero-initialised layers are filled, so that every layer has a say in the output."""
    torch.manual_seed(seed)
    model = MODELS[name][0]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
    return model


@functools.cache
def fixed_inputs(name: str) -> dict[str, Any]:
    """The inputs, drawn once: the generator belongs to the process, so that threads that draw at once disturb each other."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return MODELS[name][1]()


def run(model: nn.Module, name: str) -> torch.Tensor:
    """One forward pass on the model's fixed inputs, cast to its dtype."""

    def cast(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: cast(item) for key, item in value.items()}
        if isinstance(value, torch.Tensor):
            return value.to(model.dtype if value.is_floating_point() else value.dtype, copy=True)
        return value

    with torch.no_grad():
        return model(**cast(fixed_inputs(name)), return_dict=False)[0]
