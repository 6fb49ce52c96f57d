"""The kernels as a repository on the Hub: uploaded as they are laid out, loaded by name with the Hub's own client."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest
from hub.client import Client
from hub.fake_hub import FakeHub

# By the name of its distribution: the module's name is also that of a folder of this repository.
if not any(found.metadata["Name"] == "kernels" for found in importlib.metadata.distributions()):
    pytest.skip("the Hub's kernels client is not installed", allow_module_level=True)
PROJECT = Path(__file__).parents[2] / "kernels"

UPLOAD = """
from huggingface_hub import HfApi
api = HfApi()
api.create_repo("someone/qdiff-kernels", repo_type="kernel")
print(api.upload_folder(repo_id="someone/qdiff-kernels", folder_path={folder!r}, repo_type="kernel").oid)
"""
LOAD = """
import sys, torch
from kernels import get_kernel
import qdiff_kernels as installed
kernel = get_kernel("someone/qdiff-kernels", revision={revision!r}, trust_remote_code=True)
assert kernel.__file__ != installed.__file__ and "snapshots/{revision}/build/torch-" in kernel.__file__, kernel.__file__
x, codes = torch.randn(3, 64), kernel.pack_bits(torch.randint(0, 16, (5, 64)), 4)
arguments = (x, codes, torch.rand(5, 1), None, 4, 64, None, None, None, None, 0, "none")
assert torch.equal(kernel.integer_linear(*arguments), installed.integer_linear(*arguments))
print(kernel.integer_linear._qualname != installed.integer_linear._qualname)
"""


def test_the_uploaded_kernels_load_by_name_and_revision(tmp_path):
    subprocess.run([sys.executable, PROJECT / "package.py", tmp_path / "layout"], check=True, capture_output=True)
    # With telemetry switched off, kernels 0.17 makes a User-Agent that httpx refuses. It says nothing to any host but the fake one.
    with FakeHub() as hub, Client(hub.url, tmp_path, HF_HUB_DISABLE_TELEMETRY="0") as client:
        uploaded = client.run(UPLOAD.format(folder=str(tmp_path / "layout")))
        assert uploaded.code == 0, uploaded.err
        hub.log.clear()
        loaded = client.run(LOAD.format(revision=uploaded.out.strip()))
        assert loaded.out == "True\n", loaded.err
        fetched = {line.split("/build/")[1].split("/")[0] for line in hub.requests("^GET .*/resolve/.*/build/")}
        assert len(fetched) == 1, "builds of other backends were downloaded"
