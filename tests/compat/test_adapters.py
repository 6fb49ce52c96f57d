"""LoRA adapters on a model that is offloaded or cast: loaded before and after, active, fused, taken out again."""

from __future__ import annotations

import accelerate
import pytest
import tiny_models
import torch
from compat.conftest import distance
from compat.test_components import add_lora, run

pytest.importorskip("peft")
CPU = torch.device("cpu")
CLOSE = 1e-2  # a last bit may flip a level of 4-bit activations


def stages(model) -> list[torch.Tensor]:
    """Outputs with the adapter active, twice: hooks act between calls; then fused, twice, and taken out again."""
    outputs = [tiny_models.run(model, "flux"), tiny_models.run(model, "flux")]
    model.fuse_lora()
    outputs += [tiny_models.run(model, "flux"), tiny_models.run(model, "flux")]
    model.unfuse_lora()
    return [*outputs, tiny_models.run(model, "flux")]


EXPECTED: dict[tuple[str, torch.dtype], list[torch.Tensor]] = {}


def survives(load, method, offload, close: float = CLOSE, dtype: torch.dtype = torch.float32) -> None:
    """An adapter that is loaded before or after ``offload(model)`` does what it does on the model left alone."""
    kwargs = {"dtype": dtype}
    if (method, dtype) not in EXPECTED:
        plain = load(**kwargs)
        bare = tiny_models.run(plain, "flux")
        add_adapter(plain)
        EXPECTED[method, dtype] = stages(plain)
        assert distance(EXPECTED[method, dtype][0], bare) > 0.05
    expected = EXPECTED[method, dtype]
    for offload_first in (False, True):
        model = load(**kwargs)
        for step in (offload, add_adapter) if offload_first else (add_adapter, offload):
            step(model)
        found = stages(model)
        assert [distance(a, b) < close for a, b in zip(found, expected, strict=True)] == [True] * len(found)


def add_adapter(model) -> None:
    torch.manual_seed(5)
    add_lora(model)


def grouped(**kwargs):
    return lambda model: model.enable_group_offload(onload_device=CPU, offload_device=CPU, **kwargs)


BLOCKS = {"offload_type": "block_level", "num_blocks_per_group": 1}


@pytest.mark.row("LoRA with model CPU offload")
def test_model_cpu_offload(load, method):
    survives(load, method, lambda model: accelerate.cpu_offload_with_hook(model, execution_device=CPU))


@pytest.mark.row("LoRA with sequential CPU offload")
@pytest.mark.parametrize("buffers", [False, True])
def test_sequential_cpu_offload(load, method, buffers):
    survives(load, method, lambda model: accelerate.cpu_offload(model, execution_device=CPU, offload_buffers=buffers))


@pytest.mark.row("LoRA with group offload, blocks")
def test_group_offload_blocks(load, method):
    survives(load, method, grouped(**BLOCKS))


@pytest.mark.row("LoRA with group offload, leaves")
def test_group_offload_leaves(load, method):
    survives(load, method, grouped(offload_type="leaf_level"))


@pytest.mark.row("LoRA with group offload to disk")
@pytest.mark.parametrize("kind", [BLOCKS, {"offload_type": "leaf_level"}], ids=["blocks", "leaves"])
def test_group_offload_to_disk(load, method, kind, tmp_path_factory):
    survives(load, method, lambda model: grouped(**kind, offload_to_disk_path=str(tmp_path_factory.mktemp("offload")))(model))


@pytest.mark.row("LoRA with layerwise casting")
def test_layerwise_casting(load, method):
    """Against the model left alone: its dense layers, and the adapter if it is there by then, are rounded to float8."""
    casting = {"storage_dtype": torch.float8_e4m3fn, "compute_dtype": torch.bfloat16}
    survives(load, method, lambda model: model.enable_layerwise_casting(**casting), close=0.2, dtype=torch.bfloat16)


@pytest.mark.row("LoRA with device_map")
def test_device_map(load):
    names = [name for name, _ in load().named_children()]
    plain = load()
    add_adapter(plain)
    model = load(device_map=dict.fromkeys(names, "cpu"))
    add_adapter(model)
    for found, expected in zip(stages(model), stages(plain), strict=True):
        assert distance(found, expected) < CLOSE


@pytest.mark.row("torch.compile with an active LoRA, fullgraph")
def test_compile(load):
    model = load()
    add_adapter(model)
    expected = run(model)
    model.compile(fullgraph=True, backend="eager")
    assert torch.allclose(run(model), expected, atol=1e-5)


@pytest.mark.row("torch.compile with an active LoRA and offload")
def test_compile_and_offload(load):
    model = load()
    add_adapter(model)
    expected = run(model)
    grouped(offload_type="leaf_level")(model)
    model.compile(backend="eager")
    assert distance(run(model), expected) < CLOSE


@pytest.mark.row("dequantize(), offloaded, with a LoRA")
@pytest.mark.parametrize(("kind", "fused"), [("sequential", True), ("leaves", False), ("disk", True)])
def test_dequantize(load, kind, fused, tmp_path):
    """The dense layers take over the adapter, fused or not, and the hooks; afterwards all is PEFT's and the offloader's own."""
    offload = {
        "sequential": lambda model: accelerate.cpu_offload(model, execution_device=CPU),
        "leaves": grouped(offload_type="leaf_level"),
        "disk": grouped(offload_type="leaf_level", offload_to_disk_path=str(tmp_path)),
    }[kind]
    expected = load()
    add_adapter(expected)
    expected.dequantize()
    wanted = tiny_models.run(expected, "flux")
    model = load()
    add_adapter(model)
    if fused:
        model.fuse_lora()
    offload(model)
    model.dequantize()
    assert distance(tiny_models.run(model, "flux"), wanted) < CLOSE
    if not fused:
        model.fuse_lora()
        assert distance(tiny_models.run(model, "flux"), wanted) < CLOSE
    model.unfuse_lora()
    assert distance(tiny_models.run(model, "flux"), wanted) < CLOSE
    model.unload_lora()
    plain = load().dequantize()
    assert distance(tiny_models.run(model, "flux"), tiny_models.run(plain, "flux")) < CLOSE
