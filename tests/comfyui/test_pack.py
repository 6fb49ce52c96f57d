"""What ``comfy node publish`` would upload: checked and packed by comfy-cli itself, then unpacked into custom_nodes and used."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from comfyui.host import ROOT
from comfyui.server import Server, node
from comfyui.test_install import OURS, hide
from comfyui.test_server import NODES

pytest.importorskip("comfy_cli", reason="comfy-cli is not installed")
NEEDED = {
    "__init__.py",
    "pyproject.toml",
    "requirements.txt",
    "README.md",
    "comfy_nodes/web/js/qdiff.js",
    "example_workflows/qdiff_demo.json",
    "example_workflows/qdiff_demo.jpg",
    "locales/de/nodeDefs.json",
    "qdiff_diffusers/demo_model/model_index.json",
    "kernels/torch-ext/qdiff_kernels/__init__.py",
}
LARGEST = 30e6  # bytes; the bundled demo model is most of it


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """What would be committed now, in a repository of its own: comfy-cli packs what git knows."""
    folder = tmp_path_factory.mktemp("checkout") / "qdiff"
    names = subprocess.check_output(["git", "-C", ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard"], text=True)
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    for command in (["init", "--quiet"], ["remote", "add", "origin", "https://example.com/qdiff.git"], ["add", "--all"]):
        subprocess.run(["git", "-C", folder, *command], check=True)
    return folder


def comfy(folder, *command):
    """What comfy-cli says. It keeps its settings in the home folder and asks about telemetry, unless told otherwise."""
    environment = os.environ | {
        "HOME": str(folder.parent),
        "XDG_CONFIG_HOME": str(folder.parent),
        "DO_NOT_TRACK": "1",
        "NO_COLOR": "1",
    }
    line = [Path(sys.executable).with_name("comfy"), "--skip-prompt", "node", *command]
    done = subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def archive(checkout):
    said = comfy(checkout, "pack")
    assert "warning" not in said.lower() and "Created zip file" in said
    return checkout / "node.zip"


def test_the_registry_finds_nothing_to_complain_about(checkout):
    said = comfy(checkout, "validate")
    assert "All validation checks passed successfully" in said
    assert "warning" not in said.lower() and "error" not in said.lower()


def test_the_archive_has_what_the_nodes_need_and_nothing_else(archive):
    with zipfile.ZipFile(archive) as packed:
        names = packed.namelist()
    assert NEEDED | {f"comfy_nodes/web/docs/{name}.md" for name in NODES} <= set(names)
    top = {name.split("/")[0] for name in names if "/" in name}
    assert top == {"comfy_nodes", "example_workflows", "hub_cards", "kernels", "locales", "qdiff_diffusers"}
    assert not [name for name in names if "/tests/" in name or name.endswith(".pyc")]
    assert archive.stat().st_size < LARGEST


def test_the_unpacked_archive_is_a_working_pack(archive, tmp_path):
    """With nothing of ours installed: the archive brings the package along."""
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(tmp_path / "custom_nodes" / "qdiff")
    server = Server(tmp_path, environment=hide(OURS), pack=None)
    try:
        info = server.get("/object_info")
        assert set(info) >= NODES
        graph = {
            "pipe": node("QDiffLoadPipeline", pipeline="demo model (bundled)", quantize="as stored"),
            "images": node("QDiffSamplePipeline", pipeline=["pipe", 0], prompt="0", seed=0, steps=2, guidance=1.0, images=1),
            "save": node("SaveImage", images=["images", 0], filename_prefix="packed"),
        }
        messages = server.watch(graph)
        assert messages[-1].kind == "execution_success"
        assert [message.kind for message in messages].count("preview") == 2  # though this server shows none of samplers
        graph["images"]["inputs"]["seed"] = 1
        messages = server.watch(graph, preview_method="none")
        assert messages[-1].kind == "execution_success" and "preview" not in [message.kind for message in messages]
        assert set(server.get("/workflow_templates")["qdiff"]) >= {"qdiff_demo"}
    finally:
        server.stop()
