"""Whatever hangs on an adapter's own modules runs, and whatever keeps their weights elsewhere is asked for them."""

from __future__ import annotations

from collections import defaultdict

import accelerate
import pytest
import tiny_models
import torch
from diffusers.hooks import HookRegistry
from test_lora_dequantize import CPU, OFFLOADS, flux, folders, group, run  # noqa: F401
from test_lora_layers import distance, pair, with_adapter
from torch import Tensor, nn

from qdiff_diffusers import QDiffError
from qdiff_diffusers.layers.offloading import without_group_offloading

peft = pytest.importorskip("peft")


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


class Louder(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 3


def louder(part: nn.Linear) -> None:
    part.__class__ = Louder


def wrapped(part: nn.Linear) -> None:
    inner = part.forward
    part.forward = lambda x: inner(x) * 3


LAYERS = defaultdict(lambda: ("linear", "conv"), {"subclass": ("linear",)})
HANGING = {
    "hook": lambda part: part.register_forward_hook(lambda module, args, output: output * 3),
    "pre-hook": lambda part: part.register_forward_pre_hook(lambda module, args: (args[0] * 3,)),
    "parametrization": lambda part: torch.nn.utils.parametrize.register_parametrization(part, "weight", Doubled()),
    "subclass": louder,
    "replaced forward": wrapped,
}


@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
@pytest.mark.parametrize(("layer", "kind"), [(layer, kind) for kind in HANGING for layer in LAYERS[kind]])
def test_what_hangs_on_an_adapters_modules_runs(kind, part, layer):
    results = []
    packed, dense, x = pair(layer, "rtn")
    for base in (packed, dense):
        model = with_adapter(base).eval()
        HANGING[kind](getattr(model.base_model.model.layer, part)["default"])
        with torch.no_grad():
            results.append(model(x))
    assert distance(*results) < 1e-5


def test_a_hook_on_the_packed_layer_keeps_the_output_that_it_saw():
    packed, _, x = pair("linear", "rtn")
    kept = []
    packed.layer.register_forward_hook(lambda module, args, output: kept.append(output))
    model = with_adapter(packed).eval()
    with torch.no_grad():
        model(x)
        bare = model.base_model.model.layer.base_layer(x)
    assert torch.equal(kept[0], bare)


def test_an_adapter_with_nothing_on_it_is_added_in_place(monkeypatch):
    packed, _, x = pair("linear", "rtn")
    model = with_adapter(packed).eval()
    monkeypatch.setattr(nn.Linear, "forward", lambda *args: pytest.fail("PEFT's way, which costs two passes over the output"))
    with torch.no_grad():
        model(x)


def test_a_fused_adapter_is_a_copy():
    """Training or swapping the adapter must not change what was fused."""
    packed, _, x = pair("linear", "rtn")
    layer = with_adapter(packed).base_model.model.layer
    layer.merge()
    fused = layer(x)
    with torch.no_grad():
        for part in (layer.lora_A, layer.lora_B):
            part["default"].weight.fill_(7)
    assert torch.equal(layer(x), fused)
    layer.unmerge()


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("method", ["aq", "svdquant", "rtn-int8"])
def test_an_adapters_bias_is_fused_and_comes_out_bit_for_bit(method, rslora):
    packed, _, x = pair("linear", method)
    config = peft.LoraConfig(r=4, target_modules=["layer"], init_lora_weights=False, lora_bias=True, use_rslora=rslora)
    model = with_adapter(packed, config)
    layer = model.base_model.model.layer
    nn.init.normal_(layer.lora_B["default"].bias)
    active, bias = model(x), layer.base_layer.bias.clone()
    layer.merge()
    assert distance(model(x), active) < 1e-6
    layer.unmerge()
    assert torch.equal(layer.base_layer.bias, bias)
    assert torch.equal(model(x), active)


def test_a_bias_that_has_nowhere_to_go_is_refused():
    packed, _, x = pair("conv-stride", "rtn")
    config = peft.LoraConfig(r=4, target_modules=["layer"], init_lora_weights=False, lora_bias=True)
    model = with_adapter(packed, config)
    before = model(x)
    with pytest.raises(QDiffError, match="the layer has none"):
        model.merge_adapter()
    assert torch.equal(model(x), before)


def test_nothing_is_fused_if_one_adapter_cannot_be(folders):  # noqa: F811
    model = flux(folders)
    last = model.single_transformer_blocks[0].proj_mlp
    last.lora_B["default"].weight.data[0, 0] = torch.inf
    first = model.transformer_blocks[0].attn.to_q
    with pytest.raises(QDiffError, match="NaN or infinity"):
        model.fuse_lora(lora_scale=0.5)
    assert not first.merged_adapters and not first.base_layer.spec.rank
    assert first.scaling["default"] == 1  # nor scaled


@pytest.mark.parametrize("kind", OFFLOADS)
def test_an_adapter_of_an_offloaded_model_is_saved(kind, folders, tmp_path):  # noqa: F811
    model = flux(folders)
    expected = run(model)
    OFFLOADS[kind](model, str(tmp_path / "offload"))
    model.save_lora_adapter(tmp_path / "adapter")
    assert distance(run(model), expected) < 1e-5
    other = flux(folders, lora=False)
    other.load_lora_adapter(tmp_path / "adapter", prefix=None, use_safetensors=True)
    assert distance(run(other), expected) < 1e-5


@pytest.mark.parametrize("kind", OFFLOADS)
def test_an_adapter_is_swapped_on_an_offloaded_model(kind, folders, tmp_path):  # noqa: F811
    states, expected = [], []
    for seed in (1, 2):
        model = flux(folders, lora=False)
        torch.manual_seed(seed)
        model.add_adapter(peft.LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "proj_mlp"], init_lora_weights=False))
        expected.append(run(model))
        states.append(peft.utils.get_peft_model_state_dict(model))
    model = flux(folders, lora=False)
    model.load_lora_adapter(states[0], adapter_name="default", prefix=None)
    OFFLOADS[kind](model, str(tmp_path))
    assert distance(run(model), expected[0]) < 1e-5
    model.load_lora_adapter(states[1], adapter_name="default", prefix=None, hotswap=True)
    assert distance(run(model), expected[1]) < 1e-5
    assert distance(run(model), expected[1]) < 1e-5


@pytest.mark.parametrize("kind", OFFLOADS)
def test_adapters_are_switched_and_unloaded_on_an_offloaded_model(kind, folders, tmp_path):  # noqa: F811
    results = []
    for offloaded in (False, True):
        model = flux(folders)
        if offloaded:
            OFFLOADS[kind](model, str(tmp_path))
        outputs = [run(model)]
        model.set_adapters(["default"], [0.3])
        outputs.append(run(model))
        model.disable_adapters()
        outputs.append(run(model))
        model.enable_adapters()
        model.fuse_lora()
        model.unload_lora()
        outputs += [run(model), run(model)]
        results.append(outputs)
    for found, expected in zip(*results, strict=True):
        assert distance(found, expected) < 1e-5


@pytest.mark.parametrize("kind", ["sequential", "buffers too"])
def test_hooks_give_back_what_was_fused_meanwhile(kind, folders, tmp_path):  # noqa: F811
    model = flux(folders)
    OFFLOADS[kind](model, str(tmp_path))
    model.fuse_lora()
    fused = run(model)
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    assert not any(tensor.is_meta for tensor in model.state_dict().values())
    assert distance(run(model), fused) < 1e-6


@pytest.mark.parametrize("kind", ["sequential", "buffers too", "leaves"])
def test_pefts_own_merge_on_an_offloaded_model(kind, folders, tmp_path):  # noqa: F811
    model = flux(folders, lora=False)
    torch.manual_seed(5)
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["to_q"], init_lora_weights=False))
    active = run(model)
    OFFLOADS[kind](model, str(tmp_path))
    tuned.merge_adapter()
    assert distance(run(model), active) < 1e-5
    tuned.unmerge_adapter()
    assert distance(run(model), active) < 1e-5
    merged = tuned.merge_and_unload()
    assert distance(run(merged), active) < 1e-5


@pytest.mark.parametrize("kind", ["sequential", "disk", "casting"])
def test_a_variant_of_lora_that_would_not_find_its_layer_is_refused(kind, folders, tmp_path):  # noqa: F811
    model = flux(folders, lora=False)
    torch.manual_seed(5)
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["to_q", "ff.net.2"], init_lora_weights=False, use_dora=True))
    expected = run(model)
    if kind == "casting":
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    else:
        OFFLOADS[kind](model, str(tmp_path))
    with pytest.raises(QDiffError, match=r"adapter 'default' is no plain LoRA.*group offload by blocks"):
        run(model)
    if kind == "disk":
        with without_group_offloading(model):
            assert distance(run(model), expected) < 1e-5
        HookRegistry.check_if_exists_or_initialize(model).remove_hook("group_offloading")
        group(model, offload_type="block_level", num_blocks_per_group=1)
        assert distance(run(model), expected) < 1e-5


@pytest.mark.parametrize("load_first", [False, True])
def test_a_pipeline_with_sequential_offload(load_first, folders, tmp_path, monkeypatch):  # noqa: F811
    """diffusers takes the hooks off while it loads an adapter, and puts them on again."""
    from diffusers import FluxPipeline
    from test_lora import saved_adapter
    from test_lora_pipelines import pipeline

    file = saved_adapter(tmp_path, folders["flux"])
    expected = pipeline(flux(folders, lora=False))
    expected.load_lora_weights(file)
    pipe = pipeline(flux(folders, lora=False))
    offload = lambda self: accelerate.cpu_offload(self.transformer, execution_device=CPU)  # noqa: E731
    monkeypatch.setattr(FluxPipeline, "enable_sequential_cpu_offload", offload)  # the original wants an accelerator
    if load_first:
        pipe.load_lora_weights(file)
    pipe.enable_sequential_cpu_offload()
    if not load_first:
        pipe.load_lora_weights(file)
    wanted = tiny_models.run(expected.transformer, "flux")
    assert distance(run(pipe.transformer), wanted) < 1e-5
    pipe.fuse_lora()
    assert distance(run(pipe.transformer), wanted) < 1e-5
    pipe.unfuse_lora()
    assert distance(run(pipe.transformer), wanted) < 1e-5


@pytest.mark.parametrize("kind", OFFLOADS)
def test_an_offloaded_model_is_saved_whole_or_not_at_all(kind, folders, tmp_path):  # noqa: F811
    model = flux(folders, lora=False)
    expected = run(model)
    OFFLOADS[kind](model, str(tmp_path / "offload"))
    if kind in ("sequential", "buffers too"):
        with pytest.raises(QDiffError, match=r"is offloaded by accelerate.*remove_all_hooks"):
            model.save_pretrained(tmp_path / "saved")
        assert not (tmp_path / "saved").exists()
    else:
        model.save_pretrained(tmp_path / "saved")
        assert distance(run(type(model).from_pretrained(tmp_path / "saved")), expected) < 1e-5
    assert distance(run(model), expected) < 1e-5
