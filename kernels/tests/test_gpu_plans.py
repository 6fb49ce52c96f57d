"""Which way a call of the GPU kernels takes, and that a call which repeats an earlier one computes with its own tensors."""

from __future__ import annotations

import gc
import warnings
import weakref

import oracle
import pytest
import torch
from ptx import COMPILED_FOR
from qdiff_kernels import use

triton = pytest.importorskip("triton")
if not (COMPILED_FOR or torch.cuda.is_available()) and isinstance(triton.language.zeros_like, triton.runtime.JITFunction):
    pytest.skip("Triton was imported before TRITON_INTERPRET was set", allow_module_level=True)
from qdiff_kernels.gpu import configs, launch, ops, weights
from qdiff_kernels.gpu.configs import LinearConfig
from qdiff_kernels.reference import Extras
from test_gpu import DEVICE, linear, on_device, tolerance
from triton.runtime.errors import OutOfResources

KINDS = ["plain", "bias+low_rank+smooth+rotation", "low_rank", "bias+low_rank+int8", "rotation+fp8", "low_rank+smooth+int4"]


@pytest.fixture(autouse=True)
def triton_kernels():
    with use("triton"):
        yield


def product(weight: oracle.Packed, x: torch.Tensor, extras: dict, **config) -> torch.Tensor:
    packed = getattr(weights, weight.kind)(*(on_device(a) for a in weight.arguments), x.shape[1])
    values = Extras(*(on_device(v) for v in extras.values()))
    return ops.product(packed, on_device(x), values, LinearConfig(32, 32, 64, **config)).cpu()


@pytest.mark.parametrize("extras", KINDS)
@pytest.mark.parametrize("variant", oracle.VARIANTS)
def test_a_weight_that_is_decoded_first_matches_the_definition(variant, extras):
    weight, chosen = oracle.packed_weight(variant, 37, 160), oracle.make_extras(extras, 37, 160, 160)
    x = torch.randn(40, 160)
    y = product(weight, x, chosen, two_pass=True)
    assert oracle.relative_error(y, oracle.linear(x, weight.dense, chosen)) < tolerance(variant, chosen, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("extras", ["low_rank+smooth+rotation", "bias+low_rank+int8", "fp8", "low_rank+int4"])
@pytest.mark.parametrize("variant", ["codebook-2x8-d8", "e2m1-g16-e4m3-two-level", "e2m1-or-e1m2-g16", "int4-g64", "e4m3-row"])
def test_a_weight_that_is_decoded_first_in_sixteen_bits(variant, extras, dtype):
    weight, chosen = oracle.packed_weight(variant, 20, 128), oracle.make_extras(extras, 20, 128, 128)
    x = torch.randn(17, 128).to(dtype)
    y = product(weight, x, chosen, two_pass=True)
    slack = 4 if chosen["activations"] == "int4" else 1  # a step is a seventh of the largest input: see test_gpu
    assert y.dtype == dtype
    assert oracle.relative_error(y, oracle.linear(x, weight.dense, chosen)) < slack * tolerance(variant, chosen, dtype)


@pytest.mark.parametrize("rank", [1, 16, 200])
@pytest.mark.parametrize("extras", ["low_rank", "low_rank+smooth+rotation", "low_rank+int8"])
def test_a_low_rank_branch_of_any_rank_is_part_of_the_decoded_weight(extras, rank, monkeypatch):
    weight, chosen = oracle.packed_weight("int4-g64", 33, 192), oracle.make_extras(extras, 33, 192, 192, rank=rank)
    monkeypatch.setattr(ops, "_add_branch", lambda *_: pytest.fail("another pass over the result"))
    x = torch.randn(20, 192)
    y = product(weight, x, chosen, two_pass=True)
    assert oracle.relative_error(y, oracle.linear(x, weight.dense, chosen)) < tolerance("int4-g64", chosen, torch.float32)


@pytest.mark.parametrize("activations", ["int8", "fp8", "int4"])
def test_a_token_that_holds_a_nan_stays_one_where_inputs_are_dequantized(activations):
    weight, chosen = oracle.packed_weight("int4-g64", 5, 64), oracle.make_extras(activations, 5, 64, 64)
    x = torch.randn(3, 64)
    x[0], x[1, 7] = 0, float("nan")
    y = product(weight, x, chosen, two_pass=True)
    assert not y[0].any() and y[1].isnan().all() and y[2].isfinite().all()


@pytest.fixture
def no_recipes(monkeypatch) -> None:
    """Nothing has been called yet in this process."""
    monkeypatch.setattr(launch, "_recipes", {})


def recipes() -> int:
    return sum(isinstance(recipe, launch.Recipe) for recipe in launch._recipes.values())


@pytest.mark.parametrize("tokens", [5, 130])
@pytest.mark.parametrize("extras", KINDS)
@pytest.mark.parametrize(
    "variant", ["codebook-3x5-d3-int8", "e2m1-g16-e4m3-row-scales", "e2m1-or-e1m2-g16", "e4m3-row", "int4-g64", "int8-row"]
)
def test_a_repeated_call_computes_with_its_own_tensors(variant, extras, tokens, no_recipes):
    for seed in range(4):
        torch.manual_seed(seed)
        weight, chosen = oracle.packed_weight(variant, 24, 160, seed=seed), oracle.make_extras(extras, 24, 160, 160)
        x = torch.randn(tokens, 160)
        y = linear(weight, x, chosen)
        assert oracle.relative_error(y, oracle.linear(x, weight.dense, chosen)) < tolerance(variant, chosen, torch.float32)
    assert recipes()


@pytest.mark.parametrize("extras", ["bias", "bias+low_rank+int8"])
def test_a_repeated_convolution_computes_with_its_own_tensors(extras, no_recipes):
    geometry = ([3, 3], [1, 1], [1, 1], [1, 1])
    for seed in range(3):
        torch.manual_seed(seed)
        weight, chosen = oracle.packed_weight("int4-g64", 9, 144, seed=seed), oracle.make_extras(extras, 9, 144, 16)
        x = torch.randn(2, 16, 5, 6)
        arguments = [on_device(a) for a in (x, *weight.arguments, *chosen.values())]
        y = oracle.CONV2D[weight.kind](*arguments, *geometry).cpu()
        expected = oracle.conv2d(x, weight.dense, chosen, geometry)
        assert oracle.relative_error(y, expected) < tolerance("int4-g64", chosen, torch.float32)
    assert recipes()


def test_a_weight_changed_in_place_or_exchanged_is_what_the_next_call_multiplies():
    weight, other = (oracle.packed_weight("int4-g64", 6, 64, seed=seed) for seed in (0, 1))
    codes, scales, *rest = (on_device(a.clone()) if isinstance(a, torch.Tensor) else a for a in weight.arguments)
    codes = torch.nn.Parameter(codes, requires_grad=False)
    x = torch.randn(3, 64)

    def error(expected: torch.Tensor) -> float:
        y = oracle.LINEAR["integer"](on_device(x), codes, scales, *rest, *oracle.NO_EXTRAS.values()).cpu()
        return oracle.relative_error(y, x.double() @ expected.T)

    for _ in range(3):
        assert error(weight.dense) < 2e-5
    codes.copy_(on_device(other.arguments[0]))
    scales.copy_(on_device(other.arguments[1]))
    assert error(other.dense) < 2e-5
    codes.data, scales = (on_device(a.clone()) for a in weight.arguments[:2])
    assert error(weight.dense) < 2e-5


@pytest.mark.parametrize("extras", ["plain", "low_rank+int8"])
@pytest.mark.parametrize("variant", ["codebook-3x5-d3-int8", "e4m3-row", "int4-g64"])
def test_no_tensor_outlives_its_layer(variant, extras):
    weight, chosen = oracle.packed_weight(variant, 8, 96), oracle.make_extras(extras, 8, 96, 96)
    arguments = [on_device(a) for a in (*weight.arguments, *chosen.values())]
    for _ in range(3):
        oracle.LINEAR[weight.kind](on_device(torch.randn(4, 96)), *arguments)
    kept = [weakref.ref(a) for a in arguments if isinstance(a, torch.Tensor)]
    del weight, chosen, arguments
    gc.collect()
    assert not any(reference() is not None for reference in kept)


def test_a_call_in_which_torch_does_more_is_not_repeated():
    weight = oracle.packed_weight("int4-g64", 6, 64)
    before = recipes()
    for _ in range(3):
        x = torch.randn(64, 11).T  # becomes contiguous
        y = linear(weight, x, oracle.make_extras("plain", 6, 64, 64))
        assert oracle.relative_error(y, x.double() @ weight.dense.T) < 2e-5
    assert recipes() == before


@pytest.mark.parametrize("tokens", [3, 140])
def test_e4m3_codes_that_hardware_reads_as_nan_are_the_largest_number(tokens):
    weight, chosen = oracle.packed_weight("e4m3-row", 5, 64), oracle.make_extras("fp8", 5, 64, 64)
    codes, *rest = (on_device(a) for a in weight.arguments)
    clean = codes.clone()
    clean.view(torch.uint8)[(codes.view(torch.uint8) & 0x7F) == 0x7F] = 0
    held = clean.clone()
    x = torch.randn(tokens, 64)
    for stored in (clean, clean, clean, codes, codes, codes):
        held.copy_(stored)
        for _ in range(3):
            y = oracle.LINEAR["minifloat"](on_device(x), held, *rest, *(on_device(v) for v in chosen.values())).cpu()
            dense = (
                oracle.DEQUANTIZE["minifloat"](held, *rest, 64, torch.float32).cpu().double() if stored is clean else weight.dense
            )
            assert oracle.relative_error(y, oracle.linear(x, dense, chosen)) < 2e-3
    assert weights._clean[held] is False


def test_a_row_scaled_product_that_the_library_refuses_once_is_not_tried_again(monkeypatch):
    tried = []

    def refuse(*args, **kwargs):
        tried.append(args)
        raise RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED")

    monkeypatch.setattr(torch, "_scaled_mm", refuse)
    monkeypatch.setattr(ops, "_scaled_mm_takes", lambda values, weight: values.device not in ops._refused)
    monkeypatch.setattr(ops, "_refused", set())
    weight, chosen = oracle.packed_weight("e4m3-row", 16, 64), oracle.make_extras("bias+fp8", 16, 64, 64)
    x = torch.randn(40, 64).bfloat16()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(3):
            y = product(weight, x, chosen, two_pass=True)
            assert oracle.relative_error(y, oracle.linear(x, weight.dense, chosen)) < 3e-2
    assert len(tried) == 1
    assert [str(one.message) for one in told if "CUBLAS_STATUS_NOT_SUPPORTED" in str(one.message)] == [
        "torch._scaled_mm does not multiply FP8 rows on cpu (CUDA error: CUBLAS_STATUS_NOT_SUPPORTED); qdiff's kernel does"
    ]


def test_inputs_whose_low_rank_projection_does_not_fit_beside_them_are_projected_apart(monkeypatch):
    prepared = ops.prepare
    tried = []

    def small(x, extras, down):
        tried.append(down is not None)
        if down is not None:
            raise OutOfResources(120_000, 100_000, "shared memory")
        return prepared(x, extras, down)

    monkeypatch.setattr(ops, "prepare", small)
    monkeypatch.setattr(configs, "_fitting", {})
    weight, chosen = oracle.packed_weight("int8-row", 6, 64), oracle.make_extras("low_rank+int8", 6, 64, 64)
    x = torch.randn(3, 64)
    for _ in range(2):
        y = product(weight, x, chosen)
        assert oracle.relative_error(y, oracle.linear(x, weight.dense, chosen)) < 2e-3
    assert tried == [True, False, False]


def test_nothing_waits_for_the_device_on_behalf_of_a_codebook_twice():
    table = on_device(torch.randint(-60, 61, (2, 16, 4), dtype=torch.int8))
    unit = weights.codebook_unit(table)
    assert weights._units[table] == unit
    table.mul_(2)
    assert weights._units[table] is None and weights.codebook_unit(table) != unit
    assert DEVICE in str(table.device)


DEFAULTS = ["integer4 g64", "minifloat4 g16", "minifloat8 g16", "integer8 g64", "codebook4x8d16 row", "codebook1x12d6 row"]
H200 = 132  # multiprocessors


@pytest.mark.parametrize("rows", [3072, 12288])
@pytest.mark.parametrize("tokens", [256, 1024, 4096])
@pytest.mark.parametrize("inputs", ["bfloat16", "int8", "fp8", "int4"])
@pytest.mark.parametrize("weight", DEFAULTS)
def test_many_tokens_share_the_decoding_of_a_weight(weight, inputs, tokens, rows):
    assert configs.rule(weight, inputs, tokens, rows, 3072, H200).two_pass


@pytest.mark.parametrize("tokens", [16, 129, 1024, 4096])
def test_int8_codes_are_multiplied_as_they_are_loaded(tokens):
    assert not configs.rule("integer8 row", "int8", tokens, 3072, 3072, H200).two_pass


@pytest.mark.parametrize("weight", DEFAULTS)
@pytest.mark.parametrize("tokens", [1, 16, 64, 127])
def test_few_tokens_read_packed_weights_only(weight, tokens):
    assert not configs.rule(weight, "bfloat16", tokens, 3072, 3072, H200).two_pass


@pytest.mark.parametrize("rows", [1152, 3072, 12288, 18432])
def test_few_tokens_have_programs_for_the_whole_device(rows):
    config = configs.rule("integer4 g64", "bfloat16", 1, rows, 3072, H200)
    assert -(-rows // config.block_rows) * config.splits >= min(4 * H200, rows // config.block_rows * 12)


def test_the_model_knows_that_decoding_takes_longer_than_not_decoding():
    def fused(instructions: float) -> float:
        config = configs.rule("integer8 row", "int8", 1024, 3072, 3072, H200)
        return configs._fused_time(config, instructions, 1, 1024, 3072, 3072, H200)

    assert fused(0) <= fused(10) < fused(40)
