"""The tiny pipelines that are evaluated."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_models
import torch
from diffusers import AutoencoderTiny, DDIMPipeline, DDIMScheduler, DiTPipeline, UNet2DModel


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="session")
def by_class(tmp_path_factory) -> Path:
    """A class-conditional pipeline with a transformer."""
    folder = tmp_path_factory.mktemp("pipelines") / "by-class"
    vae = AutoencoderTiny(
        in_channels=1,
        out_channels=1,
        encoder_block_out_channels=(4, 4),
        decoder_block_out_channels=(4, 4),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    DiTPipeline(tiny_models.make("dit"), vae, DDIMScheduler()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def of_noise(tmp_path_factory) -> Path:
    """An unconditional pipeline with a UNet."""
    folder = tmp_path_factory.mktemp("pipelines") / "of-noise"
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=16,
        in_channels=3,
        out_channels=3,
        block_out_channels=(32, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    )
    DDIMPipeline(unet, DDIMScheduler()).save_pretrained(folder)
    return folder
