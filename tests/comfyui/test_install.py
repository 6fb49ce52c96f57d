"""A clone in custom_nodes with nothing of ours installed, and what is said when something is missing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from comfyui import host
from comfyui.host import FOLDER, ROOT
from comfyui.server import Server, node, pictures

import qdiff_diffusers
from qdiff_diffusers import __version__
from qdiff_diffusers.cli.comfy import install_pack

HIDDEN = Path(__file__).parent / "hidden"
OURS = "qdiff_diffusers,qdiff_kernels,qdiff_diffusers.hub_cards"


def hide(names):
    """Environment of a process in which these packages are not installed."""
    return {"PYTHONPATH": str(HIDDEN), "QDIFF_TEST_HIDDEN": names, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}


def test_a_clone_in_custom_nodes_needs_no_installation(quantized, tmp_path):
    shutil.copytree(quantized("flux"), tmp_path / "models" / "qdiff" / "flux")
    server = Server(tmp_path, environment=hide(OURS), pack="clone")
    try:
        graph = {
            "model": node("QDiffLoadModel", checkpoint="flux", dtype="auto", kernels="auto"),
            "info": node("QDiffModelInfo", model=["model", 0]),
            "pipe": node("QDiffLoadPipeline", pipeline="demo model (bundled)", quantize="as stored"),
            "images": node("QDiffSamplePipeline", pipeline=["pipe", 0], prompt="0", seed=0, steps=2, guidance=1.0, images=1),
            "save": node("SaveImage", images=["images", 0], filename_prefix="clone"),
        }
        result = server.run(graph)
        assert pictures(server, result) and "packed layers" in result["outputs"]["info"]["text"][0]
    finally:
        server.stop()


WHAT_COMFYUI_DOES = """
import asyncio, sys
sys.path.insert(0, {tests!r})
from comfyui import host
pack = host.pack()
extension = asyncio.run(pack.comfy_entrypoint())
nodes = asyncio.run(extension.get_node_list())
print(len([n.GET_NODE_INFO_V1() for n in nodes]))
from qdiff_pack.comfy_nodes.nodes import load, pipeline, clip, inspect
print(load.LoadModel.validate_inputs("x"))
print(pipeline.LoadPipeline.validate_inputs("x"))
print(clip.LoadCLIP.validate_inputs("x"))
try:
    inspect.ModelInfo.execute(None)
except Exception as error:
    print(type(error).__name__, error)
"""


def test_a_missing_package_is_a_message_and_not_a_missing_node():
    missing = "diffusers"
    code = WHAT_COMFYUI_DOES.format(tests=str(ROOT / "tests"))
    environment = os.environ | hide(missing)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=FOLDER, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    count, *messages = done.stdout.strip().splitlines()[-5:]
    assert count == "9"
    assert len(messages) == 4
    for message in messages:
        assert f"No module named '{missing}'" in message and "pip install" in message and "start ComfyUI again" in message


@pytest.mark.parametrize(
    "marker, way_out",
    [
        (("qdiff_pack.json", '{"version": "0.0.9"}\n'), "qdiff_diffusers.cli comfy install --overwrite"),
        (("pyproject.toml", '[project]\nname = "qdiff-diffusers"\nversion = "0.0.9"\n'), "pip uninstall qdiff-diffusers"),
    ],
)
def test_nodes_and_package_of_different_versions_say_so(marker, way_out, tmp_path, monkeypatch):
    package, node = host.part("package"), host.part("nodes.load").LoadModel
    assert package.problem() is None and package.nodes_version(ROOT) == __version__
    monkeypatch.setattr(package, "ROOT", tmp_path)
    assert package.problem() is None  # neither a clone nor installed: a copy by hand
    (tmp_path / marker[0]).write_text(marker[1])
    package.nodes_version.cache_clear()
    said = node.validate_inputs("flux")
    assert f"are version 0.0.9, the package in {Path(qdiff_diffusers.__file__).parent} is {__version__}" in said
    assert way_out in said and said.endswith("start ComfyUI again")
    with pytest.raises(package.MissingPackage, match=r"version 0\.0\.9"):
        host.part("nodes.inspect").ModelInfo.execute(None)


def test_what_is_installed_says_which_version_it_is(tmp_path):
    (tmp_path / "custom_nodes").mkdir()
    assert host.part("package").nodes_version(install_pack(tmp_path)) == __version__


def test_a_kernel_that_cannot_run_here_is_not_offered():
    load = host.part("nodes.load")
    assert load.kernel_choices() == ["auto", "torch"]
    with pytest.raises(ValueError, match="triton needs a GPU"):
        load.LoadModel.execute("flux", kernels="triton")
