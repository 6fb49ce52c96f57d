"""Packed weight to dense weight, every format."""

from __future__ import annotations

import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from qdiff_kernels import codebook_dequantize, integer_dequantize, minifloat_dequantize, pack_bits
from qdiff_kernels.minifloat import encoding_bits, levels

ENCODINGS = [f"e{e}m{m}{zero}" for e in range(1, 6) for m in range(7) if 2 <= 1 + e + m <= 8 for zero in ("", "uz")]


@pytest.mark.parametrize("variant", oracle.VARIANTS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 48), (5, 50), (3, 64), (2, 129)], ids=str)
def test_dequantize_matches_the_definition(variant, shape):
    weight = oracle.packed_weight(variant, *shape)
    dense = oracle.DEQUANTIZE[weight.kind](*weight.arguments, shape[1], torch.float64)
    assert dense.dtype == torch.float64
    assert dense.shape == shape
    assert torch.allclose(dense, weight.dense, rtol=1e-13, atol=0)


@pytest.mark.parametrize("variant", oracle.VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_lower_precision_results_are_the_rounded_exact_ones(variant, dtype):
    """Computed in float32 and rounded once: at most one unit in the last place from the exact value."""
    weight = oracle.packed_weight(variant, 4, 72)
    dense = oracle.DEQUANTIZE[weight.kind](*weight.arguments, 72, dtype)
    assert dense.dtype == dtype
    largest = weight.dense.abs().max()
    assert ((dense.double() - weight.dense).abs() <= torch.finfo(dtype).eps * weight.dense.abs() + 1e-6 * largest).all()


@pytest.mark.parametrize("variant", oracle.VARIANTS)
def test_non_contiguous_tensors_are_read_by_value(variant):
    weight = oracle.packed_weight(variant, 4, 64)
    strided = [a.T.contiguous().T if isinstance(a, torch.Tensor) and a.ndim == 2 else a for a in weight.arguments]
    assert torch.equal(
        oracle.DEQUANTIZE[weight.kind](*strided, 64, torch.float32),
        oracle.DEQUANTIZE[weight.kind](*weight.arguments, 64, torch.float32),
    )


@pytest.mark.parametrize("variant", oracle.VARIANTS)
def test_a_slice_of_rows_is_a_weight_of_its_own(variant):
    weight = oracle.packed_weight(variant, 6, 40)
    rows = [a[2:5] if isinstance(a, torch.Tensor) and a.shape[0] == 6 else a for a in weight.arguments]
    dense = oracle.DEQUANTIZE[weight.kind](*rows, 40, torch.float64)
    assert torch.allclose(dense, weight.dense[2:5], rtol=1e-13, atol=0)


@pytest.mark.parametrize("variant", oracle.VARIANTS)
def test_codes_of_another_width_are_refused(variant):
    weight = oracle.packed_weight(variant, 2, 64)
    with pytest.raises(ValueError, match="bytes, got"):
        oracle.DEQUANTIZE[weight.kind](*weight.arguments, 640, torch.float32)


@given(st.sampled_from(sorted(oracle.VARIANTS)), st.integers(1, 5), st.integers(1, 90), st.integers(0, 1000))
def test_dequantize_matches_the_definition_at_any_shape(variant, rows, columns, seed):
    weight = oracle.packed_weight(variant, rows, columns, seed)
    dense = oracle.DEQUANTIZE[weight.kind](*weight.arguments, columns, torch.float64)
    assert torch.allclose(dense, weight.dense, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_levels_of_an_encoding_follow_the_definition(encoding):
    bits = 1 + sum(encoding_bits(encoding))
    assert list(levels(encoding)) == [oracle.minifloat_value(code, encoding) for code in range(1 << bits)]


@pytest.mark.parametrize(("encoding", "dtype"), [("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)])
def test_eight_bit_levels_are_those_of_the_hardware_types(encoding, dtype):
    """Except infinities and NaN, which decode to the largest finite number so that every code is one."""
    hardware = torch.arange(256, dtype=torch.uint8).view(dtype).double()
    ours = torch.tensor(levels(encoding), dtype=torch.float64)
    finite = torch.isfinite(hardware)
    assert torch.equal(ours[finite], hardware[finite])
    assert (ours[~finite].abs() == torch.finfo(dtype).max).all()


def test_four_bit_levels_are_those_of_nvfp4():
    assert levels("e2m1")[:8] == (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def test_a_useful_zero_is_one_more_negative_level():
    assert [value / 0.5 for value in sorted(levels("e1m2uz"))] == list(range(-8, 8))
    assert sorted(set(levels("e2m1uz")) - set(levels("e2m1"))) == [-5.0]


@pytest.mark.parametrize("encoding", ["e1m0", "e1m1", "e1m2", "e1m4", "e1m6"])
def test_one_exponent_bit_makes_a_uniform_grid(encoding):
    positive = torch.tensor(levels(encoding)[: len(levels(encoding)) // 2])
    assert torch.allclose(positive.diff(), positive[1].expand(len(positive) - 1))


@pytest.mark.parametrize("encoding", ["e0m3", "e6m1", "e2m9", "e2m1fn", "e5m3", "m3e2", "E2M1", "e2m1 ", ""])
def test_impossible_encodings_are_refused_by_name(encoding):
    with pytest.raises(ValueError, match=r"encoding must be .*got"):
        levels(encoding)


def test_the_sign_of_a_scale_picks_the_encoding():
    codes = pack_bits(torch.tensor([[5, 13, 5, 13]]), 4)
    scales = torch.tensor([[2.0, -2.0]])
    dense = minifloat_dequantize(codes, scales, None, "e2m1,e1m2", 2, 4, torch.float32)
    assert dense.tolist() == [[2 * 3.0, -2 * 3.0, 2 * 2.5, -2 * 2.5]]


@pytest.mark.parametrize("exponent", [-127, -126, -1, 0, 1, 127])
def test_e8m0_scales_are_exact_powers_of_two(exponent):
    scales = torch.tensor([[exponent + 127]], dtype=torch.uint8).view(torch.int8)
    one = pack_bits(torch.tensor([[2]]), 4)
    dense = minifloat_dequantize(one, scales, None, "e2m1", 32, 1, torch.float64)
    assert dense.item() == 2.0**exponent


def test_denormal_scales_are_not_flushed():
    tiny = torch.tensor([[6e-8]], dtype=torch.float16)
    assert tiny.item() > 0
    dense = integer_dequantize(pack_bits(torch.tensor([[15]]), 4), tiny, None, 4, 64, 1, torch.float32)
    assert dense.item() == pytest.approx(7 * tiny.item(), rel=1e-6)


def test_largest_magnitudes_stay_finite_in_float32():
    codes = pack_bits(torch.tensor([[0, 255]]), 8)
    dense = integer_dequantize(codes, torch.tensor([[65504.0]]).half(), None, 8, 64, 2, torch.float32)
    assert dense.tolist() == [[-128 * 65504.0, 127 * 65504.0]]


def test_an_int8_codebook_is_summed_without_wrapping():
    books = torch.full((3, 2, 2), 127, dtype=torch.int8)
    codes = pack_bits(torch.zeros(1, 3, dtype=torch.int64), 1)
    dense = codebook_dequantize(codes, books, torch.ones(1, 1), 2, 2, torch.float32)
    assert dense.tolist() == [[381.0, 381.0]]


def test_integer_weights_of_unit_scale_are_exact_integers():
    codes = torch.randint(0, 256, (3, 100))
    dense = integer_dequantize(pack_bits(codes, 8), torch.ones(3, 1), None, 8, 100, 100, torch.float32)
    assert torch.equal(dense, (codes - 128).float())
