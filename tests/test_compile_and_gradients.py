"""Quantized models under torch.compile, gradients, gradient checkpointing and diffusers' offloading."""

from __future__ import annotations

from pathlib import Path

import accelerate
import diffusers
import pytest
import tiny_models
import torch
from packaging import version
from torch import nn

from qdiff_diffusers import AQConfig, FPConfig, QDiffConfig, RTNConfig, SVDQuantConfig
from qdiff_diffusers.layers import PackedLayer, QDiffConv2d
from qdiff_diffusers.model.packing import check_loaded

NAMES = ("dit", "flux", "sdxl_unet")
CONFIGS = {
    "aq-shared": lambda: AQConfig(num_codebooks=1, codebook_bits=8, vector_size=4, codebook="shared", rotation=True, effort=0),
    "fp-nvfp4-fp8": lambda: FPConfig(weight_format="nvfp4", activations="fp8"),
    "svdquant-int4": lambda: SVDQuantConfig(bits=4, rank=2, rounds=1, activations="int4", rotation=True),
    "rtn-int8": lambda: RTNConfig(bits=4, activations="int8"),
}
UNQUANTIZED_ACTIVATIONS = {
    "aq-shared": CONFIGS["aq-shared"],
    "fp-nvfp4": lambda: FPConfig(weight_format="nvfp4"),
    "svdquant": lambda: SVDQuantConfig(bits=4, rank=2, rounds=1, rotation=True),
    "rtn": lambda: RTNConfig(bits=4),
}


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    for name in NAMES:
        tiny_models.make(name).save_pretrained(root / name)
    return {name: root / name for name in NAMES}


def load(folders: dict[str, Path], name: str, config: QDiffConfig, **kwargs) -> nn.Module:
    return type(tiny_models.make(name)).from_pretrained(folders[name], quantization_config=config, **kwargs)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_model_compiles_into_one_graph_with_the_same_result(config, folders):
    model = load(folders, "dit", config())
    expected = tiny_models.run(model, "dit")
    model.compile(fullgraph=True, backend="aot_eager")
    assert torch.allclose(tiny_models.run(model, "dit"), expected, atol=1e-5)


def test_convolutions_compile_into_one_graph_with_the_same_result(folders):
    """A ResNet block and a downsampler with stride 2."""
    block = load(folders, "sdxl_unet", CONFIGS["svdquant-int4"]()).down_blocks[0]
    assert sum(isinstance(module, QDiffConv2d) for module in block.modules()) == 3
    inputs = torch.randn(1, 32, 8, 8), torch.randn(1, 128)
    with torch.no_grad():
        expected = block(*inputs)[0]
        compiled = torch.compile(block, fullgraph=True, backend="aot_eager")(*inputs)[0]
    assert torch.allclose(compiled, expected, atol=1e-5)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_another_number_of_tokens_does_not_recompile(config, folders):
    block = load(folders, "dit", config()).transformer_blocks[0]
    layers = nn.Sequential(block.attn1, block.ff)
    compiled = torch.compile(layers, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad():
        compiled(torch.randn(3, 18, 32))
        with torch.compiler.set_stance("fail_on_recompile"):
            for shape in ((3, 21, 32), (5, 50, 32)):
                x = torch.randn(shape)
                assert torch.allclose(compiled(x), layers(x), atol=1e-5)


def test_repeated_blocks_compile_once(folders):
    model = load(folders, "flux", RTNConfig(bits=4))
    expected = tiny_models.run(model, "flux")
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    assert torch.allclose(tiny_models.run(model, "flux"), expected, atol=1e-5)


@pytest.mark.parametrize("config", UNQUANTIZED_ACTIVATIONS.values(), ids=UNQUANTIZED_ACTIVATIONS)
@pytest.mark.parametrize("name", ["dit", "sdxl_unet"])
def test_gradients_to_the_input_are_those_of_the_dense_equivalent(name, config, folders):
    model = load(folders, name, config())
    inputs = tiny_models.MODELS[name][1]()
    key = "sample" if name == "sdxl_unet" else "hidden_states"
    grads = []
    for step in range(2):
        inputs[key] = inputs[key].detach().clone().requires_grad_()
        model(**inputs, return_dict=False)[0].square().sum().backward()
        grads.append(inputs[key].grad)
        if step == 0:
            model.dequantize()
    assert torch.isfinite(grads[0]).all()
    assert (grads[0] - grads[1]).norm() / grads[1].norm() < 1e-3


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_gradient_checkpointing_gives_the_same_gradients(config, folders):
    model = load(folders, "flux", config()).train()
    inputs = tiny_models.flux_inputs()
    grads = []
    for _ in range(2):
        inputs["hidden_states"] = inputs["hidden_states"].detach().clone().requires_grad_()
        model(**inputs, return_dict=False)[0].square().sum().backward()
        grads.append(inputs["hidden_states"].grad)
        model.enable_gradient_checkpointing()
    assert torch.equal(*grads)


def test_biases_and_norms_of_a_quantized_model_can_be_trained(folders):
    model = load(folders, "dit", RTNConfig(bits=4, activations="int8"))
    trained = [p for p in model.parameters() if p.requires_grad]
    model(**tiny_models.dit_inputs()).sample.square().sum().backward()
    biases = [m.bias for m in model.modules() if isinstance(m, PackedLayer)]
    assert all(bias.grad is not None and torch.isfinite(bias.grad).all() for bias in biases)
    assert {id(b) for b in biases} <= {id(p) for p in trained}


@pytest.mark.parametrize("offload_buffers", [False, True])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_sequential_offloading_changes_nothing(config, offload_buffers, folders):
    model = load(folders, "dit", config())
    expected = tiny_models.run(model, "dit")
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=offload_buffers)
    assert model.transformer_blocks[0].attn1.to_q.codes.is_meta
    check_loaded(model)  # a device map dispatches a model before its loading is checked
    assert torch.equal(tiny_models.run(model, "dit"), expected)


@pytest.mark.skipif(
    version.parse(diffusers.__version__) < version.parse("0.41") and not torch.accelerator.is_available(),
    reason="diffusers 0.40 asks for the accelerator's name even where everything stays on the CPU",
)
@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_group_offloading_changes_nothing(config, kind, folders):
    model = load(folders, "flux", config())
    expected = tiny_models.run(model, "flux")
    cpu = torch.device("cpu")
    groups = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    model.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type=kind, **groups)
    assert torch.equal(tiny_models.run(model, "flux"), expected)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_layerwise_casting_leaves_packed_tensors_alone(config, folders):
    """It casts parameters to float8 between uses; scales that went through that would be ruined."""
    model = load(folders, "flux", config(), dtype=torch.bfloat16)
    dtypes = {key: tensor.dtype for key, tensor in model.state_dict().items()}
    expected = tiny_models.run(model, "flux")
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    inputs = {k: v.bfloat16() if v.is_floating_point() else v for k, v in _fixed_flux_inputs().items()}
    with torch.no_grad():
        output = model(**inputs, return_dict=False)[0]
    packed = {name for name, module in model.named_modules() if isinstance(module, PackedLayer)}
    for key, tensor in model.state_dict().items():
        module, _, leaf = key.rpartition(".")
        assert module not in packed or leaf == "bias" or tensor.dtype == dtypes[key], key
    assert (output - expected).norm() / expected.norm() < 0.15  # dense layers and biases did go through float8


def _fixed_flux_inputs() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return tiny_models.flux_inputs()


def test_autocast_keeps_working(folders):
    model = load(folders, "dit", RTNConfig(bits=4))
    expected = tiny_models.run(model, "dit")
    with torch.autocast("cpu", torch.bfloat16):
        output = tiny_models.run(model, "dit")
    assert (output.float() - expected).norm() / expected.norm() < 0.05
