"""Grids round to the nearest level, scale searches never lose to absmax, and what is reported is what is stored."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from qdiff_kernels.minifloat import levels
from torch import Tensor

from qdiff_diffusers.formats import IntegerFormat, MinifloatFormat
from qdiff_diffusers.methods import rtn
from qdiff_diffusers.methods.grids import Grid, encoding_grid, integer_grid
from qdiff_diffusers.methods.scales import ABSMAX, Quantized, ScaleSearch, quantize_groups

ENCODINGS = [f"e{e}m{m}{suffix}" for e in range(1, 6) for m in range(7) for suffix in ("", "uz") if 2 <= 1 + e + m <= 8]


def matrix(seed: int, rows: int = 6, columns: int = 96, tail: float = 0.0, scale: float = 1.0) -> Tensor:
    """Gaussian weights, the heavier-tailed the larger ``tail``."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    return scale * weight * weight.abs() ** tail


def search(weight: Tensor, encodings: tuple[str, ...], group: int | str, dtype: str, how: ScaleSearch | None) -> Quantized:
    grids = [encoding_grid(encoding) for encoding in encodings]
    return quantize_groups(weight, grids, group, dtype, dtype == "e4m3", how, with_dense=True)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_encoding_rounds_to_its_nearest_level(encoding: str) -> None:
    grid = encoding_grid(encoding)
    table = torch.tensor(levels(encoding), dtype=torch.float64) / grid.unit
    y = torch.cat([torch.randn(2000) * grid.high * size for size in (1e-5, 0.01, 0.2, 0.5, 2)])
    q = grid.round(y, torch.empty_like(y), torch.empty_like(y))
    distance = (y.double()[:, None] - table).abs().amin(1)
    assert torch.allclose((y.double() - q.double()).abs(), distance, rtol=1e-6)
    codes = grid.codes(q.clone(), torch.empty_like(y), torch.empty_like(y))
    assert torch.equal(table[codes.long()], q.double())


@pytest.mark.parametrize("bits", range(2, 9))
def test_integers_round_to_twos_complement(bits: int) -> None:
    grid = integer_grid(bits)
    y = torch.linspace(-(2.0**bits), 2.0**bits, 1001)
    q = grid.round(y, torch.empty_like(y), torch.empty_like(y))
    assert torch.equal(q, y.round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1))
    assert grid.codes(q.clone(), y.clone(), y.clone()).dtype == torch.int8


@given(
    seed=st.integers(0, 999),
    tail=st.sampled_from([0.0, 1.0, 3.0]),
    encodings=st.sampled_from([("e2m1",), ("e1m1uz",), ("e2m1uz",), ("e1m2uz", "e2m1uz"), ("e4m3",), ("e1m6", "e2m5")]),
    group=st.sampled_from([16, 40, "row", "tensor"]),
    dtype=st.sampled_from(["float16", "float32", "bfloat16", "e4m3"]),
)
def test_search_is_never_worse_than_absmax(
    seed: int, tail: float, encodings: tuple[str, ...], group: int | str, dtype: str
) -> None:
    weight = matrix(seed, tail=tail)
    found = search(weight, encodings, group, dtype, None)
    absmax = search(weight, encodings, group, dtype, ABSMAX)
    assert found.error <= absmax.error * (1 + 1e-5)


@given(seed=st.integers(0, 999), tail=st.sampled_from([0.0, 2.0]), encoding=st.sampled_from(["e2m1", "e4m3"]))
def test_search_over_powers_of_two_is_never_worse_than_absmax(seed: int, tail: float, encoding: str) -> None:
    weight = matrix(seed, tail=tail)
    found = search(weight, (encoding,), 32, "e8m0", None)
    assert found.error <= search(weight, (encoding,), 32, "e8m0", ABSMAX).error * (1 + 1e-5)


@given(
    seed=st.integers(0, 999),
    encodings=st.sampled_from([("e2m1",), ("e2m1uz",), ("e1m2uz", "e2m1uz")]),
    group=st.sampled_from([16, 40, "row", "tensor"]),
    dtype=st.sampled_from(["float16", "float32", "e4m3"]),
    scale=st.sampled_from([1e-6, 0.02, 300.0]),
)
def test_reported_values_are_what_the_format_stores(
    seed: int, encodings: tuple[str, ...], group: int | str, dtype: str, scale: float
) -> None:
    weight = matrix(seed, scale=scale)
    found = search(weight, encodings, group, dtype, None)
    stored = MinifloatFormat(encodings, group, dtype, dtype == "e4m3")
    tensors = stored.pack(found.codes, found.scales, found.tensor_scale)
    assert torch.equal(stored.dequantize(tensors, weight.shape[1]), found.dense)
    assert found.error == pytest.approx(float((weight - found.dense).square().sum()), rel=1e-3)


def test_mirroring_gives_the_deeper_side_to_the_peak() -> None:
    weight = torch.tensor([[8.0, 1.0, -1.0, 2.0], [-8.0, 1.0, -1.0, 2.0]])
    for grid in (encoding_grid("e1m2uz"), integer_grid(4)):
        found = quantize_groups(weight, [grid], 4, "float16", search=ABSMAX, with_dense=True)
        assert torch.equal(found.dense, weight)
        assert torch.equal(found.scales.sign(), torch.tensor([[-1.0], [1.0]]))


def test_the_sign_of_a_scale_picks_the_better_of_two_grids() -> None:
    flat = torch.arange(-8.0, 8.0)[None]
    peaked = torch.tensor([[6.0, 0.5, -0.5, 1.0, -1.0, 1.5, 0.0, -1.5] * 2])
    found = search(torch.cat([flat, peaked]), ("e1m2uz", "e2m1uz"), 16, "float16", ABSMAX)
    assert found.scales[0] > 0 > found.scales[1]
    assert found.error < 1e-9


@pytest.mark.parametrize("dtype", ["float16", "e4m3", "e8m0"])
def test_zero_groups_stay_zero(dtype: str) -> None:
    weight = matrix(0, columns=64)
    weight[:, :32] = 0
    found = search(weight, ("e2m1",), 32, dtype, None)
    assert torch.equal(found.dense[:, :32], weight[:, :32])
    assert torch.isfinite(found.dense).all()
    assert search(torch.zeros(4, 64), ("e2m1",), 32, dtype, None).error == 0


def test_scales_below_their_dtype_lose_the_weights_but_not_the_sums() -> None:
    weight = matrix(0, scale=1e-12)
    found = search(weight, ("e2m1",), 16, "float16", None)
    assert found.error == pytest.approx(float(weight.square().sum()), rel=1e-3)
    assert search(weight, ("e2m1",), 16, "e4m3", None).error < 0.02 * float(weight.square().sum())


def test_threads_change_nothing() -> None:
    weight = matrix(1, rows=700, columns=512)
    one = search(weight, ("e1m2uz", "e2m1uz"), 16, "e4m3", None)
    try:
        torch.set_num_threads(2)
        two = search(weight, ("e1m2uz", "e2m1uz"), 16, "e4m3", None)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert torch.equal(one.codes, two.codes) and torch.equal(one.scales, two.scales)


def test_unsigned_scales_refuse_what_needs_a_sign() -> None:
    with pytest.raises(ValueError, match="e8m0 scales have no sign"):
        search(matrix(0), ("e1m2uz",), 32, "e8m0", None)


@given(seed=st.integers(0, 999), bits=st.integers(2, 8), group=st.sampled_from([16, 40, 64, "row", "tensor"]))
def test_round_to_nearest_errs_by_half_a_step_at_most(seed: int, bits: int, group: int | str) -> None:
    weight = matrix(seed)
    stored, tensors = rtn.quantize(weight, bits=bits, group_size=group)
    assert isinstance(stored, IntegerFormat) and not stored.symmetric
    error = (stored.dequantize(tensors, weight.shape[1]) - weight).abs().max()
    step = tensors["scales"].float().max()
    # The largest code may fall short of the maximum by what float16 rounding took from the scale and the zero.
    assert error <= step / 2 + 2.0**-10 * (weight.abs().max() + step * 2**bits)


def test_grid_is_plain_data() -> None:
    magnitudes = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)
    levels = (*(-m for m in reversed(magnitudes)), 0.0, *magnitudes)
    assert encoding_grid("e2m1") == Grid(4, levels, unit=0.5, high=12.0, low=12.0, mantissa_bits=1)
