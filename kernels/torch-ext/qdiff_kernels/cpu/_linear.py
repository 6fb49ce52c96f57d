"""``<format>_linear`` on the CPU: the strategy follows from the number of tokens and the activations' number format.

- Few tokens: the packed weight is decoded four rows at a time into the first-level cache and multiplied there.
- INT8 activations: chunks of the weight are decoded to INT8 with a scale per row and multiplied by ``torch._int_mm``, at twice
  the speed of bfloat16. Weights of up to six bits that are not integers times a row scale (plus a row zero) are rounded once
  more, to the row's INT8 grid, an error of about 1% of the weight's standard deviation.
- Else: chunks of the weight are decoded to bfloat16 (float32 for float16 and float32 inputs) and multiplied by torch.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..activations import KINDS
from ..reference import Extras
from ._activations import LIMITS, Operands, prepare, split_bytes, split_vectors
from ._epilogue import scale_sums
from ._thresholds import few_tokens, integer_tokens
from ._weights import KINDS as DTYPES
from ._weights import NAMES, Weight, decode, run_bytes, run_sums, run_weight, scales_per_block

CHUNK_BYTES = 8 << 20  # bytes of weight decoded before each product: few enough to stay in a shared cache
CACHED_NUMBERS = 3 << 17  # numbers in the tokens, which the packed product reads for every four rows: 768 KB of second-level cache
SUM_BYTES = 1 << 19  # bytes of INT32 sums before they are scaled: few enough to stay in the second-level cache
LEAST_ROWS = 512  # rows in a chunk: shorter products are slower
LEAST_TOKENS = 128  # tokens in a tile, for the same reason
ROUNDED_BITS = 6  # widest weights that may be rounded to INT8 once more


def linear(x: Tensor, weight: Weight, extras: Extras, strategy: str | None = None) -> Tensor:
    """Product of supported inputs, ``x [..., columns]`` -> ``[..., rows]``, by a strategy (:func:`choose_strategy` by default)."""
    tokens = x.reshape(-1, weight.columns)
    y = torch.empty(tokens.shape[0], weight.codes.shape[0], dtype=x.dtype, device="cpu")
    STRATEGIES[strategy or choose_strategy(tokens, weight, extras)](tokens, weight, extras, y)
    return y.view(*x.shape[:-1], y.shape[1])


def choose_strategy(x: Tensor, weight: Weight, extras: Extras) -> str:
    """How to multiply ``x [tokens, columns]``: by the packed weight in "integers" or "bfloat16", or "decoded", by torch."""
    tokens, activations = x.shape[0], extras.activations
    if tokens <= integer_tokens(weight.kind, activations) and supports_integers(x, weight, extras):
        return "integers"
    in_cache = tokens * weight.columns <= CACHED_NUMBERS
    if in_cache and tokens <= few_tokens(weight.kind, weight.bits_per_weight, activations):
        return "bfloat16"
    return "decoded"


def supports_integers(x: Tensor, weight: Weight, extras: Extras) -> bool:
    """Whether a kernel multiplies in integers. Integers represent bfloat16 and float16 inputs well enough, but not float32."""
    if extras.activations not in ("none", "int8"):
        return False
    if weight.sums is not None and not weight.sums.integer:
        return extras.activations == "none"  # sums of floating-point entries, taken in float32
    exact_enough = extras.activations == "int8" or x.dtype != torch.float32
    return exact_enough and (weight.sums is not None or scales_per_block(weight) > 0)


def supports(x: Tensor, extras: Extras) -> bool:
    """Whether the kernels accept this input's dtype, device and activations."""
    channels = x.shape[-1]
    return bool(
        x.dtype in DTYPES
        and x.numel()
        and x.device.type == "cpu"
        and extras.activations in KINDS
        and (not extras.rotation or channels % extras.rotation == 0)
    )


def supports_transforms(extras: Extras) -> bool:
    """Whether a kernel transforms inputs as ``extras`` asks; else torch does, and multiplies by the decoded weight."""
    return extras.activations in LIMITS and extras.shift is None


def operand_dtype(x: Tensor, activations: str) -> torch.dtype:
    """Dtype of the operands: bfloat16 for bfloat16 inputs and for quantized ones, whose codes it holds exactly; else float32."""
    return torch.bfloat16 if x.dtype == torch.bfloat16 or activations != "none" else torch.float32


def _branch(x: Tensor, extras: Extras) -> tuple[Tensor, Tensor] | None:
    """The low-rank branch as two factors, ``[tokens, rank]`` and ``[rows, rank]``."""
    if extras.low_rank_down is None or extras.low_rank_up is None:
        return None
    down, up = (factor.float().to(x.dtype) for factor in (extras.low_rank_down, extras.low_rank_up))  # 8 times as fast as directly
    return F.linear(x, down), up


def _multiply_in_integers(x: Tensor, weight: Weight, extras: Extras, y: Tensor) -> None:
    if weight.sums is not None:
        operands = split_vectors(x, extras, weight.vector_size, weight.sums.lanes, weight.sums.integer)
        run_sums(weight, **_product(x, operands, extras, y))
        return
    codes = extras.activations == "int8"
    operands = split_bytes(x, extras, codes)
    run_bytes(weight, scales_per_block(weight), not codes, **_product(x, operands, extras, y))


def _multiply_in_bfloat16(x: Tensor, weight: Weight, extras: Extras, y: Tensor) -> None:
    dtype = operand_dtype(x, extras.activations)
    operands = prepare(x, extras, dtype, 32 if dtype == torch.bfloat16 else 16)
    run_weight(weight, NAMES[dtype], **_product(x, operands, extras, y))


def _product(x: Tensor, operands: Operands, extras: Extras, y: Tensor) -> dict[str, Any]:
    """Fields of the job (``_job.py``) that multiplies ``operands``; tensors stand for the addresses of their data."""
    branch = _branch(x, extras)
    addend = None if branch is None else F.linear(*branch).float()
    bias = None if extras.bias is None else extras.bias.float().contiguous()
    return {
        "TOKENS": x.shape[0],
        "X": operands.values,
        "X_STRIDE": operands.values.stride(0) * operands.values.element_size(),
        "Y": y,
        "Y_KIND": DTYPES[y.dtype],
        "BIAS": bias,
        "TOKEN_SCALES": operands.scales,
        "ADDEND": addend,
    }


def _chunk_rows(weight: Weight, size: int) -> int:
    return max(LEAST_ROWS, CHUNK_BYTES // (weight.columns * size))


def _multiply_decoded(x: Tensor, weight: Weight, extras: Extras, y: Tensor) -> None:
    exact = weight.centered is not None or weight.int8()[1]
    if extras.activations == "int8" and (exact or weight.bits_per_weight <= ROUNDED_BITS):
        _multiply_int8(x, weight, extras, y)
    else:
        _multiply_floats(x, weight, extras, y)


def _multiply_int8(x: Tensor, weight: Weight, extras: Extras, y: Tensor) -> None:
    operands = prepare(x, extras, torch.int8)
    assert operands.scales is not None
    zeros = None
    if weight.centered is not None:  # a zero per row multiplies the sum of a token's codes: the rest is exact in INT8
        weight, zeros = weight.centered()
        zeros = zeros.expand(y.shape[1]).contiguous()
    bias = None if extras.bias is None else extras.bias.float().contiguous()
    rows, step = y.shape[1], _chunk_rows(weight, 1)
    dense = torch.empty(min(step, rows), weight.columns, dtype=torch.int8, device="cpu")
    scales = torch.empty(min(step, rows), dtype=torch.float32, device="cpu")
    for first in range(0, rows, step):
        part = decode(weight, torch.int8, first, min(step, rows - first), dense, scales)
        last = first + len(part)
        part_bias, part_zeros = (None if v is None else v[first:last] for v in (bias, zeros))
        tile = max(LEAST_TOKENS, SUM_BYTES // (4 * len(part)))
        sums = torch.empty(min(tile, len(y)), len(part), dtype=torch.int32, device="cpu")
        for top in range(0, len(y), tile):
            codes, token_scales, out = (t[top : top + tile] for t in (operands.values, operands.scales, y[:, first:last]))
            torch._int_mm(codes, part.t(), out=sums[: len(codes)])
            scale_sums(sums[: len(codes)], token_scales, scales, part_bias, out, part_zeros, None if zeros is None else codes)
    branch = _branch(x, extras)
    if branch is not None:
        y.addmm_(branch[0], branch[1].t())


def _multiply_floats(x: Tensor, weight: Weight, extras: Extras, y: Tensor) -> None:
    dtype = operand_dtype(x, extras.activations)
    operands = prepare(x, extras, dtype)
    rows, step = y.shape[1], _chunk_rows(weight, dtype.itemsize)
    out = y if y.dtype == dtype else torch.empty_like(y, dtype=dtype)
    dense = torch.empty(min(step, rows), weight.columns, dtype=dtype, device="cpu")
    for first in range(0, rows, step):
        part = decode(weight, dtype, first, min(step, rows - first), dense)
        torch.mm(operands.values, part.t(), out=out[:, first : first + len(part)])
    if operands.scales is not None:
        out.mul_(operands.scales[:, None])
    if y.dtype.itemsize > out.dtype.itemsize:  # branch and bias are not rounded to the operands' dtype
        out = y.copy_(out)
    branch = _branch(x, extras)
    if branch is not None:
        out.addmm_(branch[0].to(out.dtype), branch[1].to(out.dtype).t())
    if extras.bias is not None:
        out.add_(extras.bias)
    if out is not y:
        y.copy_(out)


STRATEGIES = {"integers": _multiply_in_integers, "bfloat16": _multiply_in_bfloat16, "decoded": _multiply_decoded}
