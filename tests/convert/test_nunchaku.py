"""Nunchaku checkpoints: whole models through ``qdiff convert`` and ``from_pretrained``, to Nunchaku and back, and damaged ones."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import nunchaku_files as files
import pytest
import torch
from diffusers import FluxTransformer2DModel, QwenImageTransformer2DModel, SanaTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import nn

from qdiff_diffusers import CheckpointError, ConfigError, RTNConfig, SVDQuantConfig
from qdiff_diffusers.convert import convert_nunchaku, export_nunchaku
from qdiff_diffusers.layers import PackedLayer

Checkpoint = files.Checkpoint


def flux() -> nn.Module:
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=64,
        num_attention_heads=2,
        joint_attention_dim=128,
        pooled_projection_dim=32,
        axes_dims_rope=(16, 24, 24),
    )


def flux_inputs() -> dict:
    return {
        "hidden_states": torch.randn(1, 16, 4),
        "encoder_hidden_states": torch.randn(1, 8, 128),
        "pooled_projections": torch.randn(1, 32),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(8, 3),
    }


def qwen() -> nn.Module:
    return QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=64,
        num_attention_heads=2,
        joint_attention_dim=128,
        axes_dims_rope=(16, 24, 24),
    )


def qwen_inputs() -> dict:
    return {
        "hidden_states": torch.randn(1, 16, 16),
        "encoder_hidden_states": torch.randn(1, 6, 128),
        "encoder_hidden_states_mask": torch.ones(1, 6, dtype=torch.long),
        "timestep": torch.tensor([0.5]),
        "img_shapes": [[(1, 4, 4)]],
    }


def sana() -> nn.Module:
    return SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=5,
        attention_head_dim=32,
        num_layers=1,
        num_cross_attention_heads=5,
        cross_attention_head_dim=32,
        cross_attention_dim=160,
        caption_channels=32,
        mlp_ratio=2.0,
        sample_size=8,
        patch_size=1,
    )


def sana_inputs() -> dict:
    return {
        "hidden_states": torch.randn(1, 4, 8, 8),
        "encoder_hidden_states": torch.randn(1, 6, 32),
        "timestep": torch.tensor([500]),
    }


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict]]] = {
    "flux": (flux, flux_inputs),
    "qwen": (qwen, qwen_inputs),
    "sana": (sana, sana_inputs),
}
QKV = ["attn.to_q", "attn.to_k", "attn.to_v"]
ADDED = ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"]


def flux_engine(model: nn.Module, kind: str) -> Checkpoint:
    out = Checkpoint(model)
    double, single = "transformer_blocks.0.", "single_transformer_blocks.0."

    def add(block: str, source: str, modules: list[str], rows: int, columns: int, unsigned: bool = False) -> None:
        layer = files.random_layer(kind, rows, columns, unsigned=unsigned)
        out.w4a4(block + source, [block + name for name in modules], layer)

    for suffix, names, mlp in (("", QKV, "ff"), ("_context", ADDED, "ff_context")):
        add(double, f"qkv_proj{suffix}", names, 384, 128)
        add(double, f"out_proj{suffix}", ["attn.to_out.0" if not suffix else "attn.to_add_out"], 128, 128)
        add(double, f"mlp{suffix}_fc1", [f"{mlp}.net.0.proj"], 512, 128)
        add(double, f"mlp{suffix}_fc2", [f"{mlp}.net.2"], 128, 512, unsigned=True)
        out.awq(f"{double}norm1{suffix}.linear", f"{double}norm1{suffix}.linear", files.random_layer("awq", 768, 128), 6)
    out.awq(f"{single}norm.linear", f"{single}norm.linear", files.random_layer("awq", 384, 128), 3)
    add(single, "qkv_proj", QKV, 384, 128)
    add(single, "mlp_fc1", ["proj_mlp"], 512, 128)
    halves = [files.random_layer(kind, 128, width, rank, unsigned=width > 128) for width, rank in ((128, 16), (512, 32))]
    out.w4a4(f"{single}mlp_fc2", [], halves[1])  # in the file in any order
    out.w4a4(f"{single}out_proj", [f"{single}proj_out"], halves[0])
    out.replace([f"{single}proj_out"], halves[1])
    renamed = {f"{double}attn.norm": f"{double}norm", f"{single}attn.norm": f"{single}norm"}
    out.keep(renamed)
    return out


def qwen_engine(model: nn.Module, kind: str) -> Checkpoint:
    out, block = Checkpoint(model), "transformer_blocks.0."

    def add(source: str, modules: list[str], rows: int, columns: int, unsigned: bool = False) -> None:
        layer = files.random_layer(kind, rows, columns, unsigned=unsigned)
        out.w4a4(block + source, [block + name for name in modules], layer, engine=False)

    add("attn.to_qkv", QKV, 384, 128)
    add("attn.add_qkv_proj", ADDED, 384, 128)
    for name in ("attn.to_out.0", "attn.to_add_out"):
        add(name, [name], 128, 128)
    for stream in ("img", "txt"):
        add(f"{stream}_mlp.net.0.proj", [f"{stream}_mlp.net.0.proj"], 512, 128)
        add(f"{stream}_mlp.net.2", [f"{stream}_mlp.net.2"], 128, 512, unsigned=True)
        name = f"{block}{stream}_mod.1"
        out.awq(name, name, files.random_layer("awq", 768, 128), 6)
    out.keep({})
    return out


def sana_engine(model: nn.Module, kind: str) -> Checkpoint:
    """160 channels: nothing is a multiple of 128, and each of q, k and v is padded by itself."""
    out, block = Checkpoint(model), "transformer_blocks.0."
    inner, hidden = 160, 320

    def add(source: str, modules: list[str], rows: int, columns: int, bias: bool = True, index: torch.Tensor | None = None) -> None:
        layer = files.random_layer(kind, rows, columns, bias=bias)
        out.w4a4(block + source, [block + name for name in modules], layer, index=index)

    qkv = files.random_layer(kind, 3 * inner, inner, bias=False)
    spread = torch.cat([torch.cat([torch.arange(inner) + part * inner, torch.zeros(96, dtype=torch.long)]) for part in range(3)])
    out.w4a4(f"{block}attn.qkv_proj", [f"{block}attn1.to_{part}" for part in "qkv"], qkv, index=spread)
    add("attn.out_proj", ["attn1.to_out.0"], inner, inner)
    add("cross_attn.q_linear", ["attn2.to_q"], inner, inner)
    add("cross_attn.out_proj", ["attn2.to_out.0"], inner, inner)
    interleaved = torch.arange(2 * hidden).view(2, hidden).T.reshape(-1)
    add("ff.inverted_conv", ["ff.conv_inverted"], 2 * hidden, inner, index=interleaved)
    add("ff.point_conv", ["ff.conv_point"], inner, hidden, bias=False)
    tensors = model.state_dict()
    for leaf in ("weight", "bias"):
        pair = [tensors.pop(f"{block}attn2.to_{part}.{leaf}") for part in "kv"]
        out.tensors[f"{block}cross_attn.kv_linear.{leaf}"] = torch.cat(pair).bfloat16()
    depth = tensors[f"{block}ff.conv_depth.weight"][interleaved].permute(0, 2, 3, 1).bfloat16()
    out.tensors[f"{block}ff.depth_conv.weight"] = depth
    out.tensors[f"{block}ff.depth_conv.bias"] = tensors[f"{block}ff.conv_depth.bias"][interleaved].bfloat16()
    out.keep({})
    for name in [name for name in out.tensors if ".attn2." in name or "ff.conv_depth" in name]:
        del out.tensors[name]
    return out


ENGINES = {"flux": flux_engine, "qwen": qwen_engine, "sana": sana_engine}


def bfloat16_weights(name: str) -> nn.Module:
    """A dense model whose weights bfloat16 holds exactly."""
    torch.manual_seed(0)
    model = MODELS[name][0]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
            parameter.copy_(parameter.bfloat16())
    return model


def config_of(model: nn.Module) -> dict:
    return json.loads(model.to_json_string())


def run(model: nn.Module, name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    torch.manual_seed(1)
    inputs = {
        key: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for key, value in MODELS[name][1]().items()
    }
    with torch.no_grad():
        return model(**inputs, return_dict=False)[0].double()


def load(name: str, folder: Path, dtype: torch.dtype, **kwargs) -> nn.Module:
    return type(MODELS[name][0]()).from_pretrained(folder, dtype=dtype, **kwargs)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> Callable[[str, str], tuple[Path, nn.Module]]:
    made: dict[tuple[str, str], tuple[Path, nn.Module]] = {}

    def make(name: str, kind: str) -> tuple[Path, nn.Module]:
        if (name, kind) not in made:
            model = bfloat16_weights(name)
            config = config_of(model)
            torch.manual_seed(3)
            checkpoint = ENGINES[name](copy.deepcopy(model), kind)
            folder = checkpoint.save(tmp_path_factory.mktemp("engine") / f"{name}-{kind}", config)
            made[name, kind] = folder, checkpoint.model
        return made[name, kind]

    return make


@pytest.mark.parametrize("kind", ["int4", "nvfp4"])
@pytest.mark.parametrize("name", MODELS)
def test_an_engine_checkpoint_computes_what_its_layers_are_said_to(name, kind, engine, tmp_path):
    source, reference = engine(name, kind)
    convert_nunchaku(source, tmp_path / "out")
    model = load(name, tmp_path / "out", torch.float64)  # in which no rounding tie of the activations falls the other way
    assert distance(run(model, name, torch.float64), run(reference.double(), name, torch.float64)) < 1e-9


@pytest.mark.parametrize("kind", ["int4", "nvfp4"])
@pytest.mark.parametrize("name", ["flux", "sana"])
def test_a_converted_model_in_bfloat16_is_as_close_as_bfloat16_allows_layer_by_layer(name, kind, engine, tmp_path):
    source, reference = engine(name, kind)
    convert_nunchaku(source, tmp_path / "out")
    model = load(name, tmp_path / "out", torch.bfloat16)
    packed = {name: module for name, module in model.named_modules() if isinstance(module, PackedLayer)}
    assert packed
    for layer_name, layer in packed.items():
        x = torch.randn(3, layer.weight_shape[1]).bfloat16()
        x = x[:, :, None, None] if len(layer.weight_shape) == 4 else x
        exact = reference.get_submodule(layer_name)(x.double())
        assert distance(layer(x).detach().double(), exact) < 0.01, layer_name


def lite_folder(folder: Path, kind: str, shards: bool = False) -> tuple[Path, nn.Module]:
    """A ``nunchaku_lite`` folder of the FLUX model."""
    model = bfloat16_weights("flux")
    config = config_of(model)
    torch.manual_seed(4)
    out = Checkpoint(copy.deepcopy(model))
    single, double = "single_transformer_blocks.0.", "transformer_blocks.0."
    w4a4 = [f"{double}{name}" for name in (*QKV, "attn.to_out.0", "ff.net.0.proj", "ff.net.2")] + [f"{single}proj_out"]
    for name in w4a4:
        linear = model.get_submodule(name)
        out.w4a4(name, [name], files.random_layer(kind, *linear.weight.shape, bias=linear.bias is not None), engine=False)
    awq = [f"{double}norm1.linear", f"{single}norm.linear"]
    for name in awq:
        out.awq(name, name, files.random_layer("awq", *model.get_submodule(name).weight.shape))
    out.keep({})
    quantization = {
        "quant_method": "nunchaku_lite",
        "compute_dtype": "bfloat16",
        "svdq_w4a4": {"precision": kind, "group_size": 64 if kind == "int4" else 16, "rank": 16, "targets": w4a4},
        "awq_w4a16": {"precision": "int4", "group_size": 64, "targets": awq},
    }
    out.save(folder, config, quantization)
    if shards:
        _shard(folder)
    return folder, out.model


def _shard(folder: Path) -> None:
    """Tensors of one layer in both shards."""
    file = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    file.unlink()
    names = sorted(tensors)
    parts = {f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for path, keys in parts.items():
        save_file({key: tensors[key] for key in keys}, folder / path, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 0}, "weight_map": {key: path for path, keys in parts.items() for key in keys}}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("kind", ["int4", "nvfp4"])
def test_from_pretrained_reads_a_lite_folder_where_our_config_is_passed(kind, shards, tmp_path):
    folder, reference = lite_folder(tmp_path / "lite", kind, shards)
    model = load("flux", folder, torch.float64, quantization_config=SVDQuantConfig())
    expected = run(reference.double(), "flux", torch.float64)
    assert distance(run(model, "flux", torch.float64), expected) < 1e-9
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(
        run(load("flux", tmp_path / "saved", torch.float64), "flux", torch.float64), run(model, "flux", torch.float64)
    )


def test_a_lite_folder_is_converted_to_the_same_model(tmp_path):
    folder, _ = lite_folder(tmp_path / "lite", "int4")
    convert_nunchaku(folder, tmp_path / "out")
    direct = load("flux", folder, torch.float64, quantization_config=SVDQuantConfig())
    converted = load("flux", tmp_path / "out", torch.float64)
    assert torch.equal(run(direct, "flux", torch.float64), run(converted, "flux", torch.float64))
    assert direct.config.quantization_config.layers == converted.config.quantization_config.layers


def test_a_lite_component_of_a_pipeline_is_read_and_the_rest_copied(tmp_path):
    lite_folder(tmp_path / "pipe" / "transformer", "int4")
    (tmp_path / "pipe" / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    (tmp_path / "pipe" / "scheduler").mkdir()
    (tmp_path / "pipe" / "scheduler" / "scheduler_config.json").write_text("{}")
    convert_nunchaku(tmp_path / "pipe", tmp_path / "out")
    files_written = sorted(
        path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()
    )
    assert files_written == [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
    ]
    load("flux", tmp_path / "out" / "transformer", torch.bfloat16)


def test_settings_that_would_quantize_again_are_refused(tmp_path):
    folder, _ = lite_folder(tmp_path / "lite", "int4")
    for config in (SVDQuantConfig(rank=8), RTNConfig(bits=4)):
        with pytest.raises(ConfigError, match=r"already|Pass SVDQuantConfig\(\) without settings"):
            load("flux", folder, torch.bfloat16, quantization_config=config)


def export_source(folder: Path, config) -> Path:
    dense = bfloat16_weights("flux")
    dense.save_pretrained(folder / "dense")
    FluxTransformer2DModel.from_pretrained(folder / "dense", quantization_config=config, dtype=torch.bfloat16).save_pretrained(
        folder / "ours"
    )
    return folder / "ours"


@pytest.mark.parametrize("kind", ["int4", "nvfp4"])
def test_our_layers_survive_the_way_to_nunchaku_and_back(kind, tmp_path):
    awq = RTNConfig(bits=4)
    config = SVDQuantConfig(
        weight_format=kind, activations=kind, rank=20, overrides={"norm1.linear": awq, "norm1_context": awq, "norm.linear": awq}
    )
    source = export_source(tmp_path, config)
    export_nunchaku(source, tmp_path / "lite")
    lite = json.loads((tmp_path / "lite" / "config.json").read_text())["quantization_config"]
    assert lite["compute_dtype"] == "float16"  # our scales and factors are
    assert lite["svdq_w4a4"]["rank"] == 32
    assert set(lite["awq_w4a16"]["targets"]) == {
        "transformer_blocks.0.norm1.linear",
        "transformer_blocks.0.norm1_context.linear",
        "single_transformer_blocks.0.norm.linear",
    }
    ours = load("flux", source, torch.float64)
    back = load("flux", tmp_path / "lite", torch.float64, quantization_config=SVDQuantConfig())
    for name, layer in ours.named_modules():
        if isinstance(layer, PackedLayer):
            returned = back.get_submodule(name)
            assert torch.equal(layer.codes, returned.codes)
            assert torch.equal(layer.scales.float(), returned.scales.float())
            assert torch.equal(layer.dequantize(torch.float64), returned.dequantize(torch.float64))
    assert distance(run(back, "flux", torch.float64), run(ours, "flux", torch.float64)) < 1e-3  # biases were bfloat16, are float16


@pytest.mark.parametrize("kind", ["int4", "nvfp4"])
def test_a_lite_folder_comes_back_bit_for_bit(kind, tmp_path):
    folder, _ = lite_folder(tmp_path / "lite", kind)
    convert_nunchaku(folder, tmp_path / "ours")
    export_nunchaku(tmp_path / "ours", tmp_path / "again")
    first = load_file(folder / "diffusion_pytorch_model.safetensors")
    second = load_file(tmp_path / "again" / "diffusion_pytorch_model.safetensors")
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype, name
        assert torch.equal(tensor.contiguous().view(torch.int8), second[name].contiguous().view(torch.int8)), name
    configs = [json.loads((path / "config.json").read_text()) for path in (folder, tmp_path / "again")]
    sections = [config["quantization_config"]["svdq_w4a4"] for config in configs]
    assert sections[0] == sections[1]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            SVDQuantConfig(weight_format="int4", activations="int8", rank=16),
            "attn.to_k cannot .* not int4 g64, rank 16, int8 activations",
        ),
        (SVDQuantConfig(weight_format="int4", activations="int4", rank=16, rotation=True), "does not rotate"),
        (RTNConfig(bits=8), "Nunchaku has INT4 in groups of 64"),
    ],
)
def test_layers_that_nunchaku_does_not_have_are_refused_by_name(config, message, tmp_path):
    source = export_source(tmp_path, config)
    with pytest.raises(CheckpointError, match=message):
        export_nunchaku(source, tmp_path / "lite")
    assert not (tmp_path / "lite").exists()


def rewritten(source: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of a source folder with other tensors."""
    folder.mkdir()
    (folder / "config.json").write_text((source / "config.json").read_text())
    tensors = load_file(source / "diffusion_pytorch_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    return folder


FAULTS: dict[str, tuple[Callable[[dict], None], str]] = {
    "missing codes' scales": (
        lambda t: t.pop("transformer_blocks.0.qkv_proj.wscales"),
        "lacks tensor transformer_blocks.0.qkv_proj.wscales",
    ),
    "missing layer": (
        lambda t: [t.pop(key) for key in list(t) if key.startswith("transformer_blocks.0.mlp_fc1.")],
        r"lacks tensor transformer_blocks.0.ff.net.0.proj.weight",
    ),
    "missing half": (
        lambda t: [t.pop(key) for key in list(t) if key.startswith("single_transformer_blocks.0.out_proj.")],
        "only a part of single_transformer_blocks.0.proj_out",
    ),
    "missing dense tensor": (lambda t: t.pop("x_embedder.weight"), "lacks tensor x_embedder.weight"),
    "missing branch": (
        lambda t: t.pop("transformer_blocks.0.out_proj.lora_up"),
        "lacks tensor transformer_blocks.0.out_proj.proj_up",
    ),
    "missing bias": (lambda t: t.pop("transformer_blocks.0.out_proj.bias"), "lacks tensor transformer_blocks.0.out_proj.bias"),
    "wrong size": (
        lambda t: t.update({"transformer_blocks.0.qkv_proj.qweight": torch.zeros(256, 64, dtype=torch.int8)}),
        "holds 256 x 128 weights; the model needs 384 x 128",
    ),
    "wrong scales": (
        lambda t: t.update({"transformer_blocks.0.out_proj.wscales": torch.zeros(4, 128, dtype=torch.bfloat16)}),
        r"out_proj.wscales is bfloat16 \[4, 128\], expected shape \[2, 128\]",
    ),
    "unknown precision": (
        lambda t: t.update({"transformer_blocks.0.out_proj.wscales": torch.zeros(2, 128, dtype=torch.float8_e5m2)}),
        "precision this version does not know",
    ),
    "left over": (
        lambda t: t.update({"pulid.weight": torch.zeros(2)}),
        "pulid.weight, which FluxTransformer2DModel has no place for",
    ),
    "left over in a layer": (
        lambda t: t.update({"transformer_blocks.0.out_proj.extra": torch.zeros(2)}),
        "out_proj.extra, which is no part of a layer",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_checkpoint_is_refused_by_name_before_anything_is_written(fault, engine, tmp_path):
    change, message = FAULTS[fault]
    source = rewritten(engine("flux", "int4")[0], tmp_path / "bad", change)
    with pytest.raises(CheckpointError, match=message):
        convert_nunchaku(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("svdq_w4a4", {"precision": "int2"}, "precision 'int2'; known: int4, nvfp4"),
        ("svdq_w4a4", {"precision": "nvfp4", "group_size": 16}, "stored as int4, quantization_config.svdq_w4a4 says nvfp4"),
        ("svdq_w4a4", {"rank": 32}, "with rank 16, quantization_config.svdq_w4a4 says 32"),
        ("svdq_w4a4", {"targets": ["nowhere"]}, "lacks tensor nowhere.qweight|quantizes layer nowhere"),
        ("awq_w4a16", {"group_size": 128}, "group_size 128; int4 has 64"),
    ],
)
def test_a_lite_config_that_says_otherwise_than_the_tensors_is_refused(section, change, message, tmp_path):
    folder, _ = lite_folder(tmp_path / "lite", "int4")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"][section] |= change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        convert_nunchaku(folder, tmp_path / "out")
    with pytest.raises(CheckpointError, match=message):
        load("flux", folder, torch.bfloat16, quantization_config=SVDQuantConfig())
    assert not (tmp_path / "out").exists()


def test_the_config_may_lie_in_the_file_or_be_given(engine, tmp_path):
    source, _ = engine("flux", "int4")
    tensors = load_file(source / "diffusion_pytorch_model.safetensors")
    config = json.loads((source / "config.json").read_text())
    del config["_class_name"]
    metadata = {"config": json.dumps(config), "model_class": "NunchakuFluxTransformer2dModel"}
    save_file(tensors, tmp_path / "with.safetensors", metadata=metadata)
    save_file(tensors, tmp_path / "without.safetensors")
    convert_nunchaku(tmp_path / "with.safetensors", tmp_path / "a")
    with pytest.raises(ConfigError, match="--config"):
        convert_nunchaku(tmp_path / "without.safetensors", tmp_path / "b")
    convert_nunchaku(tmp_path / "without.safetensors", tmp_path / "b", config=source)
    stored = [(tmp_path / name / "diffusion_pytorch_model.safetensors").read_bytes() for name in "ab"]
    assert stored[0] == stored[1]


def test_one_layer_at_a_time_is_in_memory(engine, tmp_path, monkeypatch):
    from qdiff_diffusers.convert import stream

    alive: list[int] = []
    get = stream.Source.get

    def counting(self, name):
        alive.append(name)
        return get(self, name)

    monkeypatch.setattr(stream.Source, "get", counting)
    source, _ = engine("flux", "int4")
    seen = []
    convert_nunchaku(source, tmp_path / "out", advance=lambda done, total, name: seen.append((done, total, len(alive))))
    assert seen[-1][0] == seen[-1][1] == len(seen)
    assert seen[0][2] < 12  # the first tensor was written when only its own layer had been read


def test_a_layout_that_is_not_known_is_refused(engine, tmp_path):
    source, _ = engine("flux", "int4")
    folder = rewritten(source, tmp_path / "other", lambda tensors: None)
    config = json.loads((folder / "config.json").read_text()) | {"_class_name": "DiTTransformer2DModel"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        CheckpointError, match=r"cannot be made from the config|not known here, only those of FluxTransformer2DModel"
    ):
        convert_nunchaku(folder, tmp_path / "out")


def test_the_commands(engine, tmp_path, capsys):
    from qdiff_diffusers.cli import main

    source, _ = engine("qwen", "int4")
    with pytest.raises(SystemExit) as done:
        main(["convert", "nunchaku", str(source), str(tmp_path / "ours")])
    assert done.value.code == 0
    assert "layers at" in capsys.readouterr().out
    with pytest.raises(SystemExit) as refused:
        main(["convert", "to-nunchaku", str(tmp_path / "ours"), str(tmp_path / "lite")])
    assert refused.value.code == 2
    assert "shifted inputs" in capsys.readouterr().err
