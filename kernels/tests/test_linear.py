"""``<format>_linear`` against the layer's definition, for every format and every extra."""

from __future__ import annotations

import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from qdiff_kernels import integer_linear, pack_bits

EXTRAS = [
    "plain",
    "bias",
    "low_rank",
    "smooth",
    "rotation",
    "int8",
    "fp8",
    "int4",
    "bias+low_rank+smooth+rotation",
    "bias+low_rank+smooth+rotation+int8",
    "bias+low_rank+smooth+rotation+fp8",
    "bias+low_rank+smooth+rotation+int4",
    "nvfp4",
    "bias+low_rank+smooth+shift+int4",
    "bias+low_rank+smooth+shift+rotation+nvfp4",
    "bias+low_rank+smooth+rotation+static+int8",
    "static+fp8",
    "bias+smooth+shift+static+int8",
    "low_rank+shift+static+fp8",
]
# Largest difference over the largest output. With quantized activations one rounding tie may fall the other way.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}


def run(weight: oracle.Packed, x: torch.Tensor, extras: dict) -> torch.Tensor:
    return oracle.LINEAR[weight.kind](x, *weight.arguments, *extras.values())


@pytest.mark.parametrize("extras", EXTRAS)
@pytest.mark.parametrize("variant", oracle.VARIANTS)
def test_linear_matches_the_definition(variant, extras):
    weight = oracle.packed_weight(variant, 7, 96)
    chosen = oracle.make_extras(extras, 7, 96, 96)
    x = torch.randn(5, 96, dtype=torch.float64)
    y = run(weight, x, chosen)
    assert (y.shape, y.dtype) == ((5, 7), torch.float64)
    assert oracle.relative_error(y, oracle.linear(x, weight.dense, chosen)) < 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("extras", ["plain", "bias+low_rank+smooth+rotation", "bias+int8", "rotation+fp8", "low_rank+int4"])
@pytest.mark.parametrize("variant", ["codebook-2x8-d8", "e2m1-g16-e4m3-two-level", "int4-g64"])
def test_linear_in_the_models_precision_is_as_close_as_that_precision_allows(variant, extras, dtype):
    weight = oracle.packed_weight(variant, 6, 128)
    chosen = oracle.make_extras(extras, 6, 128, 128)
    x = torch.randn(17, 128).to(dtype)
    y = run(weight, x, chosen)
    assert y.dtype == dtype
    tolerance = TOLERANCE[dtype] if chosen["activations"] == "none" else max(TOLERANCE[dtype], 2e-2)
    assert oracle.relative_error(y, oracle.linear(x, weight.dense, chosen)) < tolerance


@pytest.mark.parametrize("tokens", [(), (0,), (1,), (17,), (2, 3), (2, 0, 3), (1, 2, 3, 4)], ids=str)
@pytest.mark.parametrize("activations", ["plain", "int8", "fp8", "int4"])
def test_any_number_of_leading_dimensions(tokens, activations):
    weight = oracle.packed_weight("int4-g64", 5, 80)
    chosen = oracle.make_extras(f"bias+rotation+{activations}", 5, 80, 80)
    x = torch.randn(*tokens, 80, dtype=torch.float64)
    y = run(weight, x, chosen)
    assert y.shape == (*tokens, 5)
    assert oracle.relative_error(y, oracle.linear(x, weight.dense, chosen)) < 1e-10


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (3, 33), (2, 65), (9, 129)], ids=str)
@pytest.mark.parametrize("activations", ["plain", "int8", "fp8", "int4"])
@pytest.mark.parametrize("variant", oracle.VARIANTS)
def test_sizes_that_fill_no_group_and_no_vector(variant, activations, shape):
    weight = oracle.packed_weight(variant, *shape)
    chosen = oracle.make_extras(f"bias+low_rank+{activations}", *shape, shape[1], rank=1)
    x = torch.randn(3, shape[1], dtype=torch.float64)
    assert oracle.relative_error(run(weight, x, chosen), oracle.linear(x, weight.dense, chosen)) < 1e-10


@given(
    st.sampled_from(sorted(oracle.VARIANTS)),
    st.sampled_from(EXTRAS),
    st.integers(1, 9),
    st.integers(1, 6).map(lambda n: 16 * n),
    st.integers(0, 5),
    st.integers(0, 100),
)
def test_linear_matches_the_definition_at_any_shape(variant, extras, rows, columns, tokens, seed):
    weight = oracle.packed_weight(variant, rows, columns, seed)
    chosen = oracle.make_extras(extras, rows, columns, columns)
    x = torch.randn(tokens, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    assert oracle.relative_error(run(weight, x, chosen), oracle.linear(x, weight.dense, chosen)) < 1e-9


@pytest.mark.parametrize("extras", ["plain", "bias+low_rank+smooth+rotation+int8", "int4"])
def test_non_contiguous_inputs_give_the_result_of_a_copy(extras):
    weight = oracle.packed_weight("e2m1-g32-e8m0", 6, 64)
    chosen = oracle.make_extras(extras, 6, 64, 64)
    for x in (
        torch.randn(64, 9).T,
        torch.randn(5, 4, 64).transpose(0, 1),
        torch.randn(4, 128)[:, ::2],
        torch.randn(64).expand(3, 64),
    ):
        assert not x.is_contiguous()
        y = run(weight, x, chosen)
        assert y.is_contiguous()
        assert torch.allclose(y, run(weight, x.contiguous(), chosen), atol=1e-6)


@pytest.mark.parametrize("activations", ["int8", "fp8", "int4"])
def test_tokens_are_quantized_independently(activations):
    """A huge token must not change what its neighbour becomes."""
    weight = oracle.packed_weight("int8-row", 4, 64)
    chosen = oracle.make_extras(activations, 4, 64, 64)
    x = torch.randn(2, 64)
    alone = run(weight, x[:1], chosen)
    x[1] *= 1e6
    assert torch.equal(run(weight, x, chosen)[:1], alone)


@pytest.mark.parametrize("activations", ["int8", "fp8", "int4"])
def test_activation_codes_not_activations_are_multiplied(activations):
    """A value below half a step of its token's grid contributes nothing at all."""
    weight = oracle.packed_weight("int8-row", 4, 64)
    chosen = oracle.make_extras(activations, 4, 64, 64)
    x = torch.zeros(1, 64)
    x[0, 0] = 448.0
    with_small = x.clone()
    with_small[0, 1] = 0.0009
    assert torch.equal(run(weight, with_small, chosen), run(weight, x, chosen))


def test_int8_products_accumulate_exactly():
    """Integers in, integers out: the worst-case sum that float32 still holds exactly."""
    columns = 1024
    codes = torch.randint(0, 256, (8, columns))
    codes[0] = 0
    x = torch.randint(-127, 128, (16, columns)).float()
    x[:, 0] = 127
    x[0] = 127
    scales = torch.ones(8, 1)
    y = integer_linear(x, pack_bits(codes, 8), scales, None, 8, columns, None, None, None, None, 0, "int8")
    assert torch.equal(y.long(), x.long() @ (codes - 128).T)
    assert y[0, 0] == -128 * 127 * columns


@pytest.mark.parametrize("activations", ["none", "int8", "fp8", "int4"])
def test_zero_input_gives_exactly_the_bias(activations):
    weight = oracle.packed_weight("codebook-1x6-d2-g16", 5, 64)
    chosen = oracle.make_extras("bias+low_rank+smooth+rotation", 5, 64, 64) | {"activations": activations}
    assert torch.equal(run(weight, torch.zeros(3, 64), chosen), chosen["bias"].expand(3, 5))


@pytest.mark.parametrize("activations", ["int8", "fp8", "int4"])
def test_not_a_number_reaches_the_output_of_its_token_only(activations):
    weight = oracle.packed_weight("int4-g64", 5, 64)
    chosen = oracle.make_extras(f"bias+{activations}", 5, 64, 64)
    x = torch.randn(2, 64)
    x[1, 7] = float("nan")
    y = run(weight, x, chosen)
    assert torch.isfinite(y[0]).all()
    assert y[1].isnan().all()


@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_bias_of_another_dtype_leaves_the_output_dtype_alone(bias_dtype):
    weight = oracle.packed_weight("int4-g64", 5, 64)
    chosen = oracle.NO_EXTRAS | {"bias": torch.randn(5).to(bias_dtype)}
    assert run(weight, torch.randn(2, 64).bfloat16(), chosen).dtype == torch.bfloat16


def test_unknown_activations_are_refused():
    weight = oracle.packed_weight("int4-g64", 5, 64)
    with pytest.raises(ValueError, match="int8, fp8, int4, nvfp4, got 'int5'"):
        run(weight, torch.randn(2, 64), oracle.NO_EXTRAS | {"activations": "int5"})


def test_inputs_are_left_as_they_were():
    weight = oracle.packed_weight("codebook-3x5-d3-int8", 5, 64)
    chosen = oracle.make_extras("bias+low_rank+smooth+rotation+int8", 5, 64, 64)
    x = torch.randn(2, 64)
    before = [a.clone() for a in (x, *weight.arguments, *chosen.values()) if isinstance(a, torch.Tensor)]
    run(weight, x, chosen)
    after = [a for a in (x, *weight.arguments, *chosen.values()) if isinstance(a, torch.Tensor)]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
