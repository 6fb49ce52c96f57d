"""Every code of every format becomes exactly the number it stands for, in every type that a matrix unit multiplies."""

from __future__ import annotations

import oracle
import pytest
import torch
from ptx import COMPILED_FOR
from qdiff_kernels import minifloat_dequantize, pack_bits, use
from test_dequantize import ENCODINGS

triton = pytest.importorskip("triton")
if not (COMPILED_FOR or torch.cuda.is_available()) and isinstance(triton.language.zeros_like, triton.runtime.JITFunction):
    pytest.skip("Triton was imported before TRITON_INTERPRET was set", allow_module_level=True)
from qdiff_kernels.gpu import ops, weights
from qdiff_kernels.gpu.blocks import EXACT, ROW, WEIGHT
from qdiff_kernels.gpu.configs import LinearConfig
from qdiff_kernels.gpu.linear import Units, plan
from qdiff_kernels.reference import Extras

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLOATS = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def triton_kernels():
    with use("triton"):
        yield


def as_operand(weight: weights.PackedWeight, dtype: torch.dtype, activations: str = "none", largest: float = 1.0) -> torch.Tensor:
    """The weight ``[rows, columns]`` as the matrix unit is given it: its product with ``largest`` times the identity."""
    x = torch.eye(weight.columns, dtype=dtype, device=DEVICE) * largest
    extras = Extras(**(oracle.NO_EXTRAS | {"activations": activations}))
    return ops.product(weight, x, extras, LinearConfig(128, 16, 64)).T.cpu()


def all_codes(encoding: str, group: int = 0, scales: torch.Tensor | None = None) -> weights.PackedWeight:
    """One row of every code in order, repeated up to 128 columns."""
    bits = sum(int(digit) for digit in encoding.split(",")[0] if digit.isdigit()) + 1
    codes = torch.arange(max(128, 2**bits)) % 2**bits
    columns = codes.numel()
    packed = pack_bits(codes[None], bits).to(DEVICE)
    ones = torch.ones(1, columns // group if group else 1, device=DEVICE) if scales is None else scales.to(DEVICE)
    return weights.minifloat(packed, ones, None, encoding, group or columns, columns)


def values_of(encoding: str, columns: int) -> torch.Tensor:
    bits = sum(int(digit) for digit in encoding if digit.isdigit()) + 1
    return torch.tensor([[oracle.minifloat_value(i % 2**bits, encoding) for i in range(columns)]], dtype=torch.float64)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_minifloat_code_is_exact_in_every_operand(encoding):
    weight = all_codes(encoding)
    expected = values_of(encoding, weight.columns)
    for dtype in FLOATS:
        assert torch.equal(as_operand(weight, dtype), expected.to(dtype)), dtype
    for activations, largest in (("int8", 127.0), ("fp8", 448.0)):
        assert torch.equal(as_operand(weight, torch.float32, activations, largest).double(), expected * largest), activations


@pytest.mark.parametrize("encoding", ["e2m1", "e1m2uz", "e3m0", "e2m1uz", "e4m3", "e5m2", "e1m6", "e2m5", "e3m2", "e1m1", "e2m4uz"])
def test_every_minifloat_code_is_exact_under_scales_of_groups(encoding):
    for group in (16, 64):
        weight = all_codes(encoding, group)
        for dtype in FLOATS:
            assert torch.equal(as_operand(weight, dtype), values_of(encoding, weight.columns).to(dtype)), (group, dtype)


@pytest.mark.parametrize("pair", ["e1m2uz,e2m1uz", "e2m1,e1m2", "e1m6,e2m5", "e1m1,e2m0", "e5m2,e4m3"])
def test_every_code_of_two_encodings_in_every_order_of_groups(pair):
    names = pair.split(",")
    signs = torch.tensor([[1.0, -1.0, -1.0, 1.0, -1.0, 1.0, 1.0, -1.0] * 2])
    weight = all_codes(pair, 16, signs[:, : all_codes(pair).columns // 16])
    second = weight.scales.cpu().repeat_interleave(16, 1) < 0
    expected = torch.where(second, values_of(names[1], weight.columns), values_of(names[0], weight.columns))
    for dtype in FLOATS:
        assert torch.equal(as_operand(weight, dtype), expected.to(dtype)), dtype


@pytest.mark.parametrize("encoding", ["e2m1", "e3m0", "e1m2uz,e2m1uz", "e4m3"])
@pytest.mark.parametrize("kind", ["e4m3", "e8m0"])
def test_bfloat16_holds_every_product_of_a_level_and_a_scale(encoding, kind):
    """One row per scale; both signs of E4M3 scales, which pick the encoding where there are two."""
    bits = sum(int(digit) for digit in encoding.split(",")[0] if digit.isdigit()) + 1
    if kind == "e4m3":
        numbers = torch.cat([torch.arange(0x7F), torch.arange(0x80, 0xFF)]).to(torch.uint8).view(torch.float8_e4m3fn)
    else:
        numbers = torch.arange(20, 230).to(torch.uint8).view(torch.int8)
    rows, columns = numbers.numel(), max(32, 2**bits)
    codes = pack_bits((torch.arange(columns) % 2**bits).repeat(rows, 1), bits)
    scales = numbers[:, None].repeat(1, columns // 16).contiguous()
    weight = weights.minifloat(codes.to(DEVICE), scales.to(DEVICE), None, encoding, 16, columns)
    units = Units(bf16=True, fp8=True, block_scaled=False)
    assert plan(weight, torch.bfloat16, 64, torch.bfloat16, units).scale_at == EXACT.value
    with use("torch"):
        expected = minifloat_dequantize(codes, scales, None, encoding, 16, columns, torch.float64)
    assert torch.equal(as_operand(weight, torch.bfloat16).double(), expected)


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_integer_code_is_exact_in_every_operand(bits):
    columns = max(128, 2**bits)
    codes = torch.arange(columns)[None] % 2**bits
    expected = codes.double() - 2 ** (bits - 1)
    for group in (columns, 64):
        scales = torch.ones(1, columns // group, device=DEVICE)
        weight = weights.integer(pack_bits(codes, bits).to(DEVICE), scales, None, bits, group, columns)
        for dtype in FLOATS:
            assert torch.equal(as_operand(weight, dtype), expected.to(dtype)), (group, dtype)
        for activations, largest in (("int8", 127.0), ("fp8", 448.0)):
            assert torch.equal(as_operand(weight, torch.float32, activations, largest).double(), expected * largest), activations


def test_where_scales_are_multiplied():
    units = Units(bf16=True, fp8=True, block_scaled=False)

    def scale_at(encoding: str, scales: torch.Tensor, given: torch.dtype) -> int:
        weight = all_codes(encoding, 16 if scales.shape[1] > 1 else 0, scales)
        return plan(weight, given, 64, torch.bfloat16, units).scale_at

    groups = torch.ones(1, 8)
    assert scale_at("e2m1", groups.to(torch.float8_e4m3fn), torch.bfloat16) == EXACT.value
    assert scale_at("e2m1", groups.to(torch.float8_e4m3fn), torch.int8) == EXACT.value
    assert scale_at("e2m1", groups.to(torch.float8_e4m3fn), torch.float16) == WEIGHT.value
    assert scale_at("e2m1", groups.half(), torch.bfloat16) == WEIGHT.value
    assert scale_at("e2m1", groups[:, :1], torch.bfloat16) == ROW.value


@pytest.mark.parametrize("channels", [4, 8, 24, 48, 64, 80])
@pytest.mark.parametrize("variant", ["e2m1-g16-e4m3-two-level", "e2m1-g32-e8m0", "e2m1-or-e1m2-g16", "int3-asymmetric-g16"])
def test_groups_of_a_convolution_begin_anywhere_in_a_tile(variant, channels):
    geometry = ([1, 3], [1, 1], [0, 1], [1, 1])
    weight = oracle.packed_weight(variant, 5, 3 * channels)
    x = torch.randn(1, channels, 2, 3)
    arguments = [a.to(DEVICE) if isinstance(a, torch.Tensor) else a for a in (x, *weight.arguments, *oracle.NO_EXTRAS.values())]
    y = oracle.CONV2D[weight.kind](*arguments, *geometry).cpu()
    assert oracle.relative_error(y, oracle.conv2d(x, weight.dense, oracle.NO_EXTRAS, geometry)) < 2e-5
