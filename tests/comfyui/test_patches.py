"""LoRAs, merges and memory management: a packed model does what ComfyUI does with the same weights stored densely."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from comfyui import host
from comfyui.tiny_families import TINY, make
from torch import nn

from qdiff_diffusers import AQConfig, ConfigError, QDiffConfig, RTNConfig, SVDQuantConfig, VQConfig

TOLERANCE = 1e-5
FAMILIES = ("flux", "sd3", "sdxl", "wan")
METHODS: dict[str, Callable[..., QDiffConfig]] = {
    "rtn": lambda **options: RTNConfig(bits=4, group_size=32, **options),
    "svdquant": lambda **options: SVDQuantConfig(bits=4, rank=2, rounds=1, **options),
    "vq": lambda **options: VQConfig(codebook_bits=4, vector_size=2, restarts=1, **options),
    "aq": lambda **options: AQConfig(bits=2, effort=0, **options),
}


@pytest.fixture
def models(tiny, quantized):
    """``models(family)``: the packed model, and stock ComfyUI's model with the same weights decoded."""

    def pair(family, config=None):
        tiny(family)
        import comfy.sd

        loader = host.part("loader")
        packed = loader.load_model(quantized(family, config))
        tensors = packed.model.diffusion_model.state_dict()
        decoded = {k: v.dequantize() if host.part("layout").is_packed(v) else v.clone() for k, v in tensors.items()}
        return packed, comfy.sd.load_diffusion_model_state_dict(decoded, model_options={"dtype": torch.float32})

    return pair


@torch.no_grad()
def run(model, family):
    import comfy.model_management

    comfy.model_management.load_models_gpu([model])
    return TINY[family].native(model.model.diffusion_model)


def linear_layers(family):
    """Names and layers of the repeated blocks of the diffusers model."""
    chosen = (nn.Linear, nn.Conv2d) if family == "sdxl" else (nn.Linear,)
    return {n: m for n, m in make(family).named_modules() if isinstance(m, chosen) and ("blocks." in n)}


def peft_lora(family, rank=4, dora=False):
    """A LoRA file in PEFT's naming for every layer of the blocks."""
    torch.manual_seed(3)
    out = {}
    prefix = "unet" if family == "sdxl" else "transformer"
    for name, layer in linear_layers(family).items():
        kernel = layer.weight.shape[2:]
        out[f"{prefix}.{name}.lora_A.weight"] = torch.randn(rank, layer.weight.shape[1], *kernel) * 0.05
        out[f"{prefix}.{name}.lora_B.weight"] = torch.randn(layer.weight.shape[0], rank, *(1 for _ in kernel)) * 0.05
        if dora:
            out[f"{prefix}.{name}.dora_scale"] = torch.rand(1, layer.weight.shape[1], *(1 for _ in kernel)) + 0.5
    return out


def native_lora(family, rank=4):
    """The same file with ComfyUI's names, as it is usual for models whose diffusers names ComfyUI does not know."""
    families = host.part("families")
    rules = families.family_of_class(TINY[family].diffusers_class).rules(make(family).state_dict())
    out = {}
    for key, value in peft_lora(family, rank).items():
        name, kind = key.removeprefix("transformer.").split(".lora_")
        ((native, _),) = families.to_native(rules, [f"{name}.weight"]).items()
        out[f"diffusion_model.{native.removesuffix('.weight')}.lora_{kind}"] = value
    return out


def kohya_lora(family, rank=4):
    """The same file with the names that are usual for UNets; of PEFT's names ComfyUI knows only some of theirs."""
    parts = {"A": "lora_down", "B": "lora_up"}
    split = ((key.removeprefix("unet.").split(".lora_"), value) for key, value in peft_lora(family, rank).items())
    return {f"lora_unet_{name.replace('.', '_')}.{parts[kind[0]]}.weight": value for (name, kind), value in split}


def lora_file(family):
    """A LoRA under names that stock loaders know."""
    return {"wan": native_lora, "sdxl": kohya_lora}.get(family, peft_lora)(family)


def lokr(model):
    """A LoKr patch for every packed linear layer, in ComfyUI's own names."""
    torch.manual_seed(4)
    weights = {n: w for n, w in host.part("loader").packed_weights(model).items() if w.ndim == 2}
    out = {}
    for name, weight in weights.items():
        rows, columns = weight.shape
        out[f"diffusion_model.{name}.lokr_w1"] = torch.randn(2, 2) * 0.3
        out[f"diffusion_model.{name}.lokr_w2"] = torch.randn(rows // 2, columns // 2) * 0.02
    return out


def loha(model):
    """A LoHa patch, a product of two low-rank ones."""
    torch.manual_seed(5)
    weights = {n: w for n, w in host.part("loader").packed_weights(model).items() if w.ndim == 2}
    out = {}
    for name, weight in weights.items():
        for factor in ("w1", "w2"):
            out[f"diffusion_model.{name}.hada_{factor}_a"] = torch.randn(weight.shape[0], 3) * 0.2
            out[f"diffusion_model.{name}.hada_{factor}_b"] = torch.randn(3, weight.shape[1]) * 0.2
    return out


def difference(model):
    """What is to be added to every weight, as extracted from a fine-tuned model."""
    torch.manual_seed(6)
    weights = host.part("loader").packed_weights(model)
    return {f"diffusion_model.{name}.diff": torch.randn(weight.shape) * 0.02 for name, weight in weights.items()}


def with_lora(model, lora, strength):
    import comfy.sd

    patched, _ = comfy.sd.load_lora_for_models(model, None, dict(lora), strength, 0.0)
    assert patched.patches
    return patched


def patches_of(model):
    return [m.patches for m in model.model.modules() if getattr(m, "patches", None) is not None]


def control_lora(columns=2.0):
    """As the ones that give Flux an image to follow: a projection of more channels, and biases."""
    torch.manual_seed(7)
    rows, inputs = make("flux").x_embedder.weight.shape
    inputs = int(inputs * columns)
    lora = {"img_in.lora_B.weight": torch.randn(rows, 4), "img_in.lora_A.weight": torch.randn(4, inputs)}
    lora = {key: value * 0.2 for key, value in lora.items()} | {"img_in.diff_b": torch.randn(rows) * 0.1}
    lora["img_in.reshape_weight"] = torch.tensor([rows, inputs])
    return {f"diffusion_model.{key}": value for key, value in lora.items()} | peft_lora("flux")


@pytest.mark.parametrize("family", ["flux", "sd3", "sdxl"])
def test_a_lora_is_a_branch_and_exact(family, models):
    packed, stock = models(family)
    lora = lora_file(family)
    before = run(packed, family)
    patched, expected = (with_lora(model, lora, 0.8) for model in (packed, stock))
    output, wanted = run(patched, family), run(expected, family)
    assert (wanted - before).abs().max() > 100 * TOLERANCE
    assert (output - wanted).abs().max() < TOLERANCE
    # ComfyUI patches SD3's last context modulation through a function, as its halves are exchanged.
    assert len(patches_of(patched)) > 10 and sum(p.dense for p in patches_of(patched)) == (family == "sd3")
    assert torch.equal(run(packed, family), before)
    assert not patches_of(packed)


@pytest.mark.parametrize("family", ["flux", "sd3", "sdxl", "wan", "qwen"])
@torch.no_grad()
def test_a_lora_does_what_it_does_in_diffusers(family, quantized, models):
    """The reference is diffusers' model of the same checkpoint with the same LoRA through PEFT; also after unloading."""
    import comfy.model_management
    import diffusers

    lora = peft_lora(family)
    reference = diffusers.AutoModel.from_pretrained(str(quantized(family)))
    plain = TINY[family].reference(reference)
    reference.load_lora_adapter(dict(lora), prefix="unet" if family == "sdxl" else "transformer", adapter_name="a")
    reference.set_adapters(["a"], [0.8])
    wanted = TINY[family].reference(reference)
    packed, _ = models(family)
    patched = with_lora(packed, lora_file(family), 0.8)
    assert (wanted - plain).abs().max() > 100 * TOLERANCE
    assert (run(patched, family) - wanted).abs().max() < TOLERANCE
    comfy.model_management.unload_all_models()
    assert (run(packed, family) - plain).abs().max() < TOLERANCE
    comfy.model_management.unload_all_models()
    patched.load(torch.device("cpu"), lowvram_model_memory=packed.model_size() // 2)
    assert (TINY[family].native(patched.model.diffusion_model) - wanted).abs().max() < TOLERANCE


def test_two_loras_add_up(models):
    packed, stock = models("flux")
    first, second = peft_lora("flux", 4), {k: -0.5 * v for k, v in peft_lora("flux", 2).items()}
    outputs = [run(with_lora(with_lora(model, first, 1.0), second, 0.4), "flux") for model in (packed, stock)]
    assert (outputs[0] - outputs[1]).abs().max() < TOLERANCE


ADAPTERS = {"dora": lambda model: peft_lora("flux", dora=True), "lokr": lokr, "loha": loha, "difference": difference}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_other_adapters_act_on_the_decoded_weight(kind, models):
    packed, stock = models("flux")
    lora = ADAPTERS[kind](packed)
    before = run(packed, "flux")
    outputs = [run(with_lora(model, lora, 0.7), "flux") for model in (packed, stock)]
    assert (outputs[1] - before).abs().max() > 100 * TOLERANCE
    assert (outputs[0] - outputs[1]).abs().max() < TOLERANCE


@torch.no_grad()
def test_a_layer_that_shifts_its_inputs_keeps_its_bias_under_patches():
    """Such a layer's bias undoes the shift. A patch acts on the decoded weight, which sees inputs that are not shifted."""
    host.pack()
    from dataclasses import replace

    from comfy.weight_adapter import LoKrAdapter

    from qdiff_diffusers import SVDQuantConfig
    from qdiff_diffusers.model.packing import quantize_named

    torch.manual_seed(0)
    weight, shift, x = torch.randn(64, 64), torch.full((64,), 4.0), torch.rand(5, 64)
    stored, tensors = quantize_named("x", weight, SVDQuantConfig(bits=8, rank=2, activations="int4", rounds=1))
    spec = replace(stored.spec, shift=True, smooth=False)
    dtype = spec.tensors((64, 64))["shift"].dtype
    tensors = {name: value for name, value in tensors.items() if name != "smooth"} | {"shift": shift.to(dtype)}
    packed = host.part("layout").make_weight([host.part("layout").Piece(spec, "x", (64, 64), tensors)], torch.float32)
    undo = -spec.shift_offset(packed._params.blocks[0].tensors(packed._qdata), (64, 64))
    layer = host.part("ops").Operations.Linear(64, 64)
    layer.weight, layer.bias = (nn.Parameter(p, requires_grad=False) for p in (packed, undo))
    wanted = x @ packed.dequantize().T
    assert (layer(x) - wanted).norm() < 0.2 * wanted.norm()  # 4-bit inputs
    nothing = LoKrAdapter(set(), (torch.zeros(2, 2), torch.zeros(32, 32), *[None] * 7))
    layer.patches = host.part("patches").Patches("x", [(1.0, nothing, 1.0, None, None)], (64, 64))
    assert layer.patches.dense
    assert (layer(x) - wanted).abs().max() < TOLERANCE * wanted.abs().max()
    layer.patches = None
    layer.set_weight(torch.cat([packed.dequantize(), torch.ones(64, 8)], 1))  # as a patch that makes it wider leaves it
    assert (layer(torch.cat([x, torch.zeros(5, 8)], 1)) - wanted).abs().max() < TOLERANCE * wanted.abs().max()
    layer.weight = nn.Parameter(packed, requires_grad=False)
    assert (layer(x) - wanted).norm() < 0.2 * wanted.norm()


@torch.no_grad()
@pytest.mark.parametrize("method", [*METHODS, "dense"])
def test_a_control_lora_widens_a_packed_layer(method, models):
    """And lets go of it. Models look at the weight's shape, to know how many channels to put in."""
    import comfy.model_management
    from comfyui.test_stock_nodes import sample

    outer = {"keep_outer_layers": False} | ({} if method == "rtn" else {"modules_to_not_convert": ["transformer_blocks"]})
    packed, stock = models("flux", RTNConfig(bits=4, group_size=32) if method == "dense" else METHODS[method](**outer))
    assert host.part("layout").is_packed(packed.model.diffusion_model.img_in.weight) == (method != "dense")
    before = sample(packed, "flux")
    patched, expected = (with_lora(model, control_lora(), 0.8) for model in (packed, stock))
    wanted = sample(expected, "flux")
    assert (wanted - before).abs().max() > 100 * TOLERANCE
    limit = TOLERANCE * wanted.abs().max()
    assert (sample(patched, "flux") - wanted).abs().max() < limit
    patched.partially_unload(torch.device("cpu"), packed.model_size() // 2)
    assert (sample(patched, "flux") - wanted).abs().max() < limit
    again = with_lora(patched, peft_lora("flux"), 0.0)  # other patches on the same weights
    assert (sample(again, "flux") - wanted).abs().max() < limit
    assert torch.equal(sample(packed, "flux"), before)
    comfy.model_management.unload_all_models()
    patched.load(torch.device("cpu"), lowvram_model_memory=1)  # nothing fits; ComfyUI does not widen dense layers then
    assert packed.model.diffusion_model.img_in.weight.shape[1] == (64 if method == "dense" else 128)
    patched.unpatch_model(torch.device("cpu"))
    assert packed.model.diffusion_model.img_in.weight.shape[1] == 64
    assert torch.equal(sample(packed, "flux"), before)


@torch.no_grad()
def test_a_difference_that_pads_widens_a_packed_convolution(models):
    outputs = []
    for model in models("sdxl"):
        model = model.clone()
        weight = model.model.diffusion_model.input_blocks[0][0].weight
        torch.manual_seed(8)
        wider = torch.randn(weight.shape[0], 2 * weight.shape[1], *weight.shape[2:])
        key = "diffusion_model.input_blocks.0.0.weight"
        model.add_patches({key: ("diff", (wider, {"pad_weight": True}))}, 0.7)
        run_nothing(model)
        outputs.append(model.model.diffusion_model.input_blocks[0][0](torch.randn(1, 8, 8, 8)))
    assert torch.equal(*outputs)


def run_nothing(model):
    import comfy.model_management

    comfy.model_management.load_models_gpu([model])


def test_a_lora_that_narrows_a_layer_or_does_so_by_hooks_is_refused_by_name(models):
    import comfy.hooks
    import comfy.lora

    packed, _ = models("flux")
    with pytest.raises(ConfigError, match=r"img_in\.weight \[128, 32\], which is smaller than the model's \[128, 64\]"):
        run_nothing(with_lora(packed, control_lora(0.5), 1.0))
    model = packed.clone()
    hook = comfy.hooks.WeightHook(strength_model=1.0)
    hook.weights = comfy.lora.load_lora(control_lora(), comfy.lora.model_lora_keys_unet(model.model, {}))
    hook.need_weight_init = False
    group = comfy.hooks.HookGroup()
    group.add(hook)
    run_nothing(model)
    model.add_hook_patches(hook, hook.weights, 1.0)
    with pytest.raises(ConfigError, match=r"hooks makes diffusion_model\.img_in\.weight .*LoraLoaderModelOnly"):
        model.patch_hooks(group)


@torch.no_grad()
@pytest.mark.parametrize("family", ["flux", "sdxl"])
def test_a_lora_stays_when_a_part_of_the_model_is_unloaded(family, models):
    packed, _ = models(family)
    patched = with_lora(packed, lora_file(family), 0.8)
    wanted = run(patched, family)
    assert patched.partially_unload(torch.device("cpu"), packed.model_size() // 2) > 0
    assert torch.equal(TINY[family].native(patched.model.diffusion_model), wanted)
    patched.partially_load(torch.device("cpu"), 1e9)
    assert torch.equal(TINY[family].native(patched.model.diffusion_model), wanted)


@torch.no_grad()
@pytest.mark.parametrize("change", ["as convolutions", "flat", "of another model"])
def test_a_lora_of_another_shape_does_what_it_does_to_dense_weights(change, models, caplog):
    """Linear layers' are stored as 1 x 1 convolutions too, and convolutions' flat; those of another model are left out."""
    packed, stock = models("sdxl")
    changes = {
        "as convolutions": lambda w: w[..., None, None] if w.ndim == 2 else w,
        "flat": lambda w: w.flatten(1),
        "of another model": lambda w: torch.cat([w, w], 1) if len(w) == 4 else w,  # twice as many columns
    }
    lora = {key: changes[change](value).contiguous() for key, value in lora_file("sdxl").items()}
    before = run(packed, "sdxl")
    output, wanted = (run(with_lora(model, lora, 0.8), "sdxl") for model in (packed, stock))
    assert (output - wanted).abs().max() < TOLERANCE
    assert ((wanted - before).abs().max() < TOLERANCE) == (change == "of another model")
    assert ("is left out" in caplog.text) == (change == "of another model")


def test_a_merge_of_two_models_is_that_of_their_decoded_weights(models):
    def merged(one, other):
        result = one.clone()
        for key, patch in other.get_key_patches("diffusion_model.").items():
            result.add_patches({key: patch}, 0.3, 0.7)
        return result

    packed, stock = models("flux")
    other, _ = models("flux")
    lora = peft_lora("flux")
    output = run(merged(packed, with_lora(other, lora, 1.0)), "flux")
    wanted = run(merged(stock, with_lora(stock, lora, 1.0)), "flux")
    assert (wanted - run(stock, "flux")).abs().max() > 100 * TOLERANCE
    assert (output - wanted).abs().max() < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_unloading_and_partial_loading_change_nothing(family, models):
    import comfy.model_management

    packed, _ = models(family)
    before = run(packed, family)
    comfy.model_management.unload_all_models()
    assert torch.equal(run(packed, family), before)
    comfy.model_management.unload_all_models()
    packed.load(torch.device("cpu"), lowvram_model_memory=packed.model_size() // 2)  # half of the layers stay where they are
    assert any(getattr(m, "comfy_patched_weights", False) for m in packed.model.modules())
    assert torch.equal(TINY[family].native(packed.model.diffusion_model), before)


def test_a_model_counts_as_many_bytes_as_it_stores(models):
    packed, stock = models("flux")
    assert packed.model_size() < 0.45 * stock.model_size()
    weights = host.part("loader").packed_weights(packed)
    assert sum(w.nbytes for w in weights.values()) <= packed.model_size()


@torch.no_grad()
def test_a_lora_that_is_scheduled_by_hooks_comes_and_goes(models):
    import comfy.hooks
    import comfy.lora
    import comfy.model_management

    packed, stock = models("flux")
    before = run(packed, "flux")
    outputs = []
    for model in (packed, stock):
        model = model.clone()
        keys = comfy.lora.model_lora_keys_unet(model.model, {})
        hook = comfy.hooks.WeightHook(strength_model=0.8)
        hook.weights, hook.need_weight_init = comfy.lora.load_lora(peft_lora("flux"), keys), False
        group = comfy.hooks.HookGroup()
        group.add(hook)
        run(model, "flux")
        model.add_hook_patches(hook, hook.weights, 0.8)
        model.patch_hooks(group)
        outputs.append(TINY["flux"].native(model.model.diffusion_model))
        model.patch_hooks(None)
        outputs.append(TINY["flux"].native(model.model.diffusion_model))
    assert (outputs[0] - before).abs().max() > 100 * TOLERANCE
    assert (outputs[0] - outputs[2]).abs().max() < TOLERANCE
    assert torch.equal(outputs[1], before)


@torch.no_grad()
def test_torch_compile_sees_through_packed_layers(models):
    packed, _ = models("flux")
    before = run(packed, "flux")
    block = packed.model.diffusion_model.double_blocks[0].img_mlp
    x = torch.randn(1, 8, 128)
    expected = block(x)
    compiled = torch.compile(block, backend="eager")
    assert torch.allclose(compiled(x), expected, atol=1e-6)
    assert torch.equal(run(packed, "flux"), before)
