"""The layers of a model that a Nunchaku checkpoint's layers stand for: one table per layout of the original engine.

``nunchaku_lite`` names layers as diffusers does, one for one. The engine's own checkpoints fuse projections, split the last layer
of FLUX's single blocks, interleave the rows of adaLN layers (see ``nunchaku.read_awq``) and of gated feed-forwards.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from torch import nn

from ..errors import CheckpointError
from ..formats import TensorInfo
from .nunchaku import IGNORED, Part, Rows
from .packing_order import TILE, rounded_up

CODES_LEAF = ".qweight"


class Target(NamedTuple):
    """A layer of the model, and the rows of source layers that it consists of."""

    module: str
    shape: tuple[int, ...]
    parts: list[Part]
    rows: Rows


class Copied(NamedTuple):
    """A tensor of the model that is copied unchanged: its source, its rows there, and its shape."""

    name: str
    source: str
    rows: Rows | None
    shape: tuple[int, ...]


class Entry(NamedTuple):
    """One layer of a block in the source.

    Attributes:
        modules: the model's layers whose rows it holds, one after the other.
        unsigned: whether its inputs are the output of a GELU.
        splits: number of parts of an adaLN layer's output.
        interleaved: whether value and gate rows alternate.
        padded: whether each module's rows are padded to a multiple of 128.
    """

    modules: tuple[str, ...]
    unsigned: bool = False
    splits: int = 1
    interleaved: bool = False
    padded: bool = False


QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
ADDED_QKV = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
Layout = dict[str, dict[str, Entry]]  # block list -> name in the source's block -> layers

FLUX: Layout = {
    "transformer_blocks": {
        "norm1.linear": Entry(("norm1.linear",), splits=6),
        "norm1_context.linear": Entry(("norm1_context.linear",), splits=6),
        "qkv_proj": Entry(QKV),
        "qkv_proj_context": Entry(ADDED_QKV),
        "out_proj": Entry(("attn.to_out.0",)),
        "out_proj_context": Entry(("attn.to_add_out",)),
        "norm_q": Entry(("attn.norm_q",)),
        "norm_k": Entry(("attn.norm_k",)),
        "norm_added_q": Entry(("attn.norm_added_q",)),
        "norm_added_k": Entry(("attn.norm_added_k",)),
        "mlp_fc1": Entry(("ff.net.0.proj",)),
        "mlp_fc2": Entry(("ff.net.2",), unsigned=True),
        "mlp_context_fc1": Entry(("ff_context.net.0.proj",)),
        "mlp_context_fc2": Entry(("ff_context.net.2",), unsigned=True),
    },
    "single_transformer_blocks": {
        "norm.linear": Entry(("norm.linear",), splits=3),
        "qkv_proj": Entry(QKV),
        "norm_q": Entry(("attn.norm_q",)),
        "norm_k": Entry(("attn.norm_k",)),
        "mlp_fc1": Entry(("proj_mlp",)),
        "out_proj": Entry(("proj_out",)),  # of the attention's output, the first inputs of proj_out
        "mlp_fc2": Entry(("proj_out",), unsigned=True),  # of the rest
    },
}
QWEN_IMAGE: Layout = {
    "transformer_blocks": {
        "attn.to_qkv": Entry(QKV),
        "attn.add_qkv_proj": Entry(ADDED_QKV),
        "img_mod.1": Entry(("img_mod.1",), splits=6),
        "txt_mod.1": Entry(("txt_mod.1",), splits=6),
        "img_mlp.net.2": Entry(("img_mlp.net.2",), unsigned=True),
        "txt_mlp.net.2": Entry(("txt_mlp.net.2",), unsigned=True),
    },
}
SANA: Layout = {
    "transformer_blocks": {
        "attn.qkv_proj": Entry(("attn1.to_q", "attn1.to_k", "attn1.to_v"), padded=True),
        "attn.out_proj": Entry(("attn1.to_out.0",)),
        "cross_attn.q_linear": Entry(("attn2.to_q",)),
        "cross_attn.kv_linear": Entry(("attn2.to_k", "attn2.to_v")),
        "cross_attn.out_proj": Entry(("attn2.to_out.0",)),
        "ff.inverted_conv": Entry(("ff.conv_inverted",), interleaved=True),
        "ff.depth_conv": Entry(("ff.conv_depth",), interleaved=True),
        "ff.point_conv": Entry(("ff.conv_point",)),
    },
}
LAYOUTS: dict[str, Layout] = {
    "FluxTransformer2DModel": FLUX,
    "QwenImageTransformer2DModel": QWEN_IMAGE,
    "SanaTransformer2DModel": SANA,
}


class Plan(NamedTuple):
    """Use of every tensor of the source: layers to convert and tensors to copy."""

    targets: list[Target]
    copies: list[Copied]


def plan_lite(model: nn.Module, targets: list[str], stored: Mapping[str, TensorInfo]) -> Plan:
    """The plan for a ``nunchaku_lite`` checkpoint whose config names ``targets``.

    Raises:
        CheckpointError: the model has no such layer, or a tensor is missing or left over.
    """
    modules = dict(model.named_modules())
    planned = []
    for name in targets:
        shape = _weight_shape(modules.get(name), name, model)
        planned.append(Target(name, shape, [Part(name, shape[0], shape[1])], Rows(0, shape[0])))
    return _complete(model, planned, [], stored)


def plan_original(model: nn.Module, stored: Mapping[str, TensorInfo]) -> Plan:
    """The plan for a checkpoint of the original engine.

    Raises:
        CheckpointError: the layout of this model class is not known, or a tensor is missing or left over.
    """
    kind = type(model).__name__
    if kind not in LAYOUTS:
        raise CheckpointError(
            f"the layout of Nunchaku's own checkpoints of {kind} is not known here, only those of {', '.join(LAYOUTS)}; "
            "nunchaku_lite folders of any model can be read"
        )
    targets: dict[str, Target] = {}
    copies: list[Copied] = []
    for prefix in _layer_names(stored):
        if prefix + CODES_LEAF in stored:
            for target in _targets(model, prefix, _entry(kind, prefix)):
                earlier = targets.get(target.module)
                targets[target.module] = target if earlier is None else earlier._replace(parts=earlier.parts + target.parts)
        else:
            copies += _copies(model, prefix, _entry(kind, prefix), stored)
    return _complete(model, [_ordered(t) for t in targets.values()], copies, stored)


def _layer_names(stored: Mapping[str, TensorInfo]) -> Iterator[str]:
    seen = set()
    for key in stored:
        prefix = key.rpartition(".")[0]
        if prefix not in seen:
            seen.add(prefix)
            yield prefix


def _entry(kind: str, prefix: str) -> tuple[str, Entry]:
    """Prefix of a source layer's block, with a dot, and its entry in the table; layers in no table keep their names."""
    match = re.fullmatch(r"(\w+)\.(\d+)\.(.+)", prefix)
    if match and (entry := LAYOUTS[kind].get(match[1], {}).get(match[3])):
        return f"{match[1]}.{match[2]}.", entry
    return "", Entry((prefix,))


def _targets(model: nn.Module, prefix: str, found: tuple[str, Entry]) -> list[Target]:
    block, entry = found
    modules = dict(model.named_modules())
    shapes = [_weight_shape(modules.get(block + name), block + name, model) for name in entry.modules]
    sizes = [rounded_up(shape[0], TILE) if entry.padded else shape[0] for shape in shapes]
    out, start = [], 0
    for name, shape, size in zip(entry.modules, shapes, sizes, strict=True):
        columns = _half(model, block, entry, shape[1]) if name == "proj_out" else shape[1]
        part = Part(prefix, sum(sizes), columns, entry.unsigned, entry.splits)
        out.append(Target(block + name, shape, [part], Rows(start, shape[0], interleaved_halves=entry.interleaved)))
        start += size
    return out


def _half(model: nn.Module, block: str, entry: Entry, columns: int) -> int:
    """The inputs of one half of FLUX's ``proj_out``: those from the attention, or the rest."""
    attention = _weight_shape(model.get_submodule(f"{block}attn.to_v"), f"{block}attn.to_v", model)[0]
    return columns - attention if entry.unsigned else attention


def _copies(model: nn.Module, prefix: str, found: tuple[str, Entry], stored: Mapping[str, TensorInfo]) -> list[Copied]:
    """Tensors of a layer that is not quantized, under the model's names."""
    block, entry = found
    tensors = model.state_dict()
    out = []
    for leaf in _leaves(prefix, stored):
        source = f"{prefix}.{leaf}" if prefix else leaf
        start = 0
        for name in entry.modules:
            target = f"{block}{name}.{leaf}" if name else leaf
            if target not in tensors:
                raise CheckpointError(f"the checkpoint holds tensor {source}, which {type(model).__name__} has no place for")
            shape = tuple(tensors[target].shape)
            plain = len(entry.modules) == 1 and not entry.interleaved
            rows = None if plain else Rows(start, shape[0], interleaved_halves=entry.interleaved)
            out.append(Copied(target, source, rows, shape))
            start += shape[0]
        if start * _row_size(shape) != _numel(stored[source].shape):
            raise CheckpointError(
                f"tensor {source} has shape {list(stored[source].shape)}, the model needs {start} rows of {list(shape[1:])}"
            )
    return out


def _leaves(prefix: str, stored: Mapping[str, TensorInfo]) -> list[str]:
    return [key.rpartition(".")[2] for key in stored if key.rpartition(".")[0] == prefix]


def _ordered(target: Target) -> Target:
    """The halves of FLUX's ``proj_out`` in the order of its inputs: attention first."""
    return target._replace(parts=sorted(target.parts, key=lambda part: part.unsigned))


def _complete(model: nn.Module, targets: list[Target], copies: list[Copied], stored: Mapping[str, TensorInfo]) -> Plan:
    """Account for every tensor of the source and of the model."""
    modules = dict(model.named_modules())
    tensors = model.state_dict()
    packed = {target.module for target in targets}
    taken = {copy.source for copy in copies} | {part.prefix for target in targets for part in target.parts}
    for target in targets:
        if sum(part.columns for part in target.parts) != target.shape[1]:
            prefix = f"{target.module.rpartition('.')[0]}."
            raise CheckpointError(f"the checkpoint holds only a part of {target.module}; a tensor {prefix}...qweight is missing")
    for key, info in stored.items():
        prefix, _, leaf = key.rpartition(".")
        if prefix in taken or key in taken or leaf in IGNORED:
            continue
        if key not in tensors:
            raise CheckpointError(f"the checkpoint holds tensor {key}, which {type(model).__name__} has no place for")
        if info.shape != tuple(tensors[key].shape):
            raise CheckpointError(f"tensor {key} has shape {list(info.shape)}, the model needs {list(tensors[key].shape)}")
        copies.append(Copied(key, key, None, info.shape))
    held = {copy.name for copy in copies}
    for name in tensors:
        module, _, leaf = name.rpartition(".")
        if name not in held and not (module in packed and leaf in ("weight", "bias") and hasattr(modules[module], leaf)):
            raise CheckpointError(f"the checkpoint lacks tensor {name}; it is incomplete")
    return Plan(targets, copies)


def _weight_shape(module: nn.Module | None, name: str, model: nn.Module) -> tuple[int, ...]:
    if module is None:
        raise CheckpointError(f"the checkpoint quantizes layer {name}, which {type(model).__name__} does not have")
    if not isinstance(module, nn.Linear | nn.Conv2d):
        raise CheckpointError(f"the checkpoint quantizes layer {name}, which in the model is a {type(module).__name__}")
    if isinstance(module, nn.Conv2d) and (module.groups != 1 or module.kernel_size != (1, 1)):
        raise CheckpointError(f"the checkpoint quantizes layer {name}, which in the model is a convolution of more than one pixel")
    return tuple(module.weight.shape)


def _row_size(shape: tuple[int, ...]) -> int:
    return _numel(shape[1:])


def _numel(shape: tuple[int, ...]) -> int:
    out = 1
    for size in shape:
        out *= size
    return out
