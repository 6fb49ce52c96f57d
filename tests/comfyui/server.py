"""A ComfyUI server with the pack in custom_nodes, as a user has it, and a client for its API."""

from __future__ import annotations

import asyncio
import io
import json
import os
import socket
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from comfyui.host import FOLDER, ROOT
from PIL import Image

from qdiff_diffusers.cli.comfy import install_pack

LAST = ("execution_success", "execution_error", "execution_interrupted")
START = 240  # seconds; a slow machine with a cold disk
RUN = 120
PREVIEW_WITH_METADATA = 4  # ComfyUI's number of this kind of binary message


class Message(NamedTuple):
    """What the server says over its websocket: a kind with data, or a "preview" with what it is of and the picture."""

    kind: str
    data: dict[str, Any]
    picture: Image.Image | None = None


def _message(received: Any) -> Message:
    """From one of aiohttp's messages, a text or bytes."""
    if isinstance(received.data, str):
        content = json.loads(received.data)
        return Message(content["type"], content["data"])
    kind, length = struct.unpack(">II", received.data[:8])
    assert kind == PREVIEW_WITH_METADATA, kind
    return Message("preview", json.loads(received.data[8 : 8 + length]), Image.open(io.BytesIO(received.data[8 + length :])))


class Server:
    """Runs until :meth:`stop`. ``base`` gets ComfyUI's folders; what is in its models folder is offered by the nodes."""

    def __init__(
        self, base: Path, *options: str, environment: dict[str, str] | None = None, pack: str | None = "installed"
    ) -> None:
        """``pack``: what is put into custom_nodes, "installed" by ``qdiff comfy install`` or a "clone" of the repository."""
        self.base = base
        for name in ("custom_nodes", "models", "input", "output", "temp", "user"):
            (base / name).mkdir(parents=True, exist_ok=True)
        settings = base / "user" / "default" / "comfy.settings.json"
        settings.parent.mkdir(exist_ok=True)
        settings.write_text('{"Comfy.TutorialCompleted": true, "Comfy.Minimap.Visible": false}')  # they would lie over the workflow
        if pack == "clone":
            (base / "custom_nodes" / "qdiff").symlink_to(ROOT)
        elif pack == "installed":
            install_pack(base)
        (base / "custom_nodes" / "tiny_sizes").symlink_to(ROOT / "tests" / "comfyui" / "tiny_sizes")
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
        answer = self.queue(graph)
        if "prompt_id" not in answer or answer.get("node_errors"):  # what is not wrong runs all the same
            return {"outputs": {}, "error": json.dumps(answer)}
        return self.result(answer["prompt_id"])

    def queue(self, graph: dict[str, Any], client: str = "test", **extra: Any) -> dict[str, Any]:
        """The server's answer; ``extra`` is what the frontend adds from its settings."""
        return self.post("/prompt", {"prompt": graph, "client_id": client, "extra_data": extra})

    def result(self, prompt: str) -> dict[str, Any]:
        """Wait for a prompt and give what :meth:`run` gives."""
        end = time.monotonic() + RUN
        while time.monotonic() < end:
            if done := self.get(f"/history/{prompt}").get(prompt):
                failures = [m[1]["exception_message"] for m in done["status"]["messages"] if m[0] == "execution_error"]
                return {"outputs": done["outputs"], "error": failures[0] if failures else None}
            time.sleep(0.1)
        raise TimeoutError(f"the graph did not finish:\n{self.log.read_text()[-3000:]}")

    def watch(self, graph: dict[str, Any], at: Callable[[Message], None] = lambda message: None, **extra: Any) -> list[Message]:
        """Run a graph as a frontend does: with an open websocket. All its messages, each also given to ``at`` when it arrives."""
        return asyncio.run(self._watch(graph, at, extra))

    async def _watch(self, graph: dict[str, Any], at: Callable[[Message], None], extra: dict[str, Any]) -> list[Message]:
        import aiohttp  # ComfyUI requires it, this package does not

        out = []
        async with aiohttp.ClientSession() as session, session.ws_connect(f"{self.url}/ws?clientId=watcher") as socket:
            await socket.send_json({"type": "feature_flags", "data": {"supports_preview_metadata": True}})
            answer = await asyncio.to_thread(self.queue, graph, "watcher", **extra)
            assert "prompt_id" in answer, answer
            while not out or out[-1].kind not in LAST:
                out.append(_message(await socket.receive(timeout=RUN)))
                await asyncio.to_thread(at, out[-1])
        return out


def pictures(server: Server, result: dict[str, Any]) -> list[np.ndarray]:
    """The images that a graph's nodes saved or show. It must not have failed."""
    assert result["error"] is None, result["error"]
    files = [f for out in result["outputs"].values() for f in out.get("images", ())]
    return [np.asarray(Image.open(server.base / f["type"] / f["subfolder"] / f["filename"])) for f in files]


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}
