"""First steps at higher precision: exactly those, in every run, and nothing of it left behind."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, HeunDiscreteScheduler

from qdiff_diffusers import ConfigError, RTNConfig, high_precision_steps, quantize
from qdiff_diffusers.layers import PackedLayer

W4A8 = RTNConfig(bits=4, activations="int8")


def dit() -> DiTPipeline:
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(32,), down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",), norm_num_groups=8
    )
    pipe = DiTPipeline(tiny_models.make("dit"), vae, DDIMScheduler(), {0: "shirt", 1: "shoe"})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: DiTPipeline, steps: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    images = pipe([0, 1], guidance_scale=1.0, num_inference_steps=steps, generator=generator, output_type="np").images
    return torch.from_numpy(images)


def watched(model: torch.nn.Module) -> list[float]:
    """Timesteps of the calls that ``model`` takes from now on."""
    seen: list[float] = []
    original = model.forward

    def forward(*args, **kwargs):
        seen.append(float(kwargs["timestep"].flatten()[0]))
        return original(*args, **kwargs)

    model.forward = forward
    return seen


def test_the_first_steps_of_every_run_go_to_the_denoiser() -> None:
    pipe, exact = quantize(dit(), W4A8), dit().transformer
    low, high = watched(pipe.transformer), watched(exact)
    with high_precision_steps(pipe, 2, exact):
        draw(pipe), draw(pipe, 3)
    timesteps = []
    for steps in (4, 3):
        pipe.scheduler.set_timesteps(steps)
        timesteps.append(pipe.scheduler.timesteps.tolist())
    assert high == timesteps[0][:2] + timesteps[1][:2]
    assert low == timesteps[0][2:] + timesteps[1][2:]
    draw(pipe)
    assert len(high) == 4


def test_no_step_and_all_steps_are_the_two_models_themselves() -> None:
    pipe, exact = quantize(dit(), W4A8), dit()
    alone, wanted = draw(pipe), draw(exact)
    with high_precision_steps(pipe, 0, exact.transformer):
        assert torch.equal(draw(pipe), alone)
    with high_precision_steps(pipe, 4, exact.transformer):
        assert torch.equal(draw(pipe), wanted)
    with high_precision_steps(pipe, 2, exact.transformer):
        assert (draw(pipe) - wanted).square().sum() < (alone - wanted).square().sum()
    assert torch.equal(draw(pipe), alone)
    assert not {"forward"} & vars(pipe.transformer).keys() and not {"step", "set_timesteps"} & vars(pipe.scheduler).keys()


def test_without_a_denoiser_the_inputs_of_the_packed_layers_stay_in_16_bits() -> None:
    pipe, w4a16 = quantize(dit(), W4A8), quantize(dit(), RTNConfig(bits=4))
    alone, wanted = draw(pipe), draw(w4a16)
    with high_precision_steps(pipe, 4):
        assert torch.equal(draw(pipe), wanted)
    with high_precision_steps(pipe, 1):
        assert not torch.equal(draw(pipe), alone)
    with pytest.raises(RuntimeError, match="stop"), high_precision_steps(pipe, 4):
        pipe.scheduler.set_timesteps(4)
        raise RuntimeError("stop")
    assert not any(m.exact_inputs for m in pipe.transformer.modules() if isinstance(m, PackedLayer))
    assert torch.equal(draw(pipe), alone)


def test_steps_are_those_of_the_scheduler() -> None:
    """Heun's method calls the denoiser, and its scheduler, twice between two noise levels."""
    pipe, exact = quantize(dit(), W4A8), dit().transformer
    pipe.scheduler = HeunDiscreteScheduler()
    low, high = watched(pipe.transformer), watched(exact)
    with high_precision_steps(pipe, 2, exact):
        draw(pipe)
    assert high + low == pipe.scheduler.timesteps.tolist() and len(high) == 2


def test_a_compiled_model_is_compiled_once_for_each_of_the_two() -> None:
    pipe = quantize(dit(), W4A8)
    with high_precision_steps(pipe, 2):
        expected = draw(pipe)
        pipe.transformer.compile(backend="eager", fullgraph=True)
        torch._dynamo.utils.counters.clear()
        assert torch.allclose(draw(pipe), expected, atol=1e-5)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def test_what_cannot_be_is_refused() -> None:
    pipe = quantize(dit(), W4A8)
    cases = [
        ((quantize(dit(), RTNConfig(bits=4)), 1), "inputs of transformer's layers are not quantized; give a denoiser"),
        ((dit(), 1), "has no quantized transformer or unet"),
        ((pipe, 1, None, "vae"), "has no quantized vae"),
        ((pipe, -1), "0 or more, got -1"),
        ((pipe.transformer, 1), "has no scheduler"),
    ]
    for arguments, message in cases:
        with pytest.raises(ConfigError, match=message), high_precision_steps(*arguments):
            pass
