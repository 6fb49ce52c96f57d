"""Packed weights as ComfyUI's own ``QuantizedTensor``, so that its memory management sees an ordinary quantized weight.

Everything a weight stores lies in one flat uint8 buffer: ComfyUI counts, pins, streams and copies exactly one storage per weight.
The layout of the buffer is a list of blocks, each some rows of the weight quantized on its own: a fused q, k, v is three of them.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from comfy_kitchen.tensor import QuantizedLayout, QuantizedTensor, register_layout_class, register_layout_op
from comfy_kitchen.tensor.base import dequantize_args
from torch import Tensor

from qdiff_diffusers.formats import LayerSpec, TensorInfo
from qdiff_diffusers.layers import CONV2D_OPS, LINEAR_OPS, op_arguments

NAME = "QDiffLayout"
ALIGNMENT = 256  # bytes, more than any dtype or kernel asks for


class Stored(NamedTuple):
    """Position, shape and dtype of a tensor in the buffer."""

    name: str
    offset: int
    info: TensorInfo


@dataclass(frozen=True)
class Block:
    """Some rows of a weight: their spec (``None``: dense), name, logical shape, and the places of their tensors."""

    spec: LayerSpec | None
    name: str
    shape: tuple[int, ...]
    stored: tuple[Stored, ...]
    swapped: bool = False

    def tensors(self, data: Tensor) -> dict[str, Tensor]:
        """Views into the buffer."""
        return {s.name: data[s.offset : s.offset + s.info.nbytes].view(s.info.dtype).view(s.info.shape) for s in self.stored}


@dataclass(frozen=True)
class Params:
    """What ComfyUI keeps beside a quantized weight's data. Immutable, so copies share it."""

    orig_dtype: torch.dtype
    orig_shape: tuple[int, ...]
    blocks: tuple[Block, ...] = ()
    transposed: bool = False

    def to_device(self, device: Any) -> Params:
        return self

    def clone(self) -> Params:
        return self

    def copy_from(self, source: Params, non_blocking: bool = False) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, getattr(source, field.name))


class QDiffLayout(QuantizedLayout):
    """Tells ComfyUI how to decode qdiff's weights. It cannot encode, for which the methods need more than a tensor."""

    Params = Params

    @classmethod
    def quantize(cls, tensor: Tensor, **kwargs: Any) -> Any:
        raise NotImplementedError("qdiff weights are not quantized on the fly; use the Quantize Model (qdiff) node")

    @classmethod
    def dequantize(cls, qdata: Tensor, params: Params) -> Tensor:
        """The dense weight, in its logical shape and dtype."""
        rows = [_dequantize(block, qdata, params.orig_dtype) for block in params.blocks]
        weight = rows[0] if len(rows) == 1 else torch.cat(rows)
        return weight.t() if params.transposed else weight

    @classmethod
    def get_plain_tensors(cls, qtensor: QuantizedTensor) -> tuple[Tensor, ...]:
        return (qtensor._qdata,)

    @classmethod
    def state_dict_tensors(cls, qdata: Tensor, params: Params) -> dict[str, Tensor]:
        return {f".{i}.{name}": t for i, block in enumerate(params.blocks) for name, t in block.tensors(qdata).items()}


register_layout_class(NAME, QDiffLayout)


class Piece(NamedTuple):
    """Rows to put into a weight: packed by ``spec``, or dense with ``spec=None`` and one tensor "weight"."""

    spec: LayerSpec | None
    name: str
    shape: tuple[int, ...]
    tensors: dict[str, Tensor]
    swapped: bool = False


def make_weight(pieces: list[Piece], dtype: torch.dtype) -> QuantizedTensor:
    """One weight whose rows are those of ``pieces``, in order. ``dtype`` is the one it computes in."""
    buffer: list[Tensor] = []
    blocks, offset = [], 0
    for piece in pieces:
        stored = []
        for name, tensor in piece.tensors.items():
            flat = tensor.contiguous().reshape(-1).view(torch.uint8)
            padding = -flat.numel() % ALIGNMENT
            buffer += [flat, flat.new_zeros(padding)]
            stored.append(Stored(name, offset, TensorInfo(tuple(tensor.shape), tensor.dtype)))
            offset += flat.numel() + padding
        blocks.append(Block(piece.spec, piece.name, piece.shape, tuple(stored), piece.swapped))
    shape = (sum(piece.shape[0] for piece in pieces), *pieces[0].shape[1:])
    return QuantizedTensor(torch.cat(buffer), NAME, Params(dtype, shape, tuple(blocks)))


def is_packed(weight: Any) -> bool:
    """Whether a weight is packed by qdiff."""
    return isinstance(weight, QuantizedTensor) and weight._layout_cls == NAME


def packed_linear(x: Tensor, weight: QuantizedTensor, bias: Tensor | None) -> Tensor:
    """``x @ weight.T + bias`` without decoding the weight in memory."""

    def multiply(block: Block, tensors: dict[str, Tensor], bias: Tensor | None) -> Tensor:
        if block.spec is None:
            return F.linear(x, tensors["weight"].to(x.dtype), bias)
        return LINEAR_OPS[block.spec.format.kind](x, *op_arguments(block.spec, tensors, block.shape, bias))

    return _by_blocks(weight, bias, multiply, -1)


def packed_conv2d(x: Tensor, weight: QuantizedTensor, bias: Tensor | None, window: tuple[list[int], ...]) -> Tensor:
    """2-D convolution; ``window`` is stride, padding and dilation."""
    kernel = list(weight._params.orig_shape[2:])

    def convolve(block: Block, tensors: dict[str, Tensor], bias: Tensor | None) -> Tensor:
        if block.spec is None:
            return F.conv2d(x, tensors["weight"].to(x.dtype), bias, *window)
        if block.spec.kernel_vectors:  # columns in an order that no fused kernel reads
            return F.conv2d(x, block.spec.dequantize(tensors, block.shape, x.dtype), bias, *window)
        return CONV2D_OPS[block.spec.format.kind](x, *op_arguments(block.spec, tensors, block.shape, bias), kernel, *window)

    return _by_blocks(weight, bias, convolve, 1)


def shift_offset(weight: QuantizedTensor) -> Tensor | None:
    """Offset to add to the bias, ``[rows]``, where the decoded weight is used; ``None`` for no offset.

    The bias of a layer that shifts its inputs undoes the shift.
    """
    blocks = weight._params.blocks
    if not any(block.spec and block.spec.shift for block in blocks):
        return None
    offsets = [
        block.spec.shift_offset(block.tensors(weight._qdata), block.shape)
        if block.spec and block.spec.shift
        else torch.zeros(block.shape[0], device=weight._qdata.device)
        for block in blocks
    ]
    return torch.cat(offsets)


def _by_blocks(weight: QuantizedTensor, bias: Tensor | None, compute: Any, dim: int) -> Tensor:
    """Outputs of all blocks side by side along ``dim``."""
    out, row = [], 0
    for block in weight._params.blocks:
        rows = block.shape[0]
        out.append(compute(block, block.tensors(weight._qdata), None if bias is None else bias[row : row + rows]))
        row += rows
    return out[0] if len(out) == 1 else torch.cat(out, dim)


def _dequantize(block: Block, data: Tensor, dtype: torch.dtype) -> Tensor:
    tensors = block.tensors(data)
    return tensors["weight"].to(dtype) if block.spec is None else block.spec.dequantize(tensors, block.shape, dtype)


@register_layout_op(torch.ops.aten.linear.default, QDiffLayout)
def _linear(qt: Any, args: Any, kwargs: Any) -> Any:
    """``F.linear`` with a packed weight, wherever it is called."""
    x, weight = args[0], args[1]
    if kwargs or not is_packed(weight) or weight._params.transposed or isinstance(x, QuantizedTensor):
        return F.linear(*dequantize_args(args), **dequantize_args(kwargs))
    return packed_linear(x, weight, args[2] if len(args) > 2 else None)
