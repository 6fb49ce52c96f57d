"""torch.compile, gradients."""

from __future__ import annotations

import pytest
import tiny_models
import torch

SIZES = (16, 25, 36)


def run(model: torch.nn.Module, tokens: int = 16, timestep: float = 0.5) -> torch.Tensor:
    torch.manual_seed(1)
    inputs = tiny_models.flux_inputs()
    inputs |= {"hidden_states": torch.randn(1, tokens, 4), "img_ids": torch.zeros(tokens, 3), "timestep": torch.tensor([timestep])}
    with torch.no_grad():
        return model(**inputs, return_dict=False)[0]


@pytest.mark.row("torch.compile, fullgraph")
def test_fullgraph(load):
    model = load()
    expected = run(model)
    model.compile(fullgraph=True, backend="aot_eager")
    assert torch.allclose(run(model), expected, atol=1e-5)


@pytest.mark.row("torch.compile, regional")
def test_regional(load):
    model = load()
    expected = run(model)
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    assert torch.allclose(run(model), expected, atol=1e-5)


@pytest.mark.row("no recompiles across steps")
def test_steps(load):
    model = load()
    model.compile(fullgraph=True, backend="eager")
    run(model, timestep=1.0)
    frames = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with torch.compiler.set_stance("fail_on_recompile"):
        for timestep in (0.75, 0.5, 0.25):
            run(model, timestep=timestep)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == frames


@pytest.mark.row("no recompiles across resolutions")
def test_resolutions(load):
    model = load()
    expected = [run(model, tokens) for tokens in SIZES]
    model.compile(fullgraph=True, backend="eager", dynamic=True)
    run(model, 49)
    with torch.compiler.set_stance("fail_on_recompile"):
        outputs = [run(model, tokens) for tokens in SIZES]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(outputs, expected, strict=True))


@pytest.mark.row("torch.compile with group offload")
def test_with_group_offload(load):
    model = load()
    expected = run(model)
    cpu = torch.device("cpu")
    model.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    model.compile(backend="eager")
    assert torch.allclose(run(model), expected, atol=1e-5)


@pytest.mark.row("gradient checkpointing")
def test_gradient_checkpointing(load):
    model = load().train()
    torch.manual_seed(1)
    inputs = tiny_models.flux_inputs()
    grads = []
    for _ in range(2):
        inputs["hidden_states"] = inputs["hidden_states"].detach().clone().requires_grad_()
        model(**inputs, return_dict=False)[0].square().sum().backward()
        grads.append(inputs["hidden_states"].grad)
        model.enable_gradient_checkpointing()
    assert torch.isfinite(grads[0]).all()
    assert torch.equal(*grads)
