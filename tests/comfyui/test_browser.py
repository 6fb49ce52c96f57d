"""The frontend with the pack: every example workflow opens, looks as it should and runs. Needs Chromium and playwright.

``QDIFF_CHROMIUM`` names the browser. ``QDIFF_SCREENSHOTS`` names a folder for screenshots and the workflows' thumbnails; then the
demo runs with all its steps.
"""

from __future__ import annotations

import io
import os
import shutil
import time
from pathlib import Path

import pytest
from comfyui.server import RUN, pictures
from comfyui.workflows import NAMES, SMALL, api_graph, workflow

CHROMIUM = os.environ.get("QDIFF_CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
SHOTS = os.environ.get("QDIFF_SCREENSHOTS", "")
READY = "window.app && window.app.graph && 'QDiffSamplePipeline' in (window.LiteGraph?.registered_node_types ?? {})"
LOAD = """async name => {
    const answer = await fetch(`/api/workflow_templates/qdiff/${name}.json`);
    await window.app.loadGraphData(await answer.json(), true, true, name);
}"""
PROMPT = "async () => (await window.app.graphToPrompt()).output"
SPEAKING = ("QDiffModelInfo", "QDiffCompare", "QDiffSaveModel")  # nodes that show a text
SHRINK = """sizes => {
    for (const node of window.app.graph.nodes)
        for (const widget of node.widgets ?? [])
            if (widget.name in sizes && node.type != 'ImageScale') widget.value = sizes[widget.name];
}"""
# Rectangles of the nodes with their title bars; pictures and previews make nodes grow.
BOXES = """() => window.app.graph.nodes.map(n => ({title: n.title, box: [n.pos[0], n.pos[1] - 30, n.size[0], n.size[1] + 30]}))"""

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no Chromium: install it, or name it in QDIFF_CHROMIUM")


@pytest.fixture(scope="module")
def page(server):
    with sync_api.sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        page = browser.new_context(viewport={"width": 1920, "height": 1200}).new_page()
        page.goto(server.url, wait_until="domcontentloaded")
        page.wait_for_function(READY, timeout=180_000)
        page.wait_for_timeout(2000)
        page.keyboard.press("Escape")  # what ComfyUI shows on its first start
        yield page
        browser.close()


def opened(page, name):
    page.evaluate(LOAD, name)
    page.wait_for_timeout(1500)


def screenshot(page, name, thumbnail=False):
    """A picture of the window; as a thumbnail, of the graph in it."""
    if not SHOTS:
        return
    page.keyboard.press(".")  # fit to the window
    page.wait_for_timeout(1500)
    page.screenshot(path=str(Path(SHOTS) / f"{name}.png"))
    if thumbnail:
        save_thumbnail(page, Path(SHOTS) / f"{name.removesuffix('_opened')}.jpg")


def save_thumbnail(page, path, width=680):
    from PIL import Image

    area = page.evaluate("""() => {
        const boxes = window.app.graph.nodes.map(n => [n.pos[0], n.pos[1] - 40, n.pos[0] + n.size[0], n.pos[1] + n.size[1]]);
        const {scale, offset} = window.app.canvas.ds, place = window.app.canvas.canvas.getBoundingClientRect();
        const edge = (i, pick) => Math.round((pick(...boxes.map(b => b[i])) + offset[i % 2]) * scale + (i % 2 ? place.y : place.x));
        return [edge(0, Math.min), edge(1, Math.min), edge(2, Math.max), edge(3, Math.max)];
    }""")
    x, y, right, bottom = area
    clip = {"x": x - 12, "y": y - 12, "width": right - x + 24, "height": bottom - y + 24}
    picture = Image.open(io.BytesIO(page.screenshot(clip=clip))).convert("RGB")
    picture.resize((width, width * picture.height // picture.width), Image.Resampling.LANCZOS).save(path, quality=88)


def overlapping(boxes):
    """Pairs of nodes that lie on each other."""

    def apart(a, b):
        return a[0] + a[2] <= b[0] or b[0] + b[2] <= a[0] or a[1] + a[3] <= b[1] or b[1] + b[3] <= a[1]

    pairs = [(a, b) for i, a in enumerate(boxes) for b in boxes[i + 1 :]]
    return [(a["title"], b["title"]) for a, b in pairs if not apart(a["box"], b["box"])]


@pytest.mark.parametrize("name", NAMES)
def test_a_workflow_opens_runs_and_shows_its_pictures(name, page, server):
    opened(page, name)
    known = page.evaluate("() => Object.keys(window.LiteGraph.registered_node_types)")
    assert {item["type"] for item in workflow(name)["nodes"]} <= set(known)
    sent = {key: {k: item[k] for k in ("class_type", "inputs")} for key, item in page.evaluate(PROMPT).items()}
    assert sent == api_graph(workflow(name), server.get("/object_info"))  # what the other tests run
    assert not overlapping(page.evaluate(BOXES))
    screenshot(page, f"{name}_opened", thumbnail=name != "qdiff_demo")  # the others' tiny random models make noise

    if name != "qdiff_demo" or not SHOTS:
        page.evaluate(SHRINK, SMALL)
    before = set(server.get("/history"))
    page.evaluate("() => window.app.queuePrompt(0)")
    end = time.monotonic() + 2 * RUN
    while time.monotonic() < end and not (new := set(server.get("/history")) - before):
        time.sleep(0.3)
    (done,) = (server.get(f"/history/{key}")[key] for key in new)
    failures = [message[1]["exception_message"] for message in done["status"]["messages"] if message[0] == "execution_error"]
    assert pictures(server, {"outputs": done["outputs"], "error": failures[0] if failures else None})
    page.wait_for_timeout(3000)
    assert not overlapping(page.evaluate(BOXES))
    said = page.evaluate("() => window.app.graph.nodes.flatMap(n => n.widgets ?? []).filter(w => w.name == 'qdiff_text').length")
    assert said == sum(item["type"] in SPEAKING for item in workflow(name)["nodes"])
    screenshot(page, name, thumbnail=name == "qdiff_demo")
    shutil.rmtree(server.base / "models" / "qdiff" / "my-new-model-4bit", ignore_errors=True)


def test_the_templates_dialog_shows_the_pack(page):
    opened(page, "qdiff_demo")
    page.get_by_text("Templates", exact=True).first.click()
    page.wait_for_timeout(2500)
    assert page.get_by_text("qdiff", exact=True).count()
    page.get_by_text("qdiff", exact=True).first.click()
    page.wait_for_timeout(2500)
    if SHOTS:
        page.screenshot(path=str(Path(SHOTS) / "templates.png"))
    page.keyboard.press("Escape")


def test_a_help_page_opens(page):
    opened(page, "qdiff_compare")
    answer = page.evaluate("async () => (await fetch('/extensions/qdiff/docs/QDiffCompare.md')).text()")
    assert answer.startswith("# Compare")
