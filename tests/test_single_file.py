"""``from_single_file``: files in diffusers' own layout, dense and already quantized, and files in another program's layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from qdiff_diffusers import (
    AQConfig,
    CheckpointError,
    ConfigError,
    FPConfig,
    QDiffConfig,
    RTNConfig,
    SVDQuantConfig,
    VQConfig,
    inspect_checkpoint,
)

CONFIGS = {
    "aq": lambda: AQConfig(num_codebooks=1, codebook_bits=8, vector_size=4, codebook="shared", rotation=True, effort=0),
    "vq": lambda: VQConfig(codebook_bits=4, vector_size=2, restarts=1),
    "fp": lambda: FPConfig(weight_format="nvfp4"),
    "svdquant": lambda: SVDQuantConfig(bits=4, rank=2, rounds=1),
    "rtn": lambda: RTNConfig(bits=4),
}
FILE = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="session")
def flux_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("flux")
    tiny_models.make("flux").save_pretrained(folder)
    return folder


def load(folder: Path, config: QDiffConfig | None = None) -> nn.Module:
    return type(tiny_models.make("flux")).from_pretrained(folder, quantization_config=config)


def load_file_of(folder: Path, config_folder: Path, config: QDiffConfig) -> nn.Module:
    kind = type(tiny_models.make("flux"))
    return kind.from_single_file(str(folder / FILE), config=str(config_folder), quantization_config=config)


def assert_same_model(a: nn.Module, b: nn.Module) -> None:
    left, right = a.state_dict(), b.state_dict()
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)
    assert torch.equal(tiny_models.run(a, "flux"), tiny_models.run(b, "flux"))


@pytest.mark.parametrize("method", CONFIGS)
def test_a_single_file_is_quantized_while_loading_and_read_back(method, flux_folder, tmp_path):
    expected = load(flux_folder, CONFIGS[method]())
    model = load_file_of(flux_folder, flux_folder, CONFIGS[method]())
    assert_same_model(model, expected)
    model.save_pretrained(tmp_path)
    assert_same_model(load(tmp_path), expected)
    assert_same_model(load_file_of(tmp_path, tmp_path, inspect_checkpoint(tmp_path).config), expected)


def test_a_config_that_knows_other_layers_may_be_used_for_a_dense_file(flux_folder, tmp_path):
    load(flux_folder, RTNConfig(bits=4)).save_pretrained(tmp_path)
    model = load_file_of(flux_folder, flux_folder, inspect_checkpoint(tmp_path).config)
    assert_same_model(model, load(flux_folder, RTNConfig(bits=4)))


def test_a_quantized_file_without_its_description_is_refused(flux_folder, tmp_path):
    load(flux_folder, RTNConfig(bits=4)).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"inspect_checkpoint\(folder\)\.config"):
        load_file_of(tmp_path, tmp_path, RTNConfig(bits=4))


def test_an_incomplete_quantized_file_is_refused_by_name(flux_folder, tmp_path):
    load(flux_folder, RTNConfig(bits=4)).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / FILE)
    del tensors["transformer_blocks.0.attn.to_q.scales"]
    save_file(tensors, tmp_path / FILE)
    with pytest.raises(CheckpointError, match=r"attn\.to_q\.scales"):
        load_file_of(tmp_path, tmp_path, inspect_config(flux_folder, tmp_path / "other"))


def inspect_config(dense: Path, folder: Path) -> QDiffConfig:
    load(dense, RTNConfig(bits=4)).save_pretrained(folder)
    return inspect_checkpoint(folder).config


def original_layout(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A tiny Flux in its authors' layout, as far as diffusers' converter looks at it."""
    swap = lambda t: torch.cat(t.chunk(2)[::-1])  # noqa: E731 - the halves of the last modulation are stored the other way round
    out = {}

    def move(new: str, *old: str) -> None:
        for leaf in ("weight", "bias"):
            out[f"{new}.{leaf}"] = torch.cat([tensors[f"{name}.{leaf}"] for name in old])

    for new, old in (("time_in", "timestep_embedder"), ("vector_in", "text_embedder")):
        move(f"{new}.in_layer", f"time_text_embed.{old}.linear_1")
        move(f"{new}.out_layer", f"time_text_embed.{old}.linear_2")
    move("txt_in", "context_embedder")
    move("img_in", "x_embedder")
    move("final_layer.linear", "proj_out")
    block, b = "double_blocks.0", "transformer_blocks.0"
    move(f"{block}.img_mod.lin", f"{b}.norm1.linear")
    move(f"{block}.txt_mod.lin", f"{b}.norm1_context.linear")
    move(f"{block}.img_attn.qkv", *(f"{b}.attn.to_{x}" for x in "qkv"))
    move(f"{block}.txt_attn.qkv", *(f"{b}.attn.add_{x}_proj" for x in "qkv"))
    move(f"{block}.img_attn.proj", f"{b}.attn.to_out.0")
    move(f"{block}.txt_attn.proj", f"{b}.attn.to_add_out")
    for new, old in (("img_mlp", "ff"), ("txt_mlp", "ff_context")):
        move(f"{block}.{new}.0", f"{b}.{old}.net.0.proj")
        move(f"{block}.{new}.2", f"{b}.{old}.net.2")
    single, s = "single_blocks.0", "single_transformer_blocks.0"
    move(f"{single}.modulation.lin", f"{s}.norm.linear")
    move(f"{single}.linear1", *(f"{s}.attn.to_{x}" for x in "qkv"), f"{s}.proj_mlp")
    move(f"{single}.linear2", f"{s}.proj_out")
    norms = {
        f"{block}.img_attn.norm.query_norm.scale": f"{b}.attn.norm_q.weight",
        f"{block}.img_attn.norm.key_norm.scale": f"{b}.attn.norm_k.weight",
        f"{block}.txt_attn.norm.query_norm.scale": f"{b}.attn.norm_added_q.weight",
        f"{block}.txt_attn.norm.key_norm.scale": f"{b}.attn.norm_added_k.weight",
        f"{single}.norm.query_norm.scale": f"{s}.attn.norm_q.weight",
        f"{single}.norm.key_norm.scale": f"{s}.attn.norm_k.weight",
    }
    out |= {new: tensors[old] for new, old in norms.items()}
    for leaf in ("weight", "bias"):
        out[f"final_layer.adaLN_modulation.1.{leaf}"] = swap(tensors[f"norm_out.linear.{leaf}"])
    return {key: value.clone() for key, value in out.items()}


def test_a_file_in_its_authors_layout_is_converted_and_quantized(flux_folder, tmp_path, monkeypatch):
    """diffusers' converter for Flux writes the published width of 3072 into its rule for the fused layers."""
    from diffusers.loaders import single_file_utils

    source = single_file_utils.convert_flux_transformer_checkpoint_to_diffusers
    assert 3072 in source.__code__.co_consts
    constants = tuple(32 if value == 3072 else value for value in source.__code__.co_consts)
    monkeypatch.setattr(source, "__code__", source.__code__.replace(co_consts=constants))
    save_file(original_layout(load_file(flux_folder / FILE)), tmp_path / FILE)
    assert_same_model(load_file_of(tmp_path, flux_folder, RTNConfig(bits=4)), load(flux_folder, RTNConfig(bits=4)))
