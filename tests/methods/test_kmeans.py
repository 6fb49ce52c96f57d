"""k-means: the search is exact, the fit never gets worse, and odd inputs are survived."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qdiff_diffusers.config import VQConfig
from qdiff_diffusers.errors import ConfigError
from qdiff_diffusers.formats import CodebookFormat, codebook_table
from qdiff_diffusers.methods import vq
from qdiff_diffusers.methods.kmeans import kmeans, lloyd, seed_centroids
from qdiff_diffusers.methods.nearest import EntryIndex, assign, nearest
from qdiff_diffusers.methods.vectors import table_step


def brute_force(points: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    return torch.cdist(points.double(), centroids.double(), compute_mode="donot_use_mm_for_euclid_dist").square()


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 300),
    k=st.integers(1, 1500),
    d=st.integers(1, 9),
    scale=st.sampled_from([1e-4, 1.0, 100.0]),
    seed=st.integers(0, 99),
)
def test_assignment_is_nearest(n, k, d, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    points, centroids = (torch.randn(m, d, generator=generator) * scale for m in (n, k))
    codes, distances = nearest(points, centroids)
    exact = brute_force(points, centroids)
    chosen = exact.gather(1, codes[:, None])[:, 0]
    slack = 5e-4 * exact.amin(1) + 2e-6 * points.double().square().sum(1)  # index bits; float32 cancellation
    assert (chosen <= exact.amin(1) + slack).all()
    assert torch.allclose(distances.double(), chosen, rtol=1e-3, atol=float(2e-6 * points.square().sum(1).max()))


@settings(max_examples=15, deadline=None)
@given(n=st.integers(2, 400), k=st.integers(1, 40), d=st.integers(1, 5), seed=st.integers(0, 99), weighted=st.booleans())
def test_lloyd_error_never_rises(n, k, d, seed, weighted):
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(n, d, generator=generator)
    weights = torch.rand(n, generator=generator) if weighted else None
    centroids = points[torch.randint(n, (k,), generator=generator)].clone()  # repeated ones leave clusters empty
    errors = []
    for _ in range(6):
        centroids, error = lloyd(points, centroids, 1, weights)
        errors.append(error)
    assert all(after <= before * (1 + 1e-4) + 1e-6 for before, after in itertools.pairwise(errors))


@pytest.mark.parametrize("name", ["gauss_1x12_d3", "gauss_1x12_d4", "gauss_1x12_d6"])
def test_index_finds_what_an_exhaustive_search_finds(name):
    entries = codebook_table(name)[0].float() * table_step(name)
    points = torch.randn(10_000, entries.shape[1]) * 1.1
    codes, distances = nearest(points, entries)
    found = EntryIndex(entries).assign(points)
    assert (found == codes).float().mean() > 0.999
    assert float((points - entries[found]).square().sum() / distances.sum()) < 1.001


def test_index_of_few_distinct_entries():
    entries = torch.randn(3, 4).repeat(500, 1)
    assert torch.equal(entries[EntryIndex(entries).assign(entries)], entries)


def test_kmeans_finds_separated_clusters():
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(16, 3, generator=generator) * 50
    points = centers.repeat_interleave(40, 0) + torch.randn(640, 3, generator=generator) * 0.01
    found = kmeans(points, 16, seed=3)
    assert brute_force(centers, found).amin(1).max() < 1e-3


def test_more_centroids_than_points_reproduces_the_points():
    points = torch.tensor([[0.0, 1.0], [2.0, 3.0], [-1.0, 5.0]])
    for k in (3, 8):
        centroids = kmeans(points, k)
        assert centroids.shape == (k, 2) and torch.equal(centroids[assign(points, centroids)], points)


def test_identical_points_and_all_zeros():
    for value in (0.0, 7.5):
        for d in (1, 3):
            points = torch.full((100, d), value)
            centroids = kmeans(points, 8)
            assert torch.isfinite(centroids).all() and torch.allclose(centroids[assign(points, centroids)], points)


def test_scalar_kmeans_reaches_the_lloyd_max_constants():
    points = torch.randn(200_000, 1, generator=torch.Generator().manual_seed(1))
    for bits, mse in ((2, 0.1175), (3, 0.03454), (4, 0.009497)):
        error = nearest(points, kmeans(points, 1 << bits, sample=200_000))[1].mean()
        assert error == pytest.approx(mse, rel=0.02)


def test_weights_pull_centroids():
    points = torch.cat([torch.zeros(50, 2), torch.ones(50, 2)])
    weights = torch.cat([torch.full((50,), 1.0), torch.full((50,), 3.0)])
    assert torch.allclose(kmeans(points, 1, weights=weights), torch.full((1, 2), 0.75))


def test_same_seed_same_centroids_and_more_restarts_do_not_hurt():
    points = torch.randn(3000, 4, generator=torch.Generator().manual_seed(2))
    assert torch.equal(kmeans(points, 32, seed=5), kmeans(points, 32, seed=5))
    assert not torch.equal(kmeans(points, 32, seed=5), kmeans(points, 32, seed=6))
    seeds = seed_centroids(points, 32, torch.Generator().manual_seed(0))
    assert len(seeds.unique(dim=0)) == 32


@pytest.mark.parametrize("arguments", [{"k": 0}, {"k": 2, "restarts": 0}])
def test_senseless_arguments_are_refused(arguments):
    with pytest.raises(ValueError, match="k-means needs"):
        kmeans(torch.zeros(4, 2), **arguments)


WEIGHT = torch.randn(48, 100, generator=torch.Generator().manual_seed(3)) * 0.02


def relative_error(weight: torch.Tensor, fmt: CodebookFormat, tensors: dict[str, torch.Tensor]) -> float:
    return float((fmt.dequantize(tensors, weight.shape[1]) - weight).square().sum() / weight.square().sum())


@pytest.mark.parametrize("group_size", ["row", "tensor", 12])
@pytest.mark.parametrize("codebook_dtype", ["float16", "int8"])
@pytest.mark.parametrize(("bits", "size"), [(6, 2), (7, 3), (5, 1)])
def test_vq_packs_what_the_format_says(group_size, codebook_dtype, bits, size):
    fmt = CodebookFormat(1, bits, size, group_size=group_size, codebook_dtype=codebook_dtype)
    tensors = vq.quantize(WEIGHT, fmt)
    assert {n: (tuple(t.shape), t.dtype) for n, t in tensors.items()} == {n: tuple(i) for n, i in fmt.tensors(48, 100).items()}
    assert relative_error(WEIGHT, fmt, tensors) < 2.7 * 4 ** -(bits / size)


def test_vq_with_a_universal_codebook_reaches_its_gaussian_error():
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(4)) * 0.02 * torch.rand(256, 1) * 3
    fmt = CodebookFormat(1, 8, 4, table="gauss_1x8_d4")
    tensors = vq.quantize(weight, fmt)
    assert set(tensors) == {"codes", "scales"}
    assert relative_error(weight, fmt, tensors) == pytest.approx(0.0966, rel=0.03)
    assert float(tensors["scales"].float().mean()) == pytest.approx(
        float(weight.norm(dim=1).mean() / 16) * table_step(fmt.table), rel=0.02
    )


def test_vq_of_zero_rows_tiny_and_large_weights():
    weight = WEIGHT.clone()
    weight[3] = 0
    weight[4] *= 1e4
    fmt = CodebookFormat(1, 6, 2)
    dense = fmt.dequantize(vq.quantize(weight, fmt), 100)
    assert torch.isfinite(dense).all() and not dense[3].any()
    assert (dense[4] - weight[4]).norm() < 0.35 * weight[4].norm()
    zero = vq.quantize(torch.zeros(8, 12), fmt)
    assert not fmt.dequantize(zero, 12).any()


def test_vq_format_choice():
    assert vq.choose_format(VQConfig(bits=2), (3072, 3072)).table == "gauss_1x12_d6"
    plain = vq.choose_format(VQConfig(bits=2, codebook="layer"), (3072, 3072))
    assert (plain.codebook_bits, plain.vector_size, plain.table, plain.codebook_dtype) == (8, 4, None, "float16")
    assert vq.choose_format(VQConfig(bits=3, rotation=False, row_scales=False), (256, 256)) == CodebookFormat(
        1, 6, 2, group_size="tensor", codebook_dtype="int8"
    )
    assert vq.choose_format(VQConfig(bits=8), (3072, 3072)).table is None
    with pytest.raises(ConfigError, match="no shared codebook"):
        vq.choose_format(VQConfig(codebook="shared", codebook_bits=5, vector_size=7), (8, 8))
    with pytest.raises(ConfigError, match="codebook must be None, 'shared', 'layer', got 'mine'"):
        vq.choose_format(VQConfig(codebook="mine"), (8, 8))


def test_vq_refuses_several_codebooks():
    with pytest.raises(ValueError, match="use method aq"):
        vq.quantize(WEIGHT, CodebookFormat(2, 4, 4))
