"""Compiled searches find what searching by torch finds."""

from __future__ import annotations

import pytest
import torch

from qdiff_diffusers.methods import compiled
from qdiff_diffusers.methods.additive import decode, encode, encode_under
from qdiff_diffusers.methods.nearest import assign_under, nearest
from qdiff_diffusers.methods.vectors import table_neighbours

pytest.importorskip("numba")


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("k", "d"), [(64, 2), (100, 3), (256, 4), (300, 7), (4096, 6), (65, 16)])
@pytest.mark.parametrize("count", [1, 333])
def test_the_nearest_entry_is_found(k, d, count):
    points, entries = normal(count, d), normal(k, d, seed=1)
    codes, distances = nearest(points, entries)
    expected = torch.cdist(points.double(), entries.double()).square()
    torch.testing.assert_close(expected.gather(1, codes[:, None])[:, 0], expected.amin(1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(distances.double(), expected.amin(1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("k", [16, 256])
def test_the_nearest_entry_under_a_metric_is_found(k):
    points, entries, factor = normal(200, 5), normal(k, 5, seed=1), normal(5, 5, seed=2).tril()
    codes = assign_under(points @ factor @ factor.T, entries, factor @ factor.T)
    expected = torch.cdist((points @ factor).double(), (entries @ factor).double())
    torch.testing.assert_close(expected.gather(1, codes[:, None])[:, 0], expected.amin(1), rtol=1e-4, atol=1e-5)


def metric_of(*eigenvalues: float) -> torch.Tensor:
    basis = torch.linalg.qr(normal(len(eigenvalues), len(eigenvalues), seed=3)).Q
    return basis * torch.tensor(eigenvalues) @ basis.T


@pytest.mark.parametrize("eigenvalues", [(1.0, 1.0, 1.0, 1.0), (100.0, 10.0, 1.0, 0.1)])
@pytest.mark.parametrize("numba", [True, False])
def test_sums_of_entries_under_a_metric_are_searched_whole_by_a_wide_beam(eigenvalues, numba, monkeypatch):
    if not numba:
        monkeypatch.setattr("qdiff_diffusers.methods.additive.loops", lambda *_: None)
    metric, points, books = metric_of(*eigenvalues), normal(300, 4), normal(2, 16, 4, seed=1)
    codes = encode_under(points @ metric, books, metric, beam=16)
    factor = torch.linalg.cholesky(metric.double())
    sums = (books[0][:, None] + books[1][None]).view(-1, 4).double()
    best = torch.cdist(points.double() @ factor, sums @ factor).amin(1)
    found = ((points - decode(codes, books)).double() @ factor).norm(dim=1)
    torch.testing.assert_close(found, best, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("books", "k", "d", "more"), [(4, 256, 16, 1.0), (4, 256, 8, 1.0), (6, 256, 8, 1.0), (4, 256, 4, 1e3)])
def test_integers_choose_codes_as_good_as_floats_do(books, k, d, more, monkeypatch):
    """Those of 16 bits up to 4.5 bits per weight and those of 32 beyond, for points far outside of the codebooks as well."""
    points, codebooks = normal(300, d) * more, normal(books, k, d, seed=1) * torch.logspace(0, -1, books)[:, None, None]

    def error() -> float:
        return float((points - decode(encode(points, codebooks, beam=8), codebooks)).square().mean())

    compiled = error()
    monkeypatch.setattr("qdiff_diffusers.methods.additive.loops", lambda *_: None)
    assert compiled <= error() * 1.01


def test_looking_near_a_good_entry_never_ends_with_a_worse_one_and_hardly_ever_short_of_the_best():
    lists, metric = table_neighbours("gauss_1x12_d6"), metric_of(1.0, 1.2, 1.5, 2.0, 2.5, 3.0)
    points = normal(2000, 6) * lists.entries.std()
    begin = nearest(points + 0.2 * points.std() * normal(2000, 6, seed=1), lists.entries)[0]
    assert lists.suit(metric)

    def distance(codes: torch.Tensor) -> torch.Tensor:
        left = points - lists.entries[codes]
        return ((left @ metric) * left).sum(1)

    found = distance(lists.improve_under(points @ metric, metric, begin))
    best = distance(assign_under(points @ metric, lists.entries, metric))
    assert (found <= distance(begin) * (1 + 1e-4)).all()
    assert (found <= best * (1 + 1e-4)).double().mean() > 0.985


def test_neighbours_are_not_asked_where_the_metric_is_far_from_round():
    lists = table_neighbours("gauss_1x12_d6")
    assert not lists.suit(metric_of(1.0, 1.0, 1.0, 1.0, 1.0, 100.0))
    assert not lists.suit(torch.eye(5))


@pytest.mark.parametrize(("books", "k", "d"), [(2, 4, 3), (2, 256, 8), (3, 16, 5), (4, 256, 16), (6, 32, 8), (8, 2, 4)])
@pytest.mark.parametrize("beam", [1, 3, 16])
def test_the_compiled_beam_search_is_as_good_as_that_of_torch(books, k, d, beam, monkeypatch):
    points, codebooks = normal(700, d), normal(books, k, d, seed=1)

    def error() -> float:
        codes = encode(points, codebooks, beam)
        assert codes.shape == (700, books)
        assert codes.dtype == torch.long
        assert 0 <= int(codes.min()) <= int(codes.max()) < k
        return float((points - decode(codes, codebooks)).square().mean())

    compiled = error()
    monkeypatch.setattr("qdiff_diffusers.methods.additive.loops", lambda *_: None)
    assert compiled <= error() * 1.01


def test_a_beam_as_wide_as_all_there_is_finds_the_best():
    points, codebooks = normal(50, 4), normal(3, 8, 4, seed=1)
    codes = encode(points, codebooks, beam=64)
    sums = (codebooks[0][:, None, None] + codebooks[1][None, :, None] + codebooks[2][None, None]).view(-1, 4)
    best = torch.cdist(points, sums).amin(1).square()
    torch.testing.assert_close((points - decode(codes, codebooks)).square().sum(1), best, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("points", [torch.zeros(40, 8), torch.ones(40, 8) * 1e4])
def test_points_beside_all_entries_and_on_them_do_no_harm(points):
    codes = encode(points, torch.zeros(3, 16, 8), beam=4)
    assert codes.shape == (40, 3)
    assert 0 <= int(codes.min()) <= int(codes.max()) < 16


def test_that_numba_is_missing_is_told_once(monkeypatch, caplog):
    monkeypatch.setattr(compiled, "find_spec", lambda name: None)
    compiled._numba_is_there.cache_clear()
    try:
        assert [compiled.loops("search_numba", torch.zeros(1)) for _ in range(3)] == [None] * 3
    finally:
        compiled._numba_is_there.cache_clear()
    assert caplog.text.count("numba is not installed") == 1


@pytest.mark.parametrize("size", [0.0, 1e-4, 0.02])
@pytest.mark.parametrize("d", [4, 16])
def test_a_codebook_that_is_next_to_nothing_does_not_spoil_the_other(size, d):
    """As where there are fewer points than entries: the first codebook holds them all, and nothing is left for the second."""
    books = normal(2, 64, d) * torch.tensor([1.0, size])[:, None, None]
    points = books[0, :40]
    codes = encode(points, books)
    assert float((decode(codes, books) - points).square().mean()) <= float(size**2 * 2 * d)
