"""Packed layers stand in for ``nn.Linear`` and ``nn.Conv2d`` wherever code expects those."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import tiny_models
import torch
from torch import nn

from qdiff_diffusers import AQConfig, FPConfig, QDiffConfig, QDiffError, RTNConfig, SVDQuantConfig, VQConfig
from qdiff_diffusers.formats import CodebookFormat, IntegerFormat, LayerSpec, MinifloatFormat
from qdiff_diffusers.layers import PackedLayer, QDiffConv2d, QDiffLinear, dense_layer, pack_layer, unsupported_reason
from qdiff_diffusers.methods import quantize_weight
from qdiff_diffusers.model.selection import select_layers

CONFIGS = {
    "int4-asymmetric": lambda: RTNConfig(bits=4),
    "float32-scales": lambda: FPConfig(weight_format="e3m2", group_size="row", scale_dtype="float32"),
    "e8m0-scales": lambda: FPConfig(weight_format="mxfp4"),
    "e4m3-scales": lambda: FPConfig(weight_format="nvfp4"),
    "low-rank": lambda: SVDQuantConfig(bits=4, rank=2, rotation=True, activations="int8"),
}


def packed(layer: nn.Module, config: QDiffConfig | None = None, dtype: torch.dtype = torch.float32) -> PackedLayer:
    """``layer`` quantized in place."""
    spec, tensors, _ = quantize_weight(layer.weight, config or RTNConfig(bits=4))
    return pack_layer(layer.to(dtype), spec, dtype, tensors)


def codebook_layer(table: str | None = None) -> PackedLayer:
    fmt = CodebookFormat(1, 4, 4)
    tensors = fmt.pack(torch.randint(0, 16, (8, 16, 1)), torch.randn(1, 16, 4), torch.ones(8, 1))
    return pack_layer(nn.Linear(64, 8), LayerSpec(fmt), torch.float32, tensors)


def stored(layer: nn.Module) -> dict[str, torch.Tensor]:
    return {name: getattr(layer, name).clone() for name in layer.tensor_infos()}


def assert_unchanged(layer: PackedLayer, before: dict[str, torch.Tensor]) -> None:
    for name, tensor in before.items():
        now = getattr(layer, name)
        assert now.dtype == tensor.dtype == layer.tensor_infos()[name].dtype, name
        assert torch.equal(now.view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("dense", [lambda: nn.Linear(64, 24), lambda: nn.Conv2d(32, 24, 3, padding=1)], ids=["linear", "conv2d"])
def test_a_packed_layer_computes_what_its_dense_weight_would(dense, config):
    layer = packed(dense(), config())
    weight, bias = layer.weight, layer.bias
    x = torch.randn(5, 64) if isinstance(layer, nn.Linear) else torch.randn(2, 32, 6, 6)
    if isinstance(layer, nn.Linear):
        expected = nn.functional.linear(x, weight, bias)
    else:
        expected = nn.functional.conv2d(x, weight, bias, layer.stride, layer.padding)
    tolerance = 1e-5 if layer.spec.activations == "none" else 2e-2
    assert (layer(x) - expected).norm() / expected.norm() < tolerance


@pytest.mark.parametrize(
    "geometry",
    [
        {"kernel_size": 1},
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 3, "stride": 2, "padding": 1},
        {"kernel_size": 3, "padding": 2, "dilation": 2},
        {"kernel_size": 4, "stride": 4},
        {"kernel_size": (1, 3), "stride": (2, 1), "padding": (0, 1), "bias": False},
    ],
    ids=str,
)
def test_convolutions_of_any_geometry_are_packed(geometry):
    dense = nn.Conv2d(32, 16, **geometry)
    layer = packed(copy.deepcopy(dense), RTNConfig(bits=8))
    x = torch.randn(2, 32, 9, 8)
    assert type(layer) is QDiffConv2d
    assert layer(x).shape == dense(x).shape
    assert (layer(x) - dense(x)).norm() / dense(x).norm() < 0.01


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (lambda: nn.Conv2d(32, 32, 3, groups=2), "2 groups"),
        (lambda: nn.Conv2d(32, 32, 3, groups=32), "32 groups"),
        (lambda: nn.ConvTranspose2d(32, 32, 3), "ConvTranspose2d"),
        (lambda: nn.Conv1d(32, 32, 3), "Conv1d"),
        (lambda: nn.Conv3d(8, 8, 3), "Conv3d"),
        (lambda: nn.Conv2d(32, 32, 3, padding=1, padding_mode="reflect"), "reflect"),
        (lambda: nn.Conv2d(32, 32, 3, padding="same"), "same"),
        (lambda: nn.Embedding(8, 32, max_norm=1.0), "renormalises"),
        (lambda: nn.MultiheadAttention(32, 2).out_proj, "NonDynamicallyQuantizableLinear"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_layers_stay_as_they_are_and_say_why(layer, reason):
    assert reason in unsupported_reason(layer())
    model = nn.Sequential()
    model.blocks = nn.ModuleList([layer()])
    targets, skipped = select_layers(model, RTNConfig(bits=4), [])
    assert not targets
    assert reason in skipped["blocks.0"]


def test_a_packed_layer_is_an_instance_of_what_it_replaces():
    assert isinstance(packed(nn.Linear(64, 8)), nn.Linear)
    assert isinstance(packed(nn.Conv2d(32, 8, 3)), nn.Conv2d)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_weight_looks_like_the_dense_weight(dtype):
    linear = packed(nn.Linear(64, 24), dtype=dtype)
    assert (linear.weight.shape, linear.weight.dtype, linear.weight.device) == ((24, 64), dtype, linear.codes.device)
    conv = packed(nn.Conv2d(32, 24, (3, 1)), dtype=dtype)
    assert (conv.weight.shape, conv.weight.dtype) == ((24, 32, 3, 1), dtype)


def test_writing_to_weight_is_refused_rather_than_lost():
    layer = packed(nn.Linear(64, 24))
    with pytest.raises((AttributeError, KeyError, TypeError)):
        layer.weight = nn.Parameter(torch.zeros(24, 64))
    with pytest.raises((AttributeError, KeyError, TypeError)):
        layer.weight = torch.zeros(24, 64)


CASTS = {
    "to(bfloat16)": lambda m: m.to(torch.bfloat16),
    "to(cpu, half)": lambda m: m.to("cpu", torch.float16),
    "bfloat16()": lambda m: m.bfloat16(),
    "half()": lambda m: m.half(),
    "double()": lambda m: m.double(),
    "type(half)": lambda m: m.type(torch.float16),
    "there and back": lambda m: m.half().float(),
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_casting_a_model_leaves_packed_tensors_alone(config, cast):
    """Float32 scales cast to bfloat16 would change every weight, float8 and int8 ones would lose their meaning."""
    model = nn.Sequential(packed(nn.Linear(64, 32), config()), nn.LayerNorm(32))
    before, exact = stored(model[0]), model[0].dequantize(torch.float32)
    cast(model)
    dtype = model[1].weight.dtype
    assert_unchanged(model[0], before)
    assert model[0].compute_dtype == model[0].weight.dtype == model[0].bias.dtype == dtype
    assert torch.equal(model[0].dequantize(torch.float32), exact)
    assert model(torch.randn(3, 64).to(dtype)).dtype == dtype


def test_casting_leaves_codebooks_alone():
    layer = codebook_layer()
    before = stored(layer)
    assert_unchanged(layer.bfloat16(), before)


def test_moving_to_another_device_moves_every_tensor():
    layer = packed(nn.Linear(64, 32), SVDQuantConfig(bits=4, rank=2))
    layer.to("meta")
    assert all(tensor.is_meta for tensor in (*layer.parameters(), *layer.buffers()))
    assert layer.compute_dtype == torch.float32


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_layer_can_be_copied_pickled_and_rebuilt_from_its_state(config):
    layer = packed(nn.Linear(64, 32), config())
    x = torch.randn(3, 64)
    expected = layer(x)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(layer), torch.load(buffer, weights_only=False)]
    if not any(t.dtype == torch.float8_e4m3fn for t in layer.buffers()):  # torch cannot unpickle those
        copies.append(pickle.loads(pickle.dumps(layer)))
    other = packed(nn.Linear(64, 32), config())
    other.load_state_dict(layer.state_dict())
    for twin in (*copies, other):
        assert torch.equal(twin(x), expected)
        assert twin.spec == layer.spec
        assert twin.codes.data_ptr() != layer.codes.data_ptr()


def test_state_holds_exactly_the_packed_tensors_and_the_bias():
    layer = packed(nn.Linear(64, 32))
    assert layer.state_dict().keys() == {"bias", "codes", "scales", "zeros"}
    assert sum(t.nbytes for name, t in layer.state_dict().items() if name != "bias") == layer.spec.nbytes((32, 64))


def test_a_state_of_another_shape_is_refused():
    layer = packed(nn.Linear(64, 32))
    with pytest.raises(RuntimeError, match="size mismatch for codes"):
        layer.load_state_dict(packed(nn.Linear(128, 32)).state_dict())


def test_only_the_bias_can_be_trained():
    layer = packed(nn.Linear(64, 32))
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["bias"]
    layer.requires_grad_(False)
    with pytest.raises(RuntimeError, match="floating point"):
        layer.codes.requires_grad_(True)


def test_hooks_on_a_layer_survive_packing():
    linear = nn.Linear(64, 32)
    calls = []
    linear.register_forward_hook(lambda *_: calls.append(1))
    packed(linear)(torch.randn(1, 64))
    assert calls == [1]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_dequantizing_gives_an_ordinary_layer_back(config):
    for dense in (nn.Linear(64, 32), nn.Conv2d(32, 16, 3, stride=2, padding=1)):
        kind = type(dense)
        layer = packed(dense, config())
        weight = layer.weight
        dense_layer(layer)
        assert type(layer) is kind
        assert torch.equal(layer.weight, weight)
        assert isinstance(layer.weight, nn.Parameter)
        assert layer.state_dict().keys() == {"weight", "bias"}
        assert not hasattr(layer, "spec")


@pytest.mark.parametrize("name", ["dit", "sdxl_unet"])
def test_a_dequantized_model_saves_as_an_ordinary_one(name, tmp_path):
    tiny_models.make(name).save_pretrained(tmp_path / "dense")
    cls = type(tiny_models.make(name))
    model = cls.from_pretrained(tmp_path / "dense", quantization_config=RTNConfig(bits=4))
    packed_output = tiny_models.run(model, name)
    model.dequantize()
    output = tiny_models.run(model, name)
    assert (output - packed_output).norm() / packed_output.norm() < 1e-4
    model.save_pretrained(tmp_path / "again")
    reloaded = cls.from_pretrained(tmp_path / "again")
    assert "quantization_config" not in reloaded.config
    assert not getattr(reloaded, "is_quantized", False)
    assert {type(m) for m in reloaded.modules()} == {type(m) for m in tiny_models.make(name).modules()}
    left, right = reloaded.state_dict(), model.state_dict()
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)


@pytest.mark.parametrize(("layer", "x"), [(nn.Linear(63, 8), (2, 64)), (nn.Linear(64, 8), (2, 63))], ids=["wide", "narrow"])
def test_inputs_of_another_width_are_refused_even_if_the_packed_bytes_would_fit(layer, x):
    with pytest.raises((ValueError, RuntimeError), match=r"6[34]"):
        packed(layer)(torch.randn(x))


def test_images_with_other_channels_are_refused():
    layer = packed(nn.Conv2d(31, 8, 1))
    with pytest.raises((ValueError, RuntimeError), match="32"):
        layer(torch.randn(1, 32, 4, 4))


def test_an_image_without_a_batch_is_accepted_like_by_the_dense_layer():
    dense = nn.Conv2d(32, 8, 3, padding=1)
    layer = packed(copy.deepcopy(dense), RTNConfig(bits=8))
    x = torch.randn(32, 6, 6)
    assert layer(x).shape == dense(x).shape


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_weights_that_are_not_finite_are_refused(config, bad):
    weight = torch.randn(16, 64)
    weight[3, 5] = bad
    with pytest.raises(QDiffError, match="NaN or infinity"):
        quantize_weight(weight, config())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_weights_may_come_in_any_floating_dtype(dtype):
    weight = torch.randn(16, 64).to(dtype)
    quantized = quantize_weight(weight, RTNConfig(bits=8))
    assert quantized.error < 1e-3
    assert torch.equal(quantized.tensors["codes"], quantize_weight(weight.float(), RTNConfig(bits=8)).tensors["codes"])


SHAPES = [(1, 1), (2, 1), (1, 64), (3, 5), (65, 129), (5, 4, 3, 3), (4, 1, 7, 7), (33, 17, 2, 5)]
METHODS = {
    **CONFIGS,
    "aq-4": lambda: AQConfig(bits=4, effort=0),
    "aq-1": lambda: AQConfig(bits=1, effort=0),
    "aq-1.5": lambda: AQConfig(bits=1.5, effort=0),
    "aq-own": lambda: AQConfig(num_codebooks=2, codebook_bits=6, vector_size=4, codebook="layer", effort=0),
    "vq-3": lambda: VQConfig(bits=3, restarts=1),
    "vq-own": lambda: VQConfig(codebook_bits=6, vector_size=2, codebook="layer", row_scales=False, restarts=1),
    "fp-tensor": lambda: FPConfig(bits=5, group_size="tensor"),
    "svdquant-full-rank": lambda: SVDQuantConfig(bits=2, rank=64, rounds=1),
    "rtn-row": lambda: RTNConfig(bits=2, group_size="row"),
}


@pytest.mark.parametrize("values", ["random", "zero", "constant", "one huge row"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_stores_what_it_promises_at_any_shape(method, values):
    for shape in SHAPES:
        weight = torch.full(shape, 0.3) if values == "constant" else torch.randn(shape) * (values != "zero")
        if values == "one huge row":
            weight[0] *= 1000
        spec, tensors, error = quantize_weight(weight, METHODS[method](), seed=1)
        assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == spec.tensors(shape)
        assert error < 0.6
        for tensor in tensors.values():  # as if read from a file, or a reloaded layer would round differently
            assert tensor.stride() == torch.empty(tensor.shape).stride()
            assert tensor.untyped_storage().nbytes() == tensor.nbytes
        layer = nn.Linear(shape[1], shape[0]) if len(shape) == 2 else nn.Conv2d(shape[1], shape[0], shape[2:])
        pack_layer(layer, spec, torch.float32, tensors)
        assert torch.isfinite(layer(torch.randn(2, shape[1]) if len(shape) == 2 else torch.randn(1, shape[1], 8, 8))).all()
        assert torch.isfinite(layer.weight).all()
        assert values != "zero" or not layer.weight.any()


def test_printing_a_layer_says_how_it_is_stored():
    assert "int4 asymmetric g64, 4.50 bits" in repr(packed(nn.Linear(64, 32)))
    spec = LayerSpec(MinifloatFormat(("e2m1",), 32, "e8m0"))
    layer = pack_layer(
        nn.Linear(64, 32), spec, torch.float32, quantize_weight(torch.randn(32, 64), CONFIGS["e8m0-scales"]()).tensors
    )
    assert "e2m1 g32 e8m0 scales, 4.25 bits" in repr(layer)


def test_lora_adapters_work_on_packed_layers(tmp_path):
    peft = pytest.importorskip("peft")
    tiny_models.make("flux").save_pretrained(tmp_path)
    cls = type(tiny_models.make("flux"))
    model = cls.from_pretrained(tmp_path, quantization_config=RTNConfig(bits=4))
    base = tiny_models.run(model, "flux")
    lora = peft.LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_k", "proj_mlp"], init_lora_weights=False)
    model.add_adapter(lora, adapter_name="one")
    assert isinstance(model.transformer_blocks[0].attn.to_q.base_layer, QDiffLinear)
    with_lora = tiny_models.run(model, "flux")
    assert not torch.allclose(with_lora, base)

    dense = cls.from_pretrained(tmp_path, quantization_config=RTNConfig(bits=4))
    dense.dequantize()
    dense.add_adapter(lora, adapter_name="one")
    weights = {name: p for name, p in model.named_parameters() if "lora_" in name}
    assert not dense.load_state_dict(weights, strict=False).unexpected_keys
    assert torch.allclose(tiny_models.run(dense, "flux"), with_lora, atol=1e-4)

    model.disable_adapters()
    assert torch.equal(tiny_models.run(model, "flux"), base)


def test_lora_adapters_can_be_trained_on_packed_layers(tmp_path):
    peft = pytest.importorskip("peft")
    tiny_models.make("sd3").save_pretrained(tmp_path)
    cls = type(tiny_models.make("sd3"))
    model = cls.from_pretrained(tmp_path, quantization_config=SVDQuantConfig(bits=4, rank=2, activations="int8"))
    model.requires_grad_(False)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"]))
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained
    inputs = tiny_models.sd3_inputs()
    optimizer = torch.optim.SGD(trained, lr=0.1)
    losses = []
    for _ in range(4):
        loss = model(**inputs).sample.square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in trained)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_integer_specs_of_every_width_fit_a_layer():
    for bits in range(2, 9):
        fmt = IntegerFormat(bits, "row")
        low = -(1 << (bits - 1))
        codes = torch.randint(low, -low, (8, 33))
        layer = pack_layer(nn.Linear(33, 8), LayerSpec(fmt), torch.float32, fmt.pack(codes, torch.ones(8, 1)))
        assert torch.equal(layer.weight, codes.float())
