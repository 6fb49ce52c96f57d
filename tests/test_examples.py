"""The programs in examples/ that users copy from, each run on a tiny model."""

from __future__ import annotations

import http.server
import importlib.util
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import ModuleType

import pytest
import tiny_models
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, FlowMatchEulerDiscreteScheduler, FluxPipeline
from PIL import Image

from qdiff_diffusers import RTNConfig, inspect_checkpoint, quantize

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
EXAMPLES = Path(__file__).parents[1] / "examples"
SIZE = ["--size", "16", "--steps", "2"]


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def vae(**settings) -> AutoencoderKL:
    blocks = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
    return AutoencoderKL(block_out_channels=(32,), norm_num_groups=8, **blocks, **settings)


@pytest.fixture(scope="module")
def flux(tmp_path_factory) -> Path:
    """A whole tiny Flux pipeline, tokenizers included."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("examples") / "flux"
    sizes = {"vocab_size": 8, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    clip = transformers.CLIPTextConfig(**sizes, max_position_embeddings=16, bos_token_id=0, eos_token_id=1, pad_token_id=1)
    t5 = transformers.T5Config(vocab_size=8, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2)
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -1.0), ("a", -2.0)]
    words = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2, "a": 3}
    FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae(latent_channels=1, shift_factor=0.0),
        text_encoder=transformers.CLIPTextModel(clip),
        tokenizer=transformers.CLIPTokenizer(vocab=words, merges=[], model_max_length=16),
        text_encoder_2=transformers.T5EncoderModel(t5),
        tokenizer_2=transformers.T5TokenizerFast(vocab=pieces, model_max_length=16),
        transformer=tiny_models.make("flux"),
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dit(tmp_path_factory) -> Path:
    """A tiny class-conditional pipeline."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("examples") / "dit"
    DiTPipeline(tiny_models.make("dit"), vae(), DDIMScheduler(), {0: "shirt", 1: "shoe"}).save_pretrained(folder)
    return folder


def pixels(path: Path) -> bytes:
    return Image.open(path).convert("RGB").tobytes()


def test_flux_is_quantized_once_and_draws(flux, tmp_path, capsys):
    program, folder, picture = example("quantize_flux"), tmp_path / "small", tmp_path / "flux.png"
    program.main([str(folder), "--source", str(flux)])
    assert "transformer: " in capsys.readouterr().out
    before = (folder / "transformer" / "config.json").stat().st_mtime_ns
    program.main([str(folder), "--source", "no/such/model", "--prompt", "a", "--output", str(picture), *SIZE])
    assert (folder / "transformer" / "config.json").stat().st_mtime_ns == before
    assert Image.open(picture).size == (16, 16)
    assert {inspect_checkpoint(folder / name).config.method_name for name in ("transformer", "text_encoder_2")} == {
        "svdquant",
        "fp",
    }


def test_a_calibration_says_what_it_was_worth(dit, tmp_path, capsys):
    arguments = ["--classes", "0-1", "--bits", "2", "--samples", "2", "--steps", "2", "--guidance", "1", "--minutes", "0.001"]
    example("calibrate_your_own").main([str(dit), str(tmp_path / "out"), *arguments])
    assert "transformer: " in (said := capsys.readouterr().out) and "times (median)" in said
    assert json.loads((tmp_path / "out" / "transformer" / "calibration.json").read_text())


def test_an_adapter_is_loaded_switched_off_and_fused_into_a_packed_model(flux, tmp_path):
    pipe = FluxPipeline.from_pretrained(flux)
    dense = peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"]), tiny_models.make("flux"))
    for name, parameter in dense.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    FluxPipeline.save_lora_weights(tmp_path / "adapter", peft.utils.get_peft_model_state_dict(dense))
    quantize(pipe, RTNConfig(bits=4), tmp_path / "packed")
    arguments = [str(tmp_path / "packed"), str(tmp_path / "adapter"), "--prompt", "a", "--scale", "2", *SIZE]
    example("lora_on_packed").main([*arguments, "--output", str(tmp_path / "out"), "--fused-to", str(tmp_path / "fused")])
    without, with_it, switched_off = (pixels(tmp_path / "out" / f"{name}.png") for name in ("without", "with", "switched-off"))
    assert without == switched_off != with_it
    fused = inspect_checkpoint(tmp_path / "fused" / "transformer")
    assert any("rank 2" in layer.description for layer in fused.layers)


class FakeComfyUI(http.server.BaseHTTPRequestHandler):
    """The three requests of ComfyUI's API that the example makes; the run is done at the second look."""

    def do_POST(self) -> None:
        self.server.graph = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["prompt"]
        self.server.looks = 0
        if self.server.graph["images"]["inputs"]["steps"] == 0:
            self.answer(b'{"error": "steps must be at least 1"}', 400)
        else:
            self.answer(b'{"prompt_id": "run"}')

    def do_GET(self) -> None:
        if self.path.startswith("/view?"):
            self.answer(f"{self.path} of {self.server.graph['images']['inputs']['seed']}".encode())
            return
        self.server.looks += 1
        done = {
            "status": {"status_str": "success"},
            "outputs": {"save": {"images": [{"filename": "qdiff_1.png", "type": "output"}]}},
        }
        self.answer(json.dumps({"run": done} if self.server.looks > 1 else {}).encode())

    def answer(self, body: bytes, code: int = 200) -> None:
        self.send_response(code)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def fake_comfyui():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), FakeComfyUI)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_workflow_is_sent_to_comfyui_and_its_pictures_are_fetched(fake_comfyui, tmp_path):
    program = example("comfyui_api")
    program.main(["--url", fake_comfyui, "--output", str(tmp_path), "--set", "images.seed=7", "--set", "save.filename_prefix=mine"])
    assert (tmp_path / "qdiff_1.png").read_text() == "/view?filename=qdiff_1.png&type=output of 7"
    with pytest.raises(SystemExit, match=r"refuses the workflow.*at least 1"):
        program.main(["--url", fake_comfyui, "--set", "images.steps=0"])
    with pytest.raises(SystemExit, match="no node 'sampler'; there are pipeline, images, save"):
        program.main(["--url", fake_comfyui, "--set", "sampler.seed=7"])


@pytest.mark.serial
def test_pictures_are_the_same_however_many_processes_share_them(dit, tmp_path):
    quantize(DiTPipeline.from_pretrained(dit), RTNConfig(bits=4), tmp_path / "packed")
    arguments = [str(EXAMPLES / "many_gpus.py"), str(tmp_path / "packed"), "--classes", "0,1,0", "--steps", "2", "--guidance", "1"]
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    for name, command in {"one": [sys.executable], "two": two}.items():
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        run = subprocess.run(
            [*command, *arguments, "--output", str(tmp_path / name)], capture_output=True, text=True, env=environment, timeout=300
        )
        assert run.returncode == 0, run.stderr[-3000:]
    drawn = {name: [pixels(path) for path in sorted((tmp_path / name).iterdir())] for name in ("one", "two")}
    assert len(drawn["one"]) == 3 and drawn["one"] == drawn["two"]


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_every_example_is_listed_or_makes_the_demo_models(path):
    listed = f"({path.name})" in (EXAMPLES / "README.md").read_text()
    training = path.stem in ("diffusion_training", "fashion_mnist") or path.stem.startswith("train_")
    assert listed != training
