"""What ``quantize`` and the command line take as a source: pickles, variants, sources in 8 bits; and what they refuse, and when."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest
import scaled_files
import tiny_models
import torch
from diffusers import DiffusionPipeline, DiTPipeline, DiTTransformer2DModel
from diffusers.schedulers import DDIMScheduler
from safetensors.torch import load_file, save_file

from qdiff_diffusers import (
    AQConfig,
    CheckpointError,
    ConfigError,
    QDiffConfig,
    QDiffError,
    RTNConfig,
    SVDQuantConfig,
    VQConfig,
    inspect_checkpoint,
    quantize,
)
from qdiff_diffusers.cli import main
from qdiff_diffusers.model.packing import packed_layers

DIT = DiTTransformer2DModel
WEIGHTS = "diffusion_pytorch_model"
FEW = {"samples": 1, "steps": 1}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def pipeline(transformer=None) -> DiTPipeline:
    return DiTPipeline(transformer or tiny_models.make("dit"), tiny_models.make("vae"), DDIMScheduler(), id2label={0: "a"})


@pytest.fixture(scope="session")
def dense(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dense") / "pipeline"
    pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def packed(dense, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("packed") / "pipeline"
    quantize(dense, RTNConfig(bits=8), folder)
    return folder


def cli(*arguments: object) -> int:
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    return int(end.value.code or 0)


@pytest.fixture
def nothing_is_loaded(monkeypatch):
    for kind in (DiffusionPipeline, DIT):
        monkeypatch.setattr(kind, "from_pretrained", lambda *_, **__: pytest.fail("something was loaded"))


OTHER_BACKENDS = {
    "bitsandbytes at 4 bits": {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False},
    "quanto, weights_dtype int8": {"quant_method": "quanto", "weights_dtype": "int8"},
    "torchao": {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnlyConfig"}}},
    "sdnq, weights_dtype uint4": {"quant_method": "sdnq", "weights_dtype": "uint4"},
    "gguf": {"quant_method": "gguf"},
    "nunchaku_lite, precision int4": {"quant_method": "nunchaku_lite", "precision": "int4"},
    "modelopt, quant_type FP8": {"quant_method": "modelopt", "quant_type": "FP8"},
    "auto-round at 2 bits": {"quant_method": "auto-round", "bits": 2},
    "made_up": {"quant_method": "made_up"},
}


def marked(source: Path, folder: Path, quantization: dict) -> Path:
    """A copy of a pipeline whose transformer's config says that it is quantized."""
    shutil.copytree(source, folder)
    path = folder / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": quantization}))
    return folder


@pytest.mark.parametrize("calibration", [None, FEW], ids=["by weights", "calibrated"])
@pytest.mark.parametrize("part", ["", "transformer"], ids=["pipeline", "model"])
@pytest.mark.parametrize("what", OTHER_BACKENDS)
def test_a_folder_of_another_backend_is_refused_before_it_is_loaded(what, part, calibration, dense, tmp_path, nothing_is_loaded):
    source = marked(dense, tmp_path / "source", OTHER_BACKENDS[what]) / part
    with pytest.raises(ConfigError, match=rf"is quantized already \({what}.*full-precision model"):
        quantize(source, RTNConfig(bits=4), tmp_path / "out", calibration=calibration)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "config", [RTNConfig(bits=4), AQConfig(bits=2), VQConfig(bits=2), SVDQuantConfig(bits=4)], ids=lambda c: c.method
)
@pytest.mark.parametrize("part", ["", "transformer"], ids=["pipeline", "model"])
def test_what_is_packed_is_not_packed_again(part, config, packed, tmp_path, nothing_is_loaded):
    with pytest.raises(ConfigError, match=r"quantized already \(rtn at 8 bits.*, by qdiff\)"):
        quantize(packed / part, config, tmp_path / "out")


def test_the_base_model_is_named_if_it_is_known(packed, tmp_path):
    stored = json.loads((packed / "transformer" / "config.json").read_text())["quantization_config"]
    source = marked(packed, tmp_path / "source", stored | {"provenance": {"base_model": "someone/model"}})
    with pytest.raises(ConfigError, match=r"full-precision model, someone/model"):
        quantize(source, RTNConfig(bits=4), tmp_path / "out")


def test_the_command_line_refuses_it_with_one_line(packed, tmp_path, capsys):
    assert cli("quantize", packed, "-m", "aq", "-b", "2", "-o", tmp_path / "out") == 2
    assert "quantized already (rtn at 8 bits" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_another_component_may_be_quantized_later(packed, tmp_path):
    out = quantize(packed, RTNConfig(bits=8, keep_outer_layers=False), tmp_path / "out", components="vae")
    pipe = DiffusionPipeline.from_pretrained(out)
    assert packed_layers(pipe.vae) and packed_layers(pipe.transformer)


def test_a_pipeline_in_memory_is_not_quantized_twice(packed):
    pipe = DiffusionPipeline.from_pretrained(packed)
    with pytest.raises(ConfigError, match=r"transformer is quantized already \(rtn at 8 bits"):
        quantize(pipe, AQConfig(bits=2))
    with pytest.raises(ConfigError, match=r"this DiTTransformer2DModel is quantized already"):
        quantize(pipe.transformer, AQConfig(bits=2))


def passed(folder: Path, config: QDiffConfig) -> list[str]:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        DIT.from_pretrained(folder / "transformer", quantization_config=config)
    return [str(w.message) for w in seen if "quantization_config" in str(w.message)]


def test_another_config_for_a_quantized_folder_is_ignored_with_a_warning_that_names_both(packed):
    (message,) = passed(packed, AQConfig(bits=2))
    assert "is used as it is stored: rtn at 8 bits" in message and "aq at 2 bits, by qdiff, is ignored" in message


def test_the_same_config_goes_without_a_word(packed):
    assert not passed(packed, RTNConfig(bits=8))
    assert not passed(packed, inspect_checkpoint(packed).config)


@pytest.mark.parametrize("what", [name for name in OTHER_BACKENDS if name != "nunchaku_lite, precision int4"])
def test_our_config_for_another_backends_folder_is_refused(what, dense, tmp_path):
    source = marked(dense, tmp_path / "source", OTHER_BACKENDS[what]) / "transformer"
    with pytest.raises(ConfigError, match=rf"is quantized already \({what}"):
        DIT.from_pretrained(source, quantization_config=RTNConfig(bits=4))


def test_a_model_without_its_weights_is_refused_by_name():
    with torch.device("meta"):
        model = tiny_models.dit()
    with pytest.raises(ConfigError, match="is on the meta device"):
        quantize(model, RTNConfig(bits=4))
    with pytest.raises(ConfigError, match=r"of transformer is on the meta device"):
        quantize(pipeline(model), RTNConfig(bits=4))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("config", [RTNConfig(bits=8), SVDQuantConfig(bits=8, rank=4)], ids=str)
def test_a_model_with_an_adapter_is_refused_until_it_is_taken_out(config, fused, tmp_path):
    """Saved, its layers would have the names that they have under the adapter, which nothing could load."""
    peft = pytest.importorskip("peft")
    model = tiny_models.make("flux")
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["to_q"], init_lora_weights=False))
    if fused:
        model.fuse_lora()
    expected = tiny_models.run(model, "flux")
    with pytest.raises(ConfigError, match=r"transformer_blocks\.0\.attn\.to_q of this FluxTransformer2DModel has an adapter"):
        quantize(model, config, tmp_path / "out")
    assert torch.equal(tiny_models.run(model, "flux"), expected)
    assert not (tmp_path / "out").exists()
    if not fused:
        model.fuse_lora()
    model.unload_lora()
    quantize(model, config, tmp_path / "out")
    loaded = type(model).from_pretrained(tmp_path / "out", torch_dtype=torch.float32)
    assert (tiny_models.run(loaded, "flux") - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("config", [{"method": "rtn", "bits": 4}, "rtn", None, RTNConfig])
def test_what_is_no_config_is_refused_by_name(config, tmp_path):
    with pytest.raises(ConfigError, match="config must be a qdiff config"):
        quantize(tmp_path, config, tmp_path / "out")


@pytest.mark.parametrize("source", [None, DIT, {}, [], torch.nn.Linear(64, 64), DiTPipeline, 5], ids=str)
def test_what_is_no_source_is_refused_by_name(source):
    with pytest.raises(ConfigError, match="source must be a folder, a Hub name, or a model or pipeline"):
        quantize(source, RTNConfig(bits=4))


def test_a_dtype_in_words_is_refused_and_not_taken_for_float32(dense, tmp_path, nothing_is_loaded):
    with pytest.raises(ConfigError, match=r"dtype must be a torch\.dtype .*'bfloat16'"):
        quantize(dense, RTNConfig(bits=4), tmp_path / "out", dtype="bfloat16")


def test_weights_that_another_package_packed_are_refused_by_name():
    model = tiny_models.make("dit")
    layer = model.transformer_blocks[0].attn1.to_q
    layer.weight = torch.nn.Parameter(torch.ones(32, 32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ConfigError, match=r"transformer_blocks\.0\.attn1\.to_q\.weight of .* is a torch\.int8"):
        quantize(model, RTNConfig(bits=4))


def test_a_component_may_be_given_by_its_name_alone(dense, tmp_path):
    out = quantize(dense, RTNConfig(bits=4), tmp_path / "out", components="transformer")
    assert packed_layers(DiffusionPipeline.from_pretrained(out).transformer)
    with pytest.raises(ConfigError, match=r"has no component unet; it has"):
        quantize(dense, RTNConfig(bits=4), tmp_path / "other", components="unet")


@pytest.mark.parametrize("loaded", [False, True], ids=["folder", "in memory"])
def test_a_component_without_weights_is_refused(loaded, dense, tmp_path):
    source = pipeline() if loaded else dense
    with pytest.raises(ConfigError, match=r"has no component scheduler; it has (transformer, vae|vae, transformer)$"):
        quantize(source, RTNConfig(bits=4), tmp_path / "out", components=["scheduler"])


@pytest.mark.parametrize("calibration", [None, FEW], ids=["by weights", "calibrated"])
def test_settings_that_leave_every_layer_as_it_is_write_nothing(calibration, dense, tmp_path):
    calibration = calibration and calibration | {"hessian": False}
    with pytest.raises(ConfigError, match="no layer of transformer is quantized"):
        quantize(dense, RTNConfig(bits=4, modules_to_not_convert=["transformer_blocks"]), tmp_path / "out", calibration=calibration)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("where", ["transformer", "vae"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
def test_a_model_that_holds_nan_is_not_written(where, bad, dense, tmp_path, capsys):
    source = tmp_path / "source"
    shutil.copytree(dense, source)
    file = source / where / f"{WEIGHTS}.safetensors"
    tensors = load_file(file)
    name = next(key for key in tensors if key.endswith("bias"))
    tensors[name][0] = bad
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(QDiffError, match=f"{where}: {name} holds NaN or infinity"):
        quantize(source, RTNConfig(bits=4), tmp_path / "out")
    assert cli("quantize", source, "-m", "rtn", "-b", "4", "-o", tmp_path / "out") == 2
    assert f"{name} holds NaN" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def stored_in_8_bits(source: Path, folder: Path, component: str, scheme: str) -> Path:
    shutil.copytree(source, folder)
    file = folder / component / f"{WEIGHTS}.safetensors"
    tensors, _ = scaled_files.store(load_file(file), scheme)
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("scheme", ["comfy_scaled", "bitsandbytes", "plain_float8"])
def test_scales_are_applied_by_the_command_line_too(scheme, dense, tmp_path):
    source = stored_in_8_bits(dense, tmp_path / "source", "transformer", scheme)
    assert cli("quantize", source, "-m", "rtn", "-b", "8", "-o", tmp_path / "out") == 0
    model = DIT.from_pretrained(tmp_path / "out" / "transformer")
    expected = DIT.from_pretrained(dense / "transformer")
    for name, layer in packed_layers(model).items():
        weight = expected.get_submodule(name).weight
        assert (layer.dequantize(torch.float32) - weight).norm() < 0.1 * weight.norm(), name


def test_a_component_whose_scales_nobody_would_apply_is_refused(dense, tmp_path, nothing_is_loaded):
    source = stored_in_8_bits(dense, tmp_path / "vae", "vae", "comfy_scaled")
    with pytest.raises(ConfigError, match=r"in 8 bits with scales.*quantize vae too"):
        quantize(source, RTNConfig(bits=4), tmp_path / "out")
    source = stored_in_8_bits(dense, tmp_path / "transformer", "transformer", "row_scale")
    for part in ("", "transformer"):
        with pytest.raises(ConfigError, match=r"in 8 bits with scales.*without calibration"):
            quantize(source / part, RTNConfig(bits=4), tmp_path / "out", calibration=FEW)


def test_of_another_component_nothing_foreign_is_copied(dense, tmp_path, nothing_is_loaded):
    source = tmp_path / "source"
    shutil.copytree(dense, source)
    file = source / "vae" / f"{WEIGHTS}.safetensors"
    tensors = load_file(file)
    tensors["decoder.conv_in.weight"] = torch.ones(4, 4, dtype=torch.int8)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"decoder\.conv_in\.weight are in int8 numbers"):
        quantize(source, RTNConfig(bits=4), tmp_path / "out")


@pytest.fixture(scope="session")
def pickles(dense, tmp_path_factory) -> Path:
    """The same pipeline, but its weights are pickles; of its transformer there is a variant in safetensors beside."""
    folder = tmp_path_factory.mktemp("pickles") / "pipeline"
    shutil.copytree(dense, folder)
    for part in ("transformer", "vae"):
        file = folder / part / f"{WEIGHTS}.safetensors"
        torch.save(load_file(file), file.with_suffix(".bin"))
        file.unlink()
    half = {key: 2 * t.half() for key, t in load_file(dense / "transformer" / f"{WEIGHTS}.safetensors").items()}
    save_file(half, folder / "transformer" / f"{WEIGHTS}.fp16.safetensors", metadata={"format": "pt"})
    return folder


def weight_of(folder: Path) -> torch.Tensor:
    pipe = DiffusionPipeline.from_pretrained(folder)
    return packed_layers(pipe.transformer)["transformer_blocks.0.attn1.to_q"].dequantize(torch.float32)


def test_pickles_are_read_where_there_is_nothing_else_and_on_demand(dense, pickles, tmp_path):
    expected = weight_of(quantize(dense, RTNConfig(bits=4), tmp_path / "expected"))
    assert torch.equal(weight_of(quantize(pickles, RTNConfig(bits=4), tmp_path / "a")), expected)
    assert torch.equal(weight_of(quantize(pickles, RTNConfig(bits=4), tmp_path / "b", use_safetensors=False)), expected)
    assert cli("quantize", pickles, "-m", "rtn", "-b", "4", "--no-safetensors", "-o", tmp_path / "c") == 0
    assert torch.equal(weight_of(tmp_path / "c"), expected)
    assert not list((tmp_path / "b").rglob("*.bin"))


def test_pickles_are_not_read_where_only_safetensors_are_wanted(pickles, tmp_path):
    with pytest.raises(OSError, match="safetensors"):
        quantize(pickles / "transformer", RTNConfig(bits=4), tmp_path / "out", use_safetensors=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("part", ["", "transformer"], ids=["pipeline", "model"])
def test_a_variant_of_the_source_is_read(part, dense, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(dense, source)
    for name in ("transformer", "vae"):
        file = source / name / f"{WEIGHTS}.safetensors"
        save_file(
            {key: 2 * t for key, t in load_file(file).items()}, file.with_name(f"{WEIGHTS}.fp16.safetensors"), {"format": "pt"}
        )
    out = quantize(source / part, RTNConfig(bits=4), tmp_path / "out", variant="fp16")
    layers = packed_layers(DIT.from_pretrained(out / "" if part else out / "transformer"))
    weight = load_file(dense / "transformer" / f"{WEIGHTS}.safetensors")["transformer_blocks.0.attn1.to_q.weight"]
    error = layers["transformer_blocks.0.attn1.to_q"].dequantize(torch.float32) - 2 * weight
    assert error.norm() < 0.2 * (2 * weight).norm()


def test_how_to_read_files_is_refused_for_what_is_loaded():
    with pytest.raises(ConfigError, match="variant say how to read files"):
        quantize(pipeline(), RTNConfig(bits=4), variant="fp16")


@pytest.mark.parametrize("how", [{"safe_serialization": False}, {"use_flashpack": True}], ids=str)
@pytest.mark.parametrize("method", ["aq", "vq", "fp", "svdquant", "rtn"])
def test_a_quantized_model_is_not_written_as_what_cannot_be_read(method, how, dense, tmp_path):
    config = QDiffConfig(method=method, bits=4)
    model = DIT.from_pretrained(dense / "transformer", quantization_config=config)
    with pytest.raises(ConfigError, match=f"{next(iter(how))}=.*would write what cannot be loaded"):
        model.save_pretrained(tmp_path / "model", **how)
    if "use_flashpack" not in how:
        with pytest.raises(ConfigError, match=r"component 'transformer' is quantized.*safe_serialization=False"):
            pipeline(model).save_pretrained(tmp_path / "pipe", **how)
        with pytest.raises(ConfigError, match="safe_serialization=False"):
            pipeline(model).save_pretrained(tmp_path / "pipe", False)
    assert not list(tmp_path.iterdir())


def test_dense_models_are_still_written_as_pickles(dense, tmp_path):
    model = DIT.from_pretrained(dense / "transformer")
    model.save_pretrained(tmp_path / "dense", safe_serialization=False)
    packed = DIT.from_pretrained(dense / "transformer", quantization_config=RTNConfig(bits=4))
    packed.dequantize()
    packed.save_pretrained(tmp_path / "again", safe_serialization=False)
    assert all((tmp_path / name / f"{WEIGHTS}.bin").is_file() for name in ("dense", "again"))


def test_an_index_left_from_an_earlier_save_is_said_to_be_that(packed, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(packed / "transformer", folder)
    index = {"metadata": {"total_size": 1}, "weight_map": {"a": f"{WEIGHTS}-00001-of-00002.safetensors"}}
    (folder / f"{WEIGHTS}.safetensors.index.json").write_text(json.dumps(index))
    for read in (inspect_checkpoint, DIT.from_pretrained):
        with pytest.raises(CheckpointError, match=r"instead of diffusion_pytorch_model\.safetensors.*delete the index"):
            read(folder)
    (folder / f"{WEIGHTS}.safetensors").unlink()
    with pytest.raises(CheckpointError, match="incomplete"):
        inspect_checkpoint(folder)


@pytest.mark.parametrize("quant_method", [{}, {"quant_method": "qdiff"}], ids=["settings", "with quant_method"])
def test_a_users_settings_are_not_taken_for_a_checkpoint(quant_method, dense):
    assert QDiffConfig.from_dict({"method": "aq", "bits": 2} | quant_method).settings() == {"method": "aq", "bits": 2}
    for wrong, message in (({"method": "aq", "colour": 1}, "AQConfig has no setting colour"), ({"method": "q"}, "got 'q'")):
        with pytest.raises(ConfigError, match=message):
            QDiffConfig.from_dict(wrong | quant_method)
    settings = {"method": "rtn", "bits": 4, "quant_method": "qdiff"}
    assert packed_layers(DIT.from_pretrained(dense / "transformer", quantization_config=settings))


def test_an_output_that_is_no_path_is_refused(tmp_path, nothing_is_loaded):
    with pytest.raises(ConfigError, match="output_dir must be the path of a folder, got 5"):
        quantize(tmp_path, RTNConfig(bits=4), output_dir=5)
