"""Second moments ``sum x x^T`` of what layers multiply, in the fewest products: half by symmetry, of convolutions fewer still.

A convolution's matrix has kh * kw * C columns, so that the moments of its unfolded input have (kh * kw)^2 blocks ``[C, C]``, one
for each pair of taps. But at stride 1 a pair sees the pixels that lie ``o' - o`` apart, wherever the taps themselves are: two pairs
with one offset differ only by pixels at the border, which one of the windows does not reach. So 13 products of the image with
itself, shifted, and 16 small ones of border rows, border columns and corners make up the 81 blocks of a 3 x 3 kernel, and nothing
is unfolded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor, nn

STRIPE = 128  # rows of the upper triangle that are multiplied at a time: narrower ones save more, wider ones are faster
ALL = (0, 0)  # the whole of an image's side; else the first n pixels are (n, 0), the last n are (0, n)

Band = tuple[int, int]


class Triangle(NamedTuple):
    """The upper triangle of a symmetric matrix as stripes: rows ``s : s + STRIPE`` from column ``s`` on."""

    columns: int

    @property
    def height(self) -> int:
        """Rows that the stripes would fill, moved together, in a matrix of as many columns."""
        return (self.columns + STRIPE) // 2

    @property
    def starts(self) -> range:
        return range(0, self.columns, STRIPE)

    def of(self, layer: nn.Module, x: Tensor) -> list[Tensor]:
        """Stripes float32 ``[STRIPE, columns - s]`` of one input's moments."""
        rows = input_matrix(layer, x.to(product_dtype(x)))
        return [product_of(rows[:, s : s + STRIPE], rows[:, s:]) for s in self.starts]

    def matrix(self, stripes: Sequence[Tensor]) -> Tensor:
        """The whole matrix float32 ``[columns, columns]``."""
        out = stripes[0].new_empty(self.columns, self.columns)
        for start, stripe in zip(self.starts, stripes, strict=True):
            end = start + len(stripe)
            out[start:end, start:] = stripe
            out[end:, start:end] = stripe[:, end - start :].T
        return out

    def products(self, matrix: Tensor) -> list[Tensor]:
        """Inverse of :meth:`matrix`, as views."""
        return [matrix[s : s + STRIPE, s:] for s in self.starts]


class Shift(NamedTuple):
    """One product of an image, or of some ``rows`` and ``columns`` of it, with itself shifted by ``down`` and ``right`` pixels."""

    down: int
    right: int
    rows: Band = ALL
    columns: Band = ALL


class ShiftedProducts(NamedTuple):
    """The moments of a convolution of stride 1 as products of its input ``[batch, C, h, w]`` with itself, shifted."""

    channels: int
    kernel: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    def of(self, layer: nn.Module, x: Tensor) -> list[Tensor]:
        """One ``[C, C]``, float32, for each of :attr:`shifts`."""
        channels, height, width = x.shape[-3:]
        # Zeros between the rows, and between the images, so that one flat shift moves all of them at once.
        below, beside = ((size - 1) * step for size, step in zip(self.kernel, self.dilation, strict=True))
        padded = _padded(x.to(product_dtype(x)), (0, below), (0, beside))
        flat = padded.view(-1, channels)

        def shifted(shift: Shift) -> Tensor:
            if shift.rows == shift.columns == ALL:
                distance = shift.down * (width + beside) + shift.right
                return product_of(flat[: len(flat) - distance], flat[distance:])
            rows, columns = _pixels(shift.rows, height, shift.down), _pixels(shift.columns, width, shift.right)
            left = padded[:, rows.start : rows.stop, columns.start : columns.stop]
            right = padded[:, rows.start + shift.down : rows.stop + shift.down]
            right = right[:, :, columns.start + shift.right : columns.stop + shift.right]
            return product_of(left.reshape(-1, channels), right.reshape(-1, channels))

        return [shifted(shift) for shift in self.shifts]

    @property
    def shifts(self) -> list[Shift]:
        """The products that the blocks consist of."""
        return _shifts(self)

    def matrix(self, products: Sequence[Tensor]) -> Tensor:
        """The whole matrix float32 ``[kh * kw * C, kh * kw * C]``."""
        found = dict(zip(self.shifts, products, strict=True))
        taps = list(product(*map(range, self.kernel)))
        size = self.channels
        out = products[0].new_empty(len(taps), size, len(taps), size)
        for i, j, parts in _blocks(self):
            block = out[i, :, j]
            block.zero_()
            for shift, sign in parts.items():
                block.add_(found[shift], alpha=sign)
            if i < j:
                out[j, :, i] = block.T
        return out.view(len(taps) * size, -1)


Layout = Triangle | ShiftedProducts


def layout_of(layer: nn.Module, x: Tensor) -> Layout:
    """The cheapest way to the second moments of a layer's input."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if isinstance(layer, nn.Conv2d) and layer.stride == (1, 1) and weight[0, 0].numel() > 1:
        assert not isinstance(layer.padding, str)
        kernel, dilation = layer.kernel_size, layer.dilation
        # In a smaller image the borders at both ends overlap; and there they are most of the work.
        if all(n >= 2 * (k - 1) * d for n, k, d in zip(x.shape[-2:], kernel, dilation, strict=True)):
            return ShiftedProducts(layer.in_channels, kernel, layer.padding, dilation)  # type: ignore[arg-type]
    return Triangle(weight[0].numel())


def product_of(a: Tensor, b: Tensor) -> Tensor:
    """``a^T b``, float32, of matrices in the dtype of :func:`product_dtype`."""
    return a.T @ b if a.dtype == torch.float32 else torch.mm(a.T, b, out_dtype=torch.float32)


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype to multiply ``x`` in: float32; or its own of 16 bits, where a matrix unit adds up the exact products in float32."""
    if not x.is_cuda or torch.version.hip or not hasattr(torch.ops.aten.mm, "dtype"):
        return torch.float32
    narrow = x.dtype == torch.float16 or (x.dtype == torch.bfloat16 and torch.cuda.is_bf16_supported(including_emulation=False))
    return x.dtype if narrow else torch.float32


def input_matrix(layer: nn.Module, x: Tensor) -> Tensor:
    """Inputs of a layer as rows ``[tokens, columns]`` that its stored matrix multiplies, in their own dtype."""
    if not isinstance(layer, nn.Conv2d):
        return x.reshape(-1, x.shape[-1])
    assert not isinstance(layer.padding, str)
    (top, left), steps, between = layer.padding, layer.stride, layer.dilation
    padded = _padded(x, (top, top), (left, left))
    image, down, right, channel = padded.stride()
    windows = padded.as_strided(
        (len(padded), *_windows(layer, x), *layer.kernel_size, padded.shape[-1]),
        (image, steps[0] * down, steps[1] * right, between[0] * down, between[1] * right, channel),
    )
    return windows.reshape(-1, windows.shape[3:].numel())


def input_count(layer: nn.Module, x: Tensor) -> int:
    """Number of rows of :func:`input_matrix`."""
    if not isinstance(layer, nn.Conv2d):
        return x.numel() // x.shape[-1]
    height, width = _windows(layer, x)
    return (len(x) if x.ndim == 4 else 1) * height * width


def input_rows(layer: nn.Module, x: Tensor, count: int) -> Tensor:
    """``count`` evenly spaced rows of :func:`input_matrix`, or all if there are fewer, float32; the others are not made."""
    total = input_count(layer, x)
    chosen = torch.linspace(0, total - 1, min(count, total), device=x.device).round().long()
    if not isinstance(layer, nn.Conv2d):
        return x.reshape(-1, x.shape[-1])[chosen].float()
    x = x if x.ndim == 4 else x[None]
    height, width = _windows(layer, x)
    image, pixel = chosen.div(height * width, rounding_mode="floor"), chosen % (height * width)
    corners = pixel.div(width, rounding_mode="floor"), pixel % width

    def along(axis: int) -> tuple[Tensor, Tensor]:
        """Positions ``[count, kernel]`` in the image along one axis, and whether they are inside."""
        assert not isinstance(layer.padding, str)
        taps = torch.arange(layer.kernel_size[axis], device=x.device) * layer.dilation[axis] - layer.padding[axis]
        positions = corners[axis][:, None] * layer.stride[axis] + taps
        size = x.shape[2 + axis]
        return positions.clamp(0, size - 1), (positions >= 0) & (positions < size)

    (down, in_rows), (right, in_columns) = along(0), along(1)
    windows = x[image[:, None, None], :, down[:, :, None], right[:, None, :]]  # [count, kh, kw, channels]
    inside = (in_rows[:, :, None] & in_columns[:, None, :])[..., None]
    return torch.where(inside, windows.float(), 0.0).flatten(1)


def _padded(x: Tensor, rows: tuple[int, int], columns: tuple[int, int]) -> Tensor:
    """Images ``[batch, C, h, w]``, or one, channels last, with so many zeros before and after their rows and columns."""
    images = (x if x.ndim == 4 else x[None]).permute(0, 2, 3, 1)
    batch, height, width, channels = images.shape
    out = images.new_zeros(batch, height + sum(rows), width + sum(columns), channels)
    out[:, rows[0] : rows[0] + height, columns[0] : columns[0] + width] = images
    return out


def _windows(layer: nn.Conv2d, x: Tensor) -> list[int]:
    """Height and width of a convolution's output."""
    assert not isinstance(layer.padding, str)
    sizes = zip(x.shape[-2:], layer.padding, layer.dilation, layer.kernel_size, layer.stride, strict=True)
    return [(n + 2 * pad - step * (k - 1) - 1) // stride + 1 for n, pad, step, k, stride in sizes]


def _pixels(band: Band, size: int, shift: int) -> range:
    """The pixels of a band of a side of ``size`` from which ``shift`` leads to another pixel."""
    first, last = band
    start, stop = (0, size) if band == ALL else (0, first) if first else (size - last, size)
    return range(max(start, -shift), min(stop, size - shift))


@lru_cache(maxsize=64)
def _shifts(layout: ShiftedProducts) -> list[Shift]:
    return list(dict.fromkeys(shift for _, _, parts in _blocks(layout) for shift in parts))


def _blocks(layout: ShiftedProducts) -> Iterator[tuple[int, int, Counter[Shift]]]:
    """The blocks of the upper triangle by the numbers of their taps, each with the products it consists of and their signs.

    The first tap of a pair sees all pixels but a band at one end, or at both. So a block is what all pixels give, less what those
    bands of rows and of columns give, plus what the corners give, which were taken away twice.
    """
    taps = list(product(*map(range, layout.kernel)))
    for (i, first), (j, second) in product(enumerate(taps), repeat=2):
        if i > j:
            continue
        down, right = ((b - a) * step for a, b, step in zip(first, second, layout.dilation, strict=True))
        bands = [[(ALL, 1), *((band, -1) for band in _unseen(layout, axis, first[axis], (down, right)[axis]))] for axis in (0, 1)]
        parts: Counter[Shift] = Counter()
        for (rows, row_sign), (columns, column_sign) in product(*bands):
            parts[Shift(down, right, rows, columns)] += row_sign * column_sign
        yield i, j, parts


def _unseen(layout: ShiftedProducts, axis: int, tap: int, shift: int) -> list[Band]:
    """Bands of pixels along an axis that a tap does not see in any window, and from which ``shift`` does not leave the image."""
    step, pad = layout.dilation[axis], layout.padding[axis]
    first, last = tap * step - pad, (layout.kernel[axis] - 1 - tap) * step - pad
    bands = [(first, 0)] if first > max(0, -shift) else []
    return bands + ([(0, last)] if last > max(0, shift) else [])
