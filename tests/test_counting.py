"""What a quantized model says of its own size, and the one copy of each universal codebook."""

from __future__ import annotations

import copy
import pickle

import pytest
import tiny_models
import torch
from torch import nn

from qdiff_diffusers import AQConfig, FPConfig, QDiffConfig, RTNConfig, SVDQuantConfig, VQConfig
from qdiff_diffusers.formats import codebook, table_shapes
from qdiff_diffusers.layers import PackedLayer, pack_layer
from qdiff_diffusers.methods import quantize_weight

CONFIGS = {
    "aq": lambda: AQConfig(num_codebooks=1, codebook_bits=8, vector_size=4, codebook="shared", effort=0),
    "vq": lambda: VQConfig(bits=4, codebook="shared", restarts=1),
    "fp": lambda: FPConfig(bits=3),
    "svdquant": lambda: SVDQuantConfig(bits=4, rank=2, rounds=1),
    "rtn": lambda: RTNConfig(bits=5),
}


def table_layer(device: str = "cpu") -> PackedLayer:
    spec, tensors, _ = quantize_weight(torch.randn(16, 64), CONFIGS["aq"]())
    return pack_layer(nn.Linear(64, 16), spec, torch.float32, tensors).to(device)


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("name", ["sdxl_unet", "flux"])
def test_num_parameters_is_that_of_the_dense_model(name: str, method: str, tmp_path) -> None:
    dense = tiny_models.make(name)
    dense.save_pretrained(tmp_path)
    expected = dense.num_parameters()
    model = type(dense).from_pretrained(tmp_path, quantization_config=CONFIGS[method]())
    assert model.num_parameters() == expected
    assert model.num_parameters(exclude_embeddings=True) == dense.num_parameters(exclude_embeddings=True)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert model.num_parameters(only_trainable=True) == trained
    assert copy.deepcopy(model).num_parameters() == expected
    model.dequantize()
    assert model.num_parameters() == expected


def test_num_parameters_of_text_encoders_counts_shared_and_packed_tables(tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4, "vocab_size": 100}
    dense = transformers.T5EncoderModel(transformers.T5Config(**sizes))
    dense.save_pretrained(tmp_path)
    expected = dense.num_parameters()
    model = transformers.T5EncoderModel.from_pretrained(
        tmp_path, quantization_config=QDiffConfig(method="rtn", bits=4, group_size=16, keep_outer_layers=False)
    )
    assert any(isinstance(module, PackedLayer) for module in model.modules())
    assert model.num_parameters() == expected
    assert model.num_parameters(exclude_embeddings=True) <= expected


def test_small_models_with_universal_codebooks_are_smaller_than_dense_ones(tmp_path) -> None:
    dense = tiny_models.make("pixart")
    dense.save_pretrained(tmp_path)
    config = AQConfig(num_codebooks=1, codebook_bits=8, vector_size=4, codebook="shared", effort=0, keep_outer_layers=False)
    model = type(dense).from_pretrained(tmp_path, quantization_config=config)
    assert model.get_memory_footprint() < dense.get_memory_footprint()
    model.save_pretrained(tmp_path / "packed", max_shard_size=model.get_memory_footprint() // 2)
    assert len(list((tmp_path / "packed").glob("*.safetensors"))) > 1
    again = type(dense).from_pretrained(tmp_path / "packed")
    assert torch.equal(tiny_models.run(again, "pixart"), tiny_models.run(model, "pixart"))


@pytest.mark.parametrize("name", table_shapes())
def test_all_layers_on_a_device_use_one_copy_of_a_codebook(name: str) -> None:
    for device in (torch.device("cpu"), torch.device("meta")):
        one = codebook.shared_codebooks(name, device)
        assert one is codebook.shared_codebooks(name, device)
        assert one.device == device and not one.is_inference()


def test_copies_and_pickles_of_a_layer_find_the_codebook_again(monkeypatch) -> None:
    layer, x = table_layer(), torch.randn(3, 64)
    expected, stored = layer(x), pickle.dumps(layer)
    monkeypatch.setattr(codebook, "_shared", {})  # as in another process
    assert torch.equal(pickle.loads(stored)(x), expected)
    assert torch.equal(copy.deepcopy(layer)(x), expected)


def test_a_codebook_first_needed_in_inference_mode_serves_training_later(monkeypatch) -> None:
    layer, x = table_layer(), torch.randn(3, 64, requires_grad=True)
    monkeypatch.setattr(codebook, "_shared", {})
    with torch.inference_mode():
        layer(x)
    layer(x).sum().backward()
    assert x.grad is not None


def test_a_graph_traced_before_its_device_has_the_codebook_is_whole(monkeypatch) -> None:
    layer = table_layer()
    layer.to("meta")  # stands for an accelerator that offloading moves a layer to when a compiled model is called
    table = codebook.shared_codebooks(layer.spec.format.table, torch.device("cpu"))
    monkeypatch.setattr(codebook, "_shared", {(layer.spec.format.table, torch.device("cpu")): table})
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    assert compiled(torch.randn(3, 64, device="meta")).shape == (3, 16)
