"""Quantize while loading, save, load back: every method on every kind of model, equal to the last bit."""

from __future__ import annotations

import copy
import functools
import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_models
import torch
from diffusers.models import modeling_utils
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from qdiff_diffusers import AQConfig, FPConfig, Quantization, RTNConfig, SVDQuantConfig, VQConfig
from qdiff_diffusers.layers import PackedLayer

CONFIGS = {
    "aq-4": lambda: AQConfig(bits=4),
    "aq-3-int8": lambda: AQConfig(bits=3, activations="int8"),
    "aq-2-fp8": lambda: AQConfig(bits=2, activations="fp8"),
    "aq-1": lambda: AQConfig(bits=1),
    "aq-1.5": lambda: AQConfig(bits=1.5),
    "aq-own-codebooks": lambda: AQConfig(num_codebooks=2, codebook_bits=4, vector_size=4, codebook="layer", rotation=False),
    "vq-4": lambda: VQConfig(bits=4),
    "vq-3-fp8": lambda: VQConfig(bits=3, activations="fp8"),
    "vq-2-int8": lambda: VQConfig(bits=2, activations="int8"),
    "vq-6x2-unscaled": lambda: VQConfig(codebook_bits=6, vector_size=2, row_scales=False),
    "fp-8": lambda: FPConfig(bits=8),
    "fp-4-int8": lambda: FPConfig(bits=4, activations="int8"),
    "fp-3-rotated-fp8": lambda: FPConfig(bits=3, rotation=True, activations="fp8"),
    "fp-e3m2-tensor": lambda: FPConfig(weight_format="e3m2", group_size="tensor", scale_dtype="float32"),
    "fp-nvfp4": lambda: FPConfig(weight_format="nvfp4"),
    "fp-mxfp4": lambda: FPConfig(weight_format="mxfp4"),
    "fp-mxfp8": lambda: FPConfig(weight_format="mxfp8"),
    "svdquant-8": lambda: SVDQuantConfig(bits=8),
    "svdquant-4-int4": lambda: SVDQuantConfig(bits=4, rank=4, activations="int4"),
    "svdquant-nvfp4-int8": lambda: SVDQuantConfig(weight_format="nvfp4", rank=4, activations="int8"),
    "svdquant-3-rotated-fp8": lambda: SVDQuantConfig(bits=3, rank=4, rotation=True, activations="fp8"),
    "rtn-8": lambda: RTNConfig(bits=8),
    "rtn-4-int8": lambda: RTNConfig(bits=4, activations="int8"),
    "rtn-2-row-rotated": lambda: RTNConfig(bits=2, group_size="row", rotation=True),
}
ARCHITECTURES = ["flux", "sd3", "dit", "pixart", "sdxl_unet", "wan"]
# Largest acceptable relative error of a model's output. The models are random, so this is a sanity bound, not a quality claim.
OUTPUT_ERROR = {"fp-8": 0.1, "fp-mxfp8": 0.1, "svdquant-8": 0.03, "rtn-8": 0.03, "aq-4": 0.35, "vq-4": 0.35, "rtn-4-int8": 0.35}


@pytest.fixture(scope="session")
def dense_folder(tmp_path_factory):
    """``dense_folder(name)``: where the tiny model of that name lies, saved in float32."""
    root = tmp_path_factory.mktemp("dense")

    @functools.cache
    def folder(name: str) -> Path:
        tiny_models.make(name).save_pretrained(root / name)
        return root / name

    return folder


def load(folder: Path, name: str, **kwargs) -> nn.Module:
    return type(tiny_models.make(name)).from_pretrained(folder, **kwargs)


def packed_layers(model: nn.Module) -> dict[str, PackedLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLayer)}


def assert_same_tensors(a: nn.Module, b: nn.Module) -> None:
    left, right = a.state_dict(), b.state_dict()
    assert left.keys() == right.keys()
    for key in left:
        assert left[key].dtype == right[key].dtype, key
        assert torch.equal(left[key].view(torch.uint8) if left[key].ndim else left[key], _bytes(right[key], left[key])), key


def _bytes(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.uint8) if like.ndim else tensor


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float32) for name in ARCHITECTURES), *((name, torch.bfloat16) for name in ("flux", "wan"))],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_a_quantized_model_survives_save_and_reload(name, method, dtype, dense_folder, tmp_path):
    config = CONFIGS[method]()
    model = load(dense_folder(name), name, quantization_config=config, dtype=dtype)
    assert len(packed_layers(model)) >= 8
    output = tiny_models.run(model, name)
    assert torch.isfinite(output).all()
    if method in OUTPUT_ERROR and dtype == torch.float32:
        exact = tiny_models.run(tiny_models.make(name), name)
        assert (output - exact).norm() / exact.norm() < OUTPUT_ERROR[method]

    model.save_pretrained(tmp_path)
    for given in ({}, {"dtype": dtype}):
        reloaded = load(tmp_path, name, **given)
        assert reloaded.dtype == model.dtype == dtype
        assert_same_tensors(reloaded, model)
        assert torch.equal(tiny_models.run(reloaded, name), output)


@pytest.mark.parametrize("method", ["aq-2-fp8", "vq-2-int8", "fp-nvfp4", "svdquant-4-int4", "rtn-4-int8"])
@pytest.mark.parametrize("name", ["flux", "sdxl_unet"])
def test_a_sharded_checkpoint_is_equal_to_a_single_file(name, method, dense_folder, tmp_path):
    model = load(dense_folder(name), name, quantization_config=CONFIGS[method](), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    for given in ({}, {"dtype": torch.bfloat16}):
        reloaded = load(tmp_path, name, **given)
        assert_same_tensors(reloaded, model)
        assert torch.equal(tiny_models.run(reloaded, name), tiny_models.run(model, name))


def test_a_sharded_dense_checkpoint_is_quantized_like_a_single_file(dense_folder, tmp_path):
    tiny_models.make("dit").save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    from_shards = load(tmp_path, "dit", quantization_config=VQConfig(bits=3))
    assert_same_tensors(from_shards, load(dense_folder("dit"), "dit", quantization_config=VQConfig(bits=3)))


@pytest.mark.parametrize("method", ["aq-2-fp8", "vq-3-fp8", "fp-4-int8", "svdquant-4-int4", "rtn-4-int8"])
def test_quantizing_twice_gives_the_same_bits(method, dense_folder):
    first, second = (load(dense_folder("dit"), "dit", quantization_config=CONFIGS[method]()) for _ in range(2))
    assert_same_tensors(first, second)


@pytest.mark.parametrize("method", ["fp-e3m2-tensor", "rtn-4-int8", "aq-own-codebooks", "svdquant-nvfp4-int8", "fp-mxfp4"])
def test_packed_tensors_keep_their_dtype_and_bits_when_loaded_in_another_precision(method, dense_folder, tmp_path):
    """diffusers casts what it reads to the model's dtype; float32 and float16 scales must not pass through that."""
    load(dense_folder("flux"), "flux", quantization_config=CONFIGS[method](), dtype=torch.float32).save_pretrained(tmp_path)
    stored = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        model = load(tmp_path, "flux", dtype=dtype)
        assert model.dtype == dtype
        for name, layer in packed_layers(model).items():
            assert layer.compute_dtype == layer.weight.dtype == dtype
            for leaf in layer.tensor_infos():
                tensor, raw = getattr(layer, leaf), stored[f"{name}.{leaf}"]
                assert tensor.dtype == raw.dtype
                assert torch.equal(tensor.view(torch.uint8), raw.view(torch.uint8))
        assert torch.isfinite(tiny_models.run(model, "flux")).all()


@pytest.mark.parametrize("method", ["aq-2-fp8", "vq-2-int8", "fp-nvfp4", "svdquant-4-int4", "rtn-4-int8"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_memory_after_loading_is_the_packed_size(name, method, dense_folder, tmp_path):
    """Counted on the tensors that the model really holds, each storage once: no dense copy is left anywhere."""
    model = load(dense_folder(name), name, quantization_config=CONFIGS[method](), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    reloaded = load(tmp_path, name)
    for m in (model, reloaded):
        layers = packed_layers(m)
        assert layers.keys() == m.config.quantization_config.layers.keys()
        for layer_name, layer in layers.items():
            held = {id(t): t.nbytes for t in (*layer.parameters(recurse=False), *layer.buffers(recurse=False))}
            bias = layer.bias.nbytes if layer.bias is not None else 0
            assert sum(held.values()) - bias == layer.spec.nbytes(layer.weight_shape), layer_name
            assert not [key for key, value in vars(layer).items() if isinstance(value, torch.Tensor)]
    with safe_open(tmp_path / "diffusion_pytorch_model.safetensors", "pt") as file:
        on_disk = sum(file.get_tensor(key).nbytes for key in file.keys())  # noqa: SIM118
    assert sum(t.nbytes for t in reloaded.state_dict().values()) == on_disk


@pytest.mark.parametrize("method", ["aq-2-fp8", "aq-1.5"])
def test_a_universal_codebook_is_not_stored_and_no_layer_holds_it(method, dense_folder):
    """Offloading swaps the data of a layer's tensors, and to disk it writes several layers into one safetensors file, which refuses
    tensors that share memory; so the one copy that all layers use belongs to none of them."""
    model = load(dense_folder("dit"), "dit", quantization_config=CONFIGS[method]())
    layers = [layer for layer in packed_layers(model).values() if getattr(layer.spec.format, "table", None)]
    assert layers
    storages = [t.untyped_storage().data_ptr() for layer in layers for t in (*layer.parameters(), *layer.buffers())]
    assert len(set(storages)) == len(storages)
    assert not any(name.endswith("codebooks") for name, _ in (*model.named_buffers(), *model.named_parameters()))
    tables = [layer.spec.format.op_arguments(layer.packed_tensors(), 8)[1] for layer in layers]
    assert len({table.data_ptr() for table in tables}) == len({layer.spec.format.table for layer in layers})


@pytest.mark.parametrize("method", CONFIGS)
def test_the_recorded_error_is_the_error_of_the_layer(method, dense_folder):
    dense = tiny_models.make("pixart")
    model = load(dense_folder("pixart"), "pixart", quantization_config=CONFIGS[method]())
    for name, layer in packed_layers(model).items():
        exact = dense.get_submodule(name).weight
        error = (layer.dequantize() - exact).square().sum() / exact.square().sum()
        assert model.config.quantization_config.layers[name].error == pytest.approx(error.item(), rel=1e-2, abs=1e-7)


@pytest.mark.parametrize("name", [*ARCHITECTURES, "vae"])
def test_every_layer_is_either_packed_or_listed_with_a_reason(name, dense_folder, tmp_path):
    model = load(dense_folder(name), name, quantization_config=RTNConfig(bits=4))
    weighted = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)
    left = {n for n, m in model.named_modules() if isinstance(m, weighted) and not isinstance(m, PackedLayer)}
    skipped = model.config.quantization_config.skipped
    assert skipped.keys() == left
    assert all(skipped.values())
    model.save_pretrained(tmp_path)
    assert load(tmp_path, name).config.quantization_config.skipped == skipped
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["skipped"] == skipped


def test_convolutions_of_a_unet_are_packed(dense_folder):
    model = load(dense_folder("sdxl_unet"), "sdxl_unet", quantization_config=RTNConfig(bits=4))
    packed = packed_layers(model)
    kernels = {tuple(layer.weight_shape[2:]) for layer in packed.values() if len(layer.weight_shape) == 4}
    assert kernels == {(3, 3), (1, 1)}
    assert packed["down_blocks.0.downsamplers.0.conv"].stride == (2, 2)


def test_outer_layers_stay_in_sixteen_bits_unless_asked_for(dense_folder):
    by_default = load(dense_folder("flux"), "flux", quantization_config=RTNConfig(bits=4))
    assert not packed_layers(by_default).keys() & {"x_embedder", "context_embedder", "proj_out", "norm_out.linear"}
    everything = load(dense_folder("flux"), "flux", quantization_config=RTNConfig(bits=4, keep_outer_layers=False))
    assert packed_layers(everything).keys() >= {"x_embedder", "context_embedder", "proj_out", "norm_out.linear"}
    assert torch.isfinite(tiny_models.run(everything, "flux")).all()


def test_modules_to_not_convert_match_by_substring(dense_folder):
    config = RTNConfig(bits=4, modules_to_not_convert=["attn1.to_q", "norm1"])
    model = load(dense_folder("dit"), "dit", quantization_config=config)
    packed = packed_layers(model)
    assert packed
    assert not [name for name in packed if "attn1.to_q" in name or "norm1" in name]
    assert "transformer_blocks.1.attn1.to_q" in model.config.quantization_config.skipped


def test_overrides_give_the_first_matching_pattern_its_own_method(dense_folder, tmp_path):
    overrides = {
        "blocks.0.attn1": FPConfig(bits=8),
        "attn1.to_q": None,
        "attn1": RTNConfig(bits=8, activations="int8"),
        "proj_out_2": RTNConfig(bits=6),
    }
    model = load(dense_folder("dit"), "dit", quantization_config=RTNConfig(bits=3, overrides=overrides))
    packed = packed_layers(model)
    assert packed["transformer_blocks.0.attn1.to_q"].spec.format.kind == "minifloat"
    assert "transformer_blocks.1.attn1.to_q" not in packed
    assert packed["transformer_blocks.1.attn1.to_k"].spec.activations == "int8"
    assert packed["transformer_blocks.1.attn1.to_k"].spec.format.bits == 8
    assert packed["transformer_blocks.1.ff.net.2"].spec.format.bits == 3
    assert packed["proj_out_2"].spec.format.bits == 6  # an override also reaches outside the repeated blocks
    model.save_pretrained(tmp_path)
    reloaded = load(tmp_path, "dit")
    assert_same_tensors(reloaded, model)
    assert reloaded.config.quantization_config == model.config.quantization_config
    assert torch.equal(tiny_models.run(reloaded, "dit"), tiny_models.run(model, "dit"))


def test_layers_that_the_model_class_keeps_in_float32_stay_so(dense_folder, tmp_path):
    config = RTNConfig(bits=4, keep_outer_layers=False)
    model = load(dense_folder("wan"), "wan", quantization_config=config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    for m in (model, load(tmp_path, "wan"), load(tmp_path, "wan", dtype=torch.bfloat16)):
        assert not [name for name in packed_layers(m) if "time_embedder" in name]
        assert "condition_embedder.time_embedder.linear_1" in m.config.quantization_config.skipped
        for name, parameter in m.named_parameters():
            kept = any(part in name.split(".") for part in m._keep_in_fp32_modules)
            if parameter.is_floating_point():
                assert parameter.dtype == (torch.float32 if kept else torch.bfloat16), name


def test_the_dtype_of_a_model_is_remembered_not_that_of_its_scales(dense_folder, tmp_path):
    config = FPConfig(weight_format="e3m2", group_size="tensor", scale_dtype="float32")
    model = load(dense_folder("dit"), "dit", quantization_config=config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["compute_dtype"] == "bfloat16"
    assert load(tmp_path, "dit").dtype == torch.bfloat16


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}], ids=str)
def test_a_device_map_quantizes_and_reloads_the_same_bits(device_map, dense_folder, tmp_path):
    plain = load(dense_folder("dit"), "dit", quantization_config=RTNConfig(bits=4))
    mapped = load(dense_folder("dit"), "dit", quantization_config=RTNConfig(bits=4), device_map=device_map)
    assert_same_tensors(mapped, plain)
    mapped.save_pretrained(tmp_path)
    assert_same_tensors(load(tmp_path, "dit", device_map=device_map), plain)


def test_loading_without_memory_mapping_gives_the_same_bits(dense_folder, tmp_path):
    plain = load(dense_folder("dit"), "dit", quantization_config=RTNConfig(bits=4))
    assert_same_tensors(load(dense_folder("dit"), "dit", quantization_config=RTNConfig(bits=4), disable_mmap=True), plain)
    plain.save_pretrained(tmp_path)
    assert_same_tensors(load(tmp_path, "dit", disable_mmap=True), plain)


@pytest.mark.parametrize("name", ["sd3", "wan"])
def test_a_single_file_is_quantized_while_loading_like_a_folder(name, dense_folder, tmp_path):
    folder = dense_folder(name)
    file = folder / "diffusion_pytorch_model.safetensors"
    config = RTNConfig(bits=4)
    model = type(tiny_models.make(name)).from_single_file(str(file), config=str(folder), quantization_config=config)
    assert_same_tensors(model, load(folder, name, quantization_config=config))
    model.save_pretrained(tmp_path)
    reloaded = load(tmp_path, name)
    assert_same_tensors(reloaded, model)
    assert torch.equal(tiny_models.run(reloaded, name), tiny_models.run(model, name))


def test_parallel_loading_of_shards_gives_the_same_bits(dense_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(modeling_utils, "HF_ENABLE_PARALLEL_LOADING", True)
    plain = load(dense_folder("dit"), "dit", quantization_config=RTNConfig(bits=4))
    tiny_models.make("dit").save_pretrained(tmp_path / "dense", max_shard_size="20KB")
    assert_same_tensors(load(tmp_path / "dense", "dit", quantization_config=RTNConfig(bits=4)), plain)
    plain.save_pretrained(tmp_path / "packed", max_shard_size="20KB")
    assert_same_tensors(load(tmp_path / "packed", "dit"), plain)


@pytest.mark.parametrize("reloaded", [False, True], ids=["just quantized", "reloaded"])
def test_a_model_can_be_copied_and_pickled(reloaded, dense_folder, tmp_path):
    model = load(dense_folder("dit"), "dit", quantization_config=CONFIGS["svdquant-4-int4"]())
    if reloaded:
        model.save_pretrained(tmp_path)
        model = load(tmp_path, "dit")
    torch.save(model, tmp_path / "model.pt")
    for twin in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        assert_same_tensors(twin, model)
        assert torch.equal(tiny_models.run(twin, "dit"), tiny_models.run(model, "dit"))
        twin.save_pretrained(tmp_path / "again")
        assert_same_tensors(load(tmp_path / "again", "dit"), model)


def test_a_variant_is_saved_and_loaded(dense_folder, tmp_path):
    model = load(dense_folder("dit"), "dit", quantization_config=RTNConfig(bits=4))
    model.save_pretrained(tmp_path, variant="int4")
    assert_same_tensors(load(tmp_path, "dit", variant="int4"), model)


def test_a_reloaded_model_can_be_saved_again_unchanged(dense_folder, tmp_path):
    load(dense_folder("dit"), "dit", quantization_config=CONFIGS["svdquant-4-int4"]()).save_pretrained(tmp_path / "one")
    load(tmp_path / "one", "dit").save_pretrained(tmp_path / "two")
    files = [(tmp_path / folder / "diffusion_pytorch_model.safetensors").read_bytes() for folder in ("one", "two")]
    starts = [8 + int.from_bytes(data[:8], "little") for data in files]
    headers = [json.loads(data[8:start]) for data, start in zip(files, starts, strict=True)]
    assert headers[0] == headers[1]  # as JSON: safetensors writes the metadata in any order
    assert files[0][starts[0] :] == files[1][starts[1] :]
    configs = [json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("one", "two")]
    assert configs[0] | {"_name_or_path": None} == configs[1] | {"_name_or_path": None}


def test_one_config_object_quantizes_any_number_of_models(dense_folder, tmp_path):
    """A config says what to do. What was done to one model must not leak into the next."""
    config = RTNConfig(bits=4)
    dit = load(dense_folder("dit"), "dit", quantization_config=config)
    wan = load(dense_folder("wan"), "wan", quantization_config=config, dtype=torch.bfloat16)
    assert config == RTNConfig(bits=4)
    assert dit.config.quantization_config.layers.keys() == packed_layers(dit).keys()
    assert wan.config.quantization_config.layers.keys() == packed_layers(wan).keys()
    for name, model in (("dit", dit), ("wan", wan)):
        model.save_pretrained(tmp_path / name)
        assert_same_tensors(load(tmp_path / name, name), model)


def test_all_zero_layers_are_quantized_to_zero(dense_folder, tmp_path):
    """DiT initialises its modulation with zeros; a half-trained model may still have such layers."""
    model = tiny_models.make("dit")
    with torch.no_grad():
        model.transformer_blocks[0].ff.net[2].weight.zero_()
        model.transformer_blocks[1].ff.net[2].weight[::2] = 0
    model.save_pretrained(tmp_path)
    for method, config in CONFIGS.items():
        quantized = load(tmp_path, "dit", quantization_config=config())
        assert not quantized.transformer_blocks[0].ff.net[2].weight.any(), method
        assert torch.isfinite(tiny_models.run(quantized, "dit")).all(), method


UNITS = [
    *((method, size) for method in CONFIGS for size in (1e-3, 1e3)),
    # Beyond float16, which holds the scales of the other methods.
    *((method, size) for method in CONFIGS if method.startswith(("fp", "svdquant")) for size in (1e-6, 1e6)),
]


@pytest.fixture(scope="module")
def error_of_one_layer(dense_folder):
    """``error_of_one_layer(folder, method)``: of ``UNIT_LAYER``, which alone is quantized. As it was, once per method."""

    def measure(folder: Path, method: str) -> float:
        config = replace(CONFIGS[method](), modules_to_not_convert=["attn1", "norm1", "blocks.1", "ff.net.0"])
        model = load(folder, "dit", quantization_config=config)
        return model.config.quantization_config.layers[UNIT_LAYER].error

    as_it_was = functools.cache(lambda method: measure(dense_folder("dit"), method))
    return lambda folder, method: as_it_was(method) if folder is None else measure(folder, method)


UNIT_LAYER = "transformer_blocks.0.ff.net.2"


@pytest.mark.parametrize(("method", "size"), UNITS, ids=[f"{method}-{size:.0e}" for method, size in UNITS])
def test_the_unit_of_the_weights_does_not_matter(method, size, error_of_one_layer, tmp_path):
    """Scales are stored in few bits; very small or large weights must come out scaled, not as zeros or infinities."""
    model = tiny_models.make("dit")
    with torch.no_grad():
        model.get_submodule(UNIT_LAYER).weight *= size
    model.save_pretrained(tmp_path)
    assert error_of_one_layer(tmp_path, method) < 1.5 * error_of_one_layer(None, method) + 1e-3


def test_configs_print_themselves(dense_folder):
    model = load(dense_folder("dit"), "dit", quantization_config=RTNConfig(bits=4))
    assert "rtn" in repr(model.config.quantization_config)
    assert "int4 asymmetric g64, 4.50 bits" in repr(model) or "int4 asymmetric g64" in repr(model)
    assert isinstance(model.config.quantization_config, Quantization)
    assert model.config.quantization_config.config == RTNConfig(bits=4, compute_dtype="float32")


def test_one_config_quantizes_several_models_and_stays_as_it_was(dense_folder):
    config = RTNConfig(bits=4)
    first = load(dense_folder("dit"), "dit", quantization_config=config, dtype=torch.bfloat16)
    second = load(dense_folder("pixart"), "pixart", quantization_config=config, dtype=torch.float32)
    assert config == RTNConfig(bits=4)
    records = [model.config.quantization_config for model in (first, second)]
    assert [record.compute_dtype for record in records] == ["bfloat16", "float32"]
    assert set(records[0].layers) != set(records[1].layers)
    third = load(dense_folder("pixart"), "pixart", quantization_config=records[0])  # what was asked for, once more
    assert set(third.config.quantization_config.layers) == set(records[1].layers)


def test_the_record_of_a_model_says_how_it_is_now(dense_folder):
    """Also of a copy, which has layers of its own, and without saving."""
    model = load(dense_folder("dit"), "dit", quantization_config=SVDQuantConfig(bits=4, rank=4, rounds=1), dtype=torch.float32)
    name = next(name for name, layer in model.config.quantization_config.layers.items() if layer.spec.rank)
    copied, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    layer = copied.get_submodule(name)
    layer.append_branch(torch.ones(2, layer.in_features), torch.ones(layer.out_features, 2))
    nn.Module.to(copied, torch.bfloat16)
    ranks = [m.config.quantization_config.layers[name].spec.rank for m in (model, copied, pickled)]
    assert ranks == [4, 6, 4]
    dtypes = [m.config.quantization_config.to_dict()["compute_dtype"] for m in (model, copied, pickled)]
    assert dtypes == ["float32", "bfloat16", "float32"]
    described = copy.deepcopy(copied.config.quantization_config)
    del copied
    assert described.layers[name].spec.rank == 6


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("method", ["aq-2-fp8", "vq-2-int8", "fp-nvfp4", "svdquant-4-int4", "rtn-4-int8"])
def test_the_process_default_dtype_changes_nothing(method, default, dense_folder):
    """Training scripts set it, and every tensor made without a dtype follows."""
    kwargs = {"quantization_config": CONFIGS[method](), "dtype": torch.float32}
    expected = load(dense_folder("pixart"), "pixart", **kwargs)
    torch.set_default_dtype(default)
    try:
        model = load(dense_folder("pixart"), "pixart", **kwargs)
        assert torch.get_default_dtype() == default
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same_tensors(model, expected)


@pytest.mark.parametrize("method", ["aq-2-fp8", "fp-nvfp4", "rtn-4-int8"])
def test_a_model_that_was_cast_reloads_in_that_dtype(method, dense_folder, tmp_path):
    model = load(dense_folder("flux"), "flux", quantization_config=CONFIGS[method]())
    model.bfloat16()
    model.save_pretrained(tmp_path)
    reloaded = load(tmp_path, "flux")
    assert reloaded.dtype == torch.bfloat16
    assert_same_tensors(reloaded, model)
    assert torch.equal(tiny_models.run(reloaded, "flux"), tiny_models.run(model, "flux"))


def test_a_model_with_float8_scales_survives_pickling(dense_folder):
    """torch's own pickles of float8 tensors cannot be read back."""
    model = load(dense_folder("dit"), "dit", quantization_config=CONFIGS["fp-nvfp4"]())
    copied = pickle.loads(pickle.dumps(model))
    assert_same_tensors(copied, model)
    assert torch.equal(tiny_models.run(copied, "dit"), tiny_models.run(model, "dit"))
