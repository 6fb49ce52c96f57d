"""The example workflows through the API: as they are, with tiny files of the names in them, and with other families' models."""

from __future__ import annotations

import shutil

import pytest
from comfyui.models_folder import FAMILIES
from comfyui.server import pictures
from comfyui.workflows import NAMES, NOTES, api_graph, for_family, shrunk, workflow


@pytest.fixture(scope="module")
def graph(server):
    """``graph(name)``: what the frontend would send."""
    info = server.get("/object_info")
    return lambda name: api_graph(workflow(name), info)


def forget_saved(server, name):
    shutil.rmtree(server.base / "models" / "qdiff" / name, ignore_errors=True)


@pytest.mark.parametrize("name", NAMES)
def test_a_workflow_runs_as_it_is(name, graph, server):
    prompt = shrunk(graph(name))
    for item in prompt.values():
        if item["class_type"] == "QDiffSaveModel":
            item["inputs"]["name"] = "made/as-it-is"
    result = server.run(prompt)
    assert all(picture.std() > 1 for picture in pictures(server, result))
    forget_saved(server, "made/as-it-is")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", [name for name in NAMES if name != "qdiff_demo"])
def test_a_workflow_runs_with_every_family(name, family, graph, server):
    result = server.run(for_family(graph(name), family))
    assert all(picture.std() > 1 for picture in pictures(server, result))
    forget_saved(server, f"made/{family}")


def test_the_workflows_explain_themselves_and_show_every_node(server):
    """Each begins with a note, and together they have all of the pack's nodes."""
    kinds = {item["type"] for name in NAMES for item in workflow(name)["nodes"]}
    ours = {name for name in server.get("/object_info") if name.startswith("QDiff")}
    assert ours <= kinds
    for name in NAMES:
        first = workflow(name)["nodes"][0]
        assert first["type"] in NOTES and "**Run**" in first["widgets_values"][0]


def test_the_server_offers_the_workflows_with_pictures(server):
    from comfyui.workflows import FOLDER
    from PIL import Image

    assert set(server.get("/workflow_templates")["qdiff"]) == set(NAMES)
    for name in NAMES:
        with Image.open(FOLDER / f"{name}.jpg") as picture:
            assert min(picture.size) >= 300
