"""The pipeline nodes with a text-to-image model that ComfyUI has no class for: what diffusers itself makes of the same prompt."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from comfyui import host
from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel

from qdiff_diffusers import RTNConfig

PROMPT, STEPS, GUIDANCE = "a red fox in the snow", 2, 4.5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny random Sana, saved."""
    torch.manual_seed(0)
    blocks = 6  # which make an image 32 times as large as its latent, as Sana takes for granted
    vae = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=(8,) * blocks,
        decoder_block_out_channels=(8,) * blocks,
        encoder_layers_per_block=(1,) * blocks,
        decoder_layers_per_block=(1,) * blocks,
        encoder_qkv_multiscales=((),) * blocks,
        decoder_qkv_multiscales=((),) * blocks,
    )
    transformer = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=32,
        sample_size=16,
    )
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    text_encoder = transformers.Gemma2Model(transformers.Gemma2Config(vocab_size=32128, **sizes, **heads))
    tokenizer = transformers.T5TokenizerFast.from_pretrained(Path(host.FOLDER) / "comfy" / "text_encoders" / "t5_tokenizer")
    path = tmp_path_factory.mktemp("pipelines") / "sana"
    SanaPipeline(tokenizer, text_encoder, vae, transformer, DPMSolverMultistepScheduler()).save_pretrained(path)
    return path


def generate(pipe, on_step=lambda done, preview: None):
    return host.part("pipeline").generate(pipe, PROMPT, seed=3, steps=STEPS, guidance=GUIDANCE, images=2, on_step=on_step)


def test_a_prompt_gives_what_it_gives_in_diffusers(folder):
    steps = []
    images = generate(
        host.part("pipeline").load_pipeline("sana", folder), lambda done, preview: steps.append((done, preview().size))
    )
    reference = SanaPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    seeds = [torch.Generator().manual_seed(3 + i) for i in range(2)]
    options = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "output_type": "pt"}
    wanted = reference([PROMPT] * 2, generator=seeds, **options).images.movedim(1, -1)
    assert images.shape == wanted.shape and images.shape[0] == 2
    assert torch.equal(images, wanted)
    assert not torch.equal(images[0], images[1])
    assert steps == [(1, (256, 256)), (2, (256, 256))]


def test_its_transformer_can_be_quantized_while_loading(folder):
    pipe = host.part("pipeline").load_pipeline("sana", folder, RTNConfig(bits=4, group_size=16))
    assert len(pipe.transformer.config.quantization_config.layers) >= 10
    images, wanted = generate(pipe), generate(host.part("pipeline").load_pipeline("sana", folder))
    difference = (images - wanted).abs().mean()
    assert 0 < difference < 0.1


def test_an_interrupted_pipeline_runs_again_as_if_nothing_had_been(folder):
    class Interrupted(Exception):
        pass

    def interrupt(done, preview):
        raise Interrupted

    pipe = host.part("pipeline").load_pipeline("sana", folder)
    wanted = generate(pipe)
    with pytest.raises(Interrupted):
        generate(pipe, interrupt)
    assert torch.equal(generate(pipe), wanted)
