"""The tiny models of the families that came after the first fifteen; see tiny_families.py."""

from __future__ import annotations

from functools import partial
from typing import Any
from unittest import mock

import diffusers
import torch
from comfyui.tiny_inputs import CONTEXT, IMAGE, VIDEO, Tiny, noise, patches, positions, unpatches
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from torch import Tensor, nn

KREA2_TEXT = noise(1, 8, 3, 64)  # of three layers of the encoder
IDEOGRAM4_IMAGE = noise(1, 128, 4, 4)
QWEN, BYT5, VISION = noise(1, 8, 64), noise(1, 4, 1472), noise(1, 5, 1152)
COGVIDEOX_VIDEO = noise(1, 16, 4, 8, 8)
ANIMA_TOKENS = torch.arange(1, 7)[None]
COSMOS_TEXT = noise(1, 8, 1024)
VACE = noise(1, 96, 2, 8, 8)
ANIMATE = (noise(1, 36, 2, 8, 8), torch.tensor([700]), noise(1, 512, 4096), noise(1, 257, 1280))
ANIMATE_POSE, ANIMATE_FACE = noise(1, 16, 1, 8, 8), noise(1, 3, 1, 512, 512)
MINIMAX_VIDEO, MINIMAX_AUDIO = noise(1, 24, 2, 4, 4), noise(1, 32, 2, 3)


def krea2_reference(model: nn.Module) -> Tensor:
    ids = torch.cat([torch.zeros(8, 3), positions(4, 4)])
    return unpatches(model(patches(IMAGE), KREA2_TEXT, torch.tensor([0.7]), ids, return_dict=False)[0], 8, 8)


def ideogram4_reference(model: nn.Module) -> Tensor:
    from diffusers.models.transformers.transformer_ideogram4 import LLM_TOKEN_INDICATOR, OUTPUT_IMAGE_INDICATOR

    # A token's channels are its 2x2 pixels first there, and those of the autoencoder first in ComfyUI.
    tokens = IDEOGRAM4_IMAGE.view(1, 32, 4, 16).transpose(1, 2).reshape(1, 128, 16).transpose(1, 2)
    text = torch.arange(8)[:, None].expand(8, 3)
    out = model(
        torch.cat([torch.zeros(1, 8, 128), tokens], 1),
        torch.tensor([0.3]),
        torch.cat([CONTEXT, torch.zeros(1, 16, 64)], 1),
        torch.cat([text, positions(4, 4).long() + 65536])[None],
        torch.ones(1, 24, dtype=torch.long),
        torch.tensor([[LLM_TOKEN_INDICATOR] * 8 + [OUTPUT_IMAGE_INDICATOR] * 16]),
        return_dict=False,
    )[0][:, 8:]
    return -out.transpose(1, 2).view(1, 4, 32, 16).transpose(1, 2).reshape(1, 128, 4, 4)


def longcat_reference(model: nn.Module) -> Tensor:
    text = torch.zeros(8, 3)
    text[:, 1] = text[:, 2] = torch.arange(8)
    image = positions(4, 4)
    out = model(patches(IMAGE), noise(1, 8, 3584), torch.tensor([0.7]), image, text, return_dict=False)[0]
    return unpatches(out, 8, 8)


def hunyuan_video_15_reference(model: nn.Module) -> Tensor:
    return model(
        noise(1, 65, 2, 4, 4),
        torch.tensor([700.0]),
        QWEN,
        torch.ones(1, 8),
        encoder_hidden_states_2=BYT5,
        encoder_attention_mask_2=torch.ones(1, 4),
        image_embeds=VISION,
        return_dict=False,
    )[0]


def kandinsky5_reference(model: nn.Module) -> Tensor:
    channels_last = noise(1, 16, 2, 8, 8).permute(0, 2, 3, 4, 1)
    where = [torch.arange(2), torch.arange(4), torch.arange(4)]
    inputs = (channels_last, CONTEXT, torch.tensor([700.0]), noise(1, 768), where, torch.arange(8), (1.0, 2.0, 2.0))
    with mock.patch("torch.bfloat16", torch.float32):  # to which it rounds whatever it has rotated
        out = model(*inputs, return_dict=False)
    return out.permute(0, 4, 1, 2, 3)


def anima_conditioner() -> nn.Module:
    sizes = {"source_dim": 64, "target_dim": 64, "model_dim": 64, "num_layers": 1, "num_attention_heads": 1}
    return diffusers.AnimaTextConditioner(**sizes)


def anima_reference(model: nn.Module) -> Tensor:
    from comfyui.tiny_families import make

    text = make("anima", "text_conditioner")(CONTEXT, ANIMA_TOKENS)
    return model(VIDEO, torch.tensor([0.7]), text, padding_mask=torch.zeros(1, 1, 8, 8), return_dict=False)[0]


def cogvideox_reference(model: nn.Module) -> Tensor:
    rotations = get_3d_rotary_pos_embed(64, None, (4, 4), 2, grid_type="slice", max_size=(4, 4))
    video = COGVIDEOX_VIDEO.transpose(1, 2)
    return model(video, CONTEXT, torch.tensor([700]), image_rotary_emb=rotations, return_dict=False)[0].transpose(1, 2)


def minimax_h3_reference(model: nn.Module) -> Tensor:
    from comfy.ldm.minimax import model as theirs

    layout = theirs.PackedLayout(8, 2, 4, 4, 3)
    spans = {kind: torch.arange(start, stop) for start, stop, kind in layout.segments}
    tags = torch.cat([torch.full_like(rows, {"text": 1, "audio": 2, "video": 0}[kind]) for kind, rows in spans.items()])
    sigma = torch.tensor(0.7)
    audio_sigma = theirs.time_shift_sigma(sigma, 12.0, 3.0)
    video, audio = model(
        theirs.patchify_video(MINIMAX_VIDEO)[None],
        theirs.pack_audio(MINIMAX_AUDIO)[None],
        CONTEXT,
        torch.stack([1 - sigma, 1 - audio_sigma]),
        (tags == 2).long(),
        tags,
        layout.position_ids.float(),
        spans["video"],
        spans["audio"],
        spans["text"],
        return_dict=False,
    )
    slope = theirs.time_shift_slope(sigma, 12.0, 3.0)
    return -torch.cat([theirs.unpatchify_video(video[0], 2, 2, 2).flatten(), slope * theirs.unpack_audio(audio[0]).flatten()])


def minimax_h3_native(model: nn.Module) -> Tensor:
    out = model([MINIMAX_VIDEO, MINIMAX_AUDIO], torch.tensor([700.0]), CONTEXT)
    return torch.cat([part.flatten() for part in out])


LTX2 = {
    "in_channels": 16,
    "out_channels": 16,
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "cross_attention_dim": 64,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 16,
    "audio_cross_attention_dim": 32,
    "num_layers": 1,
    "caption_channels": 64,
}
GATED = {"gated_attn": True, "audio_gated_attn": True, "cross_attn_mod": True, "audio_cross_attn_mod": True}
LTX23 = LTX2 | GATED | {"rope_type": "split", "use_prompt_embeddings": False}
LTX2_VIDEO, LTX2_AUDIO, LTX2_AUDIO_TEXT = noise(1, 16, 2, 4, 4), noise(1, 8, 5, 16), noise(1, 8, 64, seed=1)


def connectors(**settings: Any) -> nn.Module:
    from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors

    heads = {f"{kind}_connector_num_attention_heads": 1 for kind in ("video", "audio")}
    sizes = {"video_connector_attention_head_dim": 64, "audio_connector_attention_head_dim": settings.pop("audio", 64)}
    return LTX2TextConnectors(caption_channels=64, text_proj_in_factor=2, **heads, **sizes, **settings)


def ltx2_reference(model: nn.Module, audio_text: Tensor) -> Tensor:
    step = torch.tensor([700.0])
    video, audio = model(
        LTX2_VIDEO.flatten(2).transpose(1, 2),
        LTX2_AUDIO.transpose(1, 2).flatten(2),
        CONTEXT,
        audio_text,
        step,
        sigma=step,
        num_frames=2,
        height=4,
        width=4,
        fps=25.0,
        audio_num_frames=5,
        return_dict=False,
    )
    return torch.cat([video.transpose(1, 2).flatten(), audio.unflatten(2, (8, 16)).transpose(1, 2).flatten()])


def ltx2_native(model: nn.Module, audio_text: Tensor) -> Tensor:
    out = model([LTX2_VIDEO, LTX2_AUDIO], torch.tensor([0.7]), torch.cat([CONTEXT, audio_text], -1), frame_rate=25)
    return torch.cat([part.flatten() for part in out])


COSMOS = {
    "num_attention_heads": 1,
    "num_layers": 2,
    "adaln_lora_dim": 32,
    "max_size": (128, 240, 240),
    "rope_scale": (1.0, 4.0, 4.0),
    "extra_pos_embed_type": None,
}
RECENT = {
    "ltx2": Tiny(
        "LTX2VideoTransformer3DModel",
        LTX2,
        lambda m: ltx2_reference(m, LTX2_AUDIO_TEXT),
        lambda m: ltx2_native(m, LTX2_AUDIO_TEXT),
        beside={"connectors": connectors},
    ),
    "ltx23": Tiny(
        "LTX2VideoTransformer3DModel",
        LTX23,
        lambda m: ltx2_reference(m, LTX2_AUDIO_TEXT[..., :32]),
        lambda m: ltx2_native(m, LTX2_AUDIO_TEXT[..., :32]),
        beside={"connectors": partial(connectors, rope_type="split", video_gated_attn=True, audio_gated_attn=True, audio=32)},
    ),
    "krea2": Tiny(
        "Krea2Transformer2DModel",
        {
            "num_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "intermediate_size": 512,
            "text_hidden_dim": 64,
            "num_text_layers": 3,
            "text_num_attention_heads": 1,
            "text_num_key_value_heads": 1,
            "text_intermediate_size": 128,
        },
        krea2_reference,
        lambda m: m(IMAGE, torch.tensor([0.7]), KREA2_TEXT.flatten(2)),
        {"multiplier": 3, "txtheads": 1, "txtkvheads": 1},
    ),
    "ideogram4": Tiny(
        "Ideogram4Transformer2DModel",
        {
            "num_layers": 2,
            "attention_head_dim": 128,
            "num_attention_heads": 1,
            "intermediate_size": 192,
            "adaln_dim": 32,
            "llm_features_dim": 64,
        },
        ideogram4_reference,
        lambda m: m(IDEOGRAM4_IMAGE, torch.tensor([0.7]), CONTEXT),
        {
            "attention_head_dim": 128,
            "num_attention_heads": 1,
            "intermediate_size": 192,
            "adaln_dim": 32,
            "llm_features_dim": 64,
        },
    ),
    "ernie": Tiny(
        "ErnieImageTransformer2DModel",
        {"hidden_size": 128, "num_attention_heads": 1, "num_layers": 2, "ffn_hidden_size": 192, "text_in_dim": 64},
        lambda m: m(noise(1, 128, 4, 4), torch.tensor([700]), CONTEXT, torch.tensor([8]), return_dict=False)[0],
        lambda m: m(noise(1, 128, 4, 4), torch.tensor([700]), CONTEXT),
        {"hidden_size": 128, "num_attention_heads": 1, "num_layers": 2, "ffn_hidden_size": 192, "text_in_dim": 64},
    ),
    "longcat": Tiny(
        "LongCatImageTransformer2DModel",
        {"in_channels": 64, "num_layers": 2, "num_single_layers": 2, "num_attention_heads": 1},
        longcat_reference,
        lambda m: m(IMAGE, torch.tensor([0.7]), noise(1, 8, 3584), None),
    ),
    "joyimage": Tiny(
        "JoyImageEditTransformer3DModel",
        {"hidden_size": 128, "num_attention_heads": 1, "text_dim": 64, "num_layers": 2, "theta": 10000},
        lambda m: m(VIDEO, torch.tensor([700]), CONTEXT, return_dict=False)[0],
        lambda m: m(VIDEO, torch.tensor([700]), CONTEXT),
        {"text_dim": 64},
    ),
    "hunyuan_image": Tiny(
        "HunyuanImageTransformer2DModel",
        {"num_attention_heads": 1, "num_layers": 1, "num_single_layers": 1, "text_embed_dim": 64, "text_embed_2_dim": 1472},
        lambda m: m(
            noise(1, 64, 4, 4),
            torch.tensor([700.0]),
            QWEN,
            torch.ones(1, 8),
            encoder_hidden_states_2=BYT5,
            encoder_attention_mask_2=torch.ones(1, 4),
            return_dict=False,
        )[0],
        lambda m: m(noise(1, 64, 4, 4), torch.tensor([700.0]), QWEN, txt_byt5=BYT5),
    ),
    "hunyuan_video_15": Tiny(
        "HunyuanVideo15Transformer3DModel",
        {
            "num_attention_heads": 1,
            "num_layers": 2,
            "text_embed_dim": 64,
            "text_embed_2_dim": 1472,
            "image_embed_dim": 1152,
        },
        hunyuan_video_15_reference,
        lambda m: m(noise(1, 65, 2, 4, 4), torch.tensor([700.0]), QWEN, txt_byt5=BYT5, clip_fea=VISION),
    ),
    "kandinsky5": Tiny(
        "Kandinsky5Transformer3DModel",
        {
            "in_visual_dim": 16,
            "out_visual_dim": 16,
            "in_text_dim": 64,
            "time_dim": 64,
            "model_dim": 128,
            "ff_dim": 192,
            "num_text_blocks": 1,
            "num_visual_blocks": 2,
        },
        kandinsky5_reference,
        lambda m: m(noise(1, 16, 2, 8, 8), torch.tensor([700.0]), CONTEXT, noise(1, 768)),
        {"in_text_dim": 64, "axes_dims": (16, 24, 24)},
        large_queries=True,
    ),
    "cosmos2": Tiny(
        "CosmosTransformer3DModel",
        COSMOS,
        lambda m: m(VIDEO, torch.tensor([0.7]), COSMOS_TEXT, padding_mask=torch.zeros(1, 1, 8, 8), return_dict=False)[0],
        lambda m: m(VIDEO, torch.tensor([0.7]), COSMOS_TEXT),
        {"num_blocks": 2, "num_heads": 1, "adaln_lora_dim": 32},
    ),
    "anima": Tiny(
        "CosmosTransformer3DModel",
        COSMOS | {"text_embed_dim": 64},
        anima_reference,
        lambda m: m(VIDEO, torch.tensor([0.7]), CONTEXT, t5xxl_ids=ANIMA_TOKENS, t5xxl_weights=torch.ones(1, 6, 1)),
        {"num_blocks": 2, "num_heads": 1, "adaln_lora_dim": 32, "crossattn_emb_channels": 64},
        beside={"text_conditioner": anima_conditioner},
    ),
    "cogvideox": Tiny(
        "CogVideoXTransformer3DModel",
        {
            "num_attention_heads": 2,
            "num_layers": 2,
            "time_embed_dim": 32,
            "text_embed_dim": 64,
            "sample_width": 8,
            "sample_height": 8,
            "sample_frames": 5,
            "max_text_seq_length": 8,
            "patch_size_t": 2,
            "patch_bias": False,
            "use_rotary_positional_embeddings": True,
        },
        cogvideox_reference,
        lambda m: m(COGVIDEOX_VIDEO, torch.tensor([700]), CONTEXT),
        {"sample_width": 8, "sample_height": 8, "sample_frames": 5, "max_text_seq_length": 8},
    ),
    "wan_animate": Tiny(
        "WanAnimateTransformer3DModel",
        {
            "num_attention_heads": 1,
            "ffn_dim": 256,
            "num_layers": 5,
            "text_dim": 4096,
            "added_kv_proj_dim": 128,
            "rope_max_seq_len": 32,
        },
        lambda m: m(*ANIMATE, pose_hidden_states=ANIMATE_POSE, face_pixel_values=ANIMATE_FACE, return_dict=False)[0],
        lambda m: m(
            *ANIMATE[:3],
            clip_fea=ANIMATE[3],
            pose_latents=ANIMATE_POSE,
            face_pixel_values=ANIMATE_FACE,
        ),
    ),
    "wan_vace": Tiny(
        "WanVACETransformer3DModel",
        {
            "num_attention_heads": 1,
            "ffn_dim": 256,
            "num_layers": 2,
            "text_dim": 4096,
            "rope_max_seq_len": 32,
            "vace_layers": [0, 1],
            "vace_in_channels": 96,
        },
        lambda m: m(
            VIDEO,
            torch.tensor([700]),
            noise(1, 8, 4096),
            control_hidden_states=VACE,
            control_hidden_states_scale=torch.ones(2),
            return_dict=False,
        )[0],
        lambda m: m(
            VIDEO, torch.tensor([700]), noise(1, 8, 4096), vace_context=noise(1, 96, 2, 8, 8)[:, None], vace_strength=[1.0]
        ),
    ),
    "minimax_h3": Tiny(
        "MiniMaxH3Transformer3DModel",
        {
            "num_attention_heads": 1,
            "hidden_size": 128,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "ffn_dim": 192,
            "text_dim": 64,
            "time_embed_hidden_dim": 64,
            "time_embed_dim": 32,
        },
        minimax_h3_reference,
        minimax_h3_native,
    ),
}
