"""Static quantization of inputs: scales from the calibration, one for all or one per timestep, signed or unsigned."""

from __future__ import annotations

import copy
import pickle
from functools import lru_cache
from pathlib import Path

import pytest
import tiny_models
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline
from diffusers import DiTTransformer2DModel as DiT
from qdiff_kernels.activations import dequantize_activations, quantize_activations
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qdiff_diffusers import (
    AQConfig,
    Calibration,
    CheckpointError,
    ConfigError,
    FPConfig,
    RTNConfig,
    SVDQuantConfig,
    Tuning,
    quantize,
)
from qdiff_diffusers.calibration.store import Store
from qdiff_diffusers.calibration.trajectories import call_model, record
from qdiff_diffusers.layers import PackedLayer, dense_layer
from qdiff_diffusers.methods.inputs import fit_inputs

FEW = {"class_labels": [0, 1], "samples": 4, "steps": 3, "batch_size": 4, "guidance_scale": 1.0, "hessian": False}
GENERATOR = torch.Generator().manual_seed(0)


def dit() -> DiTPipeline:
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(32,), down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",), norm_num_groups=8
    )
    return DiTPipeline(tiny_models.make("dit"), vae, DDIMScheduler(), {0: "shirt", 1: "shoe"})


@lru_cache
def calls(seed: int) -> list[dict]:
    exact, store = dit(), Store(Path("unused"), 1 << 30)
    record(exact, {"transformer": exact.transformer}, Calibration(**FEW, seed=seed), {"transformer": store})
    return list(store)


def error(model: nn.Module, seed: int = 7) -> float:
    """On a trajectory that calibration has not seen."""
    with torch.no_grad():
        pairs = [(call_model(model, call["inputs"]), call["output"]) for call in calls(seed)]
    return sum(float((y - t).square().sum()) for y, t in pairs) / sum(float(t.square().sum()) for _, t in pairs)


def packed(model: nn.Module) -> dict[str, PackedLayer]:
    return {name: m for name, m in model.named_modules() if isinstance(m, PackedLayer)}


def static_scale(kind: str, x: Tensor) -> Tensor:
    found = fit_inputs({0.0: x}, FPConfig(bits=8, activations=kind, activation_scales="static"), 16)
    assert list(found) == ["input_scales"] and found["input_scales"].shape == (1,)
    return found["input_scales"]


def squared(x: Tensor, kind: str, scale: Tensor) -> float:
    return float((dequantize_activations(*quantize_activations(x, kind, None, scale)) - x).square().sum())


def test_a_static_scale_of_integers_has_the_least_squared_error_of_111() -> None:
    x = torch.randn(64, 16, generator=GENERATOR)
    tried = [squared(x, "int8", (f * x.abs().max() / 127).reshape(1)) for f in torch.linspace(0.1, 1.2, 111)]
    assert squared(x, "int8", static_scale("int8", x)) == pytest.approx(min(tried), rel=1e-4)


def test_a_static_scale_of_floats_leaves_room_for_what_calibration_has_not_seen() -> None:
    x = torch.randn(64, 16, generator=GENERATOR)
    scale = static_scale("fp8", x)
    assert squared(x, "fp8", scale) < 1.1 * squared(x, "fp8", x.abs().max().reshape(1) / 448)
    beyond = 1.9 * x
    assert squared(beyond, "fp8", scale) < 1.1 * squared(beyond, "fp8", beyond.abs().max().reshape(1) / 448)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_a_static_scale_of_unsigned_numbers_is_one_of_unsigned_numbers(kind: str) -> None:
    x = nn.functional.gelu(3 * torch.randn(256, 64, generator=GENERATOR))
    config = FPConfig(bits=8, activations=kind, activation_scales="static", unsigned=True)
    found = fit_inputs({0.0: x}, config, 64, shiftable=True)
    shifted = x + found["shift"]

    def error(scale: Tensor) -> float:
        codes = quantize_activations(shifted, kind, found["shift"], scale)
        return float((dequantize_activations(*codes) - shifted).square().sum())

    peak = shifted.max().reshape(1)
    if kind == "fp8":
        assert found["input_scales"] == pytest.approx(2 * float(peak) / 496)
        assert error(found["input_scales"]) < 1.1 * error(peak / 496)
    else:
        tried = [error(f * peak / 255) for f in torch.linspace(0.1, 1.2, 111)]
        assert error(found["input_scales"]) == pytest.approx(min(tried), rel=1e-4)


def test_steps_get_scales_of_their_own_in_rising_order() -> None:
    config = FPConfig(bits=8, activations="int8", activation_scales="timestep")
    x = torch.randn(32, 16, generator=GENERATOR)
    found = fit_inputs({900.0: 10 * x, 100.0: x}, config, 16)
    assert found["input_steps"].tolist() == [100, 900]
    assert found["input_scales"][1] == pytest.approx(10 * float(found["input_scales"][0]))


@pytest.mark.parametrize(("kind", "scales"), [("int8", "static"), ("fp8", "static"), ("int8", "timestep"), ("int4", "token")])
@pytest.mark.parametrize(("function", "bound"), [(nn.functional.gelu, 0.171875), (nn.functional.silu, 0.28125)])
def test_what_a_gelu_or_silu_gives_is_quantized_to_unsigned_numbers(kind: str, scales: str, function, bound: float) -> None:
    config = SVDQuantConfig(activations=kind, activation_scales=scales, unsigned=True)
    x = torch.randn(256, 64, generator=GENERATOR) * 3
    found = fit_inputs({1.0: function(x)}, config, 64, shiftable=True)
    assert found["shift"].tolist() == [bound] * 64
    for others in ({1.0: x}, {1.0: -function(x)}):
        assert "shift" not in fit_inputs(others, config, 64, shiftable=True)
    assert "shift" not in fit_inputs({1.0: function(x)}, config, 64, shiftable=False)
    assert "shift" not in fit_inputs({1.0: function(x)}, config, 64, shiftable=True, rotation=16)


CONFIGS = {
    "int8 static": RTNConfig(bits=8, activations="int8", activation_scales="static"),
    "int8 by timestep": RTNConfig(bits=8, activations="int8", activation_scales="timestep"),
    "fp8 static, unsigned": FPConfig(bits=8, activations="fp8", activation_scales="static", unsigned=True),
    "fp8 by timestep, codebooks": AQConfig(bits=4, activations="fp8", activation_scales="timestep"),
    "int4 unsigned, low rank": SVDQuantConfig(bits=4, rank=4, activations="int4", unsigned=True),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_static_scales_serve_unseen_inputs_and_survive_saving(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    folder = quantize(dit(), config, tmp_path / "out", calibration=FEW)
    model = DiT.from_pretrained(folder, subfolder="transformer")
    layers = packed(model)
    assert layers
    for layer in layers.values():
        assert layer.spec.input_scales == {"token": 0, "static": 1, "timestep": 3}[config.activation_scales]
    after_gelu = [layer.spec.shift for key, layer in layers.items() if key.endswith("ff.net.2")]
    assert after_gelu and all(shifted == config.unsigned for shifted in after_gelu)
    assert not any(layer.spec.shift for key, layer in layers.items() if "attn1.to_q" in key)
    dynamic = quantize(dit(), type(config)(bits=config.bits, activations=config.activations), calibration=FEW).transformer
    assert error(model) < 2 * error(dynamic)  # one scale for tokens of all sizes
    again = quantize(dit(), config, calibration=FEW).transformer
    assert all(torch.equal(t, again.state_dict()[key]) for key, t in model.state_dict().items())
    for layer in layers.values():
        dense_layer(layer)  # takes the shift back out of the bias
    exact = error(model)
    assert exact < (0.03 if config.bits == 4 else 1e-3)


@pytest.mark.parametrize("objective", ["model", "blocks"])
def test_tuning_goes_on_from_shifted_inputs(objective: str) -> None:
    """The bias takes up the shift once, whatever was tuned; the loss falls as without one."""
    tuning = Tuning(steps=20, objective=objective, assignments="fixed", lr=3e-3)
    config = RTNConfig(bits=2, activations="int8", activation_scales="static", unsigned=True)
    plain = quantize(dit(), config, calibration=FEW).transformer
    tuned = quantize(dit(), config, calibration=Calibration(**FEW, tuning=tuning)).transformer
    assert any(layer.spec.shift for layer in packed(tuned).values())
    assert error(tuned) < 0.9 * error(plain)


def test_each_timestep_uses_its_own_scale_and_others_the_nearest(tmp_path: Path) -> None:
    model = quantize(dit(), CONFIGS["int8 by timestep"], calibration=FEW).transformer
    name = "transformer_blocks.0.attn1.to_q"
    layer = model.get_submodule(name)
    steps = layer.input_steps.tolist()
    assert len(steps) == 3
    used = []
    original = layer.forward
    layer.forward = lambda x: used.append(layer.op_arguments()[-1].tolist()) or original(x)
    inputs = tiny_models.dit_inputs()
    for step in (*steps, steps[0] + 1):
        model(**inputs | {"timestep": torch.full((2,), int(step))})
    scales = [[scale] for scale in layer.input_scales.tolist()]
    assert used == [*scales, scales[0]]
    del layer.forward
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        copied(**inputs | {"timestep": torch.full((2,), int(steps[1]))})
        assert packed(copied)[name].timestep.tolist() == [steps[1]] != layer.timestep.tolist()
    layer.timestep = None
    assert layer.op_arguments()[-1].tolist() == [float(layer.input_scales.max())]


def test_compiled_models_follow_the_timesteps() -> None:
    model = quantize(dit(), CONFIGS["int8 by timestep"], calibration=FEW).transformer
    whole = torch.compile(model, backend="aot_eager", fullgraph=True)
    regional = copy.deepcopy(model)
    for block in regional.transformer_blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    inputs = tiny_models.dit_inputs()
    with torch.no_grad():
        for step in next(iter(packed(model).values())).input_steps.tolist():
            given = inputs | {"timestep": torch.full((2,), int(step))}
            expected = model(**given).sample
            assert torch.allclose(whole(**given).sample, expected, atol=1e-5)
            assert torch.allclose(regional(**given).sample, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("value", "tensor"), [(0.0, "input_scales"), (float("nan"), "input_scales"), (float("inf"), "input_steps")]
)
def test_scales_that_cannot_be_are_refused_when_loading(value: float, tensor: str, tmp_path: Path) -> None:
    folder = quantize(dit(), CONFIGS["int8 by timestep"], tmp_path / "out", calibration=FEW) / "transformer"
    path = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    name = next(key for key in tensors if key.endswith(tensor))
    tensors[name][1] = value
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=name):
        DiT.from_pretrained(folder)


def test_a_calibration_is_needed(tmp_path: Path) -> None:
    dit().save_pretrained(tmp_path / "dense")
    settings = [CONFIGS["int8 static"], SVDQuantConfig(smoothing=True), RTNConfig(bits=4, overrides={"ff": CONFIGS["int8 static"]})]
    for config in settings:
        with pytest.raises(ConfigError, match="calibration"):
            quantize(dit(), config)
        with pytest.raises(ConfigError, match="calibration"):
            DiT.from_pretrained(tmp_path / "dense", subfolder="transformer", quantization_config=config)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"activation_scales": "static"}, 'goes with activations "int8" or "fp8", not None'),
        ({"activations": "int4", "activation_scales": "static"}, "not 'int4'"),
        ({"activations": "int8", "activation_scales": "sometimes"}, "'token', 'static', 'timestep', got 'sometimes'"),
        ({"activations": "int4", "unsigned": True, "rotation": True}, "unsigned goes without rotation"),
        ({"activations": "int8", "unsigned": True}, "unsigned goes with activations"),
        ({"unsigned": 1, "activations": "int4"}, "unsigned must be True or False"),
    ],
)
def test_impossible_wishes_are_refused_by_name(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SVDQuantConfig(**settings)
