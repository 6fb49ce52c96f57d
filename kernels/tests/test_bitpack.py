from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from qdiff_kernels import pack_bits, packed_bytes, unpack_bits


@st.composite
def code_matrices(draw):
    bits = draw(st.integers(1, 16))
    count = draw(st.integers(0, 70))
    rows = draw(st.integers(1, 3))
    values = draw(st.lists(st.integers(0, (1 << bits) - 1), min_size=rows * count, max_size=rows * count))
    return bits, np.array(values, dtype=np.int64).reshape(rows, count)


@given(code_matrices())
def test_unpack_inverts_pack_and_pack_follows_the_stored_layout(case):
    bits, codes = case
    packed = pack_bits(torch.from_numpy(codes), bits)
    assert packed.dtype == torch.int8
    assert packed.shape == (codes.shape[0], packed_bytes(codes.shape[1], bits))
    assert packed.numpy().tobytes() == b"".join(oracle.pack_row([int(c) for c in row], bits) for row in codes)
    assert torch.equal(unpack_bits(packed, bits, codes.shape[1]), torch.from_numpy(codes).to(torch.int32))


@pytest.mark.parametrize("bits", range(1, 17))
def test_smallest_and_largest_code_survive_beside_each_other(bits):
    codes = torch.tensor([[0, (1 << bits) - 1] * 9, [(1 << bits) - 1, 0] * 9])
    assert torch.equal(unpack_bits(pack_bits(codes, bits), bits, 18).long(), codes)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_codes_may_come_in_any_integer_dtype(dtype):
    codes = torch.arange(16).to(dtype).view(2, 8)
    assert torch.equal(unpack_bits(pack_bits(codes, 5), 5, 8), codes.int())


def test_leading_dimensions_are_kept():
    codes = torch.randint(0, 8, (2, 3, 4, 11))
    packed = pack_bits(codes, 3)
    assert packed.shape == (2, 3, 4, 5)
    assert torch.equal(unpack_bits(packed, 3, 11).long(), codes)


def test_rows_can_be_sliced_and_strided_without_unpacking():
    codes = torch.randint(0, 32, (8, 13))
    packed = pack_bits(codes.flip(1).flip(1), 5)
    assert torch.equal(unpack_bits(packed[1::3], 5, 13).long(), codes[1::3])
    wide = torch.zeros(8, 20, dtype=torch.int8)
    wide[:, :9] = packed
    assert torch.equal(unpack_bits(wide[:, :9], 5, 13).long(), codes)


@pytest.mark.parametrize("bits", [0, 17, -1])
def test_impossible_widths_are_refused(bits):
    with pytest.raises(ValueError, match="bits must be 1 to 16"):
        pack_bits(torch.zeros(1, 1, dtype=torch.int64), bits)
    with pytest.raises(ValueError, match="bits must be 1 to 16"):
        unpack_bits(torch.zeros(1, 1, dtype=torch.int8), bits, 1)


@pytest.mark.parametrize(("code", "bits"), [(-1, 4), (16, 4), (256, 8), (65536, 16)])
def test_codes_that_do_not_fit_are_refused_by_value(code, bits):
    with pytest.raises(ValueError, match=rf"0\.\.{(1 << bits) - 1}, got .*{code}"):
        pack_bits(torch.tensor([[0, code]]), bits)


def test_a_wrong_byte_count_is_refused():
    with pytest.raises(ValueError, match="10 codes of 3 bits take 4 bytes, got 5"):
        unpack_bits(torch.zeros(2, 5, dtype=torch.int8), 3, 10)


@pytest.mark.parametrize("bits", range(1, 17))
def test_codes_may_be_a_part_of_a_larger_tensor(bits):
    codes = (torch.arange(2 * 3 * 21) % (1 << bits)).to(torch.uint8 if bits <= 8 else torch.int32).view(2, 3, 21)
    for part in (codes[:, :, :16], codes[:1, :1, :16], codes[0, 1:2, :16], codes[0, :1, 5:], codes[1, 2, 5:]):
        assert torch.equal(
            pack_bits(part, bits), pack_bits(part.clone(memory_format=torch.contiguous_format).reshape(part.shape), bits)
        )
        assert torch.equal(unpack_bits(pack_bits(part, bits), bits, 16), part.int())
