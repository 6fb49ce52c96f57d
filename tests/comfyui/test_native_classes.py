"""Models that have no table of names: quantized in the graph, saved and loaded under ComfyUI's own names."""

from __future__ import annotations

import pytest
import torch
from comfyui import host
from comfyui.detection import made_by, recognise_config

from qdiff_diffusers import RTNConfig

WAN = {"dim": 128, "ffn_dim": 128, "num_heads": 1, "num_layers": 2, "text_dim": 64, "freq_dim": 32}
SPACE = {"max_img_h": 8, "max_img_w": 8, "max_frames": 4, "in_channels": 16, "out_channels": 16}
COSMOS = SPACE | {"patch_spatial": 2, "patch_temporal": 1, "model_channels": 128, "num_heads": 1, "num_blocks": 1}
COSMOS |= {"pos_emb_cls": "rope3d", "crossattn_emb_channels": 1024, "use_adaln_lora": True, "adaln_lora_dim": 32}
CASCADE = {"c_cond": 64, "c_hidden": [64, 64], "nhead": [1, 1], "blocks": [[1, 1], [1, 1]]}
OMNIGEN = {"hidden_size": 96, "num_layers": 1, "num_refiner_layers": 1, "num_attention_heads": 2, "num_kv_heads": 1}
OMNIGEN |= {"axes_dim_rope": [16, 16, 16], "axes_lens": [32, 32, 32]}
AUDIO = {"io_channels": 64, "embed_dim": 64, "depth": 1, "num_heads": 1, "global_cond_dim": 64, "cond_token_dim": 64}

# Sizes of the descriptions in ComfyUI's supported_models, beside those that a description gives itself.
SIZES = {
    "WAN21_CausalAR_T2V": WAN,
    "WAN21_Camera": WAN | {"in_dim": 32},
    "WAN22_Camera": WAN | {"in_dim": 36},
    "WAN22_S2V": WAN | {"audio_dim": 32, "audio_inject_layers": [0, 1]},
    "WAN21_HuMo": WAN,
    "WAN22_Animate": WAN | {"in_dim": 36, "num_layers": 5},
    "WAN21_FlowRVS": WAN,
    "WAN21_SCAIL": WAN,
    "WAN21_SCAIL2": WAN,
    "WAN22_WanDancer": WAN | {"audio_inject_layers": [0, 1], "music_dim": 32, "music_heads": 1, "music_latent_dim": 32},
    "Hunyuan3Dv2": {
        "in_channels": 64,
        "context_in_dim": 64,
        "hidden_size": 128,
        "num_heads": 2,
        "depth": 1,
        "depth_single_blocks": 1,
    },
    "Hunyuan3Dv2_1": {
        "hidden_size": 64,
        "context_dim": 64,
        "depth": 3,
        "num_heads": 1,
        "num_moe_layers": 1,
        "guidance_cond_proj_dim": None,
    },
    "TripoSplat": {"model_channels": 64, "cond_channels": 64, "cond2_channels": 32, "num_blocks": 1, "num_refiner_blocks": 1},
    "ACEStep": {
        "num_layers": 1,
        "inner_dim": 64,
        "attention_head_dim": 64,
        "num_attention_heads": 1,
        "mlp_ratio": 2.5,
        "lyric_encoder_vocab_size": 16,
        "lyric_hidden_size": 64,
    },
    "ACEStep15": {
        "hidden_size": 64,
        "text_hidden_dim": 32,
        "num_dit_layers": 2,
        "num_lyric_layers": 1,
        "num_timbre_layers": 1,
        "num_tokenizer_layers": 1,
        "num_heads": 1,
        "num_kv_heads": 1,
        "head_dim": 64,
        "intermediate_size": 64,
        "fsq_dim": 64,
        "encoder_hidden_size": 64,
        "encoder_intermediate_size": 64,
        "encoder_num_heads": 1,
    },
    "Omnigen2": OMNIGEN | {"text_feat_dim": 64},
    "Boogu": OMNIGEN | {"instruction_feat_dim": 64, "num_double_stream_layers": 1},
    "MageFlow": {"num_layers": 1, "num_attention_heads": 1},
    "Lens": {"num_layers": 1, "num_attention_heads": 1, "enc_hidden_dim": 64, "selected_layer_index": [0, 1]},
    "Stable_Cascade_C": CASCADE | {"c_clip_text": 64, "c_clip_text_pooled": 64, "c_clip_img": 64},
    "Stable_Cascade_B": CASCADE
    | {"c_clip": 64, "level_config": ["CT", "CTA"], "block_repeat": [[1, 1], [1, 1]], "dropout": [0.0, 0.0]},
    "StableAudio": AUDIO | {"project_cond_tokens": False},
    "StableAudio3": AUDIO | {"global_cond_type": "adaLN", "timestep_features_type": "expo", "project_cond_tokens": True},
    "CosmosT2V": COSMOS
    | {"block_config": "FA-CA-MLP", "affline_emb_norm": True, "block_x_format": "THWBD", "extra_per_block_abs_pos_emb": False},
    "HunyuanDiT": {"depth": 2, "hidden_size": 64, "num_heads": 1, "text_states_dim": 64, "text_states_dim_t5": 64},
    "SeedVR2": {
        "num_layers": 32,
        "vid_dim": 64,
        "txt_in_dim": 64,
        "heads": 1,
        "head_dim": 64,
        "rope_dim": 32,
        "norm_eps": 1e-5,
        "mlp_type": "swiglu",
        "vid_out_norm": True,
    },
}

LEFT_OUT = {
    "Stable_Zero123": "recognised by its published size only",
    "SVD_img2vid": "recognised by its published size only",
    "SV3D_u": "recognised by its published size only",
    "SV3D_p": "recognised by its published size only",
    "HiDreamO1": "a language model of a fixed size",
    "ChromaRadiance": "sizes of its own class that detection takes for granted",
    "ZImagePixelSpace": "sizes of its own class that detection takes for granted",
    "HunyuanImage21Refiner": "the second stage of HunyuanImage 2.1",
    "PixelDiTT2I": "its loaded tensors have other names than its file",
    "PiD": "its loaded tensors have other names than its file",
    "RT_DETR_v4": "no diffusion model",
    "SAM3": "no diffusion model",
    "SAM31": "no diffusion model",
    "DepthAnything3": "no diffusion model",
}


def test_every_class_of_comfyuis_has_a_table_or_is_tried_here():
    host.pack()
    from comfy import supported_models

    known = {name for family in host.part("families").FAMILIES for name in family.native}
    found = {kind.__name__: made_by(kind) for kind in supported_models.models}
    known.update(*(found.get(name, set()) for name in (*SIZES, *LEFT_OUT)))
    assert not {name for name, classes in found.items() if not classes & known}


def outside(name):
    """What the class of audio models wants of the checkpoint beside the diffusion model."""
    if name not in ("StableAudio", "StableAudio3"):
        return {}
    from comfy.ldm.audio.embedders import NumberConditioner

    kinds = {"fourier_features_type": "expo"} if name == "StableAudio3" else {}
    values = {key: torch.randn(value.shape) for key, value in NumberConditioner(768, **kinds).state_dict().items()}
    return {f"conditioner.conditioners.seconds_{part}.{key}": v for part in ("start", "total") for key, v in values.items()}


@pytest.fixture
def made(monkeypatch):
    """``made(name)``: a MODEL of the class that this description makes, with random weights in bfloat16."""
    host.pack()
    import comfy.model_management
    import comfy.model_patcher
    from comfy import supported_models

    def make(name):
        kind = getattr(supported_models, name, None)
        if kind is None:
            pytest.skip(f"this ComfyUI has no {name}")
        if name == "ACEStep15" and host.version() < (0, 24):
            pytest.skip("this ComfyUI's ACE-Step 1.5 has a fixed size")
        recognise_config(monkeypatch, SIZES[name])
        config = kind(kind.unet_config | SIZES[name])
        config.set_inference_dtype(torch.bfloat16, None)
        torch.manual_seed(0)
        model = config.get_model(outside(name), "", device=torch.device("cpu"))
        with torch.no_grad():
            for tensor in [*model.diffusion_model.parameters(), *model.diffusion_model.buffers()]:
                if tensor.is_floating_point():
                    tensor.copy_(torch.randn(tensor.shape) * 0.1)
        cpu = torch.device("cpu")
        return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)

    return make


def plain(config):
    """A config of ComfyUI's with lists for tuples."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in config.items()}


@pytest.mark.parametrize("name", SIZES)
def test_a_class_without_a_table_is_quantized_saved_and_loaded(name, made, tmp_path):
    quantize, loader = host.part("quantize"), host.part("loader")
    dense = made(name)
    original = {key: value.clone() for key, value in dense.model.diffusion_model.state_dict().items()}
    packed = quantize.quantize_model(dense, RTNConfig(bits=4, group_size=32, keep_outer_layers=False))
    assert loader.packed_weights(packed)
    quantize.save_model(packed, tmp_path / "saved")
    loaded = loader.load_model(tmp_path / "saved")
    assert type(loaded.model) is type(dense.model)
    detected = plain(loaded.model.model_config.unet_config)
    assert detected | plain(packed.model.model_config.unet_config) == detected
    for key, value in loader.outside_tensors(dense.model).items():
        assert torch.equal(loader.outside_tensors(packed.model)[key], value)
        assert torch.equal(loader.outside_tensors(loaded.model)[key], value)
    expected, found = (model.model.diffusion_model.state_dict() for model in (packed, loaded))
    assert found.keys() == expected.keys() == original.keys()
    for key, value in expected.items():
        if host.part("layout").is_packed(value):
            assert torch.equal(found[key]._qdata, value._qdata), key
        else:
            assert torch.equal(found[key], original[key]), key
            assert found[key].dtype == original[key].dtype, key
