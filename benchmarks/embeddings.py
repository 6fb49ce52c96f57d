"""What the token tables of text encoders weigh, and what packing them saves: benchmarks/results/embeddings.md.

python benchmarks/embeddings.py

The encoders are built from their published sizes on the meta device: exact byte counts, no weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import transformers
from common import write
from torch import nn

from qdiff_diffusers import RTNConfig
from qdiff_diffusers.formats import IntegerFormat, LayerSpec
from qdiff_diffusers.model.selection import select_layers
from qdiff_diffusers.model.tied_weights import tied_layers, weight_holder

GROUP = 64


def clip(**sizes: int) -> nn.Module:
    return transformers.CLIPTextModel(transformers.CLIPTextConfig(vocab_size=49408, **sizes))


def t5(kind: str, vocabulary: int) -> nn.Module:
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=vocabulary, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu"
    )
    return getattr(transformers, f"{kind}EncoderModel")(config)


def decoder(kind: str, shape: tuple[int, int, int, int, int, int, int], model: str = "Model", **more: Any) -> nn.Module:
    vocabulary, hidden, intermediate, layers, heads, key_value_heads, head_dim = shape
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        head_dim=head_dim,
        **more,
    )
    return getattr(transformers, f"{kind.removesuffix('Text') if model != 'Model' else kind}{model}")(config)


def qwen2_5_vl() -> nn.Module:
    text = {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
    }
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584}
    return transformers.Qwen2_5_VLForConditionalGeneration(transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision))


# Name, what uses it, how it is built, parts of its tables' names.
ENCODERS: list[tuple[str, str, Callable[[], nn.Module]]] = [
    (
        "CLIP-L",
        "SDXL, SD3, Flux",
        lambda: clip(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12),
    ),
    (
        "CLIP-bigG",
        "SDXL, SD3",
        lambda: clip(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20),
    ),
    ("T5-XXL", "SD3, Flux, PixArt", lambda: t5("T5", 32128)),
    ("UMT5-XXL", "Wan", lambda: t5("UMT5", 256384)),
    ("Qwen2.5-VL-7B", "Qwen-Image", qwen2_5_vl),
    (
        "Qwen3-4B, tied head",
        "Flux2 klein, Z-Image",
        lambda: decoder("Qwen3", (151936, 2560, 9728, 36, 32, 8, 128), "ForCausalLM", tie_word_embeddings=True),
    ),
    ("Gemma2-2B", "Sana, Lumina2", lambda: decoder("Gemma2", (256000, 2304, 9216, 26, 8, 4, 256))),
    ("Gemma3-12B", "LTX2", lambda: decoder("Gemma3Text", (262208, 3840, 15360, 48, 16, 8, 256))),
    ("Llama-3.1-8B", "HiDream, HunyuanVideo", lambda: decoder("Llama", (128256, 4096, 14336, 32, 32, 8, 128))),
]
TABLES = ("embed_tokens", "shared", "token_embedding")


def tables(model: nn.Module) -> set[str]:
    """The layers that hold a token table, one name for those that share it."""
    return {weight_holder(model, n) for n, m in model.named_modules() if isinstance(m, nn.Embedding) and n.split(".")[-1] in TABLES}


def gigabytes(model: nn.Module, bits: int, table_bits: int | None) -> float:
    """Size of the file with the linear layers at ``bits`` and the tables at ``table_bits``; ``None`` leaves these in 16 bits."""
    found = tables(model)
    overrides = {name: RTNConfig(bits=table_bits, group_size=GROUP) for name in found} if table_bits else None
    tied = {layer for name in found for layer in tied_layers(model, name)}
    keep = [name.rpartition(".")[2] for name in tied]
    targets, _ = select_layers(model, RTNConfig(bits=bits, group_size=GROUP, overrides=overrides), [*keep, "lm_head"])
    total = 0
    for name, parameter in model.named_parameters():
        layer, _, leaf = name.rpartition(".")
        if leaf == "weight" and layer in targets and layer not in tied:
            spec = LayerSpec(IntegerFormat(int(targets[layer].bits or 0), GROUP, symmetric=False))
            total += spec.nbytes(tuple(parameter.shape))
        else:
            total += 2 * parameter.numel()
    return total / 1e9


def main() -> None:
    rows = []
    for name, used_by, make in ENCODERS:
        with torch.device("meta"):
            model = make()
        dense = sum(2 * p.numel() for p in model.parameters()) / 1e9
        table = sum(2 * math.prod(model.get_submodule(n).weight.shape) for n in tables(model)) / 1e9
        rows.append(
            {
                "encoder": name,
                "used_by": used_by,
                "dense_gb": dense,
                "table_share": 100 * table / dense,
                "linear_4": gigabytes(model, 4, None),
                "share_at_4": 100 * table / gigabytes(model, 4, None),
                "table_8": gigabytes(model, 4, 8),
                "table_4": gigabytes(model, 4, 4),
            }
        )
        print(rows[-1], flush=True)
    columns = [
        ("encoder", "text encoder", ""),
        ("used_by", "used by", ""),
        ("dense_gb", "16 bits, GB", ".2f"),
        ("table_share", "of it token table, %", ".0f"),
        ("linear_4", "linear layers at 4 bits, GB", ".2f"),
        ("share_at_4", "of it token table, %", ".0f"),
        ("table_8", "table at 8 bits too, GB", ".2f"),
        ("table_4", "table at 4 bits too, GB", ".2f"),
    ]
    write("embeddings", rows, columns, command="python benchmarks/embeddings.py")


if __name__ == "__main__":
    main()
