"""``qdiff comfy install`` and what belongs to the pack: complete, in every language, and never half there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qdiff_diffusers import ConfigError
from qdiff_diffusers.cli.comfy import install_pack

ROOT = Path(__file__).parents[1]


@pytest.fixture
def comfyui(tmp_path):
    (tmp_path / "custom_nodes").mkdir()
    return tmp_path


def test_the_pack_is_copied_and_replaced_on_request(comfyui):
    target = install_pack(comfyui)
    assert (target / "__init__.py").is_file() and (target / "comfy_nodes" / "nodes" / "load.py").is_file()
    assert (target / "locales" / "de" / "nodeDefs.json").is_file()
    with pytest.raises(ConfigError, match="--overwrite"):
        install_pack(comfyui)
    (target / "stale").touch()
    assert not (install_pack(comfyui / "custom_nodes", overwrite=True) / "stale").exists()
    assert [p.name for p in (comfyui / "custom_nodes").iterdir()] == ["qdiff"]


def test_an_installation_without_the_files_says_so(comfyui, monkeypatch, tmp_path):
    monkeypatch.setattr("qdiff_diffusers.cli.comfy.SOURCES", (tmp_path / "nothing",))
    with pytest.raises(ConfigError, match="--force-reinstall"):
        install_pack(comfyui)
    assert not any((comfyui / "custom_nodes").iterdir())


def test_errors_name_the_way_out(comfyui):
    with pytest.raises(ConfigError, match=r"main\.py"):
        install_pack(comfyui / "nowhere")
    with pytest.raises(ConfigError, match="no custom_nodes folder"):
        install_pack(ROOT / "docs")
    (comfyui / "custom_nodes" / "qdiff").mkdir()
    with pytest.raises(ConfigError, match="move it away"):
        install_pack(comfyui, overwrite=True)


def test_every_node_has_a_help_page_and_every_locale_names_it():
    pages = {page.stem for page in (ROOT / "comfy_nodes" / "web" / "docs").glob("*.md")}
    ids = {
        line.split('"')[1]
        for file in (ROOT / "comfy_nodes" / "nodes").glob("*.py")
        for line in file.read_text().splitlines()
        if "node_id=" in line
    }
    assert pages == ids
    for language in ("de", "fr"):
        names = json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text())
        assert set(names) == ids and all(entry["display_name"].endswith("(qdiff)") for entry in names.values())
