"""The complete description of one packed layer: its weight format and the three optional extras."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from qdiff_kernels import kernel_layout
from qdiff_kernels.activations import KINDS
from qdiff_kernels.minifloat import scale_values
from torch import Tensor

from .base import TensorInfo, WeightFormat, check_choice, check_flag, check_range, non_default_fields, strict_from_dict
from .codebook import CodebookFormat
from .integer import IntegerFormat
from .minifloat import MinifloatFormat
from .transform import channels_last, smooth_matrix, unrotate_matrix

FORMATS: dict[str, type[WeightFormat]] = {f.kind: f for f in (CodebookFormat, MinifloatFormat, IntegerFormat)}
PER_ROW = ("codes", "scales", "zeros", "tensor_scale", "low_rank_up")  # unless they are one for all rows
MAX_RANK = 4096
MAX_SCALES = 4096  # of the inputs of one layer
STATIC = ("int8", "fp8")  # kinds of activations that can have stored scales
BLOCK = 1 << 22  # weights that are decoded at a time where only a number about them is wanted
EXTRAS_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class LayerSpec:
    """What one layer stores. With the weight's logical shape it determines every tensor's name, shape and dtype.

    Attributes:
        format: of the packed weight, whose matrix is ``[out, in]`` or, for a convolution, ``[out, kh*kw*in]``.
        rank: of the low-rank branch (``low_rank_down [rank, columns]``, ``low_rank_up [out, rank]``); 0 for none.
        rotation: Hadamard block along the input channels; 0 for none.
        smooth: whether inputs are divided by a vector ``smooth [in]``.
        activations: "none", "int8", "fp8", "int4" or "nvfp4".
        shift: whether a vector ``shift [in]`` is added to the inputs, before ``smooth``. "int4" groups in which it is positive
            are quantized to 0 .. 15, "int8" and "fp8" ones with a stored scale to unsigned numbers. The bias stored with the layer
            already undoes it.
        kernel_vectors: whether the columns of a convolution's stored matrix run through the kernel's taps before the next channel,
            so that a vector of kh*kw weights is one kernel (KAQ); otherwise through the channels before the next tap.
        extras_dtype: of the branch, ``smooth`` and ``shift``: "float16", "bfloat16" or "float32".
        input_scales: how many scales of the inputs are stored. 0: each token finds its own. 1: ``input_scales [1]`` for all. n: one
            per timestep, float32 ``input_scales [n]`` and ``input_steps [n]``; the one of the nearest timestep counts.
    """

    format: WeightFormat
    rank: int = 0
    rotation: int = 0
    smooth: bool = False
    activations: str = "none"
    shift: bool = False
    extras_dtype: str = "float16"
    kernel_vectors: bool = False
    input_scales: int = 0

    def __post_init__(self) -> None:
        check_range("rank", self.rank, 0, MAX_RANK)
        check_range("rotation", self.rotation, 0, 1 << 16)
        if self.rotation & (self.rotation - 1):
            raise ValueError(f"rotation must be a power of two or 0, got {self.rotation}")
        check_flag("smooth", self.smooth)
        check_choice("activations", self.activations, KINDS)
        check_flag("shift", self.shift)
        check_flag("kernel_vectors", self.kernel_vectors)
        check_choice("extras_dtype", self.extras_dtype, EXTRAS_DTYPES)
        check_range("input_scales", self.input_scales, 0, MAX_SCALES)
        if self.input_scales and self.activations not in STATIC:
            raise ValueError(f"input_scales go with int8 and fp8 activations, not with {self.activations!r}")
        if self.shift and (self.rotation or not (self.activations == "int4" or self.input_scales)):
            raise ValueError("shift goes with int4 activations, or stored scales of int8 or fp8 ones, that are not rotated")

    def tensors(self, shape: tuple[int, ...]) -> dict[str, TensorInfo]:
        """Every stored tensor of a weight with logical ``shape``, the bias left out."""
        rows, columns = matrix_shape(shape)
        if self.rotation and shape[1] % self.rotation:
            raise ValueError(f"rotation {self.rotation} does not divide the {shape[1]} input channels")
        if self.shift and columns != shape[1]:
            raise ValueError(f"shift is for linear layers and 1 x 1 convolutions, not for a kernel of {list(shape[2:])}")
        if self.kernel_vectors and len(shape) != 4:
            raise ValueError(f"kernel_vectors are for convolutions, not for a weight of shape {list(shape)}")
        out = self.format.tensors(rows, columns)
        dtype = EXTRAS_DTYPES[self.extras_dtype]
        if self.rank:
            out["low_rank_down"] = TensorInfo((self.rank, columns), dtype)
            out["low_rank_up"] = TensorInfo((rows, self.rank), dtype)
        if self.smooth:
            out["smooth"] = TensorInfo((shape[1],), dtype)
        if self.shift:
            out["shift"] = TensorInfo((shape[1],), dtype)
        if self.input_scales:
            out["input_scales"] = TensorInfo((self.input_scales,), torch.float32)
        if self.input_scales > 1:
            out["input_steps"] = TensorInfo((self.input_scales,), torch.float32)
        return out

    def select_rows(self, tensors: dict[str, Tensor], index: Tensor, rows: int) -> dict[str, Tensor]:
        """The tensors of the rows ``index [n]`` of a weight with ``rows`` rows: the same spec describes them.

        Every row decodes on its own; what all rows share is passed on as it is.
        """

        def select(name: str, tensor: Tensor) -> Tensor:
            per_row = name in PER_ROW and tensor.ndim == 2 and tensor.shape[0] == rows
            return tensor.index_select(0, index) if per_row else tensor

        return {name: select(name, tensor) for name, tensor in tensors.items()}

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes stored for a weight of logical ``shape``: codes, codebooks, scales, low-rank factors, everything."""
        return sum(info.nbytes for info in self.tensors(shape).values())

    def bits_per_weight(self, shape: tuple[int, ...]) -> float:
        """Stored bits over the number of weights."""
        return 8 * self.nbytes(shape) / math.prod(shape)

    def dequantize(self, tensors: dict[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weight that the layer is equivalent to, in its logical ``shape``, low-rank branch included.

        Of a two-dimensional weight the tensors may be those of any number of its rows; see :meth:`select_rows`.
        """
        wide = torch.promote_types(dtype, torch.float32)
        matrix = self._main_matrix(tensors, shape, wide)
        if self.rank:
            matrix = matrix + tensors["low_rank_up"].to(wide) @ tensors["low_rank_down"].to(wide)
        return (kernel_layout(matrix, (shape[2], shape[3])) if len(shape) == 4 else matrix).to(dtype)

    def zero_share(self, tensors: dict[str, Tensor], shape: tuple[int, ...]) -> float:
        """Share of the weights that are stored as exactly zero: as the format has them, rotated and without the branch."""
        rows, columns = matrix_shape(shape)
        zeros = 0
        for index in torch.arange(rows, device=tensors["codes"].device).split(max(1, BLOCK // columns)):
            part = self.select_rows(tensors, index, rows)
            zeros += int((self.format.dequantize(part, columns) == 0).sum())
        return zeros / (rows * columns)

    def bound(self, tensors: dict[str, Tensor]) -> float:
        """A bound on the magnitude of everything that the layer multiplies its inputs by: cheap, and seldom twice what there is."""
        largest = float(scale_values(tensors["scales"], torch.float32).abs().amax()) * self.format.largest_level(tensors)
        largest *= float(tensors["tensor_scale"].abs().amax()) if "tensor_scale" in tensors else 1.0
        largest += float(tensors["zeros"].float().abs().amax()) if "zeros" in tensors else 0.0
        factors = [float(tensors[name].float().abs().amax()) for name in ("low_rank_down", "low_rank_up") if self.rank]
        return max(largest, *factors, self.rank * math.prod(factors) if factors else 0.0)

    def shift_offset(self, tensors: dict[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        """What ``shift`` adds to every output, float32 ``[out]``: to be added to the bias of the dense layer."""
        return self._main_matrix(tensors, shape, torch.float32) @ tensors["shift"].float()

    def stored_order(self, matrix: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The format's matrix ``[rows, columns]`` with its columns channels last, whichever order it has."""
        return channels_last(matrix, shape[1]) if self.kernel_vectors else matrix

    def _main_matrix(self, tensors: dict[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The weight matrix without the branch, as the raw inputs see it."""
        _, columns = matrix_shape(shape)
        matrix = self.stored_order(self.format.dequantize(tensors, columns, dtype), shape)
        matrix = unrotate_matrix(matrix, shape[1], self.rotation)
        return smooth_matrix(matrix, 1 / tensors["smooth"].to(dtype)) if self.smooth else matrix

    def row_tensors(self, shape: tuple[int, ...]) -> set[str]:
        """Names of the tensors whose first dimension counts the weight's rows; the others are shared by all rows."""
        names = {"codes", "scales", "zeros", "tensor_scale", "low_rank_up"}
        return {name for name, info in self.tensors(shape).items() if name in names and info.shape[0] == shape[0]}

    def describe(self) -> str:
        """A few words for tables."""
        parts = [self.format.describe()]
        parts += [f"rank {self.rank}"] if self.rank else []
        parts += [f"rotated {self.rotation}"] if self.rotation else []
        parts += ["by kernels"] if self.kernel_vectors else []
        parts += ["smoothed"] if self.smooth else []
        parts += ["shifted"] if self.shift else []
        static = {0: "", 1: "static "}.get(self.input_scales, f"{self.input_scales} steps' ")
        parts += [f"{static}{self.activations} activations"] if self.activations != "none" else []
        return ", ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        return non_default_fields(self) | {"format": self.format.to_dict()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> LayerSpec:
        """Inverse of :meth:`to_dict`. Raises ``ValueError`` that names what is unknown, missing or out of range."""
        if not isinstance(data, dict) or not isinstance(data.get("format"), dict):
            raise ValueError(f"a layer spec must be an object with a format, got {data!r}")
        stored = dict(data["format"])
        kind = stored.pop("kind", None)
        if kind not in FORMATS:
            raise ValueError(f"unknown weight format {kind!r}; this version knows {', '.join(FORMATS)}")
        weight_format = strict_from_dict(FORMATS[kind], stored, f"{kind} format")
        return strict_from_dict(cls, data | {"format": weight_format}, "layer spec")


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Logical weight shape ``[out, in]`` or ``[out, in, kh, kw]`` -> ``(rows, columns)`` of the stored matrix."""
    if len(shape) not in (2, 4) or any(n < 1 for n in shape):
        raise ValueError(f"a weight must have shape [out, in] or [out, in, kh, kw], got {list(shape)}")
    return shape[0], math.prod(shape[1:])
