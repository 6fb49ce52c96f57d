"""Tiny text encoders, and one call of each through transformers and through ComfyUI's class, on the same tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from torch import Tensor, nn

TOKENS = torch.tensor([[5, 9, 33, 60, 2, 7, 1]])
CLIP_TOKENS = torch.cat([TOKENS, torch.full((1, 70), 49407)], 1)  # always 77


class Encoder(NamedTuple):
    """``type``: of ComfyUI's text encoders."""

    type: str
    make: Callable[[], nn.Module]
    reference: Callable[[nn.Module], Tensor]
    native: Callable[[nn.Module], Tensor]


# Vocabularies are the published ones, for ComfyUI's own tokenizers; widths are those that the tiny diffusion models take.
CLIP = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 3,  # the last but one is taken
    "num_attention_heads": 2,
    "max_position_embeddings": 77,
    "vocab_size": 49408,
    "projection_dim": 64,
    "hidden_act": "quick_gelu",
    "eos_token_id": 49407,
}
CLIP_G = CLIP | {"num_hidden_layers": 32, "hidden_act": "gelu", "pad_token_id": 0}  # ComfyUI tells it from CLIP-L by its depth
T5 = {"d_model": 64, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "vocab_size": 32128}
UMT5 = T5 | {"d_model": 4096, "vocab_size": 64}  # ComfyUI's Wan takes no other width; the vocabulary is that of tokenizer_model()
QWEN = {
    "vocab_size": 152064,
    "hidden_size": 128,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
}
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
# What ComfyUI's classes are made with instead of the published sizes.
MODEL_OPTIONS = {
    "clip_l_model_config": {key: CLIP[key] for key in SIZES},
    "clip_g_model_config": {key: CLIP_G[key] for key in SIZES},
    "t5xxl_model_config": T5,
    "umt5xxl_model_config": UMT5,
    "qwen25_7b_model_config": QWEN,
}


def qwen() -> nn.Module:
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    text = QWEN | {"rms_norm_eps": 1e-6, "rope_parameters": rope, "pad_token_id": 0, "max_position_embeddings": 128}
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": QWEN["hidden_size"]}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True)
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


ENCODERS = {
    "clip_l": Encoder(
        "stable_diffusion",
        lambda: transformers.CLIPTextModel(transformers.CLIPTextConfig(**CLIP)),
        lambda m: m(CLIP_TOKENS).last_hidden_state,
        lambda m: m.clip_l.transformer(CLIP_TOKENS)[0],
    ),
    "clip_g": Encoder(
        "stable_diffusion",
        lambda: transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**CLIP_G)),
        lambda m: m(CLIP_TOKENS).text_embeds,
        lambda m: m.clip_g.transformer(CLIP_TOKENS)[2],
    ),
    "t5": Encoder(
        "pixart",
        lambda: transformers.T5EncoderModel(transformers.T5Config(**T5, feed_forward_proj="gated-gelu")),
        lambda m: m(TOKENS).last_hidden_state,
        lambda m: m.t5xxl.transformer(TOKENS, None)[0],
    ),
    "umt5": Encoder(
        "wan",
        lambda: transformers.UMT5EncoderModel(transformers.UMT5Config(**UMT5, feed_forward_proj="gated-gelu")),
        lambda m: m(TOKENS).last_hidden_state,
        lambda m: m.umt5xxl.transformer(TOKENS, None)[0],
    ),
    "qwen": Encoder(
        "qwen_image",
        qwen,
        lambda m: m.model(TOKENS).last_hidden_state,
        lambda m: m.qwen25_7b.transformer(TOKENS)[0],
    ),
}


def tokenizer_model() -> bytes:
    """A SentencePiece model, as UMT5 has one."""
    import io

    import sentencepiece

    out = io.BytesIO()
    words = [f"a red fox in the snow number {i}" for i in range(64)]
    options = {"vocab_size": 60, "hard_vocab_limit": False, "pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(words), model_writer=out, **options)
    return out.getvalue()


def transformers_model(name: str) -> Any:
    return {
        "clip_l": transformers.CLIPTextModel,
        "clip_g": transformers.CLIPTextModelWithProjection,
        "t5": transformers.T5EncoderModel,
        "umt5": transformers.UMT5EncoderModel,
        "qwen": transformers.Qwen2_5_VLForConditionalGeneration,
    }[name]


def shrink(patch: pytest.MonkeyPatch) -> None:
    """Make ComfyUI build its text encoders at the tiny sizes."""
    import comfy.sd
    import comfy.text_encoders.long_clipl
    import comfy.text_encoders.qwen_vl

    original = comfy.sd.load_text_encoder_state_dicts

    def load(state_dicts: Any, *args: Any, model_options: Any = None, **kwargs: Any) -> Any:
        return original(state_dicts, *args, model_options=MODEL_OPTIONS | (model_options or {}), **kwargs)

    patch.setattr(comfy.sd, "load_text_encoder_state_dicts", load)
    # It would replace the sizes of CLIP-L and CLIP-G.
    patch.setattr(comfy.text_encoders.long_clipl, "model_options_long_clip", lambda sd, data, options: (data, options))
    detect, models = comfy.sd.detect_te_model, comfy.sd.TEModel
    # ComfyUI looks for T5's 24th layer, and for the published width of Qwen's keys.
    tiny = {
        "encoder.block.1.layer.1.DenseReluDense.wi_1.weight": models.T5_XXL,
        "model.layers.0.self_attn.k_proj.bias": models.QWEN25_7B,
    }
    patch.setattr(comfy.sd, "detect_te_model", lambda sd: next((tiny[key] for key in tiny if key in sd), None) or detect(sd))
    vision = comfy.text_encoders.qwen_vl.Qwen2VLVisionTransformer
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "num_layers": 1}
    patch.setattr(comfy.text_encoders.qwen_vl, "Qwen2VLVisionTransformer", lambda **options: vision(**options | sizes))
