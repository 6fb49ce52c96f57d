"""Send a workflow to a running ComfyUI that has the qdiff nodes, wait for it, and fetch its pictures.

    python examples/comfyui_api.py --output pictures                       # examples/comfyui_api.json: the bundled model at 3 bits
    python examples/comfyui_api.py my_workflow_api.json --set sampler.seed=7

In ComfyUI, *File*, *Export (API)* saves a workflow in this form. Only the standard library is used.
"""

from __future__ import annotations

import argparse
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

WORKFLOW = Path(__file__).with_suffix(".json")
POLL = 0.5  # seconds


class ComfyUI:
    """The three requests that are needed."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    def get(self, path: str) -> bytes:
        with urllib.request.urlopen(f"{self.url}{path}", timeout=60) as answer:
            return answer.read()

    def queue(self, graph: dict[str, Any]) -> str:
        """The number of the run.

        Raises:
            SystemExit: ComfyUI refuses the workflow; it says which input of which node is wrong.
        """
        request = urllib.request.Request(f"{self.url}/prompt", json.dumps({"prompt": graph}).encode())
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)["prompt_id"]
        except urllib.error.HTTPError as error:
            raise SystemExit(f"ComfyUI refuses the workflow: {error.read().decode()}") from error

    def wait(self, number: str, seconds: float) -> dict[str, Any]:
        """What a run made, by node.

        Raises:
            SystemExit: it failed, or takes longer.
        """
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            history = json.loads(self.get(f"/history/{number}"))
            if number in history:
                status = history[number]["status"]
                if status["status_str"] != "success":
                    raise SystemExit(f"the run failed: {json.dumps(status['messages'][-1][1], indent=1)}")
                return history[number]["outputs"]
            time.sleep(POLL)
        raise SystemExit(f"no result after {seconds:g} s")


def changed(graph: dict[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """The workflow with ``NODE.INPUT=VALUE`` in it; values are JSON, or else text."""
    for setting in settings:
        place, _, value = setting.partition("=")
        node, _, name = place.partition(".")
        if node not in graph:
            raise SystemExit(f"the workflow has no node {node!r}; there are {', '.join(graph)}")
        try:
            graph[node]["inputs"][name] = json.loads(value)
        except json.JSONDecodeError:
            graph[node]["inputs"][name] = value
    return graph


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workflow", type=Path, nargs="?", default=WORKFLOW, help="in API format")
    parser.add_argument("--url", default="http://127.0.0.1:8188")
    parser.add_argument("--set", action="append", default=[], metavar="NODE.INPUT=VALUE")
    parser.add_argument("--output", type=Path, default=Path("pictures"))
    parser.add_argument("--timeout", type=float, default=600, help="seconds")
    args = parser.parse_args(arguments)

    comfyui = ComfyUI(args.url)
    outputs = comfyui.wait(comfyui.queue(changed(json.loads(args.workflow.read_text()), args.set)), args.timeout)
    args.output.mkdir(parents=True, exist_ok=True)
    for found in outputs.values():
        for picture in found.get("images", []):
            target = args.output / Path(picture["filename"]).name
            target.write_bytes(comfyui.get(f"/view?{urllib.parse.urlencode(picture)}"))
            print(target)


if __name__ == "__main__":
    main()
