"""Every native family: the same numbers as diffusers, from the same quantized checkpoint, through ComfyUI's own model class."""

from __future__ import annotations

import shutil

import diffusers
import pytest
import torch
from comfyui import host
from comfyui.detection import made_by
from comfyui.test_patches import METHODS
from comfyui.tiny_families import TINY

from qdiff_diffusers import CheckpointError, RTNConfig

TOLERANCE = 1e-5  # of outputs of order one, in float32


def load(path):
    import comfy.model_management

    model = host.part("loader").load_model(path)
    comfy.model_management.load_models_gpu([model])
    return model


@pytest.mark.parametrize("family", TINY)
@torch.no_grad()
def test_native_output_is_that_of_diffusers(family, quantized, tiny):
    tiny(family)
    if family in ("ltx2", "ltx23") and host.version() < (0, 24):
        pytest.skip("this ComfyUI makes LTX-2's gates between video and audio of another time")
    folder = quantized(family)
    reference = diffusers.AutoModel.from_pretrained(str(folder))
    expected = TINY[family].reference(reference)
    model = load(folder)
    output = TINY[family].native(model.model.diffusion_model)
    assert output.shape == expected.shape
    assert (output - expected).abs().max() < TOLERANCE
    packed = host.part("loader").packed_weights(model)
    blocks = [block.name for weight in packed.values() for block in weight._params.blocks if block.spec]
    assert sorted(blocks) == sorted(reference.config.quantization_config.layers)


@pytest.mark.parametrize("family", TINY)
def test_names_go_there_and_back(family, dense, tiny):
    from qdiff_diffusers.checkpoint.files import read_headers, weight_files

    families = host.part("families")
    tiny(family)
    stored = {key: info.shape for key, info in read_headers(weight_files(dense(family))).items()}
    rules = families.family_of_class(TINY[family].diffusers_class).rules(stored)
    native = families.to_native(rules, stored)
    empty = {key: torch.empty(shape, device="meta") for key, shape in stored.items()}
    placed = {key: [host.part("loader").placed(empty[part.key], part) for part in parts] for key, parts in native.items()}
    shapes = {key: tuple((torch.cat(parts) if parts[0].ndim else parts[0]).shape) for key, parts in placed.items()}
    back = families.to_diffusers(families.family_of_class(TINY[family].diffusers_class).rules(shapes), shapes)
    assert {s.key: s.shape_of(shapes[key]) for key, slices in back.items() for s in slices} == stored
    assert {s.key: s.swapped for slices in back.values() for s in slices} == {
        part.key: part.swapped for parts in native.values() for part in parts
    }


def test_a_rule_can_give_one_tensor_two_shapes():
    rules = host.part("families.rules")
    table = rules.parse("a.N.lin[*] <- b.N.table[6,*]")
    assert rules.to_native(table, ["b.3.table"]) == {"a.3.lin": [rules.Part("b.3.table", shape=(-1,))]}
    (part,) = rules.to_diffusers(table, {"a.3.lin": (48,)})["a.3.lin"]
    assert (part.key, part.shape_of((48,))) == ("b.3.table", (6, 8))
    for wrong in ("a[*] <- b", "a <- b[6,*]", "a[*] <- b[6,*] c[6,*]", "a[2,3] <- b[*]", "a[*,*] <- b[*]"):
        with pytest.raises(ValueError, match="shape"):
            rules.parse(wrong)


@pytest.mark.parametrize("family", TINY)
def test_comfyuis_own_names_stay_as_they_are(family, dense, tiny):
    """So a checkpoint that was saved with them, before there was a table, loads still."""
    from comfyui.models_folder import native_tensors

    tiny(family)
    names = native_tensors(dense(family), family)
    parts = host.part("families").to_native(host.part("families").family_of_class(TINY[family].diffusers_class).rules(names), names)
    assert all([part.key for part in sources] == [key] for key, sources in parts.items())


PUBLISHED = [
    "FluxTransformer2DModel",
    "Flux2Transformer2DModel",
    "ChromaTransformer2DModel",
    "PixArtTransformer2DModel",
    "AuraFlowTransformer2DModel",
    "ZImageTransformer2DModel",
    "QwenImageTransformer2DModel",
    "WanTransformer3DModel",
    "LTXVideoTransformer3DModel",
    "HunyuanVideoTransformer3DModel",
    "MochiTransformer3DModel",
    "Krea2Transformer2DModel",
    "Ideogram4Transformer2DModel",
    "ErnieImageTransformer2DModel",
    "LongCatImageTransformer2DModel",
    "JoyImageEditTransformer3DModel",
    "HunyuanImageTransformer2DModel",
    "HunyuanVideo15Transformer3DModel",
    "Kandinsky5Transformer3DModel",
    "CosmosTransformer3DModel",
    "CogVideoXTransformer3DModel",
    "WanVACETransformer3DModel",
    "MiniMaxH3Transformer3DModel",
    "WanAnimateTransformer3DModel",
]
DETAILS = {
    "FluxTransformer2DModel": {"guidance_embeds": True},
    "PixArtTransformer2DModel": {"caption_channels": 4096, "use_additional_conditions": False},
    "ErnieImageTransformer2DModel": {
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_layers": 36,
        "ffn_hidden_size": 12288,
        "text_in_dim": 3072,
    },
    "HunyuanImageTransformer2DModel": {"text_embed_2_dim": 1472, "guidance_embeds": True, "use_meanflow": True},
    "Kandinsky5Transformer3DModel": {
        "in_visual_dim": 33,
        "out_visual_dim": 16,
        "model_dim": 1792,
        "ff_dim": 7168,
    },
    "CosmosTransformer3DModel": {"num_attention_heads": 16, "extra_pos_embed_type": None},
    "WanAnimateTransformer3DModel": {"added_kv_proj_dim": 5120},
    "WanVACETransformer3DModel": {"vace_layers": [0, 5, 10, 15, 20, 25, 30, 35]},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_are_recognised_and_every_tensor_fits(name):
    """With diffusers' default config, which is the published one; on the meta device."""
    host.pack()
    from comfy import model_base, model_detection

    families = host.part("families")
    family = families.family_of_class(name)
    if not any(hasattr(model_base, native) for native in family.native):
        pytest.skip(f"this ComfyUI has no {family.native[0]}")
    with torch.device("meta"):
        reference = getattr(diffusers, name)(**DETAILS.get(name, {}))
    stored = {key: tensor.to("meta") for key, tensor in reference.state_dict().items()}
    parts = families.to_native(family.rules(stored), stored)
    placed = host.part("loader").placed
    tensors = {key: torch.cat([placed(stored[part.key], part) for part in sources]) for key, sources in parts.items()}
    tensors |= family.computed(reference.config)
    config = model_detection.model_config_from_unet(dict(tensors), "")
    config.set_inference_dtype(torch.bfloat16, None)
    config.custom_operations = host.part("ops").Operations
    model = config.get_model(dict(tensors), "", device=torch.device("meta"))
    assert type(model).__name__ in family.native
    given = config.process_unet_state_dict(dict(tensors))
    wanted = {key: tensor.shape for key, tensor in model.diffusion_model.state_dict().items() if key not in family.unused}
    assert {key: tensor.shape for key, tensor in given.items()} == wanted


CHANNELS = {"in_channels", "in_dim", "out_dim"}


def test_every_class_that_comfyui_picks_by_a_number_of_channels_is_known():
    """Such a one has the names of the class without that number, so the same table; Stable Zero123 has tensors besides."""
    host.pack()
    from comfy import supported_models

    families = host.part("families").FAMILIES
    found = set()
    kinds = [kind for kind in supported_models.models if not kind.required_keys]
    for kind in kinds:
        plain = {key: value for key, value in kind.unet_config.items() if key not in CHANNELS}
        made = {name for other in kinds if other.unet_config == plain for name in made_by(other)}
        for family in families:
            if made & set(family.native):
                assert made_by(kind) <= set(family.native), f"{kind.__name__} is {family.name} with other channels"
                found |= made_by(kind)
    assert found >= {"SDXL_instructpix2pix", "HunyuanVideoI2V", "HunyuanVideoSkyreelsI2V", "WAN22", "Flux"}


def test_a_component_that_comfyuis_model_contains_has_to_lie_beside_it(quantized, tiny, tmp_path):
    tiny("ltx2")
    shutil.copytree(quantized("ltx2"), tmp_path / "transformer")
    with pytest.raises(CheckpointError, match=r"component connectors too; put its folder beside it"):
        load(tmp_path / "transformer")


@torch.no_grad()
def test_what_lies_beside_a_model_may_be_quantized_too(quantized, dense, tiny, tmp_path):
    from qdiff_diffusers import quantize

    tiny("anima")
    shutil.copytree(quantized("anima"), tmp_path / "transformer")
    quantize(dense("anima").parent / "text_conditioner", RTNConfig(bits=8), tmp_path / "text_conditioner", dtype=torch.float32)
    model, wanted = load(tmp_path / "transformer"), load(quantized("anima"))
    assert any(name.startswith("llm_adapter.") for name in host.part("loader").packed_weights(model))
    output, reference = (TINY["anima"].native(m.model.diffusion_model) for m in (model, wanted))
    assert 0 < (output - reference).norm() < 0.05 * reference.norm()


SIBLINGS = {
    "hunyuan_video_i2v": "HunyuanVideoI2V",
    "skyreels_i2v": "HunyuanVideoSkyreelsI2V",
    "sd15_pix2pix": "SD15_instructpix2pix",
    "sdxl_pix2pix": "SDXL_instructpix2pix",
    "sd21_unclip": "SD21UNCLIP",
    "x4_upscaler": "SD_X4Upscaler",
    "lotus": "Lotus",
    "anima": "Anima",
}


@pytest.mark.parametrize(
    "family, method",
    [*((family, "rtn") for family in SIBLINGS), *(("skyreels_i2v", method) for method in ("svdquant", "vq", "aq"))],
)
def test_a_model_with_other_inputs_is_loaded_as_the_class_for_them(family, method, quantized, tiny):
    tiny(family)
    model = load(quantized(family, METHODS[method]()))
    assert type(model.model).__name__ == SIBLINGS[family]
    assert host.part("loader").packed_weights(model)


def test_a_model_without_a_native_class_is_refused_by_name(tmp_path):
    import tiny_models

    from qdiff_diffusers import quantize

    tiny_models.make("dit").save_pretrained(tmp_path / "dit")
    quantize(tmp_path / "dit", RTNConfig(bits=4), tmp_path / "packed")
    with pytest.raises(CheckpointError, match=r"DiTTransformer2DModel.*pipeline nodes"):
        host.part("loader").load_model(tmp_path / "packed")
