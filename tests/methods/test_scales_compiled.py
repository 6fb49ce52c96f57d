"""The compiled scale search finds what the search by torch finds, whatever the grid, the groups and the dtype of scales."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qdiff_diffusers import FPConfig, QDiffConfig, SVDQuantConfig
from qdiff_diffusers.formats import IntegerFormat, MinifloatFormat
from qdiff_diffusers.methods import quantize_weight, scales
from qdiff_diffusers.methods.grids import Grid, encoding_grid, format_grids, integer_grid
from qdiff_diffusers.methods.scales import Quantized, ScaleSearch, pack_groups, quantize_groups

pytest.importorskip("numba")

GRIDS = [
    "int2",
    "int4",
    "int8",
    "e1m0uz",
    "e1m1uz",
    "e1m2",
    "e1m2uz,e2m1uz",
    "e2m1",
    "e2m1uz",
    "e3m0",
    "e1m3uz,e2m2uz",
    "e4m3",
    "e5m2",
]


def grids(names: str) -> list[Grid]:
    return [integer_grid(int(name[3:])) if name.startswith("int") else encoding_grid(name) for name in names.split(",")]


def weights(rows: int = 9, columns: int = 200, scale: float = 1.0) -> Tensor:
    """Gaussian and heavy-tailed rows, one of zeros, and one of which only the last group is not zero."""
    out = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    out[1::2] *= out[1::2].abs() ** 2
    out[-1], out[-2, : columns - 8] = 0, 0
    return out * scale


def by_torch(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> Quantized:
    with monkeypatch.context() as patched:
        patched.setattr(scales, "loops", lambda *_: None)
        return quantize_groups(*arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("names", GRIDS)
@pytest.mark.parametrize("group", [1, 16, 40, 64, "row"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "e4m3", "e8m0"])
def test_the_compiled_search_finds_what_torch_finds(names, group, dtype, monkeypatch):
    tried = grids(names)
    if dtype == "e8m0" and not (len(tried) == 1 and tried[0].symmetric):
        pytest.skip("powers of two have no sign")
    weight = weights()
    arguments = weight, tried, group, dtype, dtype == "e4m3", None, True
    found, expected = quantize_groups(*arguments), by_torch(monkeypatch, *arguments)
    assert found.codes.dtype == expected.codes.dtype
    assert found.scales.dtype == expected.scales.dtype
    assert found.error == pytest.approx(expected.error, rel=1e-3, abs=1e-9)
    assert found.error == pytest.approx(float((weight - found.dense).square().sum()), rel=1e-3, abs=1e-9)
    # Where two scales are equally good the order of sums decides.
    assert (found.codes != expected.codes).float().mean() < 0.01
    same = (found.codes == expected.codes) & (found.dense - expected.dense).abs().le(1e-6 * expected.dense.abs())
    assert same.float().mean() > 0.85


@pytest.mark.parametrize("names", ["int4", "e1m2uz,e2m1uz", "e2m1"])
@pytest.mark.parametrize("search", [ScaleSearch(0, 0), ScaleSearch(-9, 2), ScaleSearch(1, 3), ScaleSearch(-3, -1, 3)])
def test_it_tries_the_scales_that_it_is_told_to_try(names, search, monkeypatch):
    for dtype in ("float16", "e4m3"):
        arguments = weights(), grids(names), 16, dtype, dtype == "e4m3", search, True
        found, expected = quantize_groups(*arguments), by_torch(monkeypatch, *arguments)
        assert found.error == pytest.approx(expected.error, rel=1e-4)
        assert (found.codes == expected.codes).float().mean() > 0.99


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e-6, 1e4, 1e15])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "e4m3"])
def test_weights_of_any_size_get_the_scales_that_torch_finds(scale, dtype, monkeypatch):
    arguments = weights(scale=scale), grids("e2m1uz"), 16, dtype, dtype == "e4m3", None, True
    found, expected = quantize_groups(*arguments), by_torch(monkeypatch, *arguments)
    assert found.dense.isfinite().all() and found.scales.isfinite().all()
    assert (found.codes == expected.codes).float().mean() > 0.99
    torch.testing.assert_close(found.scales, expected.scales, rtol=0.5, atol=0)


def test_rows_that_are_not_contiguous_are_searched_too():
    weight = weights(12, 96)
    found = quantize_groups(weight[::3], grids("e2m1"), 16, "float16")
    assert torch.equal(found.codes, quantize_groups(weight[::3].contiguous(), grids("e2m1"), 16, "float16").codes)


@pytest.mark.parametrize(
    "weight_format", [IntegerFormat(3, 16), MinifloatFormat(("e2m1",), 16, "e4m3", True), MinifloatFormat(("e4m3",))]
)
def test_codes_are_packed_block_by_block_as_they_are_at_once(weight_format):
    tensor_scale = getattr(weight_format, "tensor_scale", False)
    weight = weights(1500, 202)
    found = quantize_groups(weight, format_grids(weight_format), weight_format.group_size, weight_format.scale_dtype, tensor_scale)
    second = (found.tensor_scale,) if isinstance(weight_format, MinifloatFormat) else ()
    expected = weight_format.pack(found.codes, found.scales, *second)
    packed = pack_groups(weight_format, found)
    assert packed.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(packed[name].view(torch.uint8), tensor.view(torch.uint8)), name
        assert packed[name].is_contiguous()


CONFIGS: dict[str, QDiffConfig] = {
    "fp": FPConfig(bits=4),
    "fp3": FPConfig(bits=3, group_size="row"),
    "nvfp4": FPConfig(weight_format="nvfp4"),
    "svdquant": SVDQuantConfig(bits=4, rank=4),
    "svdquant int4": SVDQuantConfig(weight_format="int4", rank=4),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_layers_are_the_same_to_the_bit_on_any_number_of_threads(name):
    weight = torch.randn(1400, 640, generator=torch.Generator().manual_seed(3))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            results.append(quantize_weight(weight, CONFIGS[name]))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert other.spec == results[0].spec
        for key, tensor in results[0].tensors.items():
            assert torch.equal(other.tensors[key].view(torch.uint8), tensor.view(torch.uint8)), key


@pytest.mark.parametrize("name", CONFIGS)
def test_layers_are_as_good_without_numba(name, monkeypatch):
    weight = torch.randn(320, 256, generator=torch.Generator().manual_seed(4))
    found = quantize_weight(weight, CONFIGS[name]).error
    monkeypatch.setattr(scales, "loops", lambda *_: None)
    assert found == pytest.approx(quantize_weight(weight, CONFIGS[name]).error, rel=1e-3)
