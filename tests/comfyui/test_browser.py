"""The frontend with the pack: the example workflow opens, runs to the end and shows its images. Needs Chromium and playwright.

``QDIFF_SCREENSHOTS`` names a folder for screenshots, ``QDIFF_CHROMIUM`` the browser.
"""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest
from comfyui.server import Server

CHROMIUM = os.environ.get("QDIFF_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser") or ""
READY = "window.app && window.app.graph && 'QDiffSamplePipeline' in (window.LiteGraph?.registered_node_types ?? {})"
LOAD = """async name => {
    const answer = await fetch(`/api/workflow_templates/qdiff/${name}.json`);
    await window.app.loadGraphData(await answer.json(), true, true, name);
}"""
RUN_LIMIT = 240  # seconds

sync_api = pytest.importorskip("playwright.sync_api")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no Chromium")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("base"))
    with sync_api.sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        page = browser.new_context(viewport={"width": 1600, "height": 1000}).new_page()
        page.goto(server.url, wait_until="domcontentloaded")
        page.wait_for_function(READY, timeout=180_000)
        page.wait_for_timeout(2000)
        page.keyboard.press("Escape")  # what ComfyUI shows on its first start
        page.server = server
        yield page
        browser.close()
    server.stop()


def screenshot(page, name):
    if folder := os.environ.get("QDIFF_SCREENSHOTS"):
        page.screenshot(path=str(Path(folder) / f"{name}.png"))


@pytest.mark.parametrize("name", ["qdiff_quantize_and_save", "qdiff_flux_with_lora", "qdiff_demo"])
def test_an_example_workflow_opens_with_every_node_known(name, page):
    page.evaluate(LOAD, name)
    page.wait_for_timeout(2000)
    page.keyboard.press(".")  # fit to the window
    page.wait_for_timeout(1000)
    screenshot(page, name)
    kinds = page.evaluate("() => window.app.graph.nodes.map(n => n.type)")
    known = page.evaluate("() => Object.keys(window.LiteGraph.registered_node_types)")
    assert len(kinds) > 5 and set(kinds) <= set(known)


def test_the_demo_workflow_runs_and_shows_its_images(page):
    page.evaluate(LOAD, "qdiff_demo")
    page.wait_for_timeout(1500)
    page.evaluate("() => window.app.queuePrompt(0)")
    end = time.monotonic() + RUN_LIMIT
    while time.monotonic() < end and not (history := page.server.get("/history")):
        time.sleep(0.5)
    (done,) = history.values()
    assert done["status"]["status_str"] == "success", done["status"]
    assert sum(len(out.get("images", ())) for out in done["outputs"].values()) == 20
    page.wait_for_timeout(2500)
    page.keyboard.press(".")
    page.wait_for_timeout(1000)
    screenshot(page, "qdiff_demo_result")
