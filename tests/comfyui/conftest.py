"""Fixtures for the tests that run inside ComfyUI. Without a ComfyUI they are skipped and nothing of it is imported."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from comfyui import host, models_folder, tiny_families
from comfyui.server import Server

from qdiff_diffusers import QDiffConfig, RTNConfig, quantize


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(host.needs_comfyui)


@pytest.fixture(scope="session", autouse=True)
def comfyui() -> None:
    """ComfyUI can be imported."""
    if host.FOLDER:
        host.pack()


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``dense(family)``: the folder of a tiny dense model, saved as diffusers saves it."""
    root, made = tmp_path_factory.mktemp("dense"), {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = root / name / "transformer"
            tiny_families.make(name).save_pretrained(made[name])
            for beside in tiny_families.TINY[name].beside:
                tiny_families.make(name, beside).save_pretrained(root / name / beside)
        return made[name]

    return folder


@pytest.fixture(scope="session")
def quantized(dense: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``quantized(family, config)``: the folder of the same model, quantized by diffusers; every layer that can be, by default."""
    root, made = tmp_path_factory.mktemp("quantized"), {}

    def folder(name: str, config: QDiffConfig | None = None) -> Path:
        config = config or RTNConfig(bits=4, group_size=32, keep_outer_layers=False)
        key = (name, str(config.to_dict()))
        if key not in made:
            folder = root / f"{name}-{len(made)}"
            beside = tiny_families.TINY[name].beside
            made[key] = quantize(dense(name), config, folder / "transformer" if beside else folder, dtype=torch.float32)
            for other in beside:
                shutil.copytree(dense(name).parent / other, folder / other)
        return made[key]

    return folder


@pytest.fixture(scope="session")
def server(dense: Any, quantized: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A running ComfyUI with the installed pack and tiny models."""
    base = tmp_path_factory.mktemp("base")
    models_folder.fill(base / "models", dense, quantized)
    server = Server(base, "--preview-method", "latent2rgb", "--extra-model-paths-config", str(base / "extra.yaml"))
    yield server
    server.stop()


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``tiny(family)``: let ComfyUI recognise the tiny model of a family, whose sizes its detection takes for granted."""
    from comfyui.detection import recognise

    return lambda name: recognise(monkeypatch, name)
