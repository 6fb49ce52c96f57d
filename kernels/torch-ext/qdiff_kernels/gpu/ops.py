"""The ops' Triton implementations: which kernels run for a call, and in what order."""

from __future__ import annotations

import warnings
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..hadamard import MAX_BLOCK, rotate
from ..reference import Extras, Window
from . import configs, weights
from .activations import CODES, prepare
from .blocks import NATIVE
from .conv2d import conv2d as convolve
from .decode import INTERPRETED
from .dequantize import dequantize as decode
from .dequantize import dequantize_tokens
from .launch import call, repeated
from .linear import Arithmetic, Inputs, Units, plan
from .linear import linear as multiply
from .weights import PackedWeight

WEIGHT_ARGUMENTS = {"codebook": 4, "minifloat": 5, "integer": 5}
GIVEN = {"int8": torch.int8, "int4": torch.int8, "fp8": torch.float8_e4m3fn}  # dtype of quantized inputs
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
FUSED_RANK_BYTES = 128  # of one column of the projection: 85 KB of shared memory in all, of 99 KB on consumer GPUs
ROOM = 16  # columns of a low-rank branch beside a decoded weight come in multiples of this: rows begin on 32 bytes


@repeated(lambda kind, *args: None)
def dequantize(known: None, kind: str, *args: Any) -> Tensor:
    """``<format>_dequantize``."""
    *weight, columns, dtype = args
    if dtype not in FLOATS or not runs_on(weight[0]):
        return NotImplemented
    return decode(_pack(kind, weight, columns), dtype)


def _content(kind: str, x: Tensor, *args: Any) -> Any:
    """What decides about a product though it depends on numbers in a tensor: see ``repeated``."""
    activations = args[WEIGHT_ARGUMENTS[kind] + Extras._fields.index("activations")]
    if kind == "codebook" and activations in ("int8", "int4"):
        return weights.codebook_unit(args[1])
    return kind == "minifloat" and activations == "fp8" and args[3] == "e4m3" and weights.no_nan(args[0])


@repeated(_content)
def linear(known: Any, kind: str, x: Tensor, *args: Any) -> Tensor:
    """``<format>_linear``."""
    count = WEIGHT_ARGUMENTS[kind]
    extras = Extras(*_contiguous(args[count:]))
    if not takes(x, extras):
        return NotImplemented
    weight = _pack(kind, args[:count], x.shape[-1])
    if not matrix_units(x.device).bf16 or not transforms(extras):
        return reference.linear(x, decode(weight, reference.compute_dtype(x, extras)), extras)
    return product(weight, x.reshape(-1, x.shape[-1]), extras, ready=known is True).view(*x.shape[:-1], weight.rows)


def product(
    weight: PackedWeight, x: Tensor, extras: Extras, config: configs.LinearConfig | None = None, ready: bool = False
) -> Tensor:
    """x ``[tokens, columns]`` -> ``[tokens, rows]``: transform, then decode and multiply at once or one after the other.

    docs/development/gpu_kernels.md says which of the three ways a call takes, and why.

    Args:
        ready: E4M3 codes hold no NaN; see :func:`weights.no_nan`.
    """
    if config is None:
        given = str(x.dtype)[6:] if extras.activations == "none" else extras.activations
        config = configs.choose(weight_name(weight), given, x.shape[0], weight.rows, weight.columns, x.device)
    units = matrix_units(x.device)
    arithmetic = plan(weight, GIVEN.get(extras.activations, x.dtype), config.block_columns, x.dtype, units)
    native = arithmetic.scale_at == NATIVE.value and extras.activations == "fp8"
    eight_bit = arithmetic.operand.itemsize == 1 and weight.row_scales and extras.activations != "int4"
    if config.two_pass and not eight_bit and not native:
        return decoded_product(weight, x, extras)
    inputs = transform(x, extras, extras.low_rank_down)
    operand = ready_operand(weight, arithmetic) if eight_bit and ready else None

    def launch(fitting: configs.LinearConfig) -> Tensor:
        if fitting.two_pass and eight_bit:
            return eight_bit_product(weight, operand, inputs, extras, fitting, x.dtype, units)
        factor = weight if operand is None else weight.dense(operand, arithmetic.unit)
        return multiply(factor, inputs, extras.low_rank_up, extras.bias, fitting, x.dtype, units)

    return configs.fit((x.device, weight_name(weight), inputs.values.dtype, x.dtype), config, launch)


def transform(x: Tensor, extras: Extras, down: Tensor | None) -> Inputs:
    """Inputs as the product takes them; the low-rank projection ``down`` rides along where it fits beside the tokens."""
    if extras.smooth is None and not extras.rotation and extras.activations == "none":
        inputs = Inputs(x if x.stride(1) == 1 else x.contiguous(), None, None, None)
    else:
        rides = down is not None and down.shape[0] * x.element_size() <= FUSED_RANK_BYTES
        key = (x.device, "prepare", x.dtype, extras.activations, extras.rotation, 0 if down is None else down.shape[0])
        inputs = configs.fit(key, rides, lambda rides: prepare(x, extras, down if rides else None), _without_branch)
    return inputs if down is None or inputs.branch is not None else inputs._replace(branch=call(_project, x, down))


def _project(x: Tensor, down: Tensor) -> Tensor:
    return x @ down.to(x.dtype).T


def _without_branch(rides: bool) -> bool | None:
    return False if rides else None


def decoded_product(weight: PackedWeight, x: Tensor, extras: Extras) -> Tensor:
    """Decode the whole weight once, scales and all, then the vendor's 16-bit product: for many tokens, which share the decoding.

    The low-rank branch costs no pass over the result. Where the product sees the input itself, if smoothed or rotated,
    ``up @ down`` is added to the weight, which is then rounded once, like any dense weight. Where it sees quantized inputs, the
    branch is columns more of both factors. Quantized inputs are multiplied as the numbers they stand for, see
    :func:`dequantize_tokens`.
    """
    down, up = (extras.low_rank_down, extras.low_rank_up) if extras.low_rank_up is not None else (None, None)
    if down is None or up is None:
        inputs = transform(x, extras, None)
        values = inputs.values if inputs.scales is None else dequantize_tokens(inputs, x.dtype)
        return call(_vendor_product, values, decode(weight, x.dtype), extras.bias)
    if extras.activations == "none":
        values = transform(x, extras, None).values
        if extras.smooth is not None or extras.rotation:
            down = call(_as_seen, down, extras.smooth, extras.rotation)
        return call(_vendor_product, values, decode(weight, x.dtype, branch=(down, up)), extras.bias)
    room = -(-down.shape[0] // ROOM) * ROOM
    values = dequantize_tokens(transform(x, extras, down), x.dtype, room)
    return call(_vendor_product, values, decode(weight, x.dtype, beside=up, room=room), extras.bias)


def _vendor_product(x: Tensor, dense: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, dense, None if bias is None else bias.to(x.dtype))


def _as_seen(down: Tensor, smooth: Tensor | None, rotation: int) -> Tensor:
    """Down-projection ``[rank, columns]`` of the inputs that smoothing and rotation leave: ``x . d = R(x / s) . R(s d)``."""
    down = down.float() if smooth is None else down.float() * smooth.float()
    return rotate(down, rotation) if rotation else down


def ready_operand(weight: PackedWeight, arithmetic: Arithmetic) -> Tensor | None:
    """The stored codes ``[rows, columns]`` where they are numbers the matrix unit takes: E4M3 codes without a NaN among them."""
    plain = weight.kind == weights.MINIFLOAT and weight.encoding == weights.E4M3 and arithmetic.unit == 1.0
    return weight.codes.view(torch.float8_e4m3fn) if plain and arithmetic.operand == torch.float8_e4m3fn else None


def eight_bit_product(
    weight: PackedWeight,
    operand: Tensor | None,
    inputs: Inputs,
    extras: Extras,
    config: configs.LinearConfig,
    dtype: torch.dtype,
    units: Units,
) -> Tensor:
    """Decode the whole weight to an 8-bit operand of the matrix unit, if it is not one as stored, then multiply.

    Sums are scaled by our own kernel or by ``torch._scaled_mm``. ``torch._int_mm`` writes int32 sums, whose scaling would cost
    another pass over four bytes a result: more than its product saves.
    """
    arithmetic = plan(weight, inputs.values.dtype, config.block_columns, dtype, units)
    if operand is None:
        operand = decode(weight, arithmetic.operand, arithmetic.unit)
    plain = operand.dtype == torch.float8_e4m3fn and arithmetic.unit == 1.0 and dtype == torch.bfloat16
    if plain and _scaled_mm_takes(inputs.values, weight):
        y = call(_scaled_mm, inputs.values, operand, inputs.scales, weight.scales, weight.e4m3, weight.tensor_scale, extras.bias)
        if y is not None:
            branch, up = inputs.branch, extras.low_rank_up
            return y if branch is None or up is None else call(_add_branch, y, branch, up)
    return multiply(weight.dense(operand, arithmetic.unit), inputs, extras.low_rank_up, extras.bias, config, dtype, units)


def _scaled_mm(
    values: Tensor, operand: Tensor, x_scales: Tensor, scales: Tensor, e4m3: bool, tensor_scale: Tensor | None, bias: Tensor | None
) -> Tensor | None:
    """``torch._scaled_mm`` to bfloat16, or ``None`` where the library refuses, which is remembered of the device."""
    scales = weights.scale_values(scales, e4m3, tensor_scale).expand(operand.shape[0], 1).T.contiguous()
    bias = None if bias is None else bias.to(torch.bfloat16)
    try:
        return torch._scaled_mm(values, operand.T, x_scales, scales, bias=bias, out_dtype=torch.bfloat16)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # row-wise scales on 12.0: pytorch/pytorch#192707
        _refused.add(values.device)
        reason = str(error).partition("\n")[0]
        warnings.warn(
            f"torch._scaled_mm does not multiply FP8 rows on {values.device} ({reason}); qdiff's kernel does", stacklevel=2
        )
        return None


def _add_branch(y: Tensor, branch: Tensor, up: Tensor) -> Tensor:
    return y.addmm_(branch, up.to(y.dtype).T)


_refused: set[torch.device] = set()


@repeated(_content)
def conv2d(known: Any, kind: str, x: Tensor, *args: Any) -> Tensor:
    """``<format>_conv2d``: 1x1 as a product of pixels, else an implicit product or a decoded kernel, by size."""
    count = WEIGHT_ARGUMENTS[kind]
    extras, window = _split(args, count)
    if not takes(x, extras):
        return NotImplemented
    height, width = (reference.conv2d_output_size(n, *g) for n, *g in zip(x.shape[-2:], *window, strict=True))
    taps = window.kernel_size[0] * window.kernel_size[1]
    weight = _pack(kind, args[:count], x.shape[1] * taps)
    if not transforms(extras):
        return call(_decoded_conv2d, x, decode(weight, reference.compute_dtype(x, extras)), window, *extras)
    if taps == 1 and window.stride == (1, 1) and window.padding == (0, 0):
        y = product(weight, x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]), extras, ready=known is True)
        return y.view(x.shape[0], height, width, weight.rows).permute(0, 3, 1, 2).contiguous()
    pixels = x.shape[0] * height * width
    config = configs.choose(weight_name(weight), f"conv {x.dtype}"[5:], pixels, weight.rows, weight.columns, x.device)
    if (extras.activations == "none" and config.two_pass) or not matrix_units(x.device).bf16:
        return call(_decoded_conv2d, x, decode(weight, reference.compute_dtype(x, extras)), window, *extras)

    def launch(fitting: configs.LinearConfig) -> Tensor:
        return convolve(weight, x, extras, window, (height, width), fitting, matrix_units(x.device).fp8)

    return configs.fit((x.device, "conv", weight_name(weight), extras.activations, x.dtype), config, launch)


def _decoded_conv2d(x: Tensor, dense: Tensor, window: Window, *extras: Any) -> Tensor:
    return reference.conv2d(x, dense, window, Extras(*extras))


def linear_input_gradient(kind: str, gradient: Tensor, *args: Any) -> Tensor:
    """``<format>_linear_input_gradient``."""
    count = WEIGHT_ARGUMENTS[kind]
    if gradient.dtype not in FLOATS or not runs_on(gradient):
        return NotImplemented
    dense = decode(_pack(kind, args[:count], args[-1]), gradient.dtype)
    return reference.linear_input_gradient(gradient, dense, Extras(*args[count:-1]))


def conv2d_input_gradient(kind: str, gradient: Tensor, *args: Any) -> Tensor:
    """``<format>_conv2d_input_gradient``."""
    count = WEIGHT_ARGUMENTS[kind]
    if gradient.dtype not in FLOATS or not runs_on(gradient):
        return NotImplemented
    extras, window = _split(args[:-1], count)
    columns = args[-1][1] * window.kernel_size[0] * window.kernel_size[1]
    dense = decode(_pack(kind, args[:count], columns), gradient.dtype)
    return reference.conv2d_input_gradient(gradient, dense, args[-1], window, extras)


def weight_name(weight: PackedWeight) -> str:
    """Key of the tuned tables: what decoding costs depends on this."""
    return weight.name


def takes(x: Tensor, extras: Extras) -> bool:
    """Whether the kernels take this input."""
    return x.dtype in FLOATS and runs_on(x) and bool(x.numel()) and extras.rotation <= MAX_BLOCK


def transforms(extras: Extras) -> bool:
    """Whether there is a kernel for what becomes of the inputs; else torch transforms and multiplies, with the decoded weight."""
    return extras.activations in CODES and extras.shift is None


def runs_on(tensor: Tensor) -> bool:
    """Triton runs on accelerators, and on the CPU only under its interpreter."""
    return tensor.device.type != "cpu" or INTERPRETED.value


@lru_cache(maxsize=16)
def matrix_units(device: torch.device) -> Units:
    """NVIDIA GPUs multiply E4M3 since Ada (8.9) and scaled blocks since Blackwell (10.0); the interpreter only the former."""
    if device.type == "cpu":
        return Units(bf16=True, fp8=True, block_scaled=False)
    if device.type != "cuda" or torch.version.hip is not None:
        return Units(bf16=True, fp8=False, block_scaled=False)
    capability = torch.cuda.get_device_capability(device)
    return Units(bf16=capability >= (8, 0), fp8=capability >= (8, 9), block_scaled=capability >= (10, 0))


def _scaled_mm_takes(values: Tensor, weight: PackedWeight) -> bool:
    """Row-wise scaled products: Hopper and newer unless the library has refused one, sizes in multiples of 16."""
    if values.device in _refused or values.device.type != "cuda" or torch.version.hip is not None or weight.zeros is not None:
        return False
    sizes_fit = values.shape[1] % 16 == 0 and weight.rows % 16 == 0
    return sizes_fit and torch.cuda.get_device_capability(values.device) >= (9, 0)


def _contiguous(args: Any) -> tuple[Any, ...]:
    return tuple(a.contiguous() if isinstance(a, Tensor) else a for a in args)


def _pack(kind: str, arguments: Any, columns: int) -> PackedWeight:
    pack: Any = getattr(weights, kind)
    return pack(*arguments, columns)


def _split(args: Any, count: int) -> tuple[Extras, Window]:
    end = count + len(Extras._fields)
    return Extras(*_contiguous(args[count:end])), Window(*(tuple(pair) for pair in args[end:]))
