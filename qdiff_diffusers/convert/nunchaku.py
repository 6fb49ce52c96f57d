"""Layers of Nunchaku checkpoints: the names and shapes of their tensors, and their content in logical order.

Two sets of names are in use for the same tensors: those of the first engine (``lora_down``, ``smooth``) and those of its later
versions and of diffusers' ``nunchaku_lite`` (``proj_down``, ``smooth_factor``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..formats import LayerSpec, TensorInfo
from ..formats.base import SCALE_DTYPES
from .logical import GELU_SHIFT, LogicalLayer, layer_spec, weight_format
from .packing_order import (
    AWQ_CODES,
    AWQ_GROUP,
    AWQ_ROWS,
    AWQ_SCALE_GROUPS,
    CODES,
    LORA_DOWN,
    LORA_UP,
    MICRO_SCALES,
    SCALES,
    TILE,
    rounded_up,
    unpack_codes,
    unpack_vector,
)

ALIASES = {
    "qweight": ("qweight",),
    "wscales": ("wscales",),
    "wzeros": ("wzeros",),
    "wcscales": ("wcscales",),
    "wtscale": ("wtscale",),
    "bias": ("bias",),
    "smooth": ("smooth", "smooth_factor"),
    "down": ("lora_down", "proj_down"),
    "up": ("lora_up", "proj_up"),
}
IGNORED = ("smooth_orig", "smooth_factor_orig")  # only for converting adapters
SIXTEEN_BITS = (torch.bfloat16, torch.float16)
Get = Callable[[str], Tensor]


class Part(NamedTuple):
    """A quantized layer of the source.

    Attributes:
        prefix: name of the layer in the source.
        rows, columns: size without padding.
        unsigned: whether its "int4" inputs are the output of a GELU, shifted and quantized to 0 .. 15.
        splits: number of interleaved parts into which the rows of an "awq" layer are reordered.
    """

    prefix: str
    rows: int
    columns: int
    unsigned: bool = False
    splits: int = 1


class Rows(NamedTuple):
    """The rows of a source layer that a layer of the model has: ``number`` from ``start``."""

    start: int
    number: int
    interleaved_halves: bool = False

    def picked(self) -> Tensor:
        """The rows, int64 ``[number]``. With interleaved halves, first the even and then the odd ones."""
        rows = self.start + torch.arange(self.number)
        return rows.view(-1, 2).T.reshape(-1) if self.interleaved_halves else rows


class Header(NamedTuple):
    """The tensors of one source layer by canonical name, with what their shapes and dtypes tell before any data is read."""

    part: Part
    kind: str
    names: dict[str, str]
    infos: dict[str, TensorInfo]

    @property
    def padded(self) -> tuple[int, int]:
        """Rows and columns as stored, in multiples of 128 ("awq": as they are)."""
        rows, columns = self.infos["qweight"].shape
        return (rows * AWQ_ROWS, columns * 2) if self.kind == "awq" else (rows, columns * 2)


def find_header(part: Part, stored: Mapping[str, TensorInfo]) -> Header:
    """Find and check the tensors of a layer.

    Raises:
        CheckpointError: names a tensor that is missing or misshapen, or a precision that is not known.
    """
    found = {name: next((k for a in aliases if (k := f"{part.prefix}.{a}") in stored), None) for name, aliases in ALIASES.items()}
    names = {name: key for name, key in found.items() if key is not None}
    for key in stored:
        if key.rpartition(".")[0] == part.prefix and key not in names.values() and key.rpartition(".")[2] not in IGNORED:
            raise CheckpointError(f"the checkpoint holds tensor {key}, which is no part of a layer that Nunchaku quantized")
    kind = _kind(part, names, stored)
    required = ("qweight", "wscales", "wzeros") if kind == "awq" else ("qweight", "wscales")
    for name in required:
        if name not in names:
            raise CheckpointError(f"the checkpoint lacks tensor {part.prefix}.{ALIASES[name][-1]}; it is incomplete")
    if ("down" in names) != ("up" in names):
        lacking = ALIASES["up" if "down" in names else "down"][-1]
        raise CheckpointError(f"the checkpoint lacks tensor {part.prefix}.{lacking}; it is incomplete")
    header = Header(part, kind, names, {name: stored[key] for name, key in names.items()})
    _check_shapes(header)
    return header


def _kind(part: Part, names: dict[str, str], stored: Mapping[str, TensorInfo]) -> str:
    if "qweight" not in names:
        raise CheckpointError(f"the checkpoint lacks tensor {part.prefix}.qweight; it is incomplete")
    code_dtype = stored[names["qweight"]].dtype
    if "wzeros" in names or code_dtype == torch.int32:
        return "awq"
    if code_dtype not in (torch.int8, torch.uint8):
        raise CheckpointError(f"tensor {names['qweight']} is {stored[names['qweight']]}; codes are int8 or, of AWQ layers, int32")
    scales = stored[names["wscales"]] if "wscales" in names else None
    if scales is None:
        raise CheckpointError(f"the checkpoint lacks tensor {part.prefix}.wscales; it is incomplete")
    if scales.dtype == torch.float8_e4m3fn:
        return "nvfp4"
    if scales.dtype in SIXTEEN_BITS:
        return "int4"
    raise CheckpointError(
        f"tensor {names['wscales']} is {scales}, a precision this version does not know; it knows INT4 (bfloat16 or float16 "
        "scales) and NVFP4 (float8_e4m3fn scales)"
    )


def _check_shapes(header: Header) -> None:
    padded_rows, padded_columns = header.padded
    multiple = (AWQ_ROWS, AWQ_GROUP) if header.kind == "awq" else (TILE, TILE)
    expected_rows, expected_columns = (
        rounded_up(*pair) for pair in zip((header.part.rows, header.part.columns), multiple, strict=True)
    )
    if (padded_rows, padded_columns) != (expected_rows, expected_columns):
        expected = f"{expected_rows} x {expected_columns}"
        raise CheckpointError(
            f"tensor {header.names['qweight']} is {header.infos['qweight']}, which holds {padded_rows} x {padded_columns} "
            f"weights; the model needs {expected}"
        )
    expected_shapes = _shapes(header, padded_rows, padded_columns)
    for name, info in header.infos.items():
        if name in expected_shapes and info.shape not in expected_shapes[name]:
            wanted = list(expected_shapes[name][0])
            raise CheckpointError(f"tensor {header.names[name]} is {info}, expected shape {wanted}")
        if name not in ("qweight", "wscales", "wtscale") and info.dtype not in (*SIXTEEN_BITS, torch.float32):
            raise CheckpointError(f"tensor {header.names[name]} is {info}, expected 16-bit floating point")


def _shapes(header: Header, rows: int, columns: int) -> dict[str, list[tuple[int, ...]]]:
    """The shapes that each tensor may have."""
    if header.kind == "awq":
        groups = columns // AWQ_GROUP
        scale_shapes: list[tuple[int, ...]] = [(groups, rows), (rounded_up(groups, AWQ_SCALE_GROUPS), rows)]
        return {"wscales": scale_shapes, "wzeros": scale_shapes, "bias": [(rows,)]}
    group = 16 if header.kind == "nvfp4" else 64
    rank = header.infos["down"].shape[-1] if "down" in header.infos else 0
    return {
        "wscales": [(columns // group, rows)],
        "wcscales": [(rows,)],
        "wtscale": [(1,), ()],
        "bias": [(rows,)],
        "smooth": [(columns,)],
        "down": [(columns, rank)],
        "up": [(rows, rank)],
    }


def spec_of(headers: list[Header]) -> LayerSpec:
    """The spec of the layer that :func:`read_layer` makes of these source layers, before any data is read."""
    first = headers[0]
    scale_dtype = first.infos["wscales"].dtype
    if scale_dtype not in SCALE_DTYPES.values():
        raise CheckpointError(f"tensor {first.names['wscales']} is {first.infos['wscales']}, which is no dtype of scales")
    row_scales = any(name in first.infos for name in ("wcscales", "wtscale"))
    if first.kind == "nvfp4" and len(headers) > 1:  # see logical.concatenate_columns
        scale_dtype, row_scales = torch.float32, False
    fmt = weight_format(first.kind, scale_dtype, row_scales and first.kind == "nvfp4")
    rank = sum(h.infos["down"].shape[1] for h in headers if "down" in h.infos)
    extras = [h.infos[name].dtype for h in headers for name in ("smooth", "down", "up") if name in h.infos]
    smooth = any("smooth" in h.infos for h in headers)
    shift = first.kind == "int4" and any(h.part.unsigned for h in headers)
    return layer_spec(fmt, first.kind, rank, smooth, shift, extras)


def read_part(header: Header, get: Get) -> LogicalLayer:
    """Read one source layer, with all its rows."""
    tensors = {name: get(key) for name, key in header.names.items()}
    return read_awq(tensors, header.part) if header.kind == "awq" else read_w4a4(tensors, header.kind, header.part)


def read_w4a4(tensors: Mapping[str, Tensor], kind: str, part: Part) -> LogicalLayer:
    """A W4A4 layer from its packed tensors by canonical name. Padding rows are kept, padding columns dropped.

    Args:
        kind: "int4" or "nvfp4".
    """
    padded_rows, padded_columns = tensors["qweight"].shape[0], 2 * tensors["qweight"].shape[1]
    columns = part.columns
    codes = unpack_codes(CODES, tensors["qweight"], padded_rows, padded_columns)[:, :columns]
    vectors = {name: unpack_vector(tensors[name]) for name in ("bias", "smooth", "wcscales") if name in tensors}
    smooth = vectors.get("smooth")
    layer = LogicalLayer(
        kind,
        codes ^ 8 if kind == "int4" else codes,  # two's complement to offset binary
        unpack_scales(tensors["wscales"], kind, padded_rows, padded_columns)[:, : -(-columns // (64 if kind == "int4" else 16))],
        bias=vectors.get("bias"),
        smooth=None if smooth is None else smooth[:columns],
    )
    if kind == "nvfp4" and ("wcscales" in tensors or "wtscale" in tensors):
        rows = vectors.get("wcscales", torch.ones(padded_rows)).float()
        layer = replace(layer, row_scales=rows * tensors["wtscale"].float().reshape(()) if "wtscale" in tensors else rows)
    if part.unsigned and kind == "int4":
        dtype = torch.bfloat16 if smooth is None else smooth.dtype
        layer = replace(layer, shift=torch.full((columns,), GELU_SHIFT, dtype=dtype))
    if "down" in tensors:
        rank = tensors["down"].shape[1]
        down = LORA_DOWN.unpack(tensors["down"].flatten(), rank, padded_columns)[:, :columns].contiguous()
        layer = replace(layer, down=down, up=LORA_UP.unpack(tensors["up"].flatten(), padded_rows, rank))
    return layer


def unpack_scales(packed: Tensor, kind: str, rows: int, columns: int) -> Tensor:
    """Scales of a W4A4 weight, ``[rows, groups]``."""
    if kind == "int4":
        return SCALES.unpack(packed.flatten(), rows, columns // 64)
    return MICRO_SCALES.unpack(packed.contiguous().view(torch.int8).flatten(), rows, columns // 16).view(torch.float8_e4m3fn)


def read_awq(tensors: Mapping[str, Tensor], part: Part) -> LogicalLayer:
    """A weight-only layer from its packed tensors by canonical name, with the rows in the order of the diffusers layer."""
    rows = tensors["qweight"].shape[0] * AWQ_ROWS
    columns = tensors["qweight"].shape[1] * 2
    groups = columns // AWQ_GROUP
    bias = tensors.get("bias")
    layer = LogicalLayer(
        "awq",
        unpack_codes(AWQ_CODES, tensors["qweight"], rows, columns)[:, : part.columns],
        tensors["wscales"][:groups].T.contiguous(),
        zeros=tensors["wzeros"][:groups].T.contiguous(),
        bias=bias,
    )
    if part.splits == 1:
        return layer
    order = torch.arange(rows).view(-1, part.splits).T.reshape(-1)  # row i * splits + split becomes split * rows / splits + i
    layer = layer.rows(order)
    return layer if bias is None else replace(layer, bias=without_one(layer.bias, part.splits))


def scale_splits(splits: int) -> set[int]:
    """The parts of an adaLN layer that are scales: "1 + scale" is folded into their bias."""
    return {1, splits - 2}


def without_one(bias: Tensor | None, splits: int) -> Tensor:
    """The bias of the diffusers layer; float32 where the dtype of the stored one cannot hold it."""
    assert bias is not None
    exact = bias.float().view(splits, -1).clone()
    exact[sorted(scale_splits(splits))] -= 1
    exact = exact.flatten()
    narrow = exact.to(bias.dtype)
    return narrow if torch.equal(narrow.float(), exact) else exact
