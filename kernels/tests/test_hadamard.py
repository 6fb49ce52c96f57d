from __future__ import annotations

import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from qdiff_kernels import largest_block, rotate, unrotate

BLOCKS = [1, 2, 4, 8, 16, 32, 64, 128, 256]


@pytest.mark.parametrize("block", BLOCKS)
def test_rotation_is_the_signed_hadamard_matrix(block):
    x = torch.randn(3, 2 * block, dtype=torch.float64)
    assert torch.allclose(rotate(x, block), x @ oracle.rotation_matrix(2 * block, block), atol=1e-12)


@given(st.sampled_from(BLOCKS), st.integers(1, 3), st.integers(0, 2**31), st.floats(1e-3, 1e3))
def test_unrotate_inverts_rotate_and_lengths_are_kept(block, blocks, seed, size):
    x = size * torch.randn(4, block * blocks, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    turned = rotate(x, block)
    assert torch.allclose(unrotate(turned, block), x, rtol=1e-12, atol=1e-12 * size)
    assert torch.allclose(turned.norm(dim=-1), x.norm(dim=-1), rtol=1e-12)


def test_rotating_weight_and_input_keeps_their_product():
    x, w = torch.randn(5, 192, dtype=torch.float64), torch.randn(7, 192, dtype=torch.float64)
    assert torch.allclose(rotate(x, 64) @ rotate(w, 64).T, x @ w.T, atol=1e-12)


def test_rotation_spreads_an_outlier_over_its_block_only():
    x = torch.zeros(256)
    x[70] = 64.0
    turned = rotate(x, 64)
    assert torch.equal(turned.abs(), torch.cat([torch.zeros(64), torch.full((64,), 8.0), torch.zeros(128)]))


@pytest.mark.parametrize("shape", [(0, 32), (32,), (2, 3, 32), (2, 1, 3, 32)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_shape_and_dtype_are_kept(shape, dtype):
    x = torch.randn(shape).to(dtype)
    turned = rotate(x, 16)
    assert (turned.shape, turned.dtype) == (x.shape, dtype)
    expected = x.double() @ oracle.rotation_matrix(32, 16)
    assert oracle.relative_error(turned, expected) < {2: 1e-2, 4: 1e-6, 8: 1e-14}[dtype.itemsize]


def test_non_contiguous_input_is_rotated_like_a_copy():
    x = torch.randn(64, 6).T
    assert torch.equal(rotate(x, 32), rotate(x.contiguous(), 32))
    x = torch.randn(4, 128)[:, ::2]
    assert torch.equal(unrotate(x, 32), unrotate(x.contiguous(), 32))


def test_large_half_precision_activations_do_not_overflow_on_the_way():
    """All of size 3000 with the signs of the rotation itself: their unscaled sum over a block of 256 is far beyond float16."""
    x = (3000 * oracle.splitmix64_signs(256)).half()
    turned = rotate(x, 256)
    assert torch.isfinite(turned).all()
    assert turned[0] == 48000


@pytest.mark.parametrize(("size", "block"), [(3072, 256), (320, 64), (1152, 128), (96, 32), (7, 1), (1, 1), (0, 1)])
def test_largest_block_is_the_largest_power_of_two_that_divides(size, block):
    assert largest_block(size) == block


def test_a_block_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="block of 32 does not divide 48"):
        rotate(torch.zeros(48), 32)
    with pytest.raises(ValueError, match="block of 32 does not divide 48"):
        unrotate(torch.zeros(48), 32)


def test_a_block_that_is_no_power_of_two_is_refused():
    with pytest.raises(ValueError, match="power of two"):
        rotate(torch.zeros(48), 24)


def test_rotation_used_first_in_inference_mode_still_takes_part_in_autograd():
    with torch.inference_mode():
        rotate(torch.zeros(2, 176), 16)
    x = torch.randn(2, 176, requires_grad=True)
    rotate(x, 16).sum().backward()
    assert x.grad is not None
