"""Models that ComfyUI has loaded quantized: Quantize Model decodes them first, with their scales, or says what to start from."""

from __future__ import annotations

import json

import pytest
import torch
from comfyui import host
from comfyui.models_folder import native_tensors
from comfyui.test_patches import METHODS, peft_lora, run, with_lora
from torch import nn

from qdiff_diffusers import ConfigError

LAYOUTS = {
    "fp8": ("float8_e4m3fn", "TensorCoreFP8E4M3Layout"),
    "fp8_e5m2": ("float8_e5m2", "TensorCoreFP8E5M2Layout"),
    "nvfp4": ("nvfp4", "TensorCoreNVFP4Layout"),
    "mxfp8": ("mxfp8", "TensorCoreMXFP8Layout"),
    "int8": ("int8_tensorwise", "TensorWiseINT8Layout"),
    "int8_rotated": ("int8_tensorwise", "TensorWiseINT8Layout"),
    "int4_rotated": ("convrot_w4a4", "TensorCoreConvRotW4A4Layout"),
}
ROTATED = {"convrot_groupsize": 64}
FORMATS = [*LAYOUTS, "scaled_fp8"]
FEW = ["single_transformer_blocks", "attn", "norm", "ff_context"]  # layers left out, so that the others take no time


def is_block_weight(key, value):
    return value.ndim == 2 and key.endswith(".weight") and "_blocks." in key


def stored(tensors, kind):
    """A file as it is published in this format, and the same tensors decoded."""
    host.pack()
    from comfy import quant_ops

    file, decoded = dict(tensors), dict(tensors)
    for key in [key for key, value in tensors.items() if is_block_weight(key, value)]:
        layer, weight = key.removesuffix(".weight"), tensors[key]
        if kind == "scaled_fp8":
            scale = weight.abs().max() / 448
            file[key] = (weight / scale).to(torch.float8_e4m3fn)
            file[f"{layer}.scale_weight"], decoded[key] = scale, file[key].float() * scale
            continue
        name, layout = LAYOUTS[kind]
        if name not in quant_ops.QUANT_ALGOS:
            pytest.skip(f"this ComfyUI does not know {name}")
        rotated = ROTATED | {"convrot": True} if kind == "int8_rotated" else ROTATED if kind == "int4_rotated" else {}
        by_row = {"per_channel": True} if kind == "int8_rotated" else {}
        options = rotated | by_row if kind.startswith("int") else {"scale": "recalculate"}
        packed = quant_ops.QuantizedTensor.from_float(weight, layout, **options)
        file |= {key + suffix: value.contiguous() for suffix, value in packed.state_dict().items()}
        conf = {"format": name} | rotated
        file[f"{layer}.comfy_quant"] = torch.tensor(list(json.dumps(conf).encode()), dtype=torch.uint8)
        decoded[key] = packed.dequantize()
    return file | ({"scaled_fp8": torch.zeros(2)} if kind == "scaled_fp8" else {}), decoded


@pytest.fixture
def load(dense, tiny):
    """``load(change)``: stock ComfyUI's model of the tiny Flux with changed tensors."""
    tiny("flux")
    import comfy.sd

    def loaded(tensors):
        return comfy.sd.load_diffusion_model_state_dict(dict(tensors), model_options={"dtype": torch.float32})

    return lambda change=lambda tensors: tensors: loaded(change(native_tensors(dense("flux"), "flux")))


def codes(model):
    return {name: weight._qdata for name, weight in host.part("loader").packed_weights(model).items()}


@pytest.mark.parametrize("kind", FORMATS)
@torch.no_grad()
def test_a_model_in_a_format_of_comfyuis_is_decoded_first(kind, load, caplog):
    """To the same bits as from a file with the decoded weights, also with a LoRA on it; and the user hears of it."""
    quantize = host.part("quantize").quantize_model
    model, plain = load(lambda tensors: stored(tensors, kind)[0]), load(lambda tensors: stored(tensors, kind)[1])
    made, wanted = (quantize(one, METHODS["rtn"]()) for one in (model, plain))
    assert len(codes(made)) > 10
    assert all(torch.equal(a, b) for a, b in zip(codes(made).values(), codes(wanted).values(), strict=True))
    assert torch.equal(run(made, "flux"), run(wanted, "flux"))
    assert "are quantized already" in caplog.text
    patched, expected = (quantize(with_lora(one, peft_lora("flux"), 0.8), METHODS["rtn"]()) for one in (model, plain))
    assert torch.equal(run(patched, "flux"), run(expected, "flux"))
    assert not torch.equal(run(patched, "flux"), run(made, "flux"))


@pytest.mark.parametrize("method", ["svdquant", "vq", "aq"])
def test_every_method_sees_decoded_weights(method, load):
    model, plain = load(lambda tensors: stored(tensors, "nvfp4")[0]), load(lambda tensors: stored(tensors, "nvfp4")[1])
    made, wanted = (
        host.part("quantize").quantize_model(one, METHODS[method](modules_to_not_convert=FEW)) for one in (model, plain)
    )
    assert made.get_attachment("qdiff")["quantization"].layers == wanted.get_attachment("qdiff")["quantization"].layers


@torch.no_grad()
def test_what_is_skipped_is_decoded_too_and_all_is_saved(load, tmp_path):
    quantize, loader = host.part("quantize"), host.part("loader")
    model = quantize.quantize_model(load(lambda tensors: stored(tensors, "fp8")[0]), METHODS["rtn"](modules_to_not_convert=["ff"]))
    output = run(model, "flux")
    quantize.save_model(model, tmp_path / "saved")
    assert torch.equal(run(loader.load_model(tmp_path / "saved"), "flux"), output)


@torch.no_grad()
def test_factors_of_the_inputs_are_taken_into_the_weight(load):
    """As files of ModelOpt have them; and what 8-bit inputs are divided by is not needed any more."""
    from comfy.quant_ops import QUANT_ALGOS

    if "pre_quant_scale" not in QUANT_ALGOS["nvfp4"]["parameters"]:
        pytest.skip("this ComfyUI does not know them")
    key = "double_blocks.0.img_mlp.0"
    factors = torch.rand(128) + 0.5

    def change(tensors, decoded=False):
        file, plain = stored(tensors, "nvfp4")
        if decoded:
            return plain | {f"{key}.weight": plain[f"{key}.weight"] * factors}
        return file | {f"{key}.pre_quant_scale": factors, f"{key}.input_scale": torch.tensor(0.1)}

    model, plain = load(change), load(lambda tensors: change(tensors, True))
    assert hasattr(model.model.diffusion_model.get_submodule(key), "pre_quant_scale")
    made, wanted = (host.part("quantize").quantize_model(one, METHODS["rtn"]()) for one in (model, plain))
    assert torch.equal(run(made, "flux"), run(wanted, "flux"))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda m: m.register_parameter("weight", nn.Parameter(m.weight.to(torch.int8), requires_grad=False)), "codes of .*int8"),
        (lambda m: m.register_parameter("weight", nn.Parameter(m.weight.byte()[:, :64], requires_grad=False)), "codes of .*uint8"),
        (lambda m: m.register_parameter("scale_weight", nn.Parameter(torch.ones(1))), "scale_weight beside its weight"),
        (lambda m: m.register_buffer("absmax", torch.ones(1)), "absmax beside its weight"),
    ],
)
@pytest.mark.parametrize("method", ["rtn", "svdquant"])
def test_codes_that_cannot_be_decoded_are_refused_by_name(method, change, message, load):
    """Of GGUF, bitsandbytes and other nodes; before any layer is quantized."""
    model = load()
    change(model.model.diffusion_model.double_blocks[1].img_mlp[2])
    done = []
    with pytest.raises(ConfigError, match=rf"double_blocks\.1\.img_mlp\.2 .*{message}.*in 16 bits"):
        host.part("quantize").quantize_model(model, METHODS[method](), lambda *progress: done.append(progress))
    assert not done
