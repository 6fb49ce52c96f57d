"""A tiny model of every native family, and one call of it through diffusers and one through ComfyUI's class, on the same inputs."""

from __future__ import annotations

from collections.abc import Callable

import diffusers
import torch
from comfyui.tiny_inputs import CONTEXT, IMAGE, POOLED, VIDEO, Tiny, noise, patches, positions, unpatches
from comfyui.tiny_recent import RECENT
from torch import Tensor, nn

SD3_CONTEXT, SD3_POOLED = noise(1, 8, 4096) / 8, noise(1, 128)  # ComfyUI pads the texts of its CLIPs to this width
XL_CONTEXT, XL_POOLED = noise(1, 6, 128), noise(1, 64)  # two encoders of width 64
NOISE_LEVEL = torch.tensor([20])  # of an upscaler
QWEN_CONTEXT = noise(1, 8, 128)


def flux_reference(model: nn.Module) -> Tensor:
    out = model(
        hidden_states=patches(IMAGE),
        encoder_hidden_states=CONTEXT,
        pooled_projections=POOLED,
        timestep=torch.tensor([0.7]),
        guidance=torch.tensor([3.5]),
        img_ids=positions(4, 4),
        txt_ids=torch.zeros(8, 3),
        return_dict=False,
    )[0]
    return unpatches(out, 8, 8)


def flux2_reference(model: nn.Module) -> Tensor:
    text = torch.zeros(8, 4)
    text[:, 3] = torch.arange(8)
    out = model(
        hidden_states=noise(1, 128, 4, 4).flatten(2).transpose(1, 2),
        encoder_hidden_states=CONTEXT,
        timestep=torch.tensor([0.7]),
        guidance=torch.tensor([3.5]),
        img_ids=positions(4, 4, 4)[None],
        txt_ids=text[None],
        return_dict=False,
    )[0]
    return out.transpose(1, 2).reshape(1, 128, 4, 4)


def chroma_reference(model: nn.Module) -> Tensor:
    out = model(
        hidden_states=patches(IMAGE),
        encoder_hidden_states=CONTEXT,
        timestep=torch.tensor([0.7]),
        img_ids=positions(4, 4),
        txt_ids=torch.zeros(8, 3),
        return_dict=False,
    )[0]
    return unpatches(out, 8, 8)


def unet_reference(model: nn.Module) -> Tensor:
    x, step = noise(1, model.config.in_channels, 8, 8), torch.tensor(500)
    if model.config.addition_embed_type is None:
        labels = None
        if model.config.num_class_embeds:
            labels = NOISE_LEVEL
        elif model.config.class_embed_type:
            labels = noise(1, model.config.projection_class_embeddings_input_dim)
        return model(x, step, noise(1, 6, 32), class_labels=labels, return_dict=False)[0]
    extra = {"text_embeds": XL_POOLED, "time_ids": torch.ones(1, 6)}
    return model(x, step, XL_CONTEXT, added_cond_kwargs=extra, return_dict=False)[0]


def unet_native(channels: int = 4, label: Tensor | None = None) -> Callable[[nn.Module], Tensor]:
    return lambda m: m(noise(1, channels, 8, 8), torch.tensor([500]), context=noise(1, 6, 32), y=label)


def sdxl_native(model: nn.Module) -> Tensor:
    from comfy.ldm.modules.diffusionmodules.util import timestep_embedding

    sizes = timestep_embedding(torch.ones(6), 256).reshape(1, -1)
    x = noise(1, model.in_channels, 8, 8)
    return model(x, torch.tensor([500]), context=XL_CONTEXT, y=torch.cat([XL_POOLED, sizes], 1))


def pixart_reference(model: nn.Module) -> Tensor:
    none = {"resolution": None, "aspect_ratio": None}
    return model(noise(1, 4, 64, 64), noise(1, 6, 32), torch.tensor([500]), none, return_dict=False)[0][:, :4]


def z_image_reference(model: nn.Module) -> Tensor:
    return -model([IMAGE[0][:, None]], torch.tensor([0.25]), [noise(1, 32, 64)[0]], return_dict=False)[0][0][None, :, 0]


def hidream_reference(model: nn.Module) -> Tensor:
    return -model(
        IMAGE,
        timesteps=torch.tensor([700]),
        encoder_hidden_states_t5=noise(1, 4, 64),
        encoder_hidden_states_llama3=noise(1, 1, 4, 64),
        pooled_embeds=POOLED,
        return_dict=False,
    )[0]


def hunyuan_video(channels: int, guided: bool) -> Tiny:
    """Text to video takes 16 channels, and those of an image besides: of the mask too (33), or not (32)."""
    video = noise(1, channels, 2, 8, 8)
    own, native = (torch.tensor([6000.0]), {"guidance": torch.tensor([6.0])}) if guided else (None, {})
    sizes = {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 1, "text_embed_dim": 64}
    return Tiny(
        "HunyuanVideoTransformer3DModel",
        sizes | {"in_channels": channels, "guidance_embeds": guided},
        lambda m: m(video, torch.tensor([700]), CONTEXT, torch.ones(1, 8), noise(1, 768), own, return_dict=False)[0],
        lambda m: m(video, torch.tensor([700.0]), CONTEXT, noise(1, 768), **native),
    )


def ltx_reference(model: nn.Module) -> Tensor:
    x = noise(1, 16, 2, 4, 4)
    out = model(
        x.flatten(2).transpose(1, 2),
        CONTEXT,
        torch.tensor([700]),
        torch.ones(1, 8),
        num_frames=2,
        height=4,
        width=4,
        rope_interpolation_scale=(8 / 25, 32, 32),
        return_dict=False,
    )[0]
    return out.transpose(1, 2).reshape(1, 16, 2, 4, 4)


UNET = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 32,
}

XL = UNET | {
    "attention_head_dim": (1, 1),  # of 64 channels each
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 64 + 6 * 256,
    "cross_attention_dim": 128,
    "norm_num_groups": 32,
}
SD21 = UNET | {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "attention_head_dim": (1, 1),
    "block_out_channels": (64, 64),
    "use_linear_projection": True,
}

TINY = {
    "flux": Tiny(
        "FluxTransformer2DModel",
        {
            "num_layers": 2,
            "num_single_layers": 2,
            "num_attention_heads": 1,
            "joint_attention_dim": 64,
            "pooled_projection_dim": 64,
            "guidance_embeds": True,
        },
        flux_reference,
        lambda m: m(IMAGE, torch.tensor([0.7]), CONTEXT, POOLED, guidance=torch.tensor([3.5])),
    ),
    "flux2": Tiny(
        "Flux2Transformer2DModel",
        {"num_layers": 1, "num_single_layers": 2, "num_attention_heads": 1, "joint_attention_dim": 64},
        flux2_reference,
        lambda m: m(noise(1, 128, 4, 4), torch.tensor([0.7]), CONTEXT, guidance=torch.tensor([3.5])),
    ),
    "chroma": Tiny(
        "ChromaTransformer2DModel",
        {
            "num_attention_heads": 1,  # and all the published layers: ComfyUI counts on them to find the modulations
            "joint_attention_dim": 64,
            "approximator_hidden_dim": 64,
            "approximator_layers": 2,
        },
        chroma_reference,
        lambda m: m(IMAGE, torch.tensor([0.7]), CONTEXT, guidance=torch.tensor([0.0])),
        {"hidden_dim": 64, "n_layers": 2, "out_dim": 128},
    ),
    "sd3": Tiny(
        "SD3Transformer2DModel",
        {
            "num_layers": 2,
            "num_attention_heads": 2,
            "caption_projection_dim": 128,
            "joint_attention_dim": 4096,
            "pooled_projection_dim": 128,
            "sample_size": 16,
            "pos_embed_max_size": 16,
            "out_channels": 16,
            "in_channels": 16,
            "dual_attention_layers": (0,),
            "qk_norm": "rms_norm",
        },
        lambda m: m(IMAGE, SD3_CONTEXT, SD3_POOLED, torch.tensor([700]), return_dict=False)[0],
        lambda m: m(IMAGE, torch.tensor([700]), context=SD3_CONTEXT, y=SD3_POOLED),
    ),
    "sdxl": Tiny("UNet2DConditionModel", XL, unet_reference, sdxl_native),
    "sdxl_pix2pix": Tiny("UNet2DConditionModel", XL | {"in_channels": 8}, unet_reference, sdxl_native),
    "sd15": Tiny("UNet2DConditionModel", UNET | {"attention_head_dim": 8}, unet_reference, unet_native()),
    "sd15_pix2pix": Tiny(
        "UNet2DConditionModel", UNET | {"attention_head_dim": 8, "in_channels": 8}, unet_reference, unet_native(8)
    ),
    "sd21_unclip": Tiny(
        "UNet2DConditionModel",
        SD21 | {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 96},
        unet_reference,
        unet_native(label=noise(1, 96)),
    ),
    "lotus": Tiny(
        "UNet2DConditionModel",
        SD21 | {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 4},
        unet_reference,
        unet_native(label=noise(1, 4)),
    ),
    "x4_upscaler": Tiny(
        "UNet2DConditionModel",
        SD21 | {"attention_head_dim": 8, "in_channels": 7, "num_class_embeds": 1000, "only_cross_attention": [True, False]},
        unet_reference,
        unet_native(7, NOISE_LEVEL),
    ),
    "pixart": Tiny(
        "PixArtTransformer2DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_layers": 2,
            "cross_attention_dim": 32,
            "caption_channels": 32,
            "sample_size": 64,
            "interpolation_scale": 1,
            "use_additional_conditions": False,
        },
        pixart_reference,
        lambda m: m(noise(1, 4, 64, 64), torch.tensor([500]), noise(1, 6, 32)),
        {"hidden_size": 32, "num_heads": 2, "caption_channels": 32, "pe_interpolation": 1},
    ),
    "auraflow": Tiny(
        "AuraFlowTransformer2DModel",
        {
            "num_mmdit_layers": 1,
            "num_single_dit_layers": 1,
            "attention_head_dim": 256,
            "num_attention_heads": 1,
            "joint_attention_dim": 2048,
            "caption_projection_dim": 256,
            "pos_embed_max_size": 64,
        },
        lambda m: m(noise(1, 4, 8, 8), noise(1, 8, 2048), torch.tensor([0.7]), return_dict=False)[0],
        lambda m: m(noise(1, 4, 8, 8), torch.tensor([0.7]), noise(1, 8, 2048)),
        {"dim": 256, "n_heads": 1, "global_conddim": 256},
    ),
    "lumina2": Tiny(
        "Lumina2Transformer2DModel",
        {
            "hidden_size": 192,
            "num_layers": 2,
            "num_refiner_layers": 2,
            "num_attention_heads": 2,
            "num_kv_heads": 1,
            "cap_feat_dim": 64,
            "axes_lens": (32, 32, 32),
        },
        lambda m: -m(IMAGE, torch.tensor([0.25]), CONTEXT, torch.ones(1, 8, dtype=torch.bool), return_dict=False)[0],
        lambda m: m(IMAGE, torch.tensor([0.75]), CONTEXT, num_tokens=8),
        {
            "dim": 192,
            "n_heads": 2,
            "n_kv_heads": 1,
            "axes_dims": [32, 32, 32],
            "axes_lens": [32, 32, 32],
            "rope_theta": 10000.0,
            "ffn_dim_multiplier": 4.0,
        },
        large_queries=True,
    ),
    "z_image": Tiny(
        "ZImageTransformer2DModel",
        {"dim": 256, "n_layers": 2, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 64, "axes_lens": [64, 64, 64]},
        z_image_reference,
        lambda m: m(IMAGE, torch.tensor([0.75]), noise(1, 32, 64), num_tokens=32),
        {
            "n_heads": 2,
            "n_kv_heads": 2,
            "axes_dims": [32, 48, 48],
            "axes_lens": [64, 64, 64],
            "rope_theta": 256.0,
            "ffn_dim_multiplier": 8.0 / 3.0,
            "z_image_modulation": True,
            "time_scale": 1000.0,
            "pad_tokens_multiple": 32,
        },
        large_queries=True,
    ),
    "qwen": Tiny(
        "QwenImageTransformer2DModel",
        {"num_layers": 2, "num_attention_heads": 1, "joint_attention_dim": 128},
        lambda m: unpatches(
            m(
                patches(IMAGE),
                QWEN_CONTEXT,
                torch.ones(1, 8),
                torch.tensor([0.7]),
                img_shapes=[(1, 4, 4)],
                return_dict=False,
            )[0],
            8,
            8,
        )[:, :, None],
        lambda m: m(IMAGE[:, :, None], torch.tensor([0.7]), QWEN_CONTEXT),
        {"num_attention_heads": 1, "joint_attention_dim": 128},
    ),
    "hidream": Tiny(
        "HiDreamImageTransformer2DModel",
        {
            "patch_size": 2,
            "in_channels": 16,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 128,
            "num_attention_heads": 1,
            "caption_channels": [64, 64],
            "text_emb_dim": 64,
            "axes_dims_rope": (64, 32, 32),
            "max_resolution": (8, 8),
            "llama_layers": [0, 0],
        },
        hidream_reference,
        lambda m: m(IMAGE, torch.tensor([700]), POOLED, noise(1, 4, 64), encoder_hidden_states_llama3=noise(1, 1, 4, 64)),
        {
            "num_layers": 1,
            "num_single_layers": 1,
            "num_attention_heads": 1,
            "caption_channels": [64, 64],
            "text_emb_dim": 64,
            "max_resolution": [8, 8],
            "llama_layers": [0, 0],
        },
    ),
    "wan": Tiny(
        "WanTransformer3DModel",
        {"num_attention_heads": 1, "ffn_dim": 256, "num_layers": 2, "text_dim": 4096, "rope_max_seq_len": 32},
        lambda m: m(VIDEO, torch.tensor([700]), noise(1, 8, 4096), return_dict=False)[0],
        lambda m: m(VIDEO, torch.tensor([700]), noise(1, 8, 4096)),
    ),
    "wan_i2v": Tiny(
        "WanTransformer3DModel",
        {
            "num_attention_heads": 1,
            "ffn_dim": 256,
            "num_layers": 2,
            "text_dim": 4096,
            "in_channels": 36,
            "image_dim": 1280,
            "added_kv_proj_dim": 128,
            "rope_max_seq_len": 32,
        },
        lambda m: m(noise(1, 36, 2, 8, 8), torch.tensor([700]), noise(1, 512, 4096), noise(1, 257, 1280), return_dict=False)[0],
        lambda m: m(noise(1, 36, 2, 8, 8), torch.tensor([700]), noise(1, 512, 4096), clip_fea=noise(1, 257, 1280)),
    ),
    "ltx": Tiny(
        "LTXVideoTransformer3DModel",
        {
            "in_channels": 16,
            "out_channels": 16,
            "num_layers": 2,
            "num_attention_heads": 32,
            "attention_head_dim": 8,
            "cross_attention_dim": 256,
            "caption_channels": 64,
        },
        ltx_reference,
        lambda m: m(noise(1, 16, 2, 4, 4), torch.tensor([0.7]), CONTEXT, None),
        {"in_channels": 16, "out_channels": 16, "caption_channels": 64},
    ),
    "hunyuan_video": hunyuan_video(16, True),
    "hunyuan_video_i2v": hunyuan_video(33, False),
    "skyreels_i2v": hunyuan_video(32, True),
    "mochi": Tiny(
        "MochiTransformer3DModel",
        {
            "num_layers": 2,
            "num_attention_heads": 2,
            "attention_head_dim": 48,
            "pooled_projection_dim": 96,
            "text_embed_dim": 64,
            "max_sequence_length": 256,
        },
        lambda m: m(
            noise(1, 12, 2, 8, 8),
            noise(1, 256, 64),
            torch.tensor([250]),
            torch.ones(1, 256, dtype=torch.bool),
            return_dict=False,
        )[0],
        lambda m: -m(noise(1, 12, 2, 8, 8), torch.tensor([0.75]), noise(1, 256, 64), torch.ones(1, 256), num_tokens=256),
        {"depth": 2, "num_heads": 2, "hidden_size_x": 96, "hidden_size_y": 96, "t5_feat_dim": 64},
    ),
    **RECENT,
}


QUERIES = tuple(f"{name}.weight" for name in ("to_q", "to_k", "to_query", "to_key", "attn_qkv"))


def make(name: str, beside: str = "") -> nn.Module:
    """A tiny model whose every weight has a say in the output, or the component beside it with this name."""
    torch.manual_seed(0)
    tiny = TINY[name]
    model = (tiny.beside[beside]() if beside else getattr(diffusers, tiny.diffusers_class)(**tiny.config)).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim > 1:
                # Large queries and keys: the programs normalise some models' with different epsilons.
                parameter.normal_(std=1.0 if key.endswith(QUERIES) and TINY[name].large_queries else 0.05)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model
