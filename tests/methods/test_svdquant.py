"""SVDQuant: the branch takes what is low-rank, rounds never hurt, bits go where they lower the error most."""

from __future__ import annotations

import itertools

import pytest
import tiny_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qdiff_diffusers import ConfigError, quantize
from qdiff_diffusers.config import QDiffConfig, SVDQuantConfig
from qdiff_diffusers.convert.nunchaku_export import kind_of
from qdiff_diffusers.formats import IntegerFormat, LayerSpec, WeightFormat
from qdiff_diffusers.layers import PackedLayer
from qdiff_diffusers.methods import quantize_weight, rtn, svdquant
from qdiff_diffusers.methods.low_rank import energies, rank_bits, truncated_svd


def low_rank_weight(seed: int, rows: int = 96, columns: int = 64, rank: int = 3, strength: float = 2.0) -> Tensor:
    """Gaussian weights with a low-rank part of ``strength`` times their size."""
    generator = torch.Generator().manual_seed(seed)
    part = torch.randn(rows, rank, generator=generator) @ torch.randn(rank, columns, generator=generator) / rank**0.5
    return 0.02 * (torch.randn(rows, columns, generator=generator) + strength * part)


def error(weight: Tensor, stored: WeightFormat, tensors: dict[str, Tensor]) -> float:
    dense = stored.dequantize(tensors, weight.shape[1])
    if "low_rank_up" in tensors:
        dense = dense + tensors["low_rank_up"].float() @ tensors["low_rank_down"].float()
    return float((dense - weight).square().sum() / weight.square().sum())


RESIDUALS = {
    "int4": svdquant.residual_quantizer(weight_format="int4"),
    "nvfp4": svdquant.residual_quantizer(weight_format="nvfp4"),
    "adaptive": svdquant.residual_quantizer(bits=3),
    "any callable": lambda residual: rtn.quantize(residual, bits=3),
}


@settings(max_examples=25)
@given(seed=st.integers(0, 999), rank=st.integers(1, 6), residual=st.sampled_from(sorted(RESIDUALS)))
def test_rounds_never_raise_the_error(seed: int, rank: int, residual: str) -> None:
    weight = low_rank_weight(seed)
    errors = [
        error(weight, *svdquant.quantize(weight, residual_quantize=RESIDUALS[residual], rank=rank, rounds=rounds))
        for rounds in (1, 2, 4)
    ]
    assert errors[0] * (1 + 1e-6) >= errors[1] and errors[1] * (1 + 1e-6) >= errors[2]


def test_the_first_round_that_does_not_help_is_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, rounds = low_rank_weight(0), []
    real = svdquant._without_branch
    monkeypatch.setattr(svdquant, "_without_branch", lambda *args: rounds.append(real(*args)[1]) or real(*args))
    found = svdquant.quantize(weight, residual_quantize=RESIDUALS["int4"], rank=3, rounds=100)
    errors = rounds[1:]  # the first is before any round
    assert 2 < len(errors) < 100
    assert errors[-1] >= errors[-2] and all(later < earlier for earlier, later in itertools.pairwise(errors[:-1]))
    assert error(weight, *found) == pytest.approx(errors[-2] / float(weight.square().sum()), rel=1e-3)


def test_more_rank_errs_less() -> None:
    weight = low_rank_weight(0)
    errors = [error(weight, *svdquant.quantize(weight, residual_quantize=RESIDUALS["int4"], rank=rank)) for rank in (0, 1, 3, 8)]
    assert errors[0] > errors[1] > errors[2] > errors[3]
    assert errors[2] < 0.45 * errors[0]


@pytest.mark.parametrize("shape", [(96, 64), (64, 96), (40, 40), (5, 64)])
def test_factors_are_float16_and_balanced(shape: tuple[int, int]) -> None:
    stored, tensors = svdquant.quantize(low_rank_weight(0, *shape), residual_quantize=RESIDUALS["int4"], rank=8)
    down, up = tensors["low_rank_down"], tensors["low_rank_up"]
    assert down.dtype == up.dtype == torch.float16
    assert (down.shape, up.shape) == ((min(8, *shape), shape[1]), (shape[0], min(8, *shape)))
    assert torch.allclose(down.float().norm(dim=1), up.float().norm(dim=0), rtol=1e-2)
    LayerSpec(stored, rank=down.shape[0]).tensors(shape)


def test_branch_found_after_rotation_serves_the_raw_input() -> None:
    weight = low_rank_weight(0)
    rotation = torch.linalg.qr(torch.randn(64, 64))[0]
    rotated = truncated_svd(weight @ rotation, 3)
    turned_back = rotated.up.float() @ (rotated.down.float() @ rotation.T)
    assert torch.allclose(turned_back, truncated_svd(weight, 3).dense(), atol=2e-4)


@pytest.mark.parametrize("shape", [(64, 64), (96, 512), (1024, 256)])
def test_randomised_svd_comes_close_to_the_exact_one(shape: tuple[int, int]) -> None:
    weight = low_rank_weight(0, *shape, rank=6)
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    exact = (weight - (left[:, :6] * values[:6]) @ right[:6]).square().sum()
    assert (weight - truncated_svd(weight, 6).dense()).square().sum() < 1.001 * exact
    assert torch.allclose(energies(weight, 6), values[:6].square() / values.square().sum(), rtol=2e-2)


def test_warm_start_needs_no_iterations() -> None:
    weight = low_rank_weight(0, 512, 256, rank=6)
    start = truncated_svd(weight, 6).subspace
    similar = weight + 0.001 * torch.randn_like(weight)
    cold, warm = truncated_svd(similar, 6, iterations=0), truncated_svd(similar, 6, start=start)
    residuals = [float((similar - found.dense()).square().sum()) for found in (cold, warm, truncated_svd(similar, 6, iterations=6))]
    assert residuals[1] < 1.001 * residuals[2] < residuals[0]


def test_bits_go_where_they_lower_the_error() -> None:
    flat, steep = low_rank_weight(0, 512, 256, strength=0.0), low_rank_weight(0, 512, 256, strength=3.0, rank=5)
    assert svdquant.plan(flat, 4, min_rank=0) == svdquant.Plan(16, 0)
    assert svdquant.plan(flat, 4) == svdquant.Plan(32, 2)
    assert svdquant.plan(steep, 4) == svdquant.Plan(64, 4)
    assert svdquant.plan(low_rank_weight(0, 8, 8), 4) == svdquant.Plan(64, 1)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_default_keeps_its_budget_and_beats_plain_rounding(bits: int) -> None:
    for strength in (0.0, 3.0):
        weight = low_rank_weight(0, 512, 256, strength=strength)
        stored, tensors = svdquant.quantize_config(weight, SVDQuantConfig(bits=bits))
        rank = tensors["low_rank_down"].shape[0]
        assert LayerSpec(stored, rank=rank).bits_per_weight((512, 256)) <= bits + 0.5 + 1e-3
        baseline = error(weight, *rtn.quantize(weight, bits=bits))
        assert error(weight, stored, tensors) < (0.92 if strength == 0 else 0.4) * baseline


def test_default_rank_scales_with_the_layer() -> None:
    assert [svdquant.default_rank((n, n)) for n in (256, 1152, 3072)] == [2, 9, 24]
    assert svdquant.default_rank((8, 8)) == 1
    assert svdquant.default_rank((4608, 1152)) * rank_bits((4608, 1152)) <= 0.25


def test_config_settings_reach_the_layer() -> None:
    stored, tensors = svdquant.quantize_config(low_rank_weight(0), SVDQuantConfig(weight_format="int4", rank=5, group_size=32))
    assert stored == IntegerFormat(4, 32)
    assert tensors["low_rank_down"].shape == (5, 64)
    assert "low_rank_down" not in svdquant.quantize_config(low_rank_weight(0), SVDQuantConfig(bits=4, rank=0))[1]


@pytest.mark.parametrize("shape", [(96, 64), (256, 256), (64, 512)])
@pytest.mark.parametrize("budget", [0.0, 0.2, 0.5, 1.0])
def test_a_budget_in_bits_is_used_and_kept(budget: float, shape: tuple[int, int]) -> None:
    weight = low_rank_weight(0, *shape)
    stored, tensors = svdquant.quantize_config(weight, SVDQuantConfig(weight_format="int4", branch_bits=budget))
    rank = tensors["low_rank_down"].shape[0] if "low_rank_down" in tensors else 0
    spent = LayerSpec(stored, rank=rank).bits_per_weight(shape) - LayerSpec(stored).bits_per_weight(shape)
    assert budget - rank_bits(shape) < spent <= budget
    with pytest.raises(ConfigError, match="goes without rank"):
        SVDQuantConfig(branch_bits=budget, rank=2)


@pytest.mark.parametrize("method", ["aq", "vq"])
def test_the_residual_may_be_stored_in_codebooks(method: str) -> None:
    weight = low_rank_weight(0, 128, 256)
    plain = quantize_weight(weight, QDiffConfig(method, bits=2))
    branch = quantize_weight(weight, SVDQuantConfig(bits=2, weight_format=method, rank=4))
    assert (branch.spec.format, branch.spec.rotation, branch.spec.rank) == (plain.spec.format, plain.spec.rotation, 4)
    assert branch.error < 0.6 * plain.error
    assert SVDQuantConfig(bits=2, weight_format="aq").widths == (2, 3, 4)  # among which mixed bits choose
    with pytest.raises(ConfigError, match="AQConfig: bits must be one of"):
        SVDQuantConfig(bits=8, weight_format="aq")


def test_modulation_at_w4a16_is_what_nunchaku_has() -> None:
    model = tiny_models.make("flux")
    config = SVDQuantConfig(weight_format="int4", rank=2, activations="int4", adaln_w4a16=True)
    quantize(model, config)
    layers = {name: module.spec for name, module in model.named_modules() if isinstance(module, PackedLayer)}
    modulation = {
        "transformer_blocks.0.norm1.linear",
        "transformer_blocks.0.norm1_context.linear",
        "single_transformer_blocks.0.norm.linear",
    }
    assert modulation < layers.keys()
    for name, spec in layers.items():
        assert kind_of(spec) == ("awq" if name in modulation else "int4"), name


def test_same_seed_same_bits() -> None:
    weight = low_rank_weight(0)
    first, second = (svdquant.quantize_config(weight, SVDQuantConfig(bits=3, rank=4), seed=7)[1] for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
