"""``from_single_file``: files in diffusers' own layout, dense and already quantized, and files in another program's layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_models
import torch
from flux_layout import narrow_converter, original_layout
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


def test_a_file_in_its_authors_layout_is_converted_and_quantized(flux_folder, tmp_path, monkeypatch):
    narrow_converter(monkeypatch)
    save_file(original_layout(load_file(flux_folder / FILE)), tmp_path / FILE)
    assert_same_model(load_file_of(tmp_path, flux_folder, RTNConfig(bits=4)), load(flux_folder, RTNConfig(bits=4)))
