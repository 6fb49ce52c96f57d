"""What diffusers' pipelines and models do with LoRA files, on a packed Flux and on the dense one that it stands for."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_models
import torch
from torch import nn

from qdiff_diffusers import QDiffConfig, RTNConfig, SVDQuantConfig
from qdiff_diffusers.layers import PackedLayer

peft = pytest.importorskip("peft")

TARGETS = ["to_q", "to_out.0", "proj_mlp", "ff.net.2"]
CONFIGS: dict[str, Callable[[], QDiffConfig]] = {
    "rtn": lambda: RTNConfig(bits=4),
    "svdquant": lambda: SVDQuantConfig(weight_format="int4", rank=2, rounds=1),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("flux")
    tiny_models.make("flux").save_pretrained(path)
    return path


def load(folder: Path, config: QDiffConfig | None = None) -> nn.Module:
    return type(tiny_models.make("flux")).from_pretrained(folder, quantization_config=config)


def pipeline(transformer: nn.Module):
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    return FluxPipeline(scheduler=FlowMatchEulerDiscreteScheduler(), transformer=transformer, **parts)


def pair(folder: Path, method: str):
    """A pipeline with a packed transformer, and one with the dense model that it stands for."""
    packed = load(folder, CONFIGS[method]())
    dense = copy.deepcopy(packed).dequantize()
    return pipeline(packed), pipeline(dense)


def adapter_file(folder: Path, base: Path, seed: int, targets: list[str] = TARGETS, model: nn.Module | None = None) -> Path:
    from diffusers import FluxPipeline

    dense = model or load(base)
    torch.manual_seed(seed)
    dense.add_adapter(peft.LoraConfig(r=4, lora_alpha=4, target_modules=targets, init_lora_weights=False))
    FluxPipeline.save_lora_weights(folder, transformer_lora_layers=peft.utils.get_peft_model_state_dict(dense))
    return folder


def run(pipe) -> torch.Tensor:
    return tiny_models.run(pipe.transformer, "flux")


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("method", CONFIGS)
def test_everything_a_pipeline_does_with_adapters_is_as_on_the_dense_model(method, folder, tmp_path):
    first, second = (adapter_file(tmp_path / str(seed), folder, seed) for seed in (1, 2))
    results = []
    for pipe in pair(folder, method):
        outputs = [run(pipe)]
        pipe.load_lora_weights(first, adapter_name="first")
        outputs.append(run(pipe))
        pipe.load_lora_weights(second, adapter_name="second")
        pipe.set_adapters(["first", "second"], [0.7, -0.3])
        outputs.append(run(pipe))
        pipe.disable_lora()
        outputs.append(run(pipe))
        pipe.enable_lora()
        pipe.fuse_lora(adapter_names=["first"], lora_scale=0.5)
        outputs.append(run(pipe))
        pipe.unfuse_lora()
        pipe.delete_adapters("first")
        outputs.append(run(pipe))
        pipe.load_lora_weights(first, adapter_name="second", hotswap=True)
        outputs.append(run(pipe))
        pipe.unload_lora_weights()
        outputs.append(run(pipe))
        results.append(outputs)
    packed, dense = results
    assert [distance(a, b) < 1e-4 for a, b in zip(packed, dense, strict=True)] == [True] * len(dense)
    assert distance(packed[6], packed[1]) < 1e-6  # the adapter that was swapped in, at its own scale
    assert torch.equal(packed[-1], packed[0])
    assert torch.equal(packed[3], packed[0])


@pytest.mark.parametrize("method", CONFIGS)
def test_an_adapter_is_swapped_for_one_of_another_rank_without_recompiling(method, folder, tmp_path):
    """``enable_lora_hotswap`` pads ranks, so that a compiled model stays valid."""
    expected, states = [], []
    for seed, rank in ((1, 2), (2, 6)):
        dense = pair(folder, method)[1].transformer
        torch.manual_seed(seed)
        dense.add_adapter(peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS, init_lora_weights=False))
        expected.append(tiny_models.run(dense, "flux"))
        states.append({f"transformer.{k}": v for k, v in peft.utils.get_peft_model_state_dict(dense).items()})
    model = load(folder, CONFIGS[method]())
    model.enable_lora_hotswap(target_rank=8)
    model.load_lora_adapter(states[0], adapter_name="default")
    compiled = torch.compile(model, backend="eager")
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True), torch._inductor.utils.fresh_inductor_cache():
        assert distance(tiny_models.run(compiled, "flux"), expected[0]) < 1e-4
        model.load_lora_adapter(states[1], adapter_name="default", hotswap=True)
        assert distance(tiny_models.run(compiled, "flux"), expected[1]) < 1e-4


@pytest.mark.parametrize("keep_outer_layers", [True, False])
def test_a_control_lora_widens_the_embedder_and_leaves_it_again(keep_outer_layers, folder, tmp_path):
    wide = tiny_models.make("flux")
    wide.x_embedder = nn.Linear(8, wide.x_embedder.out_features)
    file = adapter_file(tmp_path / "control", folder, 3, [*TARGETS, "x_embedder"], wide)
    results = []
    packed = load(folder, RTNConfig(bits=4, keep_outer_layers=keep_outer_layers))
    assert isinstance(packed.x_embedder, PackedLayer) == (not keep_outer_layers)
    for transformer in (packed, copy.deepcopy(packed).dequantize()):
        pipe = pipeline(transformer)
        before = run(pipe)
        pipe.load_lora_weights(file, adapter_name="control")
        torch.manual_seed(7)
        inputs = tiny_models.flux_inputs()
        with torch.no_grad():
            widened = transformer(**inputs | {"hidden_states": torch.randn(1, 16, 8)}, return_dict=False)[0]
        assert transformer.config.in_channels == 8
        pipe.unload_lora_weights(reset_to_overwritten_params=True)
        results.append((before, widened, run(pipe)))
    for ours, theirs in zip(*results, strict=True):
        assert distance(ours, theirs) < 1e-4


@pytest.mark.parametrize("method", CONFIGS)
def test_training_with_gradient_checkpointing_gives_the_gradients_of_the_dense_model(method, folder):
    gradients = []
    for checkpointing in (False, True):
        for pipe in pair(folder, method):
            model = pipe.transformer.requires_grad_(False)
            torch.manual_seed(1)
            model.add_adapter(peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False))
            if checkpointing:
                model.enable_gradient_checkpointing()
            model.train()
            torch.manual_seed(2)
            model(**tiny_models.flux_inputs()).sample.square().mean().backward()
            gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert len(gradients[0]) > 8
    for name, gradient in gradients[1].items():
        for other in (gradients[0], gradients[2], gradients[3]):
            assert distance(other[name], gradient) < 1e-3, name


def test_a_few_training_steps_lower_the_loss_and_leave_the_base_alone(folder):
    model = load(folder, RTNConfig(bits=4)).requires_grad_(False)
    model.add_adapter(peft.LoraConfig(r=4, target_modules=TARGETS))
    stored = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    torch.manual_seed(0)
    inputs = tiny_models.flux_inputs()
    target = torch.randn(1, 16, 4)
    losses = []
    for _ in range(8):
        loss = (model(**inputs).sample - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    assert all(torch.equal(p, stored[name]) for name, p in model.named_parameters() if name in stored)
