"""The Triton kernels against the float64 oracle: compiled where there is a GPU, under Triton's interpreter elsewhere.

The interpreter is slow and cuts bfloat16 numbers off instead of rounding them, so shapes are small and tolerances for that type
wide.
"""

from __future__ import annotations

import oracle
import pytest
import torch
from ptx import COMPILED_FOR
from qdiff_kernels import pack_bits, use

triton = pytest.importorskip("triton")
if not (COMPILED_FOR or torch.cuda.is_available()) and isinstance(triton.language.zeros_like, triton.runtime.JITFunction):
    pytest.skip("Triton was imported before TRITON_INTERPRET was set", allow_module_level=True)
from qdiff_kernels.gpu import configs, ops, weights
from qdiff_kernels.gpu.configs import LinearConfig
from qdiff_kernels.gpu.linear import plan
from qdiff_kernels.reference import Extras

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Codebooks meet int8 activations as int8 numbers, rounded to about 1 % of an entry. Elsewhere operands are exact, and what is
# left are activations on a rounding tie that falls the other way.
TOLERANCE = {torch.float32: 2e-3, torch.float16: 6e-3, torch.bfloat16: 3e-2}
CODEBOOK_INT8 = 2e-2


@pytest.fixture(autouse=True)
def triton_kernels():
    with use("triton"):
        yield


def on_device(value):
    return value.to(DEVICE) if isinstance(value, torch.Tensor) else value


def linear(weight: oracle.Packed, x: torch.Tensor, extras: dict) -> torch.Tensor:
    arguments = [on_device(a) for a in (x, *weight.arguments, *extras.values())]
    return oracle.LINEAR[weight.kind](*arguments).cpu()


def tolerance(variant: str, extras: dict, dtype: torch.dtype) -> float:
    rounded = variant.startswith("codebook") and extras["activations"] in ("int8", "int4")
    exact = extras["activations"] == "none" and dtype == torch.float32
    return max(TOLERANCE[dtype], CODEBOOK_INT8 if rounded else 0.0) if not exact else 2e-5


@pytest.mark.parametrize("shape", [(7, 96), (1, 1), (33, 129), (70, 300)], ids=str)
@pytest.mark.parametrize("variant", oracle.VARIANTS)
def test_a_packed_weight_is_decoded_exactly(variant, shape):
    weight = oracle.packed_weight(variant, *shape)
    dense = oracle.DEQUANTIZE[weight.kind](*(on_device(a) for a in weight.arguments), shape[1], torch.float32).cpu()
    assert oracle.relative_error(dense, weight.dense) < 1e-6


@pytest.mark.parametrize(
    "extras",
    ["plain", "bias+low_rank+smooth+rotation", "bias+int8", "rotation+fp8", "low_rank+int4", "low_rank+static+int8", "static+fp8"],
)
@pytest.mark.parametrize("variant", oracle.VARIANTS)
def test_linear_matches_the_definition(variant, extras):
    weight = oracle.packed_weight(variant, 37, 160)
    chosen = oracle.make_extras(extras, 37, 160, 160)
    x = torch.randn(5, 160)
    y = linear(weight, x, chosen)
    assert (y.shape, y.dtype) == ((5, 37), torch.float32)
    assert oracle.relative_error(y, oracle.linear(x, weight.dense, chosen)) < tolerance(variant, chosen, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("extras", ["bias+low_rank+smooth+rotation", "bias+int8", "fp8", "low_rank+int4"])
@pytest.mark.parametrize("variant", ["codebook-2x8-d8", "e2m1-g16-e4m3-two-level", "int4-g64", "int8-row"])
def test_linear_in_sixteen_bits(variant, extras, dtype):
    weight = oracle.packed_weight(variant, 20, 128)
    chosen = oracle.make_extras(extras, 20, 128, 128)
    x = torch.randn(17, 128).to(dtype)
    y = linear(weight, x, chosen)
    assert y.dtype == dtype
    # One int4 step is a seventh of the largest input: a few of them decided by a truncated bfloat16 number move the result.
    slack = 4 if chosen["activations"] == "int4" and dtype == torch.bfloat16 else 1
    assert oracle.relative_error(y, oracle.linear(x, weight.dense, chosen)) < slack * tolerance(variant, chosen, dtype)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (3, 33), (9, 129)], ids=str)
@pytest.mark.parametrize("activations", ["plain", "int8", "int4"])
@pytest.mark.parametrize("variant", ["codebook-3x5-d3-int8", "codebook-1x11-d4-tensor", "int3-asymmetric-g16", "e1m2uz-g16"])
def test_sizes_that_fill_no_group_no_vector_and_no_tile(variant, activations, shape):
    weight = oracle.packed_weight(variant, *shape)
    chosen = oracle.make_extras(f"bias+low_rank+{activations}", *shape, shape[1], rank=1)
    x = torch.randn(3, shape[1])
    error = oracle.relative_error(linear(weight, x, chosen), oracle.linear(x, weight.dense, chosen))
    assert error < tolerance(variant, chosen, torch.float32)


@pytest.mark.parametrize("tokens", [1, 17, 130])
@pytest.mark.parametrize("extras", ["bias", "low_rank+int8"])
def test_any_number_of_tokens(tokens, extras):
    weight = oracle.packed_weight("int8-row", 70, 192)
    chosen = oracle.make_extras(extras, 70, 192, 192)
    x = torch.randn(tokens, 192)
    assert oracle.relative_error(linear(weight, x, chosen), oracle.linear(x, weight.dense, chosen)) < 2e-3


def test_4097_tokens():
    weight = oracle.packed_weight("int4-g64", 16, 64)
    x = torch.randn(4097, 64)
    y = linear(weight, x, oracle.NO_EXTRAS)
    assert oracle.relative_error(y, oracle.linear(x, weight.dense, oracle.NO_EXTRAS)) < 2e-5


@pytest.mark.parametrize("variant", ["codebook-2x8-d8", "int4-g64", "e2m1-g32-e8m0"])
def test_columns_split_over_programs_add_up_to_the_same(variant):
    weight = oracle.packed_weight(variant, 40, 512)
    packed = getattr(weights, weight.kind)(*(on_device(a) for a in weight.arguments), 512)
    chosen = oracle.make_extras("bias+low_rank+int8", 40, 512, 512)
    extras = Extras(*(on_device(v) for v in chosen.values()))
    x = torch.randn(3, 512).to(DEVICE)
    whole, split = (ops.product(packed, x, extras, LinearConfig(16, 32, 64, splits=s)) for s in (1, 5))
    assert torch.allclose(whole, split, rtol=1e-4, atol=1e-4 * float(whole.abs().max()))


@pytest.mark.parametrize("extras", ["bias+low_rank", "bias+low_rank+int8", "low_rank+fp8"])
@pytest.mark.parametrize("variant", ["codebook-3x5-d3-int8", "e3m2-tensor", "int8-row", "int8-asymmetric-row", "int4-g64"])
def test_decoding_first_gives_what_decoding_on_the_fly_gives(variant, extras):
    weight = oracle.packed_weight(variant, 48, 192)
    packed = getattr(weights, weight.kind)(*(on_device(a) for a in weight.arguments), 192)
    values = Extras(*(on_device(v) for v in oracle.make_extras(extras, 48, 192, 192).values()))
    x = torch.randn(20, 192).to(DEVICE)
    fused, two_pass = (ops.product(packed, x, values, LinearConfig(32, 32, 64, two_pass=t)) for t in (False, True))
    assert torch.allclose(fused, two_pass, rtol=1e-3, atol=1e-3 * float(fused.abs().max()))


def test_non_contiguous_inputs():
    weight = oracle.packed_weight("int4-g64", 6, 64)
    for extras in ("plain", "bias+rotation+int8"):
        chosen = oracle.make_extras(extras, 6, 64, 64)
        for x in (torch.randn(64, 9).T, torch.randn(5, 4, 64).transpose(0, 1), torch.randn(4, 128)[:, ::2]):
            assert oracle.relative_error(linear(weight, x, chosen), oracle.linear(x, weight.dense, chosen)) < 2e-3


@pytest.mark.parametrize("activations", ["int8", "fp8", "int4", "static+int8", "static+fp8"])
def test_tokens_at_the_edges_of_the_number_range(activations):
    weight = oracle.packed_weight("int8-row", 5, 64)
    chosen = oracle.make_extras(activations, 5, 64, 64)
    x = torch.randn(5, 64)
    x[0] = 0
    x[1] = 1e-40 * torch.randn(64)
    x[2] *= 1e30
    x[3, 7] = float("nan")
    y = linear(weight, x, chosen)
    assert not y[0].any()
    assert y[3].isnan().all() if activations != "int4" else y[3].isnan().any()
    assert oracle.relative_error(y[2:3], oracle.linear(x[2:3], weight.dense, chosen)) < 2e-3
    assert oracle.relative_error(y[4:], oracle.linear(x[4:], weight.dense, chosen)) < 2e-3


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_inputs_with_one_scale_for_all_are_multiplied_without_decoding_first(monkeypatch, kind):
    weight, chosen = oracle.packed_weight("int8-row", 5, 64), oracle.make_extras(f"static+{kind}", 5, 64, 64)
    monkeypatch.setattr(ops.reference, "linear", lambda *_: pytest.fail("decoded"))
    x = torch.randn(4, 64)
    x[1, 7], x[2, 9] = float("inf"), -float("inf")
    y = linear(weight, x, chosen)
    assert y[1:3].isnan().all() and y[[0, 3]].isfinite().all()


WINDOWS = {
    "3x3": (16, ([3, 3], [1, 1], [1, 1], [1, 1])),
    "1x1": (32, ([1, 1], [1, 1], [0, 0], [1, 1])),
    "strided, dilated, odd channels": (10, ([2, 3], [2, 1], [0, 1], [1, 2])),
}


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("extras", ["bias", "bias+low_rank+int8", "smooth+fp8", "low_rank+int4"])
@pytest.mark.parametrize("variant", ["codebook-2x8-d8", "codebook-3x5-d3-int8", "e2m1-g16-e4m3-two-level", "int4-g64", "int8-row"])
def test_conv2d_matches_the_definition(variant, extras, window):
    channels, geometry = WINDOWS[window]
    columns = channels * geometry[0][0] * geometry[0][1]
    weight = oracle.packed_weight(variant, 9, columns)
    chosen = oracle.make_extras(extras, 9, columns, channels)
    x = torch.randn(2, channels, 5, 6)
    arguments = [on_device(a) for a in (x, *weight.arguments, *chosen.values())]
    y = oracle.CONV2D[weight.kind](*arguments, *geometry).cpu()
    expected = oracle.conv2d(x, weight.dense, chosen, geometry)
    assert y.shape == expected.shape
    assert oracle.relative_error(y, expected) < tolerance(variant, chosen, torch.float32)


def test_gradients_reach_the_input():
    weight = oracle.packed_weight("int4-g64", 6, 64)
    chosen = oracle.make_extras("bias+low_rank+rotation", 6, 64, 64)
    x = torch.randn(4, 64, requires_grad=True)
    linear(weight, x, chosen).square().sum().backward()
    exact = x.detach().double().requires_grad_()
    oracle.linear(exact, weight.dense, chosen).square().sum().backward()
    assert oracle.relative_error(x.grad, exact.grad) < 1e-4


def test_float64_is_left_to_the_reference():
    weight = oracle.packed_weight("int4-g64", 3, 64)
    x = torch.randn(2, 64, dtype=torch.float64)
    with pytest.raises(ValueError, match="does not take these arguments"):
        linear(weight, x, oracle.NO_EXTRAS)
    with use(None):
        assert linear(weight, x, oracle.NO_EXTRAS).dtype == torch.float64


def test_an_int8_codebook_whose_sums_leave_the_range_is_scaled_not_cut():
    books = torch.full((2, 4, 2), 120, dtype=torch.int8)
    packed = weights.codebook(torch.zeros(1, 1, dtype=torch.int8), books, torch.ones(1, 1), 2, 2)
    assert packed.operand_unit(torch.int8) == pytest.approx(127 / 240)


@pytest.mark.parametrize("inputs", ["bfloat16", "int8", "fp8", "int4", "conv bfloat16"])
@pytest.mark.parametrize("tokens", [1, 16, 33, 200, 5000])
def test_the_rule_without_a_tuned_table_gives_tiles_the_kernel_takes(inputs, tokens):
    config = configs.rule("codebook2x8d8 row", inputs, tokens, 3072, 1152, 132)
    assert config.block_columns >= 64 and config.block_rows >= 16 and config.block_tokens >= 16
    assert config.splits * 64 <= 1152


def test_a_tuned_table_is_used_by_nearest_shape_and_next_token_count(tmp_path, monkeypatch):
    def entry(tokens, rows, splits):
        config = {"block_tokens": 16, "block_rows": 64, "block_columns": 64, "splits": splits}
        return {"tokens": tokens, "rows": rows, "columns": 1024, "config": config}

    table = {"linear": {"integer4 g64 int8": [entry(1, 1024, 2), entry(64, 1024, 3), entry(64, 8192, 4)]}}
    (tmp_path / "interpreter.json").write_text(__import__("json").dumps(table))
    monkeypatch.setattr(configs, "FOLDER", tmp_path)
    configs.tuned.cache_clear()
    cpu = torch.device("cpu")
    chosen = [configs.choose("integer4 g64", "int8", t, r, 1024, cpu).splits for t, r in ((1, 1024), (50, 1100), (50, 9000))]
    configs.tuned.cache_clear()
    assert chosen == [2, 3, 4]
    assert configs.choose("integer4 g64", "fp8", 1, 64, 1024, cpu) == configs.rule("integer4 g64", "fp8", 1, 64, 1024, 1)


def test_a_configuration_too_large_for_the_device_is_made_smaller_and_remembered():
    from triton.runtime.errors import OutOfResources

    tried = []

    def launch(config):
        tried.append(config)
        if config.stages > 1 or config.block_tokens > 32:
            raise OutOfResources(200_000, 100_000, "shared memory")
        return config

    start = LinearConfig(64, 64, 64, stages=2)
    assert configs.fit("test", start, launch) == LinearConfig(32, 64, 64, stages=1)
    assert configs.fit("test", start, launch) == tried[-1] and len(tried) == 4


def with_scales(encoding: str, group: int, scales: torch.Tensor, tensor_scale: torch.Tensor | None = None) -> tuple:
    """Arguments of a minifloat weight whose rows run through all codes of an 8-bit encoding."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.int8).repeat(scales.shape[0], 1)
    return codes, scales, tensor_scale, encoding, group


@pytest.mark.parametrize("encoding", ["e4m3", "e4m3uz", "e5m2", "e5m2uz", "e1m6uz", "e3m4"])
def test_every_code_of_an_eight_bit_encoding(encoding):
    arguments = with_scales(encoding, 256, torch.ones(1, 1))
    decoded = oracle.DEQUANTIZE["minifloat"](*(on_device(a) for a in arguments), 256, torch.float32).cpu()
    assert decoded[0].tolist() == [oracle.minifloat_value(code, encoding) for code in range(256)]


def test_every_e8m0_scale_is_an_exact_power_of_two():
    scales = torch.arange(255, dtype=torch.uint8).view(torch.int8)[:, None]
    arguments = (torch.full((255, 1), 0x22, dtype=torch.int8), scales, None, "e2m1", 2)
    decoded = oracle.DEQUANTIZE["minifloat"](*(on_device(a) for a in arguments), 2, torch.float32).cpu()
    assert torch.equal(decoded[:, 0].double(), 2.0 ** (torch.arange(255, dtype=torch.float64) - 127))


@pytest.mark.parametrize("case", ["two levels of scales", "levels beyond the range"])
def test_float16_does_not_overflow_where_the_weights_are_in_range(case):
    if case == "two levels of scales":
        scales = torch.full((3, 16), 448.0).to(torch.float8_e4m3fn)
        arguments = with_scales("e4m3", 16, scales, torch.tensor([1e-5]))
    else:
        codes = pack_bits(torch.arange(128).repeat(3, 2), 7)
        arguments = (codes, torch.full((3, 1), 1e-5), None, "e5m1", 256)
    x = torch.randn(4, 256).half()
    extras = oracle.NO_EXTRAS.values()
    y = oracle.LINEAR["minifloat"](*(on_device(a) for a in (x, *arguments, *extras))).cpu()
    with use("torch"):
        expected = oracle.LINEAR["minifloat"](x.double(), *arguments, *extras)
    assert oracle.relative_error(y, expected) < 1e-2


@pytest.mark.parametrize("rotation", [1, 2])
def test_the_smallest_rotations(rotation):
    weight = oracle.packed_weight("int4-g64", 6, 64)
    chosen = oracle.NO_EXTRAS | {"rotation": rotation}
    x = torch.randn(3, 64)
    assert oracle.relative_error(linear(weight, x, chosen), oracle.linear(x, weight.dense, chosen)) < 2e-5


def test_a_rotation_larger_than_the_kernel_makes_is_left_to_the_reference():
    weight = oracle.packed_weight("int8-row", 3, 512)
    chosen = oracle.NO_EXTRAS | {"rotation": 512}
    x = torch.randn(2, 512)
    with pytest.raises(ValueError, match="does not take these arguments"):
        linear(weight, x, chosen)
    with use(None):
        assert oracle.relative_error(linear(weight, x, chosen), oracle.linear(x, weight.dense, chosen)) < 2e-5


@pytest.mark.parametrize("activations", ["plain", "int8"])
def test_extras_that_are_not_contiguous(activations):
    weight = oracle.packed_weight("int4-g64", 6, 64)
    chosen = oracle.make_extras(f"bias+low_rank+smooth+{activations}", 6, 64, 64)
    strided = {
        name: torch.stack([value, torch.zeros_like(value)], -1)[..., 0] if isinstance(value, torch.Tensor) else value
        for name, value in chosen.items()
    }
    assert not strided["low_rank_up"].is_contiguous()
    x = torch.randn(3, 64)
    assert oracle.relative_error(linear(weight, x, strided), oracle.linear(x, weight.dense, chosen)) < 2e-3


def test_an_input_of_another_width_is_refused():
    weight = oracle.packed_weight("codebook-2x8-d8", 6, 64)
    with pytest.raises(ValueError, match="codes of 8 bits take 32 bytes, got 16"):
        linear(weight, torch.randn(3, 128), oracle.NO_EXTRAS)


def test_autocast_does_not_change_the_dtype_that_the_op_promises():
    weight = oracle.packed_weight("int8-row", 5, 64)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        y = linear(weight, torch.randn(1100, 64), oracle.NO_EXTRAS)
    assert y.dtype == torch.float32


def test_a_batch_of_images_one_pixel_wide():
    weight = oracle.packed_weight("int8-row", 5, 16)
    chosen = oracle.make_extras("int8", 5, 16, 16)
    x = torch.randn(2, 1, 16, 5).permute(0, 2, 3, 1)
    geometry = ([1, 1], [1, 1], [0, 0], [1, 1])
    arguments = [on_device(a) for a in (x, *weight.arguments, *chosen.values())]
    y = oracle.CONV2D[weight.kind](*arguments, *geometry).cpu()
    assert oracle.relative_error(y, oracle.conv2d(x, weight.dense, chosen, geometry)) < 2e-3


def test_without_a_c_compiler_the_reference_runs_and_says_so(monkeypatch):
    from qdiff_kernels import gpu

    monkeypatch.setattr(gpu, "_usable", True)
    with pytest.warns(UserWarning, match="without its Triton kernels"):
        assert gpu._give_up(RuntimeError("Failed to find C compiler")) is NotImplemented
    weight = oracle.packed_weight("int8-row", 5, 16)
    with use(None):
        x = torch.randn(2, 16)
        assert oracle.relative_error(linear(weight, x, oracle.NO_EXTRAS), oracle.linear(x, weight.dense, oracle.NO_EXTRAS)) < 2e-5


def test_a_zero_per_row_leaves_the_product_to_the_integer_units():
    weight = oracle.packed_weight("int8-asymmetric-row", 5, 64)
    packed = getattr(weights, weight.kind)(*weight.arguments, 64)
    units = ops.matrix_units(torch.device("cpu"))
    assert plan(packed, torch.int8, 64, torch.bfloat16, units).operand == torch.int8
    assert plan(packed, torch.bfloat16, 64, torch.bfloat16, units).operand == torch.bfloat16
