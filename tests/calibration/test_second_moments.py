"""Second moments and samples of layers' inputs: exact in whatever way, computed once for each input, and only if asked for."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import tiny_models
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qdiff_diffusers.calibration import second_moments, statistics
from qdiff_diffusers.calibration.second_moments import ShiftedProducts, Triangle, input_matrix, layout_of
from qdiff_diffusers.calibration.statistics import InputStatistics, collect
from qdiff_diffusers.calibration.store import Store


def exact(layer: nn.Module, inputs: list[Tensor]) -> tuple[Tensor, int]:
    """``sum x x^T`` in float64, columns as in the stored matrix, and the number of samples; from unfolded inputs."""
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for x in inputs:
        if isinstance(layer, nn.Conv2d):
            taps = F.unfold(x.double(), layer.kernel_size, layer.dilation, layer.padding, layer.stride)
            rows = taps.unflatten(1, (x.shape[1], -1)).permute(0, 3, 2, 1).flatten(0, 1).flatten(1)
        else:
            rows = x.double().reshape(-1, x.shape[-1])
        total, tokens = total + rows.T @ rows, tokens + len(rows)
    return total, tokens


def collected(layer: nn.Module, inputs: list[Tensor], **options) -> InputStatistics:
    """Statistics of a model of one layer over its calls."""
    name = "sample" if isinstance(layer, nn.Conv2d) else "x"

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, **inputs: Tensor) -> Tensor:
            return self.layer(inputs[name])

    calls = Store(Path("unused"), 1 << 30)
    for x in inputs:
        calls.append({"inputs": {name: x}})
    return collect(Model(), ["layer"], calls, **options)["layer"]


def assert_moments(layer: nn.Module, inputs: list[Tensor]) -> InputStatistics:
    found = collected(layer, inputs)
    total, tokens = exact(layer, inputs)
    assert found.tokens == tokens and found.hessian.dtype == torch.float32
    assert float((found.hessian.double() * tokens - total).abs().max()) <= 5e-6 * float(total.diagonal().max())
    assert torch.allclose(found.hessian, found.hessian.T, rtol=0, atol=1e-6 * float(found.hessian.diagonal().max()))
    return found


SIZES = [(1, 1), (2, 3), (4, 4), (5, 9), (11, 8), (16, 17)]
KERNELS = [(1, 1), (3, 3), (5, 5), (1, 3), (4, 2)]


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dilation", [1, 2])
def test_moments_of_convolutions_are_those_of_their_unfolded_inputs(kernel, stride, dilation):
    """Over odd sizes, any padding (none, less than the kernel, more than it), and images smaller than the kernel."""
    generator = torch.Generator().manual_seed(0)
    tried = shifted = 0
    for size, padding, batch in product(SIZES, [(0, 0), (1, 1), (2, 1), (5, 3)], [1, 3]):
        reach = [(k - 1) * dilation for k in kernel]
        if any(n + 2 * pad <= r for n, pad, r in zip(size, padding, reach, strict=True)):
            continue
        layer = nn.Conv2d(3, 2, kernel, stride, padding, dilation)
        x = torch.randn(batch, 3, *size, generator=generator) + 0.5
        assert_moments(layer, [x])
        tried += 1
        shifted += isinstance(layout_of(layer, x), ShiftedProducts)
    assert tried > 10 and bool(shifted) == (stride == 1 and kernel != (1, 1))


def test_moments_of_images_of_several_sizes_add_up():
    layer = nn.Conv2d(4, 2, 3, padding=1)
    inputs = [torch.randn(2, 4, *size) for size in ((8, 8), (2, 3), (9, 12), (8, 8))]
    assert {type(layout_of(layer, x)) for x in inputs} == {ShiftedProducts, Triangle}
    assert_moments(layer, inputs)


def test_an_image_without_a_batch_is_a_batch_of_one():
    for size in (8, 2):
        assert_moments(nn.Conv2d(4, 2, 3, padding=1), [torch.randn(1, 4, size, size)])
        layer, x = nn.Conv2d(4, 2, 3, padding=1), torch.randn(4, size, size)
        alone, batched = (collected(layer, [y]) for y in (x, x[None]))
        assert torch.equal(alone.hessian, batched.hessian) and alone.tokens == batched.tokens


@pytest.mark.parametrize("columns", [1, 127, 128, 129, 300])
def test_moments_of_linear_layers_are_made_of_their_upper_triangle(columns):
    layer = nn.Linear(columns, 2)
    assert_moments(layer, [torch.randn(3, 7, columns), torch.randn(5, columns), torch.randn(0, columns)])


def test_pixels_that_carry_no_weight_leave_nothing_behind():
    """An image that is zero but for its border: what the border's corrections take away is nearly all there is."""
    x = torch.zeros(2, 3, 8, 8)
    x[:, :, 0] = 100 * torch.randn(2, 3, 8)
    assert_moments(nn.Conv2d(3, 2, 3, padding=1), [x])


def test_a_nan_anywhere_is_in_the_moments():
    x = torch.randn(1, 3, 8, 8)
    x[0, 1, 7, 7] = torch.nan
    assert not collected(nn.Conv2d(3, 2, 3, padding=1), [x]).hessian.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_inputs_of_other_dtypes_are_multiplied_and_added_in_float32(kind, dtype):
    """300 times the same number squared: in 16 bits the sum would stop growing."""
    layer = (nn.Linear(4, 2) if kind == "linear" else nn.Conv2d(4, 2, 3, padding=1)).to(dtype)
    x = torch.full((300, 4) if kind == "linear" else (2, 4, 12, 12), 1.25, dtype=dtype)
    assert_moments(layer, [x])
    assert all(rows.dtype == torch.float32 for rows in collected(layer, [x], keep=3).rows.values())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_matrix_unit_multiplies_16_bits_without_a_loss(dtype):
    for layer, shape in ((nn.Linear(300, 2), (5000, 300)), (nn.Conv2d(24, 2, 3, padding=1), (4, 24, 33, 31))):
        x = torch.randn(shape, dtype=dtype)
        found = collected(layer.to("cuda", dtype), [x]).hessian.cpu()
        assert second_moments.product_dtype(x.cuda()) == dtype
        total, tokens = exact(layer, [x])
        assert float((found.double() * tokens - total).abs().max()) <= 1e-5 * float(total.diagonal().max())


@pytest.mark.parametrize("count", [1, 7, 1000])
@pytest.mark.parametrize("layer", [nn.Linear(6, 2), nn.Conv2d(3, 2, (3, 2), (2, 1), (1, 2), (1, 2)), nn.Conv2d(3, 2, 1)], ids=str)
def test_samples_are_evenly_spaced_rows_of_the_unfolded_input(layer, count):
    x = torch.randn(2, 5, 6) if isinstance(layer, nn.Linear) else torch.randn(2, 3, 9, 7)
    every = input_matrix(layer, x)
    chosen = torch.linspace(0, len(every) - 1, min(count, len(every))).round().long()
    assert torch.equal(second_moments.input_rows(layer, x, count), every[chosen])
    assert second_moments.input_count(layer, x) == len(every)


def products_of(monkeypatch) -> list[tuple[int, ...]]:
    """A list that grows with the shapes of every product of an input."""
    shapes: list[tuple[int, ...]] = []
    original = second_moments.product_of
    monkeypatch.setattr(second_moments, "product_of", lambda a, b: shapes.append(tuple(a.shape)) or original(a, b))
    return shapes


def test_samples_alone_cost_no_products(monkeypatch):
    shapes = products_of(monkeypatch)
    found = collected(nn.Linear(6, 2), [torch.randn(9, 6)], keep=4, second_moments=False)
    assert not shapes and found.hessian is None and found.tokens == 9
    assert [len(rows) for rows in found.rows.values()] == [4]


class Shared(nn.Module):
    """Layers that get one tensor, with others in between; it may change between two of them."""

    def __init__(self, change: bool = False) -> None:
        super().__init__()
        self.first, self.between, self.second = (nn.Linear(8, 8) for _ in range(3))
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1.0
        y = self.between(self.first(x))
        if self.change:
            x.mul_(3)
        return y + self.second(x)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("change", [False, True])
def test_an_input_of_several_layers_is_looked_at_once_unless_it_changes(change, inference, monkeypatch):
    shapes = products_of(monkeypatch)
    calls = Store(Path("unused"), 1 << 30)
    calls.append({"inputs": {"x": torch.randn(4, 8)}})
    model = Shared(change)
    with torch.inference_mode(inference):
        found = collect(model, ["first", "between", "second"], calls)
    assert len(shapes) == (3 if change or inference else 2)
    factor = 9 if change else 1
    assert torch.allclose(found["second"].hessian, factor * found["first"].hessian)


@pytest.mark.parametrize("name", ["sdxl_unet", "pixart"])
def test_all_cross_attentions_of_a_model_share_one_look_at_the_prompt(name, monkeypatch):
    torch.manual_seed(0)
    model = tiny_models.make(name)
    names = [n for n, module in model.named_modules() if n.endswith(("attn2.to_k", "attn2.to_v"))]
    assert len(names) > 2
    calls = Store(Path("unused"), 1 << 30)
    calls.append({"inputs": tiny_models.MODELS[name][1]()})
    shapes = products_of(monkeypatch)
    found = collect(model, names, calls)
    assert len(shapes) == 1
    assert all(torch.equal(found[n].hessian, found[names[0]].hessian) for n in names)


@pytest.mark.parametrize("name", ["dit", "flux", "sd3", "sdxl_unet", "wan"])
def test_a_layer_has_the_same_bits_whether_others_are_looked_at_or_not(name):
    """So the groups that memory allows, and the processes of a distributed run, do not change the result."""
    torch.manual_seed(0)
    model = tiny_models.make(name)
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    calls = Store(Path("unused"), 1 << 30)
    calls.append({"inputs": tiny_models.MODELS[name][1]()})
    together = collect(model, names, calls, keep=4)
    for n in names[:: max(1, len(names) // 8)]:
        alone = collect(model, [n], calls, keep=4)[n]
        if together[n].tokens:
            assert torch.equal(alone.hessian, together[n].hessian), n
        assert all(torch.equal(alone.rows[step], rows) for step, rows in together[n].rows.items())


@pytest.mark.parametrize("layer", [nn.Linear(300, 2), nn.Conv2d(3, 2, 3, padding=1)], ids=str)
def test_statistics_survive_a_file_to_the_last_bit(layer, tmp_path):
    x = torch.randn(20, 300) if isinstance(layer, nn.Linear) else torch.randn(2, 3, 9, 9)
    found = collected(layer, [x], keep=5)
    found.save(tmp_path / "file", 2.0)
    loaded, fewer = InputStatistics(layer), InputStatistics(layer)
    assert loaded.load(tmp_path / "file") and fewer.load(tmp_path / "file", second_moments=False)
    assert torch.equal(loaded.hessian, found.hessian) and torch.equal(loaded.rows[0.0], found.rows[0.0])
    assert fewer.hessian is None and torch.equal(fewer.rows[0.0], found.rows[0.0])
    collected(layer, [x], keep=5, second_moments=False).save(tmp_path / "file", 2.0)
    assert not InputStatistics(layer).load(tmp_path / "file")  # second moments are not there


def test_the_size_of_statistics_is_what_they_hold():
    for layer, x in ((nn.Linear(700, 2), torch.randn(30, 700)), (nn.Conv2d(100, 2, 3, 2, 1), torch.randn(1, 100, 8, 8))):
        found = collected(layer, [x])
        held = sum(t.nbytes for products in found.sums.values() for t in products)
        assert held == pytest.approx(statistics.statistics_bytes(layer, 0, True), rel=0.02)
