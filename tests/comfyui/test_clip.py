"""Quantized text encoders as native CLIPs: what transformers computes from the same checkpoint, and text through stock nodes."""

from __future__ import annotations

import shutil

import pytest
import torch
from comfyui import host
from comfyui.conditioned import CONDITIONED, PROMPT
from comfyui.tiny_encoders import ENCODERS, T5, shrink, tokenizer_model, transformers_model

from qdiff_diffusers import CheckpointError, RTNConfig

TOLERANCE = 1e-5
TABLE = RTNConfig(bits=8, group_size=16)
CONFIGS = {
    "linear": lambda: RTNConfig(bits=4, group_size=16, keep_outer_layers=False),
    "embedding": lambda: RTNConfig(
        bits=4, group_size=16, overrides=dict.fromkeys(("shared", "embed_tokens", "token_embedding"), TABLE)
    ),
}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """``encoder(name, kind)``: folder of a tiny quantized text encoder, as transformers saves it."""
    root, made = tmp_path_factory.mktemp("encoders"), {}

    def folder(name, kind="linear"):
        if (name, kind) not in made:
            dense, packed = root / f"{name}-dense", root / f"{name}-{kind}"
            if not dense.exists():
                torch.manual_seed(0)
                ENCODERS[name].make().save_pretrained(dense)
            model = transformers_model(name).from_pretrained(dense, dtype=torch.float32, quantization_config=CONFIGS[kind]())
            model.save_pretrained(packed)
            if name == "umt5":
                (packed / "spiece.model").write_bytes(tokenizer_model())
            made[name, kind] = packed
        return made[name, kind]

    return folder


@pytest.fixture
def load(monkeypatch):
    """``load(paths, type)``: a CLIP, with ComfyUI expecting the tiny sizes."""
    shrink(monkeypatch)
    return lambda paths, kind: host.part("clip").load_clip(paths, kind)


def packed(clip):
    is_packed = host.part("layout").is_packed
    return [n for n, m in clip.cond_stage_model.named_modules() if is_packed(getattr(m, "weight", None))]


@torch.no_grad()
def native_output(clip, name):
    import comfy.model_management

    comfy.model_management.load_models_gpu([clip.patcher])
    return ENCODERS[name].native(clip.cond_stage_model)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("name", ENCODERS)
@torch.no_grad()
def test_an_encoder_computes_what_it_computes_in_transformers(name, kind, encoder, load):
    path = encoder(name, kind)
    reference = transformers_model(name).from_pretrained(path).eval()
    wanted = ENCODERS[name].reference(reference)
    clip = load([path], ENCODERS[name].type)
    output = native_output(clip, name)
    assert output.shape == wanted.shape
    assert (output - wanted).abs().max() < TOLERANCE * wanted.abs().max()
    assert len(packed(clip)) >= 10


@pytest.mark.parametrize("family", CONDITIONED)
@torch.no_grad()
def test_a_text_becomes_the_conditioning_that_diffusers_makes_of_it(family, encoder, load):
    """From the text on: the tokenizers, Qwen's template and what is cut off it, the layer that is taken, the pooled vector."""
    kind, names, *_, reference = CONDITIONED[family]
    paths = [encoder(name) for name in names]
    wanted, pooled = reference(
        *(transformers_model(name).from_pretrained(path).eval() for name, path in zip(names, paths, strict=True))
    )
    clip = load(paths, kind)
    text, short = clip.encode_from_tokens(clip.tokenize(PROMPT), return_pooled=True)
    assert text.shape == wanted.shape
    assert (text - wanted).abs().max() < TOLERANCE * wanted.abs().max()
    assert pooled is None or (short - pooled).abs().max() < TOLERANCE * pooled.abs().max()


def test_two_encoders_of_flux_encode_a_text_and_come_back_after_unloading(encoder, load):
    import comfy.model_management

    clip = load([encoder("clip_l"), encoder("t5")], "flux")
    tokens = clip.tokenize("a red fox in the snow")
    text, pooled = clip.encode_from_tokens(tokens, return_pooled=True)
    assert text.shape[-1] == T5["d_model"] and pooled.shape[-1] == 64
    assert torch.isfinite(text).all() and text.std() > 0 and pooled.std() > 0
    comfy.model_management.unload_all_models()
    assert torch.equal(clip.encode_from_tokens(tokens), text)
    assert not torch.equal(clip.encode_from_tokens(clip.tokenize("a blue whale")), text)


def test_a_lora_acts_on_a_packed_encoder(encoder, load):
    import comfy.sd

    clip = load([encoder("clip_l")], "stable_diffusion")
    before = native_output(clip, "clip_l")
    torch.manual_seed(1)
    name = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    lora = {f"{name}.lora_up.weight": torch.randn(64, 4), f"{name}.lora_down.weight": torch.randn(4, 64)}
    _, patched = comfy.sd.load_lora_for_models(None, clip, lora, 0.0, 1.0)
    assert patched.patcher.patches
    changed = native_output(patched, "clip_l")
    assert (changed - before).abs().max() > 1e-3
    assert torch.equal(native_output(clip, "clip_l"), before)


def test_the_node_loads_what_lies_in_the_models_folder(encoder, load, monkeypatch, tmp_path):
    import folder_paths

    shutil.copytree(encoder("clip_l"), tmp_path / "clip_l")
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "qdiff", ([str(tmp_path)], {".safetensors"}))
    node = host.part("nodes.clip").LoadCLIP
    assert node.validate_inputs("clip_l") is True
    assert "There is no text encoder 'nothing'" in node.validate_inputs("nothing")
    clip = node.execute("clip_l", "stable_diffusion").result[0]
    assert len(packed(clip)) >= 10


def test_an_incomplete_encoder_and_an_unknown_type_are_refused(encoder, load, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(encoder("clip_l"), tmp_path / "lost")
    file = tmp_path / "lost" / "model.safetensors"
    tensors = load_file(file)
    del tensors[next(key for key in tensors if key.endswith("final_layer_norm.weight"))]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks .*final_layer_norm\.weight"):
        load([tmp_path / "lost"], "stable_diffusion")
    with pytest.raises(CheckpointError, match="no text encoder type 'poetry'"):
        load([encoder("clip_l")], "poetry")


def test_an_encoder_whose_tokenizer_comfyui_lacks_brings_its_own(encoder, load, tmp_path):
    """ComfyUI has the files of most tokenizers; UMT5's it expects with the weights."""
    folder = tmp_path / "pipeline" / "text_encoder"
    shutil.copytree(encoder("umt5"), folder)
    (folder / "spiece.model").unlink()
    with pytest.raises(CheckpointError, match=r"put spiece\.model"):
        load([folder], "wan")
    (folder.parent / "tokenizer").mkdir()
    (folder.parent / "tokenizer" / "spiece.model").write_bytes(tokenizer_model())
    clip = load([folder], "wan")
    text = clip.encode_from_tokens(clip.tokenize("a red fox"))
    assert torch.isfinite(text).all() and text.std() > 0
