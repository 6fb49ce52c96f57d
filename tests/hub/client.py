"""A fresh Python process with ``HF_ENDPOINT`` set, which runs code until it is closed. huggingface_hub's client is unmodified."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

from hub.fake_hub import TOKEN

LOOP = """
import contextlib, io, json, sys, traceback
channel, sys.stdout = sys.stdout, sys.stderr
space = {}
for line in sys.stdin:
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            exec(json.loads(line), space)
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            traceback.print_exc()
            code = 1
    print(json.dumps([code, out.getvalue(), err.getvalue()]), file=channel, flush=True)
"""


class Done(NamedTuple):
    code: int
    out: str
    err: str


class Client:
    """``client.run("print(1)").out == "1\\n"``; names live on from one call to the next."""

    def __init__(self, endpoint: str, home: Path, token: str = TOKEN, **environment: str) -> None:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "QDIFF_", "TORCH_DEVICE"))}
        settings = {
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(home),
            "HF_TOKEN": token,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
            "OMP_NUM_THREADS": "1",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-c", LOOP],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=kept | settings | environment,
            cwd=home,
        )

    def run(self, code: str) -> Done:
        assert self.process.stdin and self.process.stdout
        print(json.dumps(textwrap.dedent(code)), file=self.process.stdin, flush=True)
        return Done(*json.loads(self.process.stdout.readline()))

    def qdiff(self, *arguments: object) -> Done:
        """The command line."""
        return self.run(f"from qdiff_diffusers.cli import main; main({[str(a) for a in arguments]!r})")

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: Any) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.kill()  # it has nothing left to save, and torch takes its time to go
        self.process.wait(timeout=60)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def refused(client: Client, folder: Path, name: str, *options: str) -> str:
    """Push in vain: the one line that says why. Nothing may have changed on this side."""
    before = snapshot(folder)
    done = client.qdiff("push", folder, name, *options)
    lines = [line for line in done.err.splitlines() if line.startswith("qdiff: ")]
    assert done.code == 2 and len(lines) == 1 and "Traceback" not in done.err, done.err
    assert snapshot(folder) == before
    return lines[0]
