"""diffusers' config.json for a model that ComfyUI has loaded, from the shapes of its tensors."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from .families import Family, Shape

Shapes = dict[str, Shape]


def diffusers_settings(family: Family, shapes: Shapes, model_config: Any) -> dict[str, Any] | None:
    """``_class_name`` and the arguments of the class; ``None`` for a family whose arguments cannot be told from shapes yet.

    Args:
        shapes: shapes of the tensors under diffusers' names.
        model_config: ComfyUI's config of the model.
    """
    find = FINDERS.get(family.name)
    return {"_class_name": family.classes[0]} | find(shapes, model_config) if find else None


def _count(shapes: Shapes, prefix: str) -> int:
    """How many numbered children ``prefix`` has."""
    numbers = [int(m[1]) for key in shapes if (m := re.match(rf"{prefix}\.(\d+)\.", key))]
    return max(numbers, default=-1) + 1


def _flux(shapes: Shapes, config: Any) -> dict[str, Any]:
    axes = tuple(config.unet_config["axes_dim"])
    return {
        "in_channels": shapes["x_embedder.weight"][1],
        "out_channels": shapes["proj_out.weight"][0],
        "patch_size": 1,
        "num_layers": _count(shapes, "transformer_blocks"),
        "num_single_layers": _count(shapes, "single_transformer_blocks"),
        "attention_head_dim": sum(axes),
        "num_attention_heads": shapes["x_embedder.weight"][0] // sum(axes),
        "joint_attention_dim": shapes["context_embedder.weight"][1],
        "pooled_projection_dim": shapes["time_text_embed.text_embedder.linear_1.weight"][1],
        "guidance_embeds": "time_text_embed.guidance_embedder.linear_1.weight" in shapes,
        "axes_dims_rope": axes,
    }


def _flux2(shapes: Shapes, config: Any) -> dict[str, Any]:
    axes = tuple(config.unet_config["axes_dim"])
    return {
        "in_channels": shapes["x_embedder.weight"][1],
        "num_layers": _count(shapes, "transformer_blocks"),
        "num_single_layers": _count(shapes, "single_transformer_blocks"),
        "attention_head_dim": sum(axes),
        "num_attention_heads": shapes["x_embedder.weight"][0] // sum(axes),
        "joint_attention_dim": shapes["context_embedder.weight"][1],
        "guidance_embeds": "time_guidance_embed.guidance_embedder.linear_1.weight" in shapes,
        "axes_dims_rope": axes,
    }


def _sd3(shapes: Shapes, config: Any) -> dict[str, Any]:
    width, channels, patch, _ = shapes["pos_embed.proj.weight"]
    size = round(shapes["pos_embed.pos_embed"][1] ** 0.5)
    dual = [i for i in range(_count(shapes, "transformer_blocks")) if f"transformer_blocks.{i}.attn2.to_q.weight" in shapes]
    return {
        "sample_size": size * patch // 2 if size > 128 else size,
        "patch_size": patch,
        "in_channels": channels,
        "out_channels": shapes["proj_out.weight"][0] // patch**2,
        "num_layers": _count(shapes, "transformer_blocks"),
        "attention_head_dim": 64,
        "num_attention_heads": width // 64,
        "joint_attention_dim": shapes["context_embedder.weight"][1],
        "caption_projection_dim": shapes["context_embedder.weight"][0],
        "pooled_projection_dim": shapes["time_text_embed.text_embedder.linear_1.weight"][1],
        "pos_embed_max_size": size,
        "dual_attention_layers": dual,
        "qk_norm": "rms_norm" if "transformer_blocks.0.attn.norm_q.weight" in shapes else None,
    }


def _unet(shapes: Shapes, config: Any) -> dict[str, Any]:
    levels = range(_count(shapes, "down_blocks"))
    crossed = [f"down_blocks.{i}.attentions.0.proj_in.weight" in shapes for i in levels]
    widths = [shapes[f"down_blocks.{i}.resnets.0.conv1.weight"][0] for i in levels]
    depths = [max(1, _count(shapes, rf"down_blocks\.{i}\.attentions\.0\.transformer_blocks")) for i in levels]
    heads, head_dim = config.unet_config.get("num_heads", -1), config.unet_config.get("num_head_channels", -1)
    context = next(shapes[key][1] for key in shapes if key.endswith("attn2.to_k.weight"))
    extra = shapes.get("add_embedding.linear_1.weight")
    out: dict[str, Any] = {
        "sample_size": 64 if extra is None else 128,
        "in_channels": shapes["conv_in.weight"][1],
        "out_channels": shapes["conv_out.weight"][0],
        "block_out_channels": widths,
        "layers_per_block": _count(shapes, r"down_blocks\.0\.resnets"),
        "down_block_types": ["CrossAttnDownBlock2D" if c else "DownBlock2D" for c in crossed],
        "up_block_types": ["CrossAttnUpBlock2D" if c else "UpBlock2D" for c in reversed(crossed)],
        "transformer_layers_per_block": depths,
        # What diffusers calls the head dimension is the number of heads.
        "attention_head_dim": [heads if heads > 0 else width // head_dim for width in widths],
        "cross_attention_dim": context,
        "use_linear_projection": len(next(shape for key, shape in shapes.items() if key.endswith("proj_in.weight"))) == 2,
    }
    if disabled := config.unet_config.get("disable_self_attentions"):
        out["only_cross_attention"] = list(disabled)
    if classes := shapes.get("class_embedding.weight"):
        out["num_class_embeds"] = classes[0]
    if vector := shapes.get("class_embedding.linear_1.weight"):
        out |= {"class_embed_type": "projection", "projection_class_embeddings_input_dim": vector[1]}
    if extra is None:
        return out
    embedding = {"addition_embed_type": "text_time", "addition_time_embed_dim": 256}  # as ComfyUI's SDXL has it
    return out | embedding | {"projection_class_embeddings_input_dim": extra[1]}


def _pixart(shapes: Shapes, config: Any) -> dict[str, Any]:
    width, channels, patch, _ = shapes["pos_embed.proj.weight"]
    heads = config.unet_config["num_heads"]
    return {
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "in_channels": channels,
        "out_channels": shapes["proj_out.weight"][0] // patch**2,
        "num_layers": _count(shapes, "transformer_blocks"),
        "cross_attention_dim": width,
        "caption_channels": shapes["caption_projection.linear_1.weight"][1],
        "sample_size": 64 * config.unet_config.get("pe_interpolation", 2),
        "interpolation_scale": config.unet_config.get("pe_interpolation", 2),
        "use_additional_conditions": "adaln_single.emb.resolution_embedder.linear_1.weight" in shapes,
    }


def _wan(shapes: Shapes, config: Any) -> dict[str, Any]:
    width, channels = shapes["patch_embedding.weight"][:2]
    image = shapes.get("condition_embedder.image_embedder.norm1.weight")
    return {
        "num_attention_heads": width // 128,
        "attention_head_dim": 128,
        "in_channels": channels,
        "out_channels": shapes["proj_out.weight"][0] // 4,
        "text_dim": shapes["condition_embedder.text_embedder.linear_1.weight"][1],
        "freq_dim": shapes["condition_embedder.time_embedder.linear_1.weight"][1],
        "ffn_dim": shapes["blocks.0.ffn.net.0.proj.weight"][0],
        "num_layers": _count(shapes, "blocks"),
        "image_dim": image[0] if image else None,
        "added_kv_proj_dim": width if image else None,
    }


def _qwen(shapes: Shapes, config: Any) -> dict[str, Any]:
    width, channels = shapes["img_in.weight"]
    return {
        "in_channels": channels,
        "out_channels": shapes["proj_out.weight"][0] // 4,
        "num_layers": _count(shapes, "transformer_blocks"),
        "attention_head_dim": 128,
        "num_attention_heads": width // 128,
        "joint_attention_dim": shapes["txt_in.weight"][1],
    }


FINDERS: dict[str, Callable[[Shapes, Any], dict[str, Any]]] = {
    "Flux.1": _flux,
    "Flux.2": _flux2,
    "Stable Diffusion 3": _sd3,
    "Stable Diffusion UNet": _unet,
    "PixArt": _pixart,
    "Wan": _wan,
    "Qwen-Image": _qwen,
}
