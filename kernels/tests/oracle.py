"""What every op must compute, written out in plain float64 without calling the code under test.

``packed_weight`` makes a random packed weight of a format together with its dense float64 value, element by element from the
definitions in the docstrings. ``linear`` and ``conv2d`` are the layer definitions on dense float64 weights.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from qdiff_kernels import (
    codebook_conv2d,
    codebook_dequantize,
    codebook_linear,
    integer_conv2d,
    integer_dequantize,
    integer_linear,
    minifloat_conv2d,
    minifloat_dequantize,
    minifloat_linear,
)
from torch import Tensor

DEQUANTIZE = {"codebook": codebook_dequantize, "minifloat": minifloat_dequantize, "integer": integer_dequantize}
LINEAR = {"codebook": codebook_linear, "minifloat": minifloat_linear, "integer": integer_linear}
CONV2D = {"codebook": codebook_conv2d, "minifloat": minifloat_conv2d, "integer": integer_conv2d}

NO_EXTRAS: dict[str, Any] = {
    "bias": None,
    "low_rank_down": None,
    "low_rank_up": None,
    "smooth": None,
    "rotation": 0,
    "activations": "none",
    "shift": None,
    "input_scale": None,
}


class Packed(NamedTuple):
    """A packed weight: the op's leading arguments and the dense ``[rows, columns]`` float64 weight they stand for."""

    kind: str
    arguments: tuple[Any, ...]
    dense: Tensor


# One entry per way of storing a weight. The format's name comes first.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "codebook-2x8-d8": ("codebook", {"num_codebooks": 2, "bits": 8, "vector_size": 8, "group_size": None}),
    "codebook-1x6-d2-g16": ("codebook", {"num_codebooks": 1, "bits": 6, "vector_size": 2, "group_size": 16}),
    "codebook-3x5-d3-int8": ("codebook", {"num_codebooks": 3, "bits": 5, "vector_size": 3, "group_size": None, "int8": True}),
    "codebook-1x11-d4-tensor": ("codebook", {"num_codebooks": 1, "bits": 11, "vector_size": 4, "group_size": "tensor"}),
    "codebook-4x8-d32-int8": ("codebook", {"num_codebooks": 4, "bits": 8, "vector_size": 32, "group_size": None, "int8": True}),
    "e2m1-g16-e4m3-two-level": ("minifloat", {"encodings": "e2m1", "group_size": 16, "scales": "e4m3", "tensor_scale": True}),
    "e2m1-g16-e4m3-row-scales": ("minifloat", {"encodings": "e2m1", "group_size": 16, "scales": "e4m3", "row_scale": True}),
    "e2m1-g32-e8m0": ("minifloat", {"encodings": "e2m1", "group_size": 32, "scales": "e8m0"}),
    "e4m3-row": ("minifloat", {"encodings": "e4m3", "group_size": None, "scales": "float16"}),
    "e3m2-tensor": ("minifloat", {"encodings": "e3m2", "group_size": "tensor", "scales": "float32"}),
    "e1m1-row": ("minifloat", {"encodings": "e1m1", "group_size": None, "scales": "float32"}),
    "e1m2uz-g16": ("minifloat", {"encodings": "e1m2uz", "group_size": 16, "scales": "float16"}),
    "e2m1-or-e1m2-g16": ("minifloat", {"encodings": "e2m1,e1m2", "group_size": 16, "scales": "float16"}),
    "int4-g64": ("integer", {"bits": 4, "group_size": 64}),
    "int3-asymmetric-g16": ("integer", {"bits": 3, "group_size": 16, "zeros": True}),
    "int8-row": ("integer", {"bits": 8, "group_size": None}),
    "int8-asymmetric-row": ("integer", {"bits": 8, "group_size": None, "zeros": True}),
    "int2-asymmetric-tensor": ("integer", {"bits": 2, "group_size": "tensor", "zeros": True}),
}


def pack_row(codes: list[int], bits: int) -> bytes:
    """Code i at bits ``i*bits ..`` of one little-endian number."""
    number = sum(code << (i * bits) for i, code in enumerate(codes))
    return number.to_bytes((len(codes) * bits + 7) // 8, "little")


def pack(codes: np.ndarray, bits: int) -> Tensor:
    """``[rows, count]`` codes -> int8 ``[rows, bytes]``."""
    rows = [np.frombuffer(pack_row([int(c) for c in row], bits), dtype=np.int8) for row in codes]
    return torch.from_numpy(np.stack(rows).copy())


def minifloat_value(code: int, encoding: str) -> float:
    """IEEE-like value with subnormals; no code is an infinity or a NaN, and with "uz" none is a negative zero either."""
    exponent_bits, mantissa_bits = int(encoding[1]), int(encoding[3])
    if encoding.endswith("uz") and code == 1 << (mantissa_bits + exponent_bits):
        last, before = (minifloat_value((1 << (mantissa_bits + exponent_bits)) - i, encoding) for i in (1, 2))
        return -(2 * last - before) if exponent_bits == 1 else -(last + before) / 2
    mantissa = code & ((1 << mantissa_bits) - 1)
    exponent = (code >> mantissa_bits) & ((1 << exponent_bits) - 1)
    sign = -1.0 if code >> (mantissa_bits + exponent_bits) else 1.0
    bias = 2 ** (exponent_bits - 1) - 1
    if exponent == 0:
        value = mantissa / 2**mantissa_bits * 2.0 ** (1 - bias)
    else:
        value = (1 + mantissa / 2**mantissa_bits) * 2.0 ** (exponent - bias)
    return sign * min(value, {"e4m3": 448.0, "e5m2": 57344.0}.get(encoding, value))


def packed_weight(variant: str, rows: int, columns: int, seed: int = 0) -> Packed:
    """A random packed weight of ``VARIANTS[variant]`` and its dense value."""
    kind, options = VARIANTS[variant]
    random = np.random.default_rng(seed)
    group = options["group_size"]
    groups = -(-columns // group) if isinstance(group, int) else 1
    scale_rows = 1 if group == "tensor" else rows
    group_size = group if isinstance(group, int) else columns
    build = {"codebook": _codebook, "minifloat": _minifloat, "integer": _integer}[kind]
    arguments, dense = build(random, options, rows, columns, (scale_rows, groups), group_size)
    return Packed(kind, arguments, torch.from_numpy(dense))


def _per_column(scales: np.ndarray, rows: int, columns: int, group_size: int) -> np.ndarray:
    """Scale of every weight, ``[rows, columns]``."""
    out = np.empty((rows, columns))
    for r in range(rows):
        for c in range(columns):
            out[r, c] = scales[r if scales.shape[0] > 1 else 0, c // group_size if scales.shape[1] > 1 else 0]
    return out


def _codebook(random: Any, options: dict, rows: int, columns: int, scale_shape: tuple, group_size: int) -> tuple:
    count, bits, width = options["num_codebooks"], options["bits"], options["vector_size"]
    vectors = -(-columns // width)
    codes = random.integers(0, 1 << bits, (rows, vectors, count))
    if options.get("int8"):
        books = torch.from_numpy(random.integers(-128, 128, (count, 1 << bits, width)).astype(np.int8))
    else:
        books = torch.from_numpy(random.normal(size=(count, 1 << bits, width))).half()
    scales = torch.from_numpy(random.uniform(0.01, 0.05, scale_shape)).half()
    dense = np.zeros((rows, columns))
    table = books.double().numpy()
    for r in range(rows):
        for c in range(columns):
            dense[r, c] = sum(table[m, codes[r, c // width, m], c % width] for m in range(count))
    dense *= _per_column(scales.double().numpy(), rows, columns, group_size)
    return (pack(codes.reshape(rows, -1), bits), books, scales, group_size), dense


def _minifloat(random: Any, options: dict, rows: int, columns: int, scale_shape: tuple, group_size: int) -> tuple:
    encodings = options["encodings"].split(",")
    bits = 1 + int(encodings[0][1]) + int(encodings[0][3])
    codes = random.integers(0, 1 << bits, (rows, columns))
    values = random.uniform(0.01, 0.05, scale_shape)
    if options["scales"] == "e8m0":
        exponents = random.integers(110, 130, scale_shape)
        scales = torch.from_numpy(exponents.astype(np.uint8)).view(torch.int8)
        values = 2.0 ** (exponents - 127.0)
    else:
        if len(encodings) == 2:
            values = values * random.choice([-1.0, 1.0], scale_shape)
        dtypes = {"e4m3": torch.float8_e4m3fn, "float16": torch.float16, "float32": torch.float32}
        scales = torch.from_numpy(values).float().to(dtypes[options["scales"]])
        values = scales.double().numpy()
    spread = _per_column(values, rows, columns, group_size)
    dense = np.empty((rows, columns))
    for r in range(rows):
        for c in range(columns):
            dense[r, c] = abs(spread[r, c]) * minifloat_value(int(codes[r, c]), encodings[int(spread[r, c] < 0)])
    tensor_scale = torch.tensor([0.37]) if options.get("tensor_scale") else None
    if tensor_scale is not None:
        dense *= tensor_scale.double().item()
    if options.get("row_scale"):
        tensor_scale = torch.from_numpy(random.uniform(0.2, 2, (rows, 1))).bfloat16().float()
        dense *= tensor_scale.double().numpy()
    return (pack(codes, bits), scales, tensor_scale, options["encodings"], group_size), dense


def _integer(random: Any, options: dict, rows: int, columns: int, scale_shape: tuple, group_size: int) -> tuple:
    bits = options["bits"]
    codes = random.integers(0, 1 << bits, (rows, columns))
    scales = torch.from_numpy(random.uniform(0.01, 0.05, scale_shape)).half()
    spread = _per_column(scales.double().numpy(), rows, columns, group_size)
    if options.get("zeros"):
        zeros = torch.from_numpy(random.normal(size=scale_shape) * 0.1).half()
        dense = codes * spread + _per_column(zeros.double().numpy(), rows, columns, group_size)
    else:
        zeros = None
        dense = (codes - 2 ** (bits - 1)) * spread
    return (pack(codes, bits), scales, zeros, bits, group_size), dense


def splitmix64_signs(count: int) -> Tensor:
    """+1 or -1 by the top bit of splitmix64 of ``index + 1``, float64 ``[count]``."""
    mask = (1 << 64) - 1
    out = []
    for index in range(1, count + 1):
        z = index * 0x9E3779B97F4A7C15 & mask
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
        z ^= z >> 31
        out.append(-1.0 if z >> 63 else 1.0)
    return torch.tensor(out, dtype=torch.float64)


def rotation_matrix(channels: int, block: int) -> Tensor:
    """``R`` with ``rotate(x) = x @ R``, float64 ``[channels, channels]``."""
    entries = [[(-1.0) ** (i & j).bit_count() for j in range(block)] for i in range(block)]
    small = torch.tensor(entries, dtype=torch.float64) / block**0.5
    blocks = torch.block_diag(*[small] * (channels // block))
    return splitmix64_signs(channels)[:, None] * blocks


def quantize_activations(x: Tensor, kind: str, shift: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    """Last dimension of float64 x as the matrix unit sees it, scales multiplied back in."""
    if kind == "none":
        return x
    if scale is not None:
        return _nearest(x / scale.double(), _static_grid(kind, shift is not None)) * scale.double()
    if kind == "nvfp4":
        return _quantize_nvfp4(x)
    out = torch.empty_like(x)
    width = 64 if kind == "int4" else x.shape[-1]
    largest = {"int8": 127.0, "int4": 7.0, "fp8": 448.0}[kind]
    fp8 = np.unique([minifloat_value(c, "e4m3") for c in range(256)])
    for start in range(0, x.shape[-1], width):
        part = x[..., start : start + width]
        if kind == "int4" and shift is not None and (shift[start : start + width] > 0).any():
            scale = part.amax(-1, keepdim=True).clamp_min(0) / 15
            scale = torch.where(scale > 0, scale, torch.ones_like(scale))
            out[..., start : start + width] = (part / scale).round().clamp(0, 15) * scale
            continue
        scale = part.abs().amax(-1, keepdim=True) / largest
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        units = part / scale
        out[..., start : start + width] = (_nearest(units, fp8) if kind == "fp8" else units.round()) * scale
    return out


def _quantize_nvfp4(x: Tensor) -> Tensor:
    """Value by value: an E4M3 scale for every 16 channels, then the nearest E2M1 value, the even code where two are as near."""
    levels = [minifloat_value(code, "e2m1") for code in range(8)]
    even_first = torch.tensor([levels[code] for code in (0, 2, 4, 6, 1, 3, 5, 7)], dtype=torch.float64)
    out = torch.empty_like(x)
    for start in range(0, x.shape[-1], 16):
        part = x[..., start : start + 16]
        scale = (part.abs().amax(-1, keepdim=True) / 6).clamp(max=448).float().to(torch.float8_e4m3fn).double()
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        nearest = even_first[((part / scale).abs()[..., None] - even_first).abs().argmin(-1)]
        out[..., start : start + 16] = nearest * part.sign() * scale
    return out


def _static_grid(kind: str, unsigned: bool) -> np.ndarray:
    """All numbers that a code stands for; unsigned E4M4 has E4M3's bias and 16 steps in each of its 16 binades."""
    if kind == "int8":
        return np.arange(256.0) if unsigned else np.arange(-127.0, 128.0)
    if not unsigned:
        return np.unique([minifloat_value(c, "e4m3") for c in range(256)])
    small = [m / 16 * 2.0**-6 for m in range(16)]
    return np.array(small + [(1 + m / 16) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(16)])


def _nearest(values: Tensor, grid: np.ndarray) -> Tensor:
    table = torch.from_numpy(grid)
    return table[(values.clamp(table[0], table[-1])[..., None] - table).abs().argmin(-1)]


def linear(x: Tensor, dense: Tensor, extras: dict[str, Any]) -> Tensor:
    """``y = Q(R(x / s)) W^T + (x D^T) U^T + b`` in float64."""
    x = x.double()
    y = _inputs(x, extras) @ dense.T
    if extras["low_rank_down"] is not None:
        y = y + x @ extras["low_rank_down"].double().T @ extras["low_rank_up"].double().T
    return y if extras["bias"] is None else y + extras["bias"].double()


def conv2d(x: Tensor, dense: Tensor, extras: dict[str, Any], window: tuple[list[int], ...]) -> Tensor:
    """The same with a convolution, tap by tap on slices of the padded input; dense ``[out, kh*kw*in]``."""
    x = x.double()
    y = _convolve(_inputs(x.movedim(1, -1), extras).movedim(-1, 1), dense, window)
    if extras["low_rank_down"] is not None:
        branch = _convolve(x, extras["low_rank_down"].double(), window)
        y = y + torch.einsum("brhw,or->bohw", branch, extras["low_rank_up"].double())
    return y if extras["bias"] is None else y + extras["bias"].double()[:, None, None]


def _inputs(x: Tensor, extras: dict[str, Any]) -> Tensor:
    if extras.get("shift") is not None:
        x = x + extras["shift"].double()
    if extras["smooth"] is not None:
        x = x / extras["smooth"].double()
    if extras["rotation"]:
        x = x @ rotation_matrix(x.shape[-1], extras["rotation"])
    return quantize_activations(x, extras["activations"], extras.get("shift"), extras.get("input_scale"))


def _convolve(x: Tensor, rows: Tensor, window: tuple[list[int], ...]) -> Tensor:
    (kh, kw), (sh, sw), (ph, pw), (dh, dw) = window
    batch, channels, height, width = x.shape
    padded = torch.zeros(batch, channels, height + 2 * ph, width + 2 * pw, dtype=x.dtype)
    padded[:, :, ph : ph + height, pw : pw + width] = x
    out_h = (height + 2 * ph - dh * (kh - 1) - 1) // sh + 1
    out_w = (width + 2 * pw - dw * (kw - 1) - 1) // sw + 1
    y = torch.zeros(batch, rows.shape[0], out_h, out_w, dtype=x.dtype)
    for i in range(kh):
        for j in range(kw):
            top, left = i * dh, j * dw
            piece = padded[:, :, top : top + (out_h - 1) * sh + 1 : sh, left : left + (out_w - 1) * sw + 1 : sw]
            tap = rows[:, (i * kw + j) * channels : (i * kw + j + 1) * channels]
            y += torch.einsum("bchw,oc->bohw", piece, tap)
    return y


def make_extras(names: str, rows: int, columns: int, channels: int, rotation: int = 16, rank: int = 3) -> dict[str, Any]:
    """Extras of a layer from a "+"-separated list of bias, low_rank, smooth, shift, rotation, static, int8, fp8, int4, nvfp4."""
    extras = dict(NO_EXTRAS)
    for name in names.split("+"):
        if name == "bias":
            extras["bias"] = torch.randn(rows)
        elif name == "low_rank":
            extras["low_rank_down"] = (0.1 * torch.randn(rank, columns)).half()
            extras["low_rank_up"] = torch.randn(rows, rank).half()
        elif name == "smooth":
            extras["smooth"] = (torch.rand(channels) + 0.5).half()
        elif name == "shift":  # of the second half, in whole groups of 64
            extras["shift"] = torch.where(torch.arange(channels) // 64 * 64 >= channels // 2, 0.171875, 0.0)
        elif name == "static":
            extras["input_scale"] = torch.tensor([0.02])
        elif name == "rotation":
            extras["rotation"] = rotation
        elif name != "plain":
            extras["activations"] = name
    return extras


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest absolute difference over the largest magnitude expected."""
    if expected.numel() == 0:
        return 0.0
    return float((actual.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-300))
