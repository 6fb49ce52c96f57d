"""A ComfyUI server with the pack in custom_nodes, as a user has it, and a client for its API."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
from comfyui.host import FOLDER, ROOT
from PIL import Image

from qdiff_diffusers.cli.comfy import install_pack

START = 240  # seconds; a slow machine with a cold disk
RUN = 120


class Server:
    """Runs until :meth:`stop`. ``base`` gets ComfyUI's folders; what is in its models folder is offered by the nodes."""

    def __init__(self, base: Path, *options: str, environment: dict[str, str] | None = None, clone: bool = False) -> None:
        """``clone``: the repository itself is in custom_nodes, instead of what ``qdiff comfy install`` copies there."""
        self.base = base
        for name in ("custom_nodes", "models/qdiff", "models/loras", "input", "output", "temp", "user"):
            (base / name).mkdir(parents=True, exist_ok=True)
        settings = base / "user" / "default" / "comfy.settings.json"
        settings.parent.mkdir(exist_ok=True)
        settings.write_text('{"Comfy.TutorialCompleted": true}')  # or a dialog opens over the first workflow
        if clone:
            (base / "custom_nodes" / "qdiff").symlink_to(ROOT)
        else:
            install_pack(base)
        (base / "custom_nodes" / "stand_ins").symlink_to(ROOT / "tests" / "comfyui" / "stand_ins")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = base / "server.log"
        command = [sys.executable, "main.py", "--cpu", "--listen", "127.0.0.1", "--port", str(self.port)]
        command += ["--base-directory", str(base), "--database-url", "sqlite:///:memory:", "--disable-api-nodes", *options]
        with self.log.open("wb") as log:
            environment = os.environ | {"OMP_NUM_THREADS": "1"} | (environment or {})
            self.process = subprocess.Popen(command, cwd=FOLDER, stdout=log, stderr=log, env=environment)
        self._wait()

    def _wait(self) -> None:
        end = time.monotonic() + START
        while time.monotonic() < end and self.process.poll() is None:
            try:
                self.get("/system_stats")
                return
            except OSError:
                time.sleep(0.3)
        raise RuntimeError(f"ComfyUI did not start:\n{self.log.read_text()[-3000:]}")

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(30)

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            return json.load(answer)

    def post(self, path: str, data: Any) -> Any:
        """The answer, an error's too."""
        request = urllib.request.Request(self.url + path, json.dumps(data).encode(), {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.loads(answer.read() or b"{}")
        except urllib.error.HTTPError as error:
            return json.load(error)

    def run(self, graph: dict[str, Any]) -> dict[str, Any]:
        """Queue a graph and wait. ``{"outputs": ..}``, with "error" where it was refused or failed."""
        answer = self.post("/prompt", {"prompt": graph, "client_id": "test"})
        if "prompt_id" not in answer or answer.get("node_errors"):  # what is not wrong runs all the same
            return {"outputs": {}, "error": json.dumps(answer)}
        end = time.monotonic() + RUN
        while time.monotonic() < end:
            if done := self.get(f"/history/{answer['prompt_id']}").get(answer["prompt_id"]):
                failures = [m[1]["exception_message"] for m in done["status"]["messages"] if m[0] == "execution_error"]
                return {"outputs": done["outputs"], "error": failures[0] if failures else None}
            time.sleep(0.1)
        raise TimeoutError(f"the graph did not finish:\n{self.log.read_text()[-3000:]}")


def pictures(server: Server, result: dict[str, Any]) -> list[np.ndarray]:
    """The images that a graph's nodes saved or show. It must not have failed."""
    assert result["error"] is None, result["error"]
    files = [f for out in result["outputs"].values() for f in out.get("images", ())]
    return [np.asarray(Image.open(server.base / f["type"] / f["subfolder"] / f["filename"])) for f in files]


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}
