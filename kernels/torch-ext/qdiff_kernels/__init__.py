"""qdiff-kernels: layers that multiply by packed 2- to 8-bit weights.

Every op is a ``torch.library`` custom op with a torch reference, a fake implementation and a gradient to its input. Inputs are
tensors and sizes only; nothing here knows a model, a checkpoint or a quantization method.
"""

from __future__ import annotations

from . import cpu
from . import gpu as gpu
from ._dispatch import implementation, implementations, use
from .activations import dequantize_activations, quantize_activations
from .bitpack import pack_bits, packed_bytes, unpack_bits
from .codebook import codebook_conv2d, codebook_dequantize, codebook_linear
from .hadamard import largest_block, rotate, unrotate
from .integer import integer_conv2d, integer_dequantize, integer_linear
from .minifloat import minifloat_conv2d, minifloat_dequantize, minifloat_linear
from .reference import kernel_layout, matrix_layout

__all__ = [
    "codebook_conv2d",
    "codebook_dequantize",
    "codebook_linear",
    "cpu",
    "dequantize_activations",
    "implementation",
    "implementations",
    "integer_conv2d",
    "integer_dequantize",
    "integer_linear",
    "kernel_layout",
    "largest_block",
    "matrix_layout",
    "minifloat_conv2d",
    "minifloat_dequantize",
    "minifloat_linear",
    "pack_bits",
    "packed_bytes",
    "quantize_activations",
    "rotate",
    "unpack_bits",
    "unrotate",
    "use",
]
