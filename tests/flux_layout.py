"""A tiny Flux under its authors' names, as single files have it."""

from __future__ import annotations

import pytest
import torch


def narrow_converter(monkeypatch: pytest.MonkeyPatch, width: int = 32) -> None:
    """diffusers' converter for Flux writes the published width of 3072 into its rule for the fused layers."""
    from diffusers.loaders import single_file_utils

    source = single_file_utils.convert_flux_transformer_checkpoint_to_diffusers
    assert 3072 in source.__code__.co_consts
    constants = tuple(width if value == 3072 else value for value in source.__code__.co_consts)
    monkeypatch.setattr(source, "__code__", source.__code__.replace(co_consts=constants))


def original_layout(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A tiny Flux in its authors' layout, as far as diffusers' converter looks at it."""
    swap = lambda t: torch.cat(t.chunk(2)[::-1])  # noqa: E731 - the halves of the last modulation are stored the other way round
    out = {}

    def move(new: str, *old: str) -> None:
        for leaf in ("weight", "bias"):
            out[f"{new}.{leaf}"] = torch.cat([tensors[f"{name}.{leaf}"] for name in old])

    for new, old in (("time_in", "timestep_embedder"), ("vector_in", "text_embedder")):
        move(f"{new}.in_layer", f"time_text_embed.{old}.linear_1")
        move(f"{new}.out_layer", f"time_text_embed.{old}.linear_2")
    move("txt_in", "context_embedder")
    move("img_in", "x_embedder")
    move("final_layer.linear", "proj_out")
    block, b = "double_blocks.0", "transformer_blocks.0"
    move(f"{block}.img_mod.lin", f"{b}.norm1.linear")
    move(f"{block}.txt_mod.lin", f"{b}.norm1_context.linear")
    move(f"{block}.img_attn.qkv", *(f"{b}.attn.to_{x}" for x in "qkv"))
    move(f"{block}.txt_attn.qkv", *(f"{b}.attn.add_{x}_proj" for x in "qkv"))
    move(f"{block}.img_attn.proj", f"{b}.attn.to_out.0")
    move(f"{block}.txt_attn.proj", f"{b}.attn.to_add_out")
    for new, old in (("img_mlp", "ff"), ("txt_mlp", "ff_context")):
        move(f"{block}.{new}.0", f"{b}.{old}.net.0.proj")
        move(f"{block}.{new}.2", f"{b}.{old}.net.2")
    single, s = "single_blocks.0", "single_transformer_blocks.0"
    move(f"{single}.modulation.lin", f"{s}.norm.linear")
    move(f"{single}.linear1", *(f"{s}.attn.to_{x}" for x in "qkv"), f"{s}.proj_mlp")
    move(f"{single}.linear2", f"{s}.proj_out")
    norms = {
        f"{block}.img_attn.norm.query_norm.scale": f"{b}.attn.norm_q.weight",
        f"{block}.img_attn.norm.key_norm.scale": f"{b}.attn.norm_k.weight",
        f"{block}.txt_attn.norm.query_norm.scale": f"{b}.attn.norm_added_q.weight",
        f"{block}.txt_attn.norm.key_norm.scale": f"{b}.attn.norm_added_k.weight",
        f"{single}.norm.query_norm.scale": f"{s}.attn.norm_q.weight",
        f"{single}.norm.key_norm.scale": f"{s}.attn.norm_k.weight",
    }
    out |= {new: tensors[old] for new, old in norms.items()}
    for leaf in ("weight", "bias"):
        out[f"final_layer.adaLN_modulation.1.{leaf}"] = swap(tensors[f"norm_out.linear.{leaf}"])
    return {key: value.clone() for key, value in out.items()}
