"""Quantizing in the graph gives what quantizing in diffusers gives, to the last bit, and what is saved is read by both."""

from __future__ import annotations

import diffusers
import pytest
import torch
from comfyui import host
from comfyui.models_folder import native_tensors
from comfyui.tiny_families import TINY

from qdiff_diffusers import CheckpointError, ConfigError, FPConfig, QDiffConfig, RTNConfig, SVDQuantConfig, VQConfig
from qdiff_diffusers.checkpoint.stored_model import read_stored_model, write_stored_model
from qdiff_diffusers.methods import METHODS

CONFIGS = {
    "rtn": lambda: RTNConfig(bits=4, group_size=32),
    "svdquant": lambda: SVDQuantConfig(bits=4, rank=2, rounds=1, activations="int8"),
    "fp": lambda: FPConfig(weight_format="nvfp4"),
    "vq": lambda: VQConfig(codebook_bits=4, vector_size=2, restarts=1),
}
# ComfyUI's class of Z-Image has widths of its own, which the tiny model does not fit; Wan Animate's face encoder takes seconds.
DENSE = [name for name in TINY if name not in ("z_image", "wan_animate")]


@pytest.fixture
def native(dense, tiny):
    """``native(family)``: the tiny dense model, loaded by stock ComfyUI."""

    def load(family, dtype=torch.float32):
        tiny(family)
        import comfy.sd

        sources = native_tensors(dense(family), family)
        told = host.part("families").family_of_class(TINY[family].diffusers_class).told(TINY[family].settings())
        metadata = host.part("loader").file_metadata(told) if told else None
        return comfy.sd.load_diffusion_model_state_dict(sources, model_options={"dtype": dtype}, metadata=metadata)

    return load


@torch.no_grad()
def run(model, family):
    import comfy.model_management

    comfy.model_management.load_models_gpu([model])
    return TINY[family].native(model.model.diffusion_model)


@pytest.mark.parametrize("family", DENSE)
def test_the_same_layers_get_the_same_bits_as_in_diffusers(family, native, quantized):
    config = RTNConfig(bits=4, group_size=32)
    expected = read_stored_model(quantized(family, config))
    model = host.part("quantize").quantize_model(native(family), config)
    made = model.get_attachment("qdiff")["quantization"]
    assert made.layers == expected.quantization.layers
    wanted = expected.load()
    blocks = [b for w in host.part("loader").packed_weights(model).values() for b in [(w, x) for x in w._params.blocks]]
    for weight, block in blocks:
        if block.spec is None:
            continue
        values = block.tensors(weight._qdata)
        values = host.part("loader").swap_rows(block.spec, block.shape, values) if block.swapped else values
        for leaf in block.spec.tensors(block.shape):
            assert torch.equal(values[leaf], wanted[f"{block.name}.{leaf}"])


@pytest.mark.parametrize("family", DENSE)
@torch.no_grad()
def test_a_saved_model_is_read_by_the_loader_and_by_diffusers(family, native, tmp_path):
    quantize, loader = host.part("quantize"), host.part("loader")
    model = quantize.quantize_model(native(family), CONFIGS["rtn"]())
    output = run(model, family)
    file = quantize.save_model(model, tmp_path / "saved")
    assert torch.equal(run(loader.load_model(tmp_path / "saved"), family), output)
    alone = file.rename(tmp_path / "alone.safetensors")
    assert torch.equal(run(loader.load_model(alone), family), output)
    alone.rename(file)
    found = host.part("families").family_of_class(TINY[family].diffusers_class)
    if found.name not in host.part("settings").FINDERS:  # whose arguments diffusers has to be told
        return
    reference = diffusers.AutoModel.from_pretrained(str(tmp_path / "saved"))
    assert (TINY[family].reference(reference) - output).abs().max() < 1e-5


@pytest.mark.parametrize("family", ["lumina2", "hunyuan_video"])
@torch.no_grad()
def test_a_file_with_comfyuis_names_for_what_is_dense_loads_too(family, native, tmp_path):
    """As they were saved before the loader could read the families whose config diffusers has to be told."""
    quantize, loader = host.part("quantize"), host.part("loader")
    model = quantize.quantize_model(native(family), CONFIGS["rtn"]())
    output = run(model, family)
    info, weights = model.get_attachment("qdiff"), quantize._weights(model)
    packed = host.part("layout").is_packed
    tensors = [item for w in weights.values() if packed(w) for item in quantize._unpack(w)]
    tensors += [(key, w.clone()) for key, w in weights.items() if not packed(w)]
    write_stored_model(tmp_path / "saved", info["settings"], info["quantization"], tensors)
    assert torch.equal(run(loader.load_model(tmp_path / "saved"), family), output)


@pytest.mark.parametrize("method", CONFIGS)
@torch.no_grad()
def test_every_method_survives_saving(method, native, quantized, tmp_path):
    quantize, loader = host.part("quantize"), host.part("loader")
    model = quantize.quantize_model(native("flux"), CONFIGS[method]())
    output = run(model, "flux")
    if method != "svdquant":  # whose iterations amplify the last bit, which depends on how memory is aligned
        assert torch.equal(run(loader.load_model(quantized("flux", CONFIGS[method]())), "flux"), output)
    quantize.save_model(model, tmp_path / "saved")
    assert torch.equal(run(loader.load_model(tmp_path / "saved"), "flux"), output)


@torch.no_grad()
def test_a_single_file_needs_no_config_for_diffusers(native, tmp_path):
    quantize = host.part("quantize")
    model = quantize.quantize_model(native("flux"), CONFIGS["rtn"]())
    file = quantize.save_model(model, tmp_path / "saved").rename(tmp_path / "alone.safetensors")
    reference = diffusers.FluxTransformer2DModel.from_single_file(str(file))
    assert (TINY["flux"].reference(reference) - run(model, "flux")).abs().max() < 1e-5


@torch.no_grad()
def test_a_lora_is_baked_in(native):
    from comfyui.test_patches import peft_lora, with_lora

    model = with_lora(native("flux"), peft_lora("flux"), 1.0)
    wanted = run(model, "flux")
    packed = host.part("quantize").quantize_model(model, RTNConfig(bits=8, group_size=32))
    assert (run(packed, "flux") - wanted).abs().max() < 0.02 * wanted.std()


@torch.no_grad()
def test_a_lora_that_widens_a_layer_is_baked_in_and_saved(native, tmp_path):
    from comfyui.test_patches import control_lora, with_lora
    from comfyui.test_stock_nodes import sample

    quantize, loader = host.part("quantize"), host.part("loader")
    model = with_lora(native("flux"), control_lora(), 0.8)
    wanted = sample(model, "flux")
    packed = quantize.quantize_model(model, RTNConfig(bits=8, group_size=32, keep_outer_layers=False))
    output = sample(packed, "flux")
    assert (output - wanted).norm() < 0.02 * wanted.norm()
    quantize.save_model(packed, tmp_path / "saved")
    assert torch.equal(sample(loader.load_model(tmp_path / "saved"), "flux"), output)
    assert diffusers.AutoModel.from_pretrained(str(tmp_path / "saved")).config.in_channels == 128


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float16])
@torch.no_grad()
def test_a_model_that_is_stored_in_fewer_bits_can_be_quantized_and_saved(dtype, native, tmp_path):
    """As UNETLoader's weight_dtype has it. Eight bits only store: what stays dense is kept in the dtype that computes."""
    from comfyui.test_stock_nodes import sample

    quantize, dense = host.part("quantize"), native("flux", dtype)
    model = quantize.quantize_model(dense, RTNConfig(bits=8, group_size=32))
    output, wanted = sample(model, "flux"), sample(dense, "flux")
    assert (output - wanted).norm() < 0.02 * wanted.norm()
    quantize.save_model(model, tmp_path / "saved")
    assert torch.equal(sample(host.part("loader").load_model(tmp_path / "saved"), "flux"), output)
    made = read_stored_model(tmp_path / "saved").quantization.compute_dtype
    assert made == ("float16" if dtype == torch.float16 else "float32")


def test_skip_patterns_and_overrides_hold_inside_fused_layers(native):
    config = RTNConfig(bits=4, group_size=32, modules_to_not_convert=["to_k"], overrides={"attn.to_v": FPConfig(bits=8)})
    model = host.part("quantize").quantize_model(native("flux"), config)
    weight = host.part("loader").packed_weights(model)["double_blocks.0.img_attn.qkv"]
    assert [block.spec and block.spec.format.kind for block in weight._params.blocks] == ["integer", None, "minifloat"]
    dense = run(native("flux"), "flux")
    assert (run(model, "flux") - dense).abs().max() < 0.5


def test_an_interrupt_leaves_the_model_as_it_was(native):
    class Interrupted(Exception):
        pass

    def progress(done, total):
        if len(done) == 3:
            raise Interrupted

    model = native("flux")
    before = run(model, "flux")
    with pytest.raises(Interrupted):
        host.part("quantize").quantize_model(model, CONFIGS["rtn"](), progress)
    assert torch.equal(run(model, "flux"), before)


def test_errors_say_what_to_do(native, tmp_path):
    quantize = host.part("quantize")
    dense = native("flux")
    with pytest.raises(ConfigError, match=r"Quantize Model \(qdiff\)"):
        quantize.save_model(dense, tmp_path / "x")
    packed = quantize.quantize_model(dense, CONFIGS["rtn"]())
    with pytest.raises(ConfigError, match="quantized already"):
        quantize.quantize_model(packed, CONFIGS["rtn"]())
    with pytest.raises(ConfigError, match="nothing to quantize"):
        quantize.quantize_model(dense, RTNConfig(bits=4, modules_to_not_convert=["blocks"]))
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "something").touch()
    with pytest.raises(CheckpointError, match="exists already"):
        quantize.save_model(packed, tmp_path / "there")


def test_the_node_offers_what_the_methods_take():
    node = host.part("nodes.quantize")
    assert set(node.method_inputs()) == set(METHODS)
    for method, inputs in node.method_inputs().items():
        kind = type(QDiffConfig(method=method))
        by_name = {entry.id: entry for entry in inputs}
        assert set(by_name["activations"].options) == {"none", *kind.activation_choices}
        if "bits" in by_name:
            assert {float(b) for b in by_name["bits"].options} == set(kind.bit_choices)
        for choice in by_name["format"].options if "format" in by_name else by_name["bits"].options:
            shown = {"method": method, "format" if "format" in by_name else "bits": choice, "activations": "int8"}
            assert node.make_config(shown, "a, b", False, 3).modules_to_not_convert == ["a", "b"]


def test_the_growing_plot_takes_a_hundredth_of_the_time_at_most(quantized):
    """With a clock on which a plot takes a second and a layer five hundredths of one."""
    layers = list(read_stored_model(quantized("flux")).quantization.layers.items())
    now = 0.0

    def clock():
        nonlocal now
        now += 0.5
        return now

    plots = host.part("plots")
    grow, drawn, total = plots.GrowingPlot(clock), [], 1000
    for done in range(total + 1):
        now += 0.05
        drawn += [done] if grow(dict(layers[: min(done, 20)]), total) else []
    assert grow({}, total) is None
    assert drawn[0] == 1
    assert len(drawn) > 3 and 0.5 * (len(drawn) - 1) <= 0.01 * now
    assert grow({str(i): layers[0][1] for i in range(total)}, total).size == plots.SMALL
    with pytest.raises(ValueError, match="before the first layer"):
        plots.progress_plot([], 5)
