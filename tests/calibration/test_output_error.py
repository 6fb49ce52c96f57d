"""Codes chosen by their effect on a layer's output: errors fall monotonically, and every format gains."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qdiff_diffusers import AQConfig, FPConfig, RTNConfig, SVDQuantConfig, VQConfig
from qdiff_diffusers.methods import LayerInputs, format_target, quantize_weight, rtn
from qdiff_diffusers.methods.calibrated import fit_to_inputs
from qdiff_diffusers.methods.coders import make_coder
from qdiff_diffusers.methods.error_feedback import damped, descend, pass_on_errors, prepare, row_errors

CONFIGS = {
    "aq": AQConfig(bits=2),
    "aq-layer": AQConfig(num_codebooks=2, codebook_bits=4, vector_size=4, codebook="layer"),
    "aq-tensor": AQConfig(num_codebooks=2, codebook_bits=4, vector_size=8, codebook="layer", group_size="tensor"),
    "aq-groups": AQConfig(num_codebooks=2, codebook_bits=4, vector_size=4, codebook="layer", group_size=24),
    "vq": VQConfig(bits=2, codebook="layer"),
    "vq-shared": VQConfig(bits=2),
    "rtn": RTNConfig(bits=3, group_size=32),
    "fp": FPConfig(bits=4),
    "nvfp4": FPConfig(weight_format="nvfp4"),
    "mxfp4": FPConfig(weight_format="mxfp4"),
    "svdquant": SVDQuantConfig(bits=4, rank=4),
}


def problem(rows: int = 48, columns: int = 96, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight, and second moments of inputs that lie near a few directions."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(columns // 4, columns, generator=generator)
    x = torch.randn(4 * columns, columns // 4, generator=generator) @ basis + 0.3 * torch.randn(
        4 * columns, columns, generator=generator
    )
    return torch.randn(rows, columns, generator=generator), x.T @ x / len(x)


def output_error(weight, quantized, hessian) -> float:
    dense = quantized.spec.dequantize(quantized.tensors, tuple(weight.shape))
    return float(row_errors(weight - dense, hessian).sum() / row_errors(weight, hessian).sum())


@pytest.mark.parametrize("name", CONFIGS)
def test_inputs_lower_the_output_error_of_every_format_to_less_than_two_thirds(name):
    weight, hessian = problem()
    plain = quantize_weight(weight, CONFIGS[name])
    errors: list[float] = []
    fitted = quantize_weight(weight, CONFIGS[name], inputs=LayerInputs(hessian, errors=errors))
    assert fitted.spec == plain.spec
    assert {k: (t.shape, t.dtype) for k, t in fitted.tensors.items()} == {k: (t.shape, t.dtype) for k, t in plain.tensors.items()}
    assert output_error(weight, fitted, hessian) < 0.66 * output_error(weight, plain, hessian)
    assert len(errors) >= 2
    assert all(later < earlier for earlier, later in pairwise(errors))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_sweep_of_coordinate_descent_raises_no_rows_error(name):
    weight, hessian = problem(seed=1)
    hessian = damped(hessian, 0.01)
    plain = quantize_weight(weight, CONFIGS[name])
    target = format_target(weight, plain.spec, plain.tensors)
    own = {k: plain.tensors[k] for k in plain.spec.format.tensors(*target.shape)}
    coder = make_coder(plain.spec.format, own, target.shape[1], beam=8)
    for _ in range(3):
        before = row_errors(target - coder.values, hessian)
        descend(target, hessian, coder)
        after = row_errors(target - coder.values, hessian)
        assert (after <= before * (1 + 1e-4)).all()
        packed = plain.spec.format.dequantize(coder.pack(), target.shape[1])
        torch.testing.assert_close(packed, coder.values, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["aq", "aq-layer", "aq-tensor", "aq-groups", "vq", "vq-shared"])
def test_slopes_are_those_of_the_codes_after_each_sweep(name):
    weight, hessian = problem(seed=1)
    hessian = damped(hessian, 0.01)
    plain = quantize_weight(weight, CONFIGS[name])
    target = format_target(weight, plain.spec, plain.tensors)
    coder = make_coder(plain.spec.format, plain.tensors, target.shape[1], beam=8)
    before = row_errors(target - coder.values, hessian)
    slopes = (target - coder.values) @ hessian
    for _ in range(2):
        gains = coder.descend(target, hessian, slopes)
        torch.testing.assert_close(slopes, (target - coder.values) @ hessian, rtol=1e-3, atol=1e-3)
        after = row_errors(target - coder.values, hessian)
        torch.testing.assert_close(before - gains, after, rtol=1e-3, atol=1e-3 * float(before.mean()))
        before = after


@pytest.mark.parametrize("name", ["aq", "aq-layer", "vq", "vq-shared"])
def test_what_the_pass_leaves_is_the_error_of_its_codes(name):
    weight, hessian = problem(seed=2)
    hessian = damped(hessian, 0.01)
    plain = quantize_weight(weight, CONFIGS[name])
    target = format_target(weight, plain.spec, plain.tensors)
    coder = make_coder(plain.spec.format, plain.tensors, target.shape[1], beam=8)
    left = coder.pass_on(target, prepare(hessian, coder.step))
    torch.testing.assert_close(left, row_errors(target - coder.values, hessian), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", CONFIGS)
def test_uncorrelated_inputs_change_little(name):
    """With H = 1 there is nothing to make up for: as good as, and hardly better than, quantizing the weight by itself."""
    weight, _ = problem()
    hessian = torch.eye(weight.shape[1])
    plain = output_error(weight, quantize_weight(weight, CONFIGS[name]), hessian)
    fitted = output_error(weight, quantize_weight(weight, CONFIGS[name], inputs=LayerInputs(hessian)), hessian)
    assert 0.5 * plain < fitted < 1.02 * plain


@given(columns=st.integers(3, 40), vector=st.integers(1, 7), seed=st.integers(0, 5))
def test_columns_need_not_be_a_multiple_of_the_vector(columns, vector, seed):
    weight, hessian = problem(8, max(columns, 4), seed)
    weight, hessian = weight[:, :columns].contiguous(), hessian[:columns, :columns].contiguous()
    config = VQConfig(codebook_bits=3, vector_size=vector, codebook="layer", rotation=False)
    plain = output_error(weight, quantize_weight(weight, config), hessian)
    fitted = quantize_weight(weight, config, inputs=LayerInputs(hessian))
    assert output_error(weight, fitted, hessian) <= plain * 1.05  # keeping the gain may cost a little of the squared error


def test_passing_on_errors_is_gptq():
    """Column by column against the textbook's loop, in float64."""
    weight, hessian = problem(5, 12)
    hessian = damped(hessian, 0.01)
    plain = quantize_weight(weight, RTNConfig(bits=2, group_size=12))
    coder = make_coder(plain.spec.format, plain.tensors, 12, beam=1)
    scale, zero = plain.tensors["scales"].double(), plain.tensors["zeros"].double()
    pass_on_errors(weight, hessian, coder)
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian.double()), upper=True)
    left, expected = weight.double().clone(), torch.empty(5, 12, dtype=torch.float64)
    for i in range(12):
        code = ((left[:, i : i + 1] - zero) / scale).round().clamp(0, 3)
        expected[:, i : i + 1] = code * scale + zero
        error = (left[:, i] - expected[:, i]) / upper[i, i]
        left[:, i:] -= error[:, None] * upper[i, i:]
    torch.testing.assert_close(coder.values.double(), expected, rtol=1e-4, atol=1e-5)


def test_convolutions_too():
    weight = torch.randn(8, 16, 3, 3)
    x = torch.randn(600, 30) @ torch.randn(30, 144) + 0.3 * torch.randn(600, 144)
    hessian = x.T @ x / 600
    config = AQConfig(bits=2)
    plain, fitted = quantize_weight(weight, config), quantize_weight(weight, config, inputs=LayerInputs(hessian))

    def error(quantized):
        difference = weight - quantized.spec.dequantize(quantized.tensors, tuple(weight.shape))
        return float(row_errors(difference.permute(0, 2, 3, 1).flatten(1), hessian).sum())

    assert error(fitted) < 0.66 * error(plain)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_inputs_that_are_no_numbers_are_refused(bad):
    weight, hessian = problem()
    hessian[3, 3] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        quantize_weight(weight, RTNConfig(bits=4), inputs=LayerInputs(hessian))


def test_an_input_that_never_occurs_is_no_reason_to_fail():
    weight, hessian = problem()
    hessian[7] = hessian[:, 7] = 0
    fitted = quantize_weight(weight, RTNConfig(bits=4), inputs=LayerInputs(hessian))
    assert torch.isfinite(fitted.spec.dequantize(fitted.tensors, tuple(weight.shape))).all()


EXACT = {
    **{name: CONFIGS[name] for name in ("rtn", "fp", "nvfp4", "mxfp4", "svdquant")},
    "rtn-2": RTNConfig(bits=2, group_size=16),
    "rtn-8": RTNConfig(bits=8, group_size=24),
    "fp8": FPConfig(bits=8, group_size="row"),
    "fp-float32": FPConfig(bits=4, group_size=10, scale_dtype="float32"),
    "fp-bfloat16": FPConfig(bits=4, scale_dtype="bfloat16"),
    "fp-tensor": FPConfig(bits=4, group_size="tensor"),
    "int8": SVDQuantConfig(weight_format="int8", group_size=32, rank=3),
}


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("shape", [(48, 96), (77, 301), (1, 19)])
def test_compiled_loops_give_the_bits_that_torch_gives(name, shape, monkeypatch):
    pytest.importorskip("numba")
    weight, hessian = problem(*shape, seed=3)
    weight[0] = 0
    inputs = LayerInputs(hessian)
    fast = quantize_weight(weight, EXACT[name], inputs=inputs)
    monkeypatch.setattr("qdiff_diffusers.methods.columns.loops", lambda *_: None)
    slow = quantize_weight(weight, EXACT[name], inputs=inputs)
    for key, tensor in slow.tensors.items():
        assert torch.equal(fast.tensors[key].view(torch.uint8), tensor.view(torch.uint8)), key


@pytest.mark.parametrize("name", CONFIGS)
def test_the_number_of_threads_changes_no_bit(name):
    weight, hessian = problem(1000, 96, seed=4)
    found = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append(quantize_weight(weight, CONFIGS[name], inputs=LayerInputs(hessian)).tensors)
    finally:
        torch.set_num_threads(threads)
    for key, tensor in found[0].items():
        assert torch.equal(found[1][key].view(torch.uint8), tensor.view(torch.uint8)), key


def textbook(weight: torch.Tensor, hessian: torch.Tensor, coder, sweeps: int) -> float:
    """GPTQ first column to last, then sweeps of coordinate descent, scales as they are: in float64, column by column."""
    weight, hessian = weight.double(), hessian.double()
    group = torch.arange(weight.shape[1]) // (weight.shape[1] // coder.scales.shape[1])
    levels, second = coder.levels.double(), coder.second

    def nearest(column: int, wanted: torch.Tensor) -> torch.Tensor:
        g = group[column]
        table = levels[second[:, g].long()] * coder.scales[:, g, None].double() + coder.zeros[:, g, None].double()
        return table.gather(1, (table - wanted[:, None]).abs().argmin(1, keepdim=True))[:, 0]

    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    left, found = weight.clone(), torch.empty_like(weight)
    for i in range(weight.shape[1]):
        found[:, i] = nearest(i, left[:, i])
        left[:, i:] -= ((left[:, i] - found[:, i]) / upper[i, i])[:, None] * upper[i, i:]
    for _ in range(sweeps):
        for i in range(weight.shape[1]):
            slope = (weight - found) @ hessian[:, i]
            found[:, i] = nearest(i, found[:, i] + slope / hessian[i, i])
    return float(row_errors(weight - found, hessian).sum() / row_errors(weight, hessian).sum())


@pytest.mark.parametrize("name", ["rtn", "fp", "nvfp4", "mxfp4", "svdquant"])
@pytest.mark.parametrize("seed", range(3))
def test_the_output_error_is_at_most_that_of_textbook_gptq_and_four_sweeps(name, seed):
    weight, hessian = problem(64, 192, seed)
    sizes = torch.randn(192, generator=torch.Generator().manual_seed(seed)).exp()  # channels of different size
    hessian = damped(hessian * sizes * sizes[:, None], 0.01)
    plain = quantize_weight(weight, CONFIGS[name])
    target = format_target(weight, plain.spec, plain.tensors)
    own = {k: plain.tensors[k] for k in plain.spec.format.tensors(*target.shape)}
    expected = textbook(target, hessian, make_coder(plain.spec.format, own, 192, 1), sweeps=4)
    fitted = plain.spec.format.dequantize(fit_to_inputs(target, plain.spec.format, own, hessian), 192)
    found = float(row_errors(target - fitted, hessian).sum() / row_errors(target, hessian).sum())
    assert found < expected


@given(columns=st.integers(1, 70), rows=st.integers(1, 40), seed=st.integers(0, 5))
def test_the_pass_over_columns_is_that_of_float64(columns, rows, seed):
    """Codes are a greedy choice under ``U D U^T``: no other code of a weight leaves less, given those before it."""
    weight, hessian = problem(rows, max(4, columns), seed)
    weight, hessian = weight[:, :columns].contiguous(), damped(hessian[:columns, :columns].contiguous(), 0.01)
    fmt, tensors = rtn.quantize(weight, bits=3, group_size=7)
    coder, moments = make_coder(fmt, tensors, columns, 1), prepare(hessian)
    left = coder.pass_on(weight, moments)
    torch.testing.assert_close(left, row_errors(weight - coder.values, hessian), rtol=1e-3, atol=1e-5)
    feedback, order = moments.feedback.double(), moments.order
    torch.testing.assert_close(
        feedback * moments.pivots.double() @ feedback.T, hessian[order][:, order].double(), rtol=1e-4, atol=1e-4
    )
    error = (weight - coder.values)[:, order].double()
    group = order // 7
    scale, zero = coder.scales[:, group].double(), coder.zeros[:, group].double()
    target = weight[:, order].double() + error @ (feedback - torch.eye(columns, dtype=torch.float64))
    expected = ((target - zero) / scale).round().clamp(0, 7) * scale + zero
    distance, found = (target - expected).abs(), (target - coder.values[:, order].double()).abs()
    assert (found <= distance + 1e-4).all()
