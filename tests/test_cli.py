"""The command line: what it prints, and that a mistake costs one clear line and exit code 2."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, DiTTransformer2DModel

from qdiff_diffusers import __version__
from qdiff_diffusers.cli import main
from qdiff_diffusers.evaluation import demo as demo_module
from qdiff_diffusers.evaluation.demo import DEMO_MODEL
from qdiff_diffusers.layers import PackedLayer


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory) -> Path:
    """A transformer so small that it quantizes at once."""
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=32, in_channels=1, num_layers=1, sample_size=8, num_embeds_ada_norm=4
    )
    folder = tmp_path_factory.mktemp("tiny") / "model"
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def quantized(tiny_model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("quantized") / "model"
    with pytest.raises(SystemExit) as end:
        main(["quantize", str(tiny_model), "-o", str(folder), "--method", "rtn", "--bits", "4", "--skip", "attn1"])
    assert end.value.code == 0
    return folder


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    return end.value.code


def fails(capsys, *arguments: object) -> str:
    """Run a command that must fail; the one line it prints on stderr."""
    capsys.readouterr()
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("qdiff: ")]
    assert len(lines) == 1 and "Traceback" not in captured.err
    return lines[0]


class TestMistakes:
    def test_unknown_command(self, capsys):
        assert "bogus" in fails(capsys, "bogus")

    def test_unknown_option(self, capsys):
        assert "--frobnicate" in fails(capsys, "demo", "--frobnicate")

    def test_missing_argument(self, capsys):
        assert "source" in fails(capsys, "quantize").lower()

    def test_a_number_that_is_none(self, capsys):
        assert "--images" in fails(capsys, "demo", "--images", "many")

    def test_no_images(self, capsys):
        assert "--images" in fails(capsys, "demo", "--images", "0")

    def test_unknown_method(self, capsys, tmp_path):
        line = fails(capsys, "quantize", DEMO_MODEL, "-o", tmp_path / "out", "--method", "gptq")
        assert "gptq" in line and "svdquant" in line
        assert "gptq" in fails(capsys, "demo", "-o", tmp_path / "out", "--only", "gptq")
        assert not (tmp_path / "out").exists()

    def test_bits_that_a_method_does_not_offer(self, capsys, tmp_path):
        assert "7" in fails(capsys, "quantize", DEMO_MODEL, "-o", tmp_path / "out", "--method", "aq", "--bits", "7")

    def test_an_option_of_another_method(self, capsys, tmp_path):
        line = fails(capsys, "quantize", DEMO_MODEL, "-o", tmp_path / "out", "--method", "aq", "--rank", "8")
        assert "--rank does not go with --method aq" in line

    def test_what_needs_a_calibration(self, capsys, tmp_path):
        for options in (["-m", "svdquant", "--smoothing"], ["-m", "rtn", "--activations", "int8", "--activation-scales", "static"]):
            line = fails(capsys, "quantize", DEMO_MODEL, "-o", tmp_path / "out", *options)
            assert "are found on the layers' inputs" in line and "--calibrate" in line
        assert not (tmp_path / "out").exists()

    def test_unknown_dtype_and_device(self, capsys, tmp_path):
        assert "int3" in fails(capsys, "quantize", DEMO_MODEL, "-o", tmp_path / "out", "--dtype", "int3")
        assert "warp" in fails(capsys, "demo", "-o", tmp_path / "out", "--device", "warp")

    def test_nothing_there(self, capsys, tmp_path):
        for command in (["quantize", tmp_path / "none", "-o", tmp_path / "out"], ["inspect", tmp_path / "none"]):
            assert "none" in fails(capsys, *command)

    def test_a_folder_without_a_model(self, capsys, tmp_path):
        assert "model_index.json" in fails(capsys, "quantize", tmp_path, "-o", tmp_path / "out")
        assert "no qdiff checkpoint" in fails(capsys, "inspect", tmp_path)

    def test_a_file_instead_of_a_folder(self, capsys, tmp_path):
        file = tmp_path / "model.safetensors"
        file.write_bytes(b"")
        assert "is a file" in fails(capsys, "quantize", file, "-o", tmp_path / "out")

    def test_a_model_that_is_not_quantized(self, capsys, tiny_model):
        assert "no qdiff checkpoint" in fails(capsys, "inspect", tiny_model)

    def test_a_component_that_is_not_there(self, capsys, tmp_path, tiny_model):
        line = fails(capsys, "quantize", DEMO_MODEL, "-o", tmp_path / "out", "--component", "text_encoder")
        assert "text_encoder" in line and "transformer" in line
        assert "single model" in fails(capsys, "quantize", tiny_model, "-o", tmp_path / "out", "--component", "unet")

    def test_an_output_folder_in_use(self, capsys, tmp_path, tiny_model):
        (tmp_path / "precious.txt").write_text("x")
        assert "not empty" in fails(capsys, "quantize", tiny_model, "-o", tmp_path, "--method", "rtn")
        assert "holds no saved model" in fails(capsys, "quantize", tiny_model, "-o", tmp_path, "--method", "rtn", "--overwrite")
        assert (tmp_path / "precious.txt").read_text() == "x"

    def test_a_folder_that_cannot_be_pushed(self, capsys, tiny_model, tmp_path):
        assert "no qdiff checkpoint" in fails(capsys, "push", tiny_model, "owner/name")
        assert "cannot be a name" in fails(capsys, "push", tiny_model, "a/b/c")
        assert "cannot be a name" in fails(capsys, "quantize", tiny_model, "-o", tmp_path / "out", "--push", "a/b/c")
        assert not (tmp_path / "out").exists()

    def test_a_truncated_checkpoint(self, capsys, quantized, tmp_path):
        broken = tmp_path / "broken"
        broken.mkdir()
        (broken / "config.json").write_text((quantized / "config.json").read_text())
        name = "diffusion_pytorch_model.safetensors"
        (broken / name).write_bytes((quantized / name).read_bytes()[:-100])
        assert "truncated" in fails(capsys, "inspect", broken)


class TestCommands:
    def test_version(self, capsys):
        assert run("--version") == 0
        assert __version__ in capsys.readouterr().out

    def test_help_is_shown_without_a_command(self, capsys):
        assert run() == 0
        out = capsys.readouterr().out
        assert all(command in out for command in ("demo", "quantize", "inspect", "push", "doctor"))

    def test_quantize_writes_what_from_pretrained_loads(self, quantized):
        model = DiTTransformer2DModel.from_pretrained(quantized)
        assert model.is_quantized and model.dtype == torch.bfloat16
        assert not [p for p in quantized.parent.iterdir() if p != quantized]  # no workspace left behind

    def test_quantize_replaces_a_model_when_asked(self, tiny_model, quantized, tmp_path):
        folder = tmp_path / "model"
        assert run("quantize", tiny_model, "-o", folder, "--method", "rtn", "--bits", "8") == 0
        before = (folder / "config.json").read_text()
        assert run("quantize", tiny_model, "-o", folder, "--method", "rtn", "--bits", "2", "--overwrite") == 0
        assert json.loads((folder / "config.json").read_text())["quantization_config"]["bits"] == 2
        assert before != (folder / "config.json").read_text()

    def test_quantize_takes_a_whole_pipeline(self, tmp_path):
        folder = tmp_path / "deep" / "out"
        assert run("quantize", DEMO_MODEL, "-o", folder, "-m", "rtn", "-b", "4", "--skip", "ff", "--dtype", "float16") == 0
        pipe = DiffusionPipeline.from_pretrained(folder)
        assert pipe.transformer.is_quantized and type(pipe).__name__ == "DiTPipeline"

    def test_inspect_lists_layers_and_totals(self, quantized, capsys):
        assert run("inspect", quantized) == 0
        out = capsys.readouterr().out
        assert "transformer_blocks.0.ff.net.0.proj" in out and "attn1" not in out
        assert "rtn" in out and "4.50" in out and "packed layers" in out

    def test_inspect_counts_zeros_on_request(self, tiny_model, tmp_path, capsys):
        folder = tmp_path / "fp"
        assert run("quantize", tiny_model, "-o", folder, "--method", "fp", "--weight-format", "e2m0") == 0
        layers = [m for m in DiTTransformer2DModel.from_pretrained(folder).modules() if isinstance(m, PackedLayer)]
        zeros = sum(int((layer.dequantize(torch.float32) == 0).sum()) for layer in layers)
        share = zeros / sum(layer.dequantize().numel() for layer in layers)
        assert 0.05 < share < 0.5
        assert run("inspect", folder, "--sparsity") == 0
        assert f"sparsity: {share:.2%} of the packed weights" in capsys.readouterr().out

    def test_inspect_finds_the_component_of_a_pipeline(self, quantized, tmp_path, capsys):
        (tmp_path / "transformer").symlink_to(quantized)
        assert run("inspect", tmp_path) == 0
        assert "packed layers" in capsys.readouterr().out

    def test_doctor_fits_a_terminal_of_a_hundred_columns(self, capsys):
        assert run("doctor") == 0
        out = capsys.readouterr().out
        assert all(word in out for word in ("torch", "triton", "cpu", "codebook_linear", "registered", "nothing imported"))
        assert max(map(len, out.splitlines())) <= 100

    def test_demo_prints_a_summary_and_the_paths(self, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr(demo_module, "DEMO_CONFIGS", tuple(c for c in demo_module.DEMO_CONFIGS if c.bits == 4))
        monkeypatch.setattr("qdiff_diffusers.cli.demo.MAX_WORKERS", 1)
        assert run("demo", "-o", tmp_path, "--images", "1", "--only", "rtn", "--device", "cpu") == 0
        out = capsys.readouterr().out
        assert "Round-to-nearest 4-bit" in out and "16-bit" in out
        for name in ("grid.png", "report.html", "results.json"):
            assert str(tmp_path / name) in out and (tmp_path / name).is_file()
