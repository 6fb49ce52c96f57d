"""One packed layer of every method and kind with adapters: against the dense layer it stands for, with the very same adapters."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from qdiff_diffusers import AQConfig, FPConfig, QDiffConfig, QDiffError, RTNConfig, SVDQuantConfig, VQConfig
from qdiff_diffusers.layers import PackedLayer, dense_layer
from qdiff_diffusers.model.packing import quantize_layer

peft = pytest.importorskip("peft")

METHODS: dict[str, QDiffConfig] = {
    "aq": AQConfig(num_codebooks=1, codebook_bits=8, vector_size=4, codebook="shared", rotation=True, effort=0),
    "vq": VQConfig(codebook_bits=4, vector_size=2, restarts=1),
    "fp": FPConfig(bits=4),
    "nvfp4": FPConfig(weight_format="nvfp4"),
    "svdquant": SVDQuantConfig(weight_format="int4", rank=4, rounds=1),
    "rtn": RTNConfig(bits=4),
}
QUANTIZED_INPUTS: dict[str, QDiffConfig] = {
    "rtn-int8": RTNConfig(bits=4, activations="int8"),
    "fp-fp8": FPConfig(bits=4, activations="fp8"),
    "svdquant-int4": SVDQuantConfig(weight_format="int4", rank=4, rounds=1, activations="int4"),
    "svdquant-nvfp4": SVDQuantConfig(weight_format="nvfp4", rank=4, rounds=1, activations="nvfp4"),
}
LAYERS = {
    "linear": (lambda: nn.Linear(64, 48), lambda: torch.randn(2, 5, 64)),
    "conv": (lambda: nn.Conv2d(16, 24, 3, padding=1), lambda: torch.randn(2, 16, 6, 6)),
    "conv-stride": (lambda: nn.Conv2d(16, 24, 3, padding=1, stride=2, bias=False), lambda: torch.randn(2, 16, 7, 6)),
}
every_layer = pytest.mark.parametrize("kind", LAYERS)
every_method = pytest.mark.parametrize("method", [*METHODS, *QUANTIZED_INPUTS])


class Model(nn.Module):
    """A model of one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def pair(kind: str, method: str) -> tuple[Model, Model, Tensor]:
    """A packed layer, the dense one that it stands for, and an input."""
    torch.manual_seed(0)
    layer = LAYERS[kind][0]()
    config = (METHODS | QUANTIZED_INPUTS)[method]
    quantize_layer(layer, "layer", layer.weight.detach().clone(), config, torch.float32)
    assert isinstance(layer, PackedLayer)
    dense = dense_layer(copy.deepcopy(layer))
    return Model(layer).requires_grad_(False), Model(dense).requires_grad_(False), LAYERS[kind][1]()


def with_adapter(model: Model, config: peft.PeftConfig | None = None, name: str = "default", seed: int = 1) -> nn.Module:
    """The model with a random adapter; the same for models of the same shape."""
    torch.manual_seed(seed)
    config = config or peft.LoraConfig(r=4, lora_alpha=8, target_modules=["layer"], init_lora_weights=False)
    if isinstance(model, peft.PeftModel):
        model.add_adapter(name, config)
        return model
    return peft.get_peft_model(model, config, adapter_name=name)


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm().clamp_min(1e-30))


@every_layer
@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_adds_what_it_adds_to_the_dense_layer(kind, method):
    packed, dense, x = pair(kind, method)
    expected = with_adapter(dense)(x)
    assert distance(with_adapter(packed)(x), expected) < 1e-5


@every_layer
@every_method
def test_fused_equals_active_and_comes_out_bit_for_bit(kind, method):
    packed, _, x = pair(kind, method)
    model = with_adapter(packed)
    layer = model.base_model.model.layer
    active, stored = model(x), {name: tensor.clone() for name, tensor in layer.base_layer.packed_tensors().items()}
    layer.merge()
    assert distance(model(x), active) < 1e-6
    layer.unmerge()
    assert layer.base_layer.packed_tensors().keys() == stored.keys()
    for name, tensor in layer.base_layer.packed_tensors().items():
        assert tensor.dtype == stored[name].dtype
        assert torch.equal(tensor.contiguous().view(torch.int8), stored[name].contiguous().view(torch.int8))
    assert torch.equal(model(x), active)


@every_layer
@every_method
def test_gradients_of_adapters_and_inputs_are_those_of_the_dense_layer(kind, method):
    gradients = []
    packed, dense, x = pair(kind, method)
    for model in (with_adapter(packed), with_adapter(dense)):
        inputs = x.clone().requires_grad_()
        upstream = torch.randn(model(inputs).shape, generator=torch.Generator().manual_seed(3))
        model(inputs).backward(upstream)
        gradients.append([inputs.grad, *(p.grad for p in model.parameters() if p.requires_grad)])
    assert len(gradients[0]) == len(gradients[1]) == 3
    for ours, theirs in zip(*gradients, strict=True):
        assert distance(ours, theirs) < 1e-5  # straight through the quantization of inputs: theirs has none


@every_layer
@pytest.mark.parametrize("method", METHODS)
def test_several_adapters_scales_and_switching_off(kind, method):
    results = []
    for model in pair(kind, method)[:2]:
        x = pair(kind, method)[2]
        model = with_adapter(with_adapter(model, name="a"), name="b", seed=2)
        layer = model.base_model.model.layer
        outputs = []
        model.set_adapter("b")
        outputs.append(model(x))
        layer.set_adapter(["a", "b"])
        layer.set_scale("a", 0.3)
        layer.scale_layer(0.5)
        outputs.append(model(x))
        with model.disable_adapter():
            outputs.append(model(x))
        layer.unscale_layer()
        model.delete_adapter("a")
        layer.set_adapter(["b"])
        outputs.append(model(x))
        outputs.append(model.unload()(x))
        results.append(outputs)
    for ours, theirs in zip(*results, strict=True):
        assert distance(ours, theirs) < 1e-5


@every_layer
@pytest.mark.parametrize("variant", ["dora", "lokr", "loha"])
@pytest.mark.parametrize("method", ["aq", "fp", "svdquant"])
def test_other_adapters_work_through_the_dense_weight_and_refuse_to_be_fused(kind, method, variant):
    def config() -> peft.PeftConfig:
        if variant == "dora":
            return peft.LoraConfig(r=4, target_modules=["layer"], init_lora_weights=False, use_dora=True)
        make = peft.LoKrConfig if variant == "lokr" else peft.LoHaConfig
        return make(r=4, alpha=4, target_modules=["layer"], init_weights=False)

    packed, dense, x = pair(kind, method)
    ours, theirs = with_adapter(packed, config()), with_adapter(dense, config())
    ours.load_state_dict({key: value for key, value in theirs.state_dict().items() if "base_layer" not in key}, strict=False)
    gradients = []
    for model in (ours, theirs):
        model(x).square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert distance(ours(x), theirs(x)) < 1e-5
    assert distance(ours(x), pair(kind, method)[0](x)) > 1e-3
    assert gradients[0]
    for a, b in zip(*gradients, strict=True):
        assert distance(a, b) < 1e-4
    before = ours(x)
    with pytest.raises(QDiffError, match=r"cannot be fused into .*packed layer"):
        ours.merge_adapter()
    assert torch.equal(ours(x), before)


@pytest.mark.parametrize("method", ["aq", "svdquant", "rtn-int8"])
def test_a_compiled_layer_with_an_adapter_is_the_same_in_value_and_gradient(method):
    packed, _, x = pair("linear", method)
    model = with_adapter(packed)
    results = []
    for function in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        y = function(x)
        y.square().sum().backward()
        results.append([y.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)])
    for plain, compiled in zip(*results, strict=True):
        assert distance(compiled, plain) < 1e-5


def test_factors_are_kept_in_the_narrowest_dtype_that_holds_them():
    packed, _, x = pair("linear", "rtn")
    layer = packed.layer
    down, up = torch.randn(2, 64), torch.randn(48, 2)
    down[0, 0] = 2.0**-30  # too small for float16
    for dtype, name in ((torch.bfloat16, "bfloat16"), (torch.float16, "float16"), (torch.float32, "float32")):
        kept = down.clamp_min(-3).where(down.abs() > 0.01, 0.25) if dtype == torch.float16 else down
        layer.append_branch(kept.to(dtype).float(), up.to(dtype).float())
        assert layer.spec.extras_dtype == name
        assert layer.low_rank_down.dtype == dtype
        layer.drop_branch(2, "float16")
    assert layer.spec == pair("linear", "rtn")[0].layer.spec
    layer.append_branch(down.half().float(), up.half().float())
    layer.append_branch(down, up)
    assert layer.spec.extras_dtype == "float32"
    layer.drop_branch(2, "float16")
    assert torch.equal(layer.low_rank_down, down.half())
    assert layer(x).shape == (2, 5, 48)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["fp", "rtn-int8", "svdquant-int4"])
def test_adding_adapters_in_place_gives_what_peft_gives_and_leaves_what_it_cannot_do_to_peft(method, dtype, monkeypatch):
    packed, _, x = pair("linear", method)
    model = with_adapter(with_adapter(packed, name="first"), name="second", seed=2)
    layer = model.base_model.model.layer
    layer.set_adapter(["first", "second"])
    model.to(dtype).eval()
    x, passed_on = x.to(dtype), []
    of_peft = type(layer).__mro__[2].forward
    monkeypatch.setattr(type(layer).__mro__[2], "forward", lambda self, *a, **k: (passed_on.append(1), of_peft(self, *a, **k))[1])
    wanted = layer(x)  # gradients are tracked: PEFT's own way
    assert passed_on.pop() and not passed_on
    with torch.no_grad():
        found, bare = layer(x), layer.base_layer(x)
        assert not passed_on
        assert float((bare - wanted).norm() / wanted.norm()) > 0.05  # the adapters do something
        assert float((found - wanted).norm() / wanted.norm()) < (1e-6 if dtype == torch.float32 else 6e-3)
        layer.enable_adapters(False)
        assert torch.equal(layer(x), bare) and passed_on.pop()
        layer.enable_adapters(True)
        layer.scaling["second"] = torch.tensor(2.0)  # as hot swapping in a compiled model has it
        layer(x)
        assert passed_on.pop()
