"""Additive codebooks: beam search finds good codes, least squares is optimal, and alternating them never loses."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from qdiff_diffusers.config import AQConfig
from qdiff_diffusers.formats import CodebookFormat, codebook_table, table_shapes
from qdiff_diffusers.formats.codebook import TABLES_FILE
from qdiff_diffusers.methods import aq
from qdiff_diffusers.methods.additive import decode, encode, fit, residual_kmeans, update_codebooks, weighted_error
from qdiff_diffusers.methods.vectors import integer_codebooks, table_step


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def exhaustive_error(points: torch.Tensor, codebooks: torch.Tensor) -> float:
    sums = torch.stack([sum(book[i] for book, i in zip(codebooks, choice, strict=True)) for choice in all_codes(codebooks)])
    return float(torch.cdist(points, sums).amin(1).square().mean() / points.shape[1])


def all_codes(codebooks: torch.Tensor) -> itertools.product:
    return itertools.product(range(codebooks.shape[1]), repeat=len(codebooks))


@settings(max_examples=15, deadline=None)
@given(m=st.integers(1, 3), bits=st.integers(1, 3), d=st.integers(1, 6), seed=st.integers(0, 99))
def test_wide_beam_is_exhaustive_search(m, bits, d, seed):
    codebooks, points = gaussian(m, 1 << bits, d, seed=seed), gaussian(50, d, seed=seed + 100) * m**0.5
    codes = encode(points, codebooks, beam=1 << bits * m)
    assert weighted_error(points, codes, codebooks) == pytest.approx(exhaustive_error(points, codebooks), rel=1e-4, abs=1e-6)


def test_wider_beams_find_better_codes():
    points = gaussian(2000, 8)
    codebooks, _ = residual_kmeans(points, 3, 64)
    errors = [weighted_error(points, encode(points, codebooks, beam), codebooks) for beam in (1, 4, 16, 64)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.9 * errors[0]


def test_encoding_undoes_decoding():
    codebooks = torch.stack([gaussian(16, 8) * 4**-m for m in range(3)])
    codes = torch.randint(16, (500, 3), generator=torch.Generator().manual_seed(1))
    assert torch.equal(encode(decode(codes, codebooks), codebooks, 16), codes)


@settings(max_examples=10, deadline=None)
@given(m=st.integers(1, 4), bits=st.integers(1, 5), d=st.integers(1, 8), seed=st.integers(0, 99), weighted=st.booleans())
def test_fit_error_falls_monotonically(m, bits, d, seed, weighted):
    points = gaussian(300, d, seed=seed) ** 3
    weights = torch.rand(300, generator=torch.Generator().manual_seed(seed)) if weighted else None
    result = fit(points, m, 1 << bits, beam=4, iterations=5, tolerance=0, weights=weights, seed=seed, sample=300)
    assert all(after <= before * (1 + 1e-5) + 1e-6 for before, after in itertools.pairwise(result.errors))
    assert result.errors[-1] == pytest.approx(weighted_error(points, result.codes, result.codebooks, weights), rel=1e-5)


@pytest.mark.parametrize("k", [16, 1024])  # factorised, and block after block
def test_least_squares_update_is_optimal_and_leaves_unused_entries_alone(k):
    points, codebooks = gaussian(800, 5), gaussian(3, k, 5, seed=1)
    codes = torch.randint(1, k, (800, 3), generator=torch.Generator().manual_seed(2))
    weights = torch.rand(800, generator=torch.Generator().manual_seed(3)) + 0.1
    updated = update_codebooks(points, codes, codebooks, weights)
    assert torch.allclose(updated[:, 0], codebooks[:, 0], atol=1e-5)  # entry 0 is never used
    best = weighted_error(points, codes, updated, weights)
    assert best < weighted_error(points, codes, codebooks, weights)
    if k == 16:
        nudges = (gaussian(3, k, 5, seed=seed) * 0.05 for seed in range(5))
        assert all(weighted_error(points, codes, updated + nudge, weights) > best for nudge in nudges)


def test_fit_is_reproducible_and_better_than_its_start():
    points = gaussian(4000, 8)
    first, second = (fit(points, 2, 64, seed=1, iterations=6) for _ in range(2))
    assert torch.equal(first.codebooks, second.codebooks)
    assert first.errors[-1] < 0.9 * first.errors[0]


@pytest.mark.parametrize("points", [torch.zeros(64, 4), torch.ones(64, 4), gaussian(3, 4)])
def test_fit_survives_degenerate_points(points):
    result = fit(points, 2, 16, iterations=2)
    assert torch.isfinite(result.codebooks).all() and result.errors[-1] < 1e-4


def test_senseless_arguments_are_refused():
    with pytest.raises(ValueError, match="power of two"):
        encode(gaussian(4, 2), gaussian(2, 3, 2))
    with pytest.raises(ValueError, match="beam"):
        encode(gaussian(4, 2), gaussian(2, 4, 2), 0)
    with pytest.raises(ValueError, match="effort must be 0 to 3"):
        aq.quantize(gaussian(4, 8), CodebookFormat(2, 2, 4), effort=9)


@pytest.mark.parametrize("name", sorted(table_shapes()))
def test_universal_tables_are_integers_that_add_up_and_keep_their_promise(name):
    table = codebook_table(name)
    assert table.dtype == torch.int8
    assert int(table.amax(1).int().sum(0).max()) <= 127 and int(table.amin(1).int().sum(0).min()) >= -127
    with safe_open(TABLES_FILE, "pt") as file:
        about = json.loads(file.metadata()[name])
    values = table.float() * table_step(name)
    points = gaussian(100_000 // table.shape[2], table.shape[2], seed=5)
    if name.startswith("flat"):  # three quarters of the variance uniform
        uniform = torch.rand(points.shape, generator=torch.Generator().manual_seed(6)) * 12**0.5 - 3**0.5
        points = 0.75**0.5 * uniform + 0.5 * points
    assert weighted_error(points, encode(points, values, about["beam"]), values) == pytest.approx(about["mse"], rel=0.02)


def test_universal_tables_stay_small():
    assert TABLES_FILE.stat().st_size < 265_000


def test_int8_codebooks_use_the_range_and_one_step():
    codebooks = gaussian(3, 32, 4)
    rounded, unit = integer_codebooks(codebooks)
    assert int(rounded.amax(1).int().sum(0).max()) <= 127
    step = float(torch.maximum(codebooks.amax(1).sum(0), -codebooks.amin(1).sum(0)).max()) / 125.5
    assert (rounded.float() * step - codebooks).abs().max() <= 0.5001 * step

    def error(factor: float) -> float:
        return float((rounded.float() * factor - codebooks).square().sum(dtype=torch.float64))

    assert error(unit) <= min(error(step), error(0.999 * unit), error(1.001 * unit))
    again, one = integer_codebooks(rounded.float())
    assert torch.equal(again, rounded) and one == pytest.approx(1, abs=1e-6)  # packing twice changes nothing


WEIGHT = gaussian(40, 100, seed=3) * 0.02


@pytest.mark.parametrize("group_size", ["row", "tensor", 24])
@pytest.mark.parametrize("codebook_dtype", ["float16", "int8"])
@pytest.mark.parametrize(("num_codebooks", "bits", "size"), [(2, 5, 6), (3, 3, 4), (1, 6, 3)])
def test_aq_packs_what_the_format_says(group_size, codebook_dtype, num_codebooks, bits, size):
    fmt = CodebookFormat(num_codebooks, bits, size, group_size=group_size, codebook_dtype=codebook_dtype)
    tensors = aq.quantize(WEIGHT, fmt)
    assert {n: (tuple(t.shape), t.dtype) for n, t in tensors.items()} == {n: tuple(i) for n, i in fmt.tensors(40, 100).items()}
    error = (fmt.dequantize(tensors, 100) - WEIGHT).square().sum() / WEIGHT.square().sum()
    assert error < 1.6 * 4 ** -(num_codebooks * bits / size)


@pytest.mark.parametrize("bits", [1, 1.5, 2, 3, 4])
def test_aq_presets_store_what_they_say_and_beat_round_to_nearest(bits):
    weight = gaussian(64, 240, seed=6) * 0.03
    fmt = aq.choose_format(AQConfig(bits=bits), (64, 240))
    tensors = aq.quantize(weight, fmt)
    stored = sum(i.nbytes for i in fmt.tensors(3072, 3072).values()) * 8 / 3072**2
    assert stored <= bits + 0.01
    error = (fmt.dequantize(tensors, 240) - weight).square().sum() / weight.square().sum()
    assert error < 4 ** -(stored - 0.5)


def test_aq_effort_buys_accuracy():
    weight = gaussian(32, 256, seed=7)
    fmt = aq.choose_format(AQConfig(bits=2), (32, 256))
    errors = [float((fmt.dequantize(aq.quantize(weight, fmt, effort=e), 256) - weight).square().sum()) for e in (0, 1, 2)]
    assert errors == sorted(errors, reverse=True)


def test_aq_format_choice():
    assert aq.choose_format(AQConfig(), (3072, 3072)).table == "gauss_4x8_d16"
    own = aq.choose_format(AQConfig(num_codebooks=2, codebook_bits=6, vector_size=8), (256, 256))
    assert own == CodebookFormat(2, 6, 8, codebook_dtype="int8")
    assert aq.choose_format(AQConfig(bits=2, codebook="layer"), (3072, 3072)) == CodebookFormat(2, 8, 8)
