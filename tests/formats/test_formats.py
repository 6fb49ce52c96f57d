"""Each format: what ``pack`` stores is what ``tensors`` promises, and ``dequantize`` gives back what was packed."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qdiff_diffusers.formats import CodebookFormat, IntegerFormat, MinifloatFormat, TensorInfo, WeightFormat, group_columns

GROUP_SIZES = st.sampled_from(["row", "tensor", 4, 16, 32, 64, 7])
SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 130))
ENCODINGS = [f"e{e}m{m}" for e in range(1, 6) for m in range(7) if 3 <= 1 + e + m <= 8]


def random_scales(fmt: WeightFormat, rows: int, columns: int) -> torch.Tensor:
    info = fmt.tensors(rows, columns)["scales"]
    if info.dtype == torch.int8:
        return torch.randint(100, 127, info.shape).to(torch.uint8).view(torch.int8)
    return (torch.rand(info.shape) + 0.5).to(info.dtype)


def spread(scales: torch.Tensor, fmt: WeightFormat, rows: int, columns: int) -> torch.Tensor:
    """Scale of every weight, float64 ``[rows, columns]``, looked up one by one."""
    group = group_columns(fmt.group_size, columns)
    out = torch.empty(rows, columns, dtype=torch.float64)
    for r in range(rows):
        for c in range(columns):
            out[r, c] = scales[min(r, scales.shape[0] - 1), min(c // group, scales.shape[1] - 1)]
    return out


def check_stored(fmt: WeightFormat, tensors: dict[str, torch.Tensor], rows: int, columns: int) -> None:
    promised = fmt.tensors(rows, columns)
    assert {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in tensors.items()} == promised
    assert all(t.is_contiguous() for t in tensors.values())
    assert sum(t.nbytes for t in tensors.values()) == sum(info.nbytes for info in promised.values())


@given(
    SHAPES,
    st.integers(2, 8),
    GROUP_SIZES,
    st.booleans(),
    st.sampled_from(["float16", "bfloat16", "float32", "e4m3"]),
)
def test_integer_weights_come_back_exactly(shape, bits, group_size, symmetric, scale_dtype):
    rows, columns = shape
    fmt = IntegerFormat(bits, group_size, symmetric, scale_dtype)
    low = -(1 << (bits - 1)) if symmetric else 0
    codes = torch.randint(low, low + (1 << bits), shape)
    scales = random_scales(fmt, rows, columns)
    zeros = None if symmetric else random_scales(fmt, rows, columns)
    tensors = fmt.pack(codes, scales, zeros)
    check_stored(fmt, tensors, rows, columns)
    expected = codes * spread(scales.double(), fmt, rows, columns)
    if zeros is not None:
        expected = expected + spread(zeros.double(), fmt, rows, columns)
    assert torch.allclose(fmt.dequantize(tensors, columns, torch.float64), expected, rtol=1e-14)


@given(
    SHAPES,
    st.sampled_from(ENCODINGS),
    GROUP_SIZES,
    st.sampled_from(["float16", "bfloat16", "float32", "e4m3", "e8m0"]),
    st.booleans(),
)
def test_minifloat_weights_come_back_exactly(shape, encoding, group_size, scale_dtype, two_level):
    rows, columns = shape
    fmt = MinifloatFormat((encoding,), group_size, scale_dtype, two_level)
    codes = torch.randint(0, 1 << fmt.bits, shape)
    scales = random_scales(fmt, rows, columns)
    tensors = fmt.pack(codes, scales, torch.tensor(0.25) if two_level else None)
    check_stored(fmt, tensors, rows, columns)
    values = torch.exp2(scales.view(torch.uint8).double() - 127) if scale_dtype == "e8m0" else scales.double()
    levels = torch.tensor(fmt.levels()[0], dtype=torch.float64)
    expected = levels[codes] * spread(values, fmt, rows, columns) * (0.25 if two_level else 1)
    assert torch.allclose(fmt.dequantize(tensors, columns, torch.float64), expected, rtol=1e-14)


@given(SHAPES, st.sampled_from([("e2m1", "e1m2"), ("e4m3", "e5m2"), ("e3m2", "e1m4")]), st.sampled_from(["float16", "e4m3"]))
def test_each_group_of_a_two_encoding_weight_uses_the_one_its_scale_picks(shape, encodings, scale_dtype):
    rows, columns = shape
    fmt = MinifloatFormat(encodings, 16, scale_dtype)
    codes = torch.randint(0, 1 << fmt.bits, shape)
    scales = random_scales(fmt, rows, columns).float()
    scales = scales * torch.where(torch.rand(scales.shape) < 0.5, -1, 1)
    tensors = fmt.pack(codes, scales)
    check_stored(fmt, tensors, rows, columns)
    signed = spread(tensors["scales"].double(), fmt, rows, columns)
    first, second = (torch.tensor(levels, dtype=torch.float64)[codes] for levels in fmt.levels())
    expected = torch.where(signed > 0, first, second) * signed.abs()
    assert torch.allclose(fmt.dequantize(tensors, columns, torch.float64), expected, rtol=1e-14)


@given(
    SHAPES,
    st.integers(1, 4),
    st.integers(1, 10),
    st.sampled_from([1, 2, 3, 4, 8]),
    st.sampled_from(["row", "tensor", 24, 48]),
    st.sampled_from(["float16", "int8"]),
    st.sampled_from(["float16", "bfloat16", "float32"]),
)
def test_codebook_weights_come_back_exactly(shape, count, bits, width, group_size, codebook_dtype, scale_dtype):
    rows, columns = shape
    fmt = CodebookFormat(count, bits, width, None, group_size, codebook_dtype, scale_dtype)
    codes = torch.randint(0, 1 << bits, (rows, -(-columns // width), count))
    books = torch.randint(-128, 128, fmt.codebook_shape) if codebook_dtype == "int8" else torch.randn(fmt.codebook_shape).half()
    scales = random_scales(fmt, rows, columns)
    tensors = fmt.pack(codes, books, scales)
    check_stored(fmt, tensors, rows, columns)
    vectors = sum(books[m].double()[codes[..., m]] for m in range(count))
    expected = vectors.flatten(1)[:, :columns] * spread(scales.double(), fmt, rows, columns)
    assert torch.allclose(fmt.dequantize(tensors, columns, torch.float64), expected, rtol=1e-13, atol=1e-12)


@pytest.mark.parametrize(
    ("fmt", "bits"),
    [
        (IntegerFormat(4, 64), 4 + 16 / 64),
        (IntegerFormat(4, 64, symmetric=False), 4 + 32 / 64),
        (IntegerFormat(8, "row"), 8 + 16 / 3072),
        (MinifloatFormat(("e2m1",), 16, "e4m3", tensor_scale=True), 4 + 8 / 16 + 32 / 3072**2),
        (MinifloatFormat(("e2m1",), 32, "e8m0"), 4 + 8 / 32),
        (MinifloatFormat(("e3m2",), "tensor", "float32"), 6 + 32 / 3072**2),
        (CodebookFormat(1, 8, 4), 2 + 16 / 3072 + 256 * 4 * 16 / 3072**2),
        (CodebookFormat(2, 8, 8), 2 + 16 / 3072 + 2 * 256 * 8 * 16 / 3072**2),
    ],
    ids=lambda value: value.describe() if isinstance(value, WeightFormat) else "",
)
def test_stored_bits_per_weight_count_everything(fmt, bits):
    stored = 8 * sum(info.nbytes for info in fmt.tensors(3072, 3072).values())
    assert stored / 3072**2 == pytest.approx(bits, rel=1e-12)


@pytest.mark.parametrize(
    "make",
    [
        lambda: IntegerFormat(0),
        lambda: IntegerFormat(9),
        lambda: IntegerFormat(4.0),
        lambda: IntegerFormat(True),
        lambda: IntegerFormat(4, 0),
        lambda: IntegerFormat(4, -64),
        lambda: IntegerFormat(4, "column"),
        lambda: IntegerFormat(4, 64.0),
        lambda: IntegerFormat(4, 64, scale_dtype="e8m0"),
        lambda: IntegerFormat(4, 64, symmetric="no"),
        lambda: MinifloatFormat(("e9m9",)),
        lambda: MinifloatFormat(()),
        lambda: MinifloatFormat(("e2m1", "e1m2", "e2m1")),
        lambda: MinifloatFormat(("e2m1", "e4m3")),
        lambda: MinifloatFormat(("e2m1", "e1m2"), 32, "e8m0"),
        lambda: MinifloatFormat("e2m1"),
        lambda: MinifloatFormat((2, 1)),
        lambda: MinifloatFormat(("e2m1",), "row", "float8"),
        lambda: MinifloatFormat(("e2m1",), tensor_scale="yes"),
        lambda: CodebookFormat(0, 8, 4),
        lambda: CodebookFormat(9, 8, 4),
        lambda: CodebookFormat(1, 0, 4),
        lambda: CodebookFormat(1, 17, 4),
        lambda: CodebookFormat(1, 8, 0),
        lambda: CodebookFormat(1, 8, 65),
        lambda: CodebookFormat(1, 8, 8, group_size=12),
        lambda: CodebookFormat(1, 8, 8, codebook_dtype="float64"),
        lambda: CodebookFormat(1, 8, 8, scale_dtype="e4m3"),
    ],
)
def test_settings_out_of_range_are_refused(make):
    with pytest.raises(ValueError, match=r"got|multiple of|no sign"):
        make()


@pytest.mark.parametrize("codes", [[[8]], [[-9]]], ids=["too large", "too small"])
def test_codes_that_do_not_fit_the_format_are_refused(codes):
    with pytest.raises(ValueError, match="codes must lie in"):
        IntegerFormat(4, "row").pack(torch.tensor(codes), torch.ones(1, 1))


def test_formats_are_values():
    """Equal settings are equal and hashable, so that a checkpoint stores each distinct spec once."""
    assert MinifloatFormat(("e2m1",)) == MinifloatFormat(("e2m1",))
    assert len({IntegerFormat(4), IntegerFormat(4), IntegerFormat(3)}) == 2


@pytest.mark.parametrize(
    "fmt", [IntegerFormat(8, "row"), MinifloatFormat(("e4m3",)), CodebookFormat(1, 8, 4)], ids=["integer", "minifloat", "codebook"]
)
def test_sizes_are_computed_without_allocating(fmt):
    huge = fmt.tensors(1 << 40, 1 << 20)
    assert math.prod(huge["codes"].shape) >= 1 << 57
