"""The paper's grid search: exactly what trying every clip on every weight gives, and no better than the fast search."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qdiff_diffusers import ConfigError, FPConfig
from qdiff_diffusers.formats import MinifloatFormat
from qdiff_diffusers.methods import fp
from qdiff_diffusers.methods.clips import ClipSearch
from qdiff_diffusers.methods.grids import encoding_grid, integer_grid
from qdiff_diffusers.methods.scales import quantize_groups

SHAPE = (24, 160)


def gaussian(generator: torch.Generator) -> Tensor:
    return 0.02 * torch.randn(SHAPE, generator=generator)


def heavy_tailed(generator: torch.Generator) -> Tensor:
    """Student's t with four degrees of freedom, as trained layers often are."""
    return gaussian(generator) / (torch.randn(4, *SHAPE, generator=generator).square().mean(0)).sqrt()


def uneven_rows(generator: torch.Generator) -> Tensor:
    return gaussian(generator) * torch.logspace(-3, 3, SHAPE[0])[:, None]


WEIGHTS: dict[str, Callable[[torch.Generator], Tensor]] = {
    "gaussian": gaussian,
    "heavy-tailed": heavy_tailed,
    "uneven rows": uneven_rows,
}
GROUPS = ["tensor", "row", 16]


def weights(name: str, seed: int = 0) -> Tensor:
    return WEIGHTS[name](torch.Generator().manual_seed(seed))


def group(weight: Tensor, size: int | str) -> Tensor:
    return weight.reshape(1, -1) if size == "tensor" else weight if size == "row" else weight.reshape(-1, int(size))


def paper(groups: Tensor, encoding: str) -> Tensor:
    """Least squared error of each group, by the paper's formulas with its real-valued bias, clip by clip, in float64."""
    exponent, mantissa = int(encoding[1]), int(encoding[3])
    x, peak = groups.double(), groups.double().abs().amax(1, keepdim=True)
    best = torch.full((len(x),), torch.inf, dtype=torch.float64)
    for factor in torch.linspace(0.1, 1.2, 111).double():
        clip = factor * peak
        bias = 2**exponent - clip.log2() + torch.tensor(2 - 2.0**-mantissa).double().log2() - 1
        clipped = torch.minimum(torch.maximum(x, -clip), clip)
        power = ((clipped.abs().clamp_min(1e-300).log2() + bias) + 1e-12).floor().clamp_min(1)
        step = (power - mantissa - bias).exp2()
        best = torch.minimum(best, ((clipped / step).round() * step - x).square().sum(1))
    return best


@pytest.mark.parametrize("size", GROUPS)
@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("encoding", ["e2m1", "e3m0", "e2m2", "e3m2", "e2m5", "e5m2"])
def test_sorting_finds_what_the_paper_finds_clip_by_clip(encoding: str, name: str, size: int | str) -> None:
    weight = weights(name)
    stored = MinifloatFormat((encoding,), size, "float32")
    found = quantize_groups(weight, [encoding_grid(encoding)], size, "float32", search=ClipSearch())
    error = (stored.dequantize(stored.pack(found.codes, found.scales), SHAPE[1]) - weight).double()
    # Hardware's E5M2 has no largest binade, which the paper's has.
    expected = paper(group(weight, size), encoding) if encoding != "e5m2" else group(error.square(), size).sum(1)
    assert torch.allclose(group(error.square(), size).sum(1), expected, rtol=1e-4, atol=1e-12)
    assert found.error == pytest.approx(float(expected.sum()), rel=1e-4)


@pytest.mark.parametrize("scale_dtype", ["float16", "e4m3", "e8m0"])
def test_clips_are_tried_as_their_scales_are_stored(scale_dtype: str) -> None:
    weight = weights("heavy-tailed")
    for grid in (encoding_grid("e2m1"), *(() if scale_dtype == "e8m0" else (encoding_grid("e1m2uz"), integer_grid(4)))):
        tensor_scale = scale_dtype == "e4m3"
        found = quantize_groups(weight, [grid], 16, scale_dtype, tensor_scale, ClipSearch(), with_dense=True)
        assert found.dense is not None
        assert found.error == pytest.approx(float((found.dense - weight).square().sum()), rel=1e-4)


@pytest.mark.parametrize("size", ["tensor", "row"])
@pytest.mark.parametrize("name", WEIGHTS)
def test_the_fast_search_gives_the_same_answer(name: str, size: int | str) -> None:
    """The encoding that 111 clips on every weight choose, or one as good to a hundredth; and hardly more squared error."""
    weight = weights(name)
    for bits in (3, 4, 6, 8):
        formats = fp.formats_for(bits, "exmy", size, "float32")

        def errors(search: str, formats: list[MinifloatFormat] = formats) -> list[float]:
            grids = [[encoding_grid(*f.encodings)] for f in formats]
            return [quantize_groups(weight, g, size, "float32", search=fp.SEARCHES[search]).error for g in grids]

        fast, paper = errors("fast"), errors("grid")
        chosen = fast.index(min(fast))
        assert paper[chosen] < 1.01 * min(paper)
        assert fast == paper if size == "tensor" else fast[chosen] < (1.01 if bits < 5 else 1.11) * paper[chosen]


def test_the_three_rows_of_the_ablation_are_three_searches() -> None:
    """Fixed encoding and clip, searched encoding, searched encoding and clip: each better than the one before."""
    weight = weights("gaussian")
    settings = [
        {"weight_format": "e1m2", "scale_search": "absmax"},
        {"bits": 4, "weight_format": "exmy", "scale_search": "absmax"},
        {"bits": 4, "weight_format": "exmy", "scale_search": "grid"},
        {"bits": 4, "weight_format": "exmy"},
    ]
    errors = []
    for setting in settings:
        stored, tensors = fp.quantize_config(weight, FPConfig(group_size="row", **setting))
        errors.append(float((stored.dequantize(tensors, SHAPE[1]) - weight).square().sum()))
    fixed, encoding, clip, fast = errors
    assert clip < 0.95 * encoding < 0.95 * fixed
    assert fast < 1.01 * clip


def test_an_unknown_search_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="scale_search must be 'fast', 'grid', 'absmax', got 'slow'"):
        FPConfig(bits=4, scale_search="slow")
