"""Text encoders whose weights are stored in 8 bits: scales are applied, also to what stays dense, or the source is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import scaled_files
import test_text_encoders as encoders
import torch
from safetensors.torch import load_file, save_file

from qdiff_diffusers import CheckpointError, ConfigError, QDiffError, RTNConfig

WEIGHTS = "model.safetensors"
RTN = encoders.METHODS["rtn"]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """``folder(name)``: where the encoder lies, saved in float32."""
    root = tmp_path_factory.mktemp("encoders")

    def save(name: str) -> Path:
        if not (root / name).is_dir():
            torch.manual_seed(0)
            encoders.ENCODERS[name]().save_pretrained(root / name)
        return root / name

    return save


def written(target: Path, source: Path, tensors: dict[str, torch.Tensor]) -> Path:
    target.mkdir()
    shutil.copy(source / "config.json", target)
    save_file(tensors, target / WEIGHTS, metadata={"format": "pt"})
    return target


def stored(name: str, scheme: str, folder: Path, tmp_path: Path) -> tuple[Path, Path]:
    """The encoder in 8 bits, and what it stands for in float32."""
    file, values = scaled_files.store(load_file(folder / WEIGHTS), scheme)
    return written(tmp_path / "scaled", folder, file), written(tmp_path / "plain", folder, values)


def assert_same(a: torch.nn.Module, b: torch.nn.Module) -> None:
    left, right = a.state_dict(), b.state_dict()
    assert left.keys() == right.keys()
    for key in left:
        assert left[key].dtype == right[key].dtype, key
        assert torch.equal(left[key].float(), right[key].float()), key
    assert torch.equal(encoders.encode(a), encoders.encode(b))


@pytest.mark.parametrize("scheme", scaled_files.SCHEMES)
@pytest.mark.parametrize("name", ["clip", "t5", "qwen2_5_vl"])
def test_scales_are_applied_to_every_layer(name, scheme, folder, tmp_path):
    """Also to embeddings, which stay dense, and under the names that transformers gives modules in files."""
    scaled, plain = stored(name, scheme, folder(name), tmp_path)
    models = [encoders.load(name, f, RTN(), dtype=torch.bfloat16) for f in (scaled, plain)]
    assert len(encoders.packed(models[0])) >= 10
    assert_same(*models)


@pytest.mark.parametrize("method", [name for name in encoders.METHODS if name != "svdquant"])
def test_every_method_quantizes_what_the_scales_give(method, folder, tmp_path):
    scaled, plain = stored("t5", "comfy_scaled", folder("t5"), tmp_path)
    assert_same(*(encoders.load("t5", f, encoders.METHODS[method](), dtype=torch.float32) for f in (scaled, plain)))


@pytest.mark.parametrize("scheme", ["comfy_scaled", "bitsandbytes", "plain_float8"])
def test_a_packed_token_table_has_its_scale_too(scheme, folder, tmp_path):
    scaled, plain = stored("t5", scheme, folder("t5"), tmp_path)
    config = RTNConfig(bits=4, group_size=16, overrides={"shared": RTNConfig(bits=8, group_size=16)})
    assert_same(*(encoders.load("t5", f, config, dtype=torch.float32) for f in (scaled, plain)))


def test_pickles_have_scales_as_well(folder, tmp_path):
    scaled, plain = stored("clip", "row_scale", folder("clip"), tmp_path)
    torch.save(load_file(scaled / WEIGHTS), scaled / "pytorch_model.bin")
    (scaled / WEIGHTS).unlink()
    models = [
        encoders.load("clip", f, RTN(), dtype=torch.float32, **k) for f, k in ((scaled, {"use_safetensors": False}), (plain, {}))
    ]
    assert_same(*models)


def test_shards_have_their_scales(folder, tmp_path):
    scaled, plain = stored("t5", "weight_scale", folder("t5"), tmp_path)
    tensors = load_file(scaled / WEIGHTS)
    (scaled / WEIGHTS).unlink()
    parts = {"model-00001-of-00002.safetensors": {k: t for k, t in tensors.items() if k.endswith("_scale")}}
    parts["model-00002-of-00002.safetensors"] = {k: t for k, t in tensors.items() if not k.endswith("_scale")}
    for name, part in parts.items():
        save_file(part, scaled / name, metadata={"format": "pt"})
    places = {key: name for name, part in parts.items() for key in part}
    (scaled / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    assert_same(*(encoders.load("t5", f, RTN(), dtype=torch.float32) for f in (scaled, plain)))


LAYER = "encoder.block.0.layer.0.SelfAttention.q"
REFUSED = {
    "int8": ({f"{LAYER}.weight": torch.ones(32, 32, dtype=torch.int8)}, "int8 numbers"),
    "bool": ({f"{LAYER}.weight": torch.ones(32, 32, dtype=torch.bool)}, "bool numbers"),
    "4-bit": ({f"{LAYER}.weight.absmax": torch.ones(16), f"{LAYER}.weight.quant_map": torch.ones(16)}, "bitsandbytes' 4-bit"),
    "GPTQ": ({f"{LAYER}.qweight": torch.ones(4, 32, dtype=torch.int32)}, "GPTQ's or AWQ's"),
    "zero points": (
        {
            f"{LAYER}.weight": torch.ones(32, 32, dtype=torch.int8),
            f"{LAYER}.weight_scale": torch.ones(32),
            f"{LAYER}.weight_zero_point": torch.ones(32, dtype=torch.int8),
        },
        "weight_zero_point",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_refused_by_name(case, folder, tmp_path):
    change, message = REFUSED[case]
    source = written(tmp_path / "source", folder("t5"), load_file(folder("t5") / WEIGHTS) | change)
    with pytest.raises(CheckpointError, match=message):
        encoders.load("t5", source, RTN())


def test_a_weight_that_is_not_finite_is_our_error_that_names_the_layer(folder, tmp_path):
    tensors = load_file(folder("t5") / WEIGHTS)
    tensors[f"{LAYER}.weight"][0, 0] = float("nan")
    with pytest.raises(QDiffError, match=rf"layer {LAYER} .*NaN or infinity"):
        encoders.load("t5", written(tmp_path / "source", folder("t5"), tensors), RTN())


OTHERS = [{"quant_method": "bitsandbytes", "load_in_8bit": True}, {"quant_method": "gptq", "bits": 4}]


@pytest.mark.parametrize("quantization", OTHERS, ids=lambda config: config["quant_method"])
def test_our_config_for_another_backends_encoder_is_refused(quantization, folder, tmp_path):
    source = written(tmp_path / "source", folder("t5"), load_file(folder("t5") / WEIGHTS))
    settings = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(settings | {"quantization_config": quantization}))
    with pytest.raises(ConfigError, match=rf"is quantized already \({quantization['quant_method']} at [84] bits\)"):
        encoders.load("t5", source, RTN())


@pytest.mark.parametrize("method", encoders.METHODS)
def test_another_config_for_a_quantized_encoder_is_ignored_with_a_warning(method, folder, tmp_path):
    encoders.load("t5", folder("t5"), RTN()).save_pretrained(tmp_path)
    if method == "rtn":
        model = encoders.load("t5", tmp_path, RTN())
    else:
        with pytest.warns(UserWarning, match=rf"rtn at 4 bits.*{method}.*is ignored"):
            model = encoders.load("t5", tmp_path, encoders.METHODS[method]())
    assert_same(model, encoders.load("t5", tmp_path))


def test_a_quantized_encoder_is_not_written_as_pickles(folder, tmp_path):
    model = encoders.load("t5", folder("t5"), RTN())
    with pytest.raises(ConfigError, match="safe_serialization=False"):
        model.save_pretrained(tmp_path / "out", safe_serialization=False)
    assert not (tmp_path / "out").exists()
