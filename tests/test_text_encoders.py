"""The text encoders that pipelines use, each tiny: quantized by transformers while loading, saved, reloaded, run."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import torch

from qdiff_diffusers import AQConfig, FPConfig, QDiffConfig, RTNConfig, SVDQuantConfig, VQConfig
from qdiff_diffusers.checkpoint.stored_model import read_stored_model
from qdiff_diffusers.layers import PackedLayer

transformers = pytest.importorskip("transformers")

METHODS = {
    "aq": lambda: AQConfig(num_codebooks=1, codebook_bits=8, vector_size=4, codebook="shared", rotation=True, effort=0),
    "vq": lambda: VQConfig(codebook_bits=4, vector_size=2, restarts=1),
    "fp": lambda: FPConfig(weight_format="nvfp4"),
    "svdquant": lambda: SVDQuantConfig(bits=4, rank=2, rounds=1),
    "rtn": lambda: RTNConfig(bits=4, group_size=16),
}
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
DECODER = SIZES | {"num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 32, "pad_token_id": 0}
T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "feed_forward_proj": "gated-gelu"}


def clip():
    return transformers.CLIPTextModel(transformers.CLIPTextConfig(**SIZES, max_position_embeddings=16, eos_token_id=1))


def clip_with_projection():
    config = transformers.CLIPTextConfig(**SIZES, projection_dim=32, max_position_embeddings=16, eos_token_id=1)
    return transformers.CLIPTextModelWithProjection(config)


def t5():
    return transformers.T5EncoderModel(transformers.T5Config(**T5))


def umt5():
    return transformers.UMT5EncoderModel(transformers.UMT5Config(**T5))


def llama():
    return transformers.LlamaModel(transformers.LlamaConfig(**DECODER))


def gemma2():
    return transformers.Gemma2Model(transformers.Gemma2Config(**DECODER))


def qwen2_5_vl():
    text = DECODER | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
    del text["head_dim"]
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32, "patch_size": 4}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


ENCODERS = {f.__name__: f for f in (clip, clip_with_projection, t5, umt5, llama, gemma2, qwen2_5_vl)}
TOKENS = torch.tensor([[0, 5, 9, 33, 60, 2, 7, 1]])


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """``folder(name)``: where the encoder lies, saved in float32."""
    root = tmp_path_factory.mktemp("encoders")

    @functools.cache
    def save(name: str) -> Path:
        torch.manual_seed(0)
        ENCODERS[name]().save_pretrained(root / name)
        return root / name

    return save


def load(name: str, folder: Path, config: QDiffConfig | None = None, **kwargs):
    if config is not None:
        kwargs["quantization_config"] = config
    return type(ENCODERS[name]()).from_pretrained(folder, **kwargs).eval()


@torch.no_grad()
def encode(model: torch.nn.Module) -> torch.Tensor:
    return model(TOKENS, output_hidden_states=True).hidden_states[-1]


def packed(model: torch.nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, PackedLayer)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_survives_quantizing_saving_and_reloading(name, method, folder, tmp_path):
    model = load(name, folder(name), METHODS[method](), dtype=torch.bfloat16)
    assert len(packed(model)) >= 10
    output = encode(model)
    assert torch.isfinite(output).all()
    model.save_pretrained(tmp_path)
    reloaded = load(name, tmp_path)
    assert reloaded.dtype == torch.bfloat16
    assert packed(reloaded) == packed(model)
    assert torch.equal(encode(reloaded), output)


@pytest.mark.parametrize("name", ["clip", "t5", "qwen2_5_vl"])
def test_a_saved_encoder_can_be_read_without_building_it(name, folder, tmp_path):
    """Also where transformers gives layers other names in files than modules have."""
    load(name, folder(name), RTNConfig(bits=4, group_size=16)).save_pretrained(tmp_path)
    stored = read_stored_model(tmp_path)
    assert len(stored.quantization.layers) >= 10
    assert {f"{layer}.codes" for layer in stored.quantization.layers} <= set(stored.load())


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_at_eight_bits_is_near_the_dense_one(name, folder):
    exact = encode(load(name, folder(name)))
    close = encode(load(name, folder(name), RTNConfig(bits=8, group_size=16)))
    assert (close - exact).norm() / exact.norm() < 0.02


@pytest.mark.parametrize("name", ["t5", "umt5", "qwen2_5_vl"])
def test_layers_that_stay_dense_are_listed_with_a_reason(name, folder):
    model = load(name, folder(name), RTNConfig(bits=4, group_size=16))
    skipped = model.config.quantization_config.skipped
    expected = {"t5": "wo", "umt5": "wo", "qwen2_5_vl": "embed_tokens"}[name]
    assert any(expected in layer for layer in skipped)
    assert not skipped.keys() & set(packed(model))


def test_a_cast_encoder_is_saved_in_its_new_dtype(folder, tmp_path):
    # Not a Llama: its rotary embedding casts frequencies, which are not stored and come back in float32.
    model = load("clip", folder("clip"), RTNConfig(bits=4, group_size=16))
    model.bfloat16()
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert stored["compute_dtype"] == "bfloat16"
    assert torch.equal(encode(load("clip", tmp_path)), encode(model))
