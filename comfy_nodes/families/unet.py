"""The UNets of Stable Diffusion 1.5 and XL, whose blocks ComfyUI numbers through and diffusers numbers by level."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

FIXED = """
time_embed.0 <- time_embedding.linear_1
time_embed.2 <- time_embedding.linear_2
input_blocks.0.0 <- conv_in
middle_block.1 <- mid_block.attentions.0
out.0 <- conv_norm_out
out.2 <- conv_out
"""

# What a model is conditioned on besides the text: sizes (XL), an image's embedding (unCLIP), or a class.
EXTRA = """
label_emb.0.0 <- {0}.linear_1
label_emb.0.2 <- {0}.linear_2
label_emb <- {0}
"""

RESNET = """
{native}.in_layers.0 <- {diffusers}.norm1
{native}.in_layers.2 <- {diffusers}.conv1
{native}.emb_layers.1 <- {diffusers}.time_emb_proj
{native}.out_layers.0 <- {diffusers}.norm2
{native}.out_layers.3 <- {diffusers}.conv2
{native}.skip_connection <- {diffusers}.conv_shortcut
"""


class Level(NamedTuple):
    """One resolution level of the down or up path: whether each resnet has an attention, and whether a sampler follows."""

    attentions: tuple[bool, ...]
    sampler: bool


def unet_table(keys: Iterable[str]) -> str:
    """The table for a UNet with these tensors, named as diffusers or as ComfyUI names them."""
    keys = set(keys)
    native = any(key.startswith("input_blocks.") for key in keys)
    down, up = (_native_levels(keys, path) if native else _levels(keys, path) for path in ("down", "up"))
    extra = EXTRA.format(_extra_embedding(keys, native))
    lines = [FIXED, extra, _resnet("middle_block.0", "mid_block.resnets.0"), _resnet("middle_block.2", "mid_block.resnets.1")]
    lines += _path("input_blocks", 1, "down", down)
    lines += _path("output_blocks", 0, "up", up)
    return "\n".join(lines)


def _extra_embedding(keys: set[str], native: bool) -> str:
    """diffusers' name of what ComfyUI always calls ``label_emb``. Only in XL models the first level has no attention."""
    if native:
        return "class_embedding" if any(key.startswith("input_blocks.1.1.") for key in keys) else "add_embedding"
    return "class_embedding" if any(key.startswith("class_embedding.") for key in keys) else "add_embedding"


def _path(native: str, index: int, path: str, levels: list[Level]) -> Iterator[str]:
    """Lines for all levels down or up; ``index`` is the number of ComfyUI's first block."""
    for i, level in enumerate(levels):
        for j, attention in enumerate(level.attentions):
            yield _resnet(f"{native}.{index}.0", f"{path}_blocks.{i}.resnets.{j}")
            if attention:
                yield f"{native}.{index}.1 <- {path}_blocks.{i}.attentions.{j}"
            index += 1
        if level.sampler and path == "down":  # a block of its own
            yield f"{native}.{index}.0.op <- down_blocks.{i}.downsamplers.0.conv"
            index += 1
        elif level.sampler:  # at the end of the level's last block
            yield f"{native}.{index - 1}.{1 + level.attentions[-1]}.conv <- up_blocks.{i}.upsamplers.0.conv"


def _resnet(native: str, diffusers: str) -> str:
    return RESNET.format(native=native, diffusers=diffusers)


def _levels(keys: set[str], path: str) -> list[Level]:
    """Levels of a model with diffusers' names."""
    out = []
    for i in range(_count(keys, rf"{path}_blocks")):
        block = f"{path}_blocks.{i}"
        resnets = _count(keys, rf"{block}\.resnets")
        attentions = _count(keys, rf"{block}\.attentions")
        out.append(Level((attentions > 0,) * resnets, f"{block}.{path}samplers.0.conv.weight" in keys))
    return out


def _native_levels(keys: set[str], path: str) -> list[Level]:
    """Levels of a model with ComfyUI's names: a sampler ends each but the last."""
    prefix = {"down": "input_blocks", "up": "output_blocks"}[path]
    out: list[Level] = []
    attentions: list[bool] = []
    for k in range(1 if path == "down" else 0, _count(keys, prefix)):
        block = f"{prefix}.{k}"
        if f"{block}.0.op.weight" in keys:
            out.append(Level(tuple(attentions), True))
            attentions = []
            continue
        attention = any(key.startswith(f"{block}.1.transformer_blocks.") for key in keys)
        attentions.append(attention)
        if f"{block}.{1 + attention}.conv.weight" in keys:
            out.append(Level(tuple(attentions), True))
            attentions = []
    return [*out, Level(tuple(attentions), False)] if attentions else out


def _count(keys: set[str], prefix: str) -> int:
    """How many numbered children ``prefix`` has."""
    numbers = [int(match[1]) for key in keys if (match := re.match(rf"{prefix}\.(\d+)\.", key))]
    return max(numbers, default=-1) + 1
