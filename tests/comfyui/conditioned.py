"""What stands around the tiny model of a family in a graph: real text encoders, empty latent and VAE, with tiny weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from comfyui import host, tiny_encoders, tiny_families
from comfyui.server import node
from torch import Tensor, nn

PROMPT = "a red fox in the snow"
Graph = dict[str, dict[str, Any]]


class Conditioned(NamedTuple):
    """``encoders`` by their names in ENCODERS, ``type`` as the loader calls it, ``latent`` the node that makes an empty one."""

    type: str
    encoders: tuple[str, ...]
    latent: str
    vae: str
    reference: Callable[..., tuple[Tensor, Tensor | None]]


def clip_node(family: str) -> dict[str, Any]:
    """The loader of a family's text encoders, in models/qdiff."""
    kind, names = CONDITIONED[family][:2]
    second = f"text/{names[1]}" if len(names) > 1 else "none"
    return node("QDiffLoadCLIP", encoder=f"text/{names[0]}", encoder_2=second, encoder_3="none", type=kind)


def latent_node(family: str, size: int = 64) -> dict[str, Any]:
    kind = CONDITIONED[family].latent
    length = {"length": 5} if kind == "EmptyHunyuanLatentVideo" else {}
    return node(kind, width=size, height=size, batch_size=1, **length)


def around(family: str) -> Graph:
    """Nodes "text", "latent" and "vae" of a family."""
    return {
        "clip": clip_node(family),
        "text": node("CLIPTextEncode", clip=["clip", 0], text=PROMPT),
        "latent": latent_node(family),
        "vae": node("VAELoader", vae_name=CONDITIONED[family].vae),
    }


def vaes() -> dict[str, dict[str, Tensor]]:
    """Random weights by the names of their files. ComfyUI hard-codes the sizes of the usual VAE of images; the small one that it
    knows too, TAESD, is as published. Wan's it builds at the width that it finds."""
    import comfy.ldm.wan.vae
    import comfy.taesd.taesd

    scale = {"vae_scale": torch.tensor(1.0), "vae_shift": torch.tensor(0.0)}
    wan = {"z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_scales": [], "dropout": 0.0}
    wan |= {"temperal_downsample": [False, True, True], "dim": 8}
    return {
        "ae.safetensors": _random(comfy.taesd.taesd.TAESD(latent_channels=16)) | scale,
        "sdxl_vae.safetensors": _random(comfy.taesd.taesd.TAESD(latent_channels=4)) | scale,
        "wan_2.1_vae.safetensors": _random(comfy.ldm.wan.vae.WanVAE(**wan)),
    }


def _random(model: nn.Module) -> dict[str, Tensor]:
    torch.manual_seed(0)
    fans = {key: value.shape[1:].numel() or 1 for key, value in model.state_dict().items()}
    return {key: torch.randn(value.shape) * fans[key] ** -0.5 for key, value in model.state_dict().items()}


def _tokenizer(kind: str, folder: str, **options: Any) -> Any:
    return getattr(transformers, kind).from_pretrained(Path(host.FOLDER) / "comfy" / folder, **options)


def _clip_tokenizers() -> dict[str, Any]:
    """CLIP-G pads with zeros."""
    pads = {"tokenizer": "<|endoftext|>", "tokenizer_2": "!"}
    options = {"folder": "sd1_tokenizer", "model_max_length": 77}
    return {name: _tokenizer("CLIPTokenizer", **options, pad_token=pad) for name, pad in pads.items()}


class _Wan:
    """The tokenizer of tokenizer_model(), called as transformers' are."""

    def __call__(self, prompts: list[str], max_length: int, **options: Any) -> Any:
        import sentencepiece

        processor = sentencepiece.SentencePieceProcessor(model_proto=tiny_encoders.tokenizer_model())
        ids = [*processor.encode(prompts[0]), 1]
        padded = torch.tensor([ids + [0] * (max_length - len(ids))])
        return transformers.BatchEncoding(
            {"input_ids": padded, "attention_mask": (torch.arange(max_length) < len(ids)).long()[None]}
        )


def _flux(clip: nn.Module, t5: nn.Module) -> tuple[Tensor, Tensor | None]:
    from diffusers import FluxPipeline

    tokenizers = {
        "tokenizer": _clip_tokenizers()["tokenizer"],
        "tokenizer_2": _tokenizer("T5TokenizerFast", "text_encoders/t5_tokenizer"),
    }
    pipe = FluxPipeline(None, None, text_encoder=clip, text_encoder_2=t5, transformer=None, **tokenizers)
    return pipe.encode_prompt(PROMPT, None, max_sequence_length=256)[:2]  # as many as ComfyUI pads to


def _sd3(clip_l: nn.Module, clip_g: nn.Module) -> tuple[Tensor, Tensor | None]:
    from diffusers import StableDiffusion3Pipeline

    projected = transformers.CLIPTextModelWithProjection(clip_l.config).eval()  # as SD3's files have it
    projected.text_model, projected.text_projection.weight.data = clip_l, torch.eye(64)
    encoders = {"text_encoder": projected, "text_encoder_2": clip_g, "text_encoder_3": None, "tokenizer_3": None}
    pipe = StableDiffusion3Pipeline(tiny_families.make("sd3"), None, None, **encoders, **_clip_tokenizers())
    text, _, pooled, _ = pipe.encode_prompt(PROMPT, None, None, do_classifier_free_guidance=False)
    return text[:, :77], pooled  # zeros follow, in place of the missing T5


def _sdxl(clip_l: nn.Module, clip_g: nn.Module) -> tuple[Tensor, Tensor | None]:
    from diffusers import StableDiffusionXLPipeline

    pipe = StableDiffusionXLPipeline(None, clip_l, clip_g, unet=None, scheduler=None, **_clip_tokenizers())
    text, _, pooled, _ = pipe.encode_prompt(PROMPT, do_classifier_free_guidance=False)
    return text, pooled


def _wan(umt5: nn.Module) -> tuple[Tensor, Tensor | None]:
    from diffusers import WanPipeline

    pipe = WanPipeline(_Wan(), umt5, None, None)
    return pipe.encode_prompt(PROMPT, do_classifier_free_guidance=False, max_sequence_length=512)[0], None


def _qwen(qwen: nn.Module) -> tuple[Tensor, Tensor | None]:
    from diffusers import QwenImagePipeline

    tokenizer = _tokenizer("Qwen2Tokenizer", "text_encoders/qwen25_tokenizer")
    return QwenImagePipeline(None, None, qwen, tokenizer, None).encode_prompt(PROMPT)[0], None


CONDITIONED = {
    "flux": Conditioned("flux", ("clip_l", "t5"), "EmptySD3LatentImage", "ae.safetensors", _flux),
    "sd3": Conditioned("sd3", ("clip_l", "clip_g"), "EmptySD3LatentImage", "ae.safetensors", _sd3),
    "sdxl": Conditioned("sdxl", ("clip_l", "clip_g"), "EmptyLatentImage", "sdxl_vae.safetensors", _sdxl),
    "wan": Conditioned("wan", ("umt5",), "EmptyHunyuanLatentVideo", "wan_2.1_vae.safetensors", _wan),
    "qwen": Conditioned("qwen_image", ("qwen",), "EmptySD3LatentImage", "wan_2.1_vae.safetensors", _qwen),
}
