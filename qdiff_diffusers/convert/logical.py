"""A four-bit layer in logical order, as plain matrices, with the changes to it that are exact: the step between two layouts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..formats import IntegerFormat, LayerSpec, MinifloatFormat, WeightFormat
from ..formats.base import SCALE_DTYPES
from ..formats.spec import EXTRAS_DTYPES

GELU_SHIFT = 0.171875  # what Nunchaku adds to the output of a GELU, so that it is never negative
DTYPE_NAMES = {dtype: name for name, dtype in EXTRAS_DTYPES.items()}
INT4_GROUP, NVFP4_GROUP = 64, 16


@dataclass(frozen=True)
class LogicalLayer:
    """``y = Q((x + shift) / smooth) W^T + (x down^T) up^T + bias`` with W given by codes and scales.

    Attributes:
        kind: "int4" (codes are the weights plus 8), "nvfp4" (E2M1 codes) or "awq" (code * scale + zero, inputs in 16 bits).
        codes: 0 .. 15, integer ``[rows, columns]``.
        scales: ``[rows, groups]``, bfloat16, float16 or float8_e4m3fn.
        zeros: zero points of "awq", of the shape and dtype of ``scales``.
        row_scales: second scales of "nvfp4", float32 ``[rows]``, which multiply ``scales``.
        bias: ``[rows]``; smooth, shift: ``[columns]``; down ``[rank, columns]``; up ``[rows, rank]``; each may be missing.
    """

    kind: str
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    row_scales: Tensor | None = None
    bias: Tensor | None = None
    smooth: Tensor | None = None
    shift: Tensor | None = None
    down: Tensor | None = None
    up: Tensor | None = None

    def rows(self, index: Tensor | slice) -> LogicalLayer:
        """The layer with some of the rows, in the order of ``index``."""
        names = ("codes", "scales", "zeros", "row_scales", "bias", "up")
        picked: dict[str, Any] = {name: _pick(value, index) for name in names if (value := getattr(self, name)) is not None}
        return replace(self, **picked)

    def format(self) -> WeightFormat:
        """qdiff's format for the weight."""
        return weight_format(self.kind, self.scales.dtype, self.row_scales is not None)

    def spec(self) -> LayerSpec:
        """qdiff's spec for the layer."""
        extras = [t.dtype for t in (self.smooth, self.down, self.up) if t is not None]
        rank = 0 if self.down is None else len(self.down)
        return layer_spec(self.format(), self.kind, rank, self.smooth is not None, self.shift is not None, extras)

    def store(self) -> dict[str, Tensor]:
        """The tensors of :meth:`spec`."""
        spec, fmt = self.spec(), self.format()
        if isinstance(fmt, IntegerFormat):
            signed = self.codes.to(torch.int16) - 8 if fmt.symmetric else self.codes
            out = fmt.pack(signed, self.scales, self.zeros)
        else:
            assert isinstance(fmt, MinifloatFormat)
            out = fmt.pack(self.codes, self.scales, self.row_scales)
        extras = {"low_rank_down": self.down, "low_rank_up": self.up, "smooth": self.smooth, "shift": self.shift}
        dtype = EXTRAS_DTYPES[spec.extras_dtype]
        return out | {name: value.to(dtype).contiguous() for name, value in extras.items() if value is not None}


def _pick(tensor: Tensor, index: Tensor | slice) -> Tensor:
    """Rows of any dtype: float8 cannot be indexed."""
    return tensor.view(torch.int8)[index].view(tensor.dtype) if tensor.dtype.itemsize == 1 else tensor[index]


def weight_format(kind: str, scale_dtype: torch.dtype, row_scales: bool) -> WeightFormat:
    """The format of a :class:`LogicalLayer`'s weight."""
    name = {dtype: name for name, dtype in SCALE_DTYPES.items()}[scale_dtype]
    if kind == "nvfp4":
        return MinifloatFormat(("e2m1",), NVFP4_GROUP, name, "row" if row_scales else False)
    return IntegerFormat(4, INT4_GROUP, symmetric=kind == "int4", scale_dtype=name)


def layer_spec(fmt: WeightFormat, kind: str, rank: int, smooth: bool, shift: bool, extras: list[torch.dtype]) -> LayerSpec:
    """The spec of a :class:`LogicalLayer`; ``extras`` are the dtypes of its factors and vectors."""
    dtype = extras[0] if extras else torch.float16
    for other in extras[1:]:
        dtype = torch.promote_types(dtype, other)
    activations = "none" if kind == "awq" else kind
    return LayerSpec(fmt, rank, 0, smooth, activations, shift, DTYPE_NAMES[dtype])


def concatenate_columns(layers: list[LogicalLayer]) -> LogicalLayer:
    """One layer whose inputs are those of all layers side by side, and whose output is the sum of theirs.

    Raises:
        ValueError: the layers' weights have different formats.
    """
    if len(layers) == 1:
        return layers[0]
    first = layers[0]
    if {layer.kind for layer in layers} != {first.kind} or {layer.scales.dtype for layer in layers} != {first.scales.dtype}:
        raise ValueError("the halves of a layer have different formats")
    group = NVFP4_GROUP if first.kind == "nvfp4" else INT4_GROUP
    if any(layer.codes.shape[1] % group for layer in layers[:-1]):
        raise ValueError(f"the halves of a layer meet inside a group of {group} inputs")
    return LogicalLayer(
        kind=first.kind,
        codes=torch.cat([layer.codes for layer in layers], 1),
        scales=torch.cat([_folded(layer) for layer in layers], 1),
        bias=_sum([layer.bias for layer in layers]),
        smooth=_side_by_side([layer.smooth for layer in layers], layers, 1.0),
        shift=_side_by_side([layer.shift for layer in layers], layers, 0.0),
        down=_block_diagonal([layer.down for layer in layers], layers),
        up=_side_by_side_ranks([layer.up for layer in layers]),
    )


def _folded(layer: LogicalLayer) -> Tensor:
    """Scales of groups, those of rows multiplied in: each half has its own. E4M3 times 16 bits is exact in float32."""
    if layer.kind != "nvfp4":
        return layer.scales
    return layer.scales.float() * (1.0 if layer.row_scales is None else layer.row_scales[:, None])


def _sum(biases: list[Tensor | None]) -> Tensor | None:
    present = [bias for bias in biases if bias is not None and bias.any()]
    if not present:
        return next((bias for bias in biases if bias is not None), None)
    return present[0] if len(present) == 1 else torch.stack([bias.float() for bias in present]).sum(0)


def _side_by_side(vectors: list[Tensor | None], layers: list[LogicalLayer], neutral: float) -> Tensor | None:
    if all(vector is None for vector in vectors):
        return None
    dtype = next(vector.dtype for vector in vectors if vector is not None)
    filled = [
        torch.full((layer.codes.shape[1],), neutral, dtype=dtype) if vector is None else vector
        for vector, layer in zip(vectors, layers, strict=True)
    ]
    return torch.cat(filled)


def _block_diagonal(factors: list[Tensor | None], layers: list[LogicalLayer]) -> Tensor | None:
    if all(factor is None for factor in factors):
        return None
    dtype = next(factor.dtype for factor in factors if factor is not None)
    empty = [
        torch.zeros(0, layer.codes.shape[1], dtype=dtype) if factor is None else factor
        for factor, layer in zip(factors, layers, strict=True)
    ]
    return torch.block_diag(*empty)


def _side_by_side_ranks(factors: list[Tensor | None]) -> Tensor | None:
    present = [factor for factor in factors if factor is not None]
    return torch.cat(present, 1) if present else None
