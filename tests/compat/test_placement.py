"""Where a quantized model may live: devices, offloading, layerwise casting."""

from __future__ import annotations

import accelerate
import pytest
import tiny_models
import torch
from compat.conftest import distance

CPU = torch.device("cpu")


@pytest.mark.row("device_map='auto'")
def test_device_map_auto(load):
    assert torch.equal(run(load(device_map="auto")), run(load()))


@pytest.mark.row("device_map='balanced'")
def test_device_map_balanced(load):
    assert torch.equal(run(load(device_map="balanced")), run(load()))


@pytest.mark.row("device_map={...}")
def test_device_map_dict(load):
    names = [name for name, _ in load().named_children()]
    assert torch.equal(run(load(device_map=dict.fromkeys(names, "cpu"))), run(load()))


@pytest.mark.row("device_map with 'disk'")
def test_device_map_disk(load, refuses, tmp_path):
    names = [name for name, _ in load().named_children()]
    with refuses("group offloading"):
        load(device_map=dict.fromkeys(names, "cpu") | {"transformer_blocks": "disk"}, offload_folder=tmp_path)
    assert not any(tmp_path.iterdir())  # refused before a weight was written


@pytest.mark.row("model CPU offload")
def test_model_cpu_offload(load):
    model = load()
    expected = run(model)
    model, hook = accelerate.cpu_offload_with_hook(model, execution_device=CPU)
    assert torch.equal(run(model), expected)
    hook.offload()
    assert torch.equal(run(model), expected)


@pytest.mark.row("sequential CPU offload")
@pytest.mark.parametrize("offload_buffers", [False, True])
def test_sequential_cpu_offload(load, offload_buffers):
    model = load()
    expected = run(model)
    accelerate.cpu_offload(model, execution_device=CPU, offload_buffers=offload_buffers)
    assert model.transformer_blocks[0].attn.to_q.codes.is_meta
    assert torch.equal(run(model), expected)


def group_offload(model, **kwargs):
    model.enable_group_offload(onload_device=CPU, offload_device=CPU, **kwargs)
    return run(model)


@pytest.mark.row("group offload, blocks")
def test_group_offload_blocks(load):
    expected = run(load())
    assert torch.equal(group_offload(load(), offload_type="block_level", num_blocks_per_group=1), expected)


@pytest.mark.row("group offload, leaves")
def test_group_offload_leaves(load):
    expected = run(load())
    assert torch.equal(group_offload(load(), offload_type="leaf_level"), expected)


@pytest.mark.row("group offload to disk")
@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_group_offload_to_disk(load, kind, tmp_path):
    expected = run(load())
    groups = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    output = group_offload(load(), offload_type=kind, offload_to_disk_path=str(tmp_path), **groups)
    assert any(tmp_path.rglob("*.safetensors"))
    assert torch.allclose(output, expected, atol=1e-5)  # tensors read from a file are aligned differently


@pytest.mark.row("group offload with streams")
def test_group_offload_streams(load):
    if not torch.cuda.is_available():
        pytest.skip("streams need an accelerator")
    model = load()
    expected = run(model.to("cuda"))
    model.enable_group_offload(onload_device=torch.device("cuda"), offload_type="leaf_level", use_stream=True)
    assert distance(run(model), expected) < 1e-3


@pytest.mark.row("layerwise casting")
def test_layerwise_casting(load):
    """Dense layers and biases go through float8; a packed tensor that did would be ruined."""
    model = load(dtype=torch.bfloat16)
    expected = run(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if name.endswith((".scales", ".codes"))}
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    torch.manual_seed(1)
    inputs = {k: v.bfloat16() if v.is_floating_point() else v for k, v in tiny_models.flux_inputs().items()}
    with torch.no_grad():
        output = model(**inputs, return_dict=False)[0]
    after = model.state_dict()
    assert all(after[name].dtype == tensor.dtype and bytes_of(after[name]) == bytes_of(tensor) for name, tensor in before.items())
    assert distance(output, expected) < 0.2


@pytest.mark.row("layerwise casting, then save")
def test_layerwise_casting_and_saving(load, tmp_path):
    model = load(dtype=torch.bfloat16)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    reloaded = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert reloaded.config.quantization_config.compute_dtype == "bfloat16"
    assert distance(run(reloaded), run(load(dtype=torch.bfloat16))) < 0.2


@pytest.mark.row("`.to(device)`")
def test_to_device(load):
    model = load()
    assert torch.equal(run(model.to("cpu")), run(load()))


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def run(model: torch.nn.Module) -> torch.Tensor:
    return tiny_models.run(model, "flux")
