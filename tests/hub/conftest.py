"""A Hub on this machine, a process that speaks to it, and something to send."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_models
from diffusers import DiTTransformer2DModel
from hub.client import Client
from hub.fake_hub import FakeHub

from qdiff_diffusers import RTNConfig


@pytest.fixture(scope="session")
def hub():
    with FakeHub() as server:
        yield server


@pytest.fixture(scope="session")
def client(hub, tmp_path_factory):
    """One process for all tests that push, so that importing torch is paid for once."""
    with Client(hub.url, tmp_path_factory.mktemp("home")) as running:
        yield running


@pytest.fixture(autouse=True)
def nothing_left(hub):
    hub.log.clear()
    hub.faults.clear()
    yield
    assert not [fault for fault in hub.faults if fault.times > 0 and fault.times < 100], "a fault that never struck"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A quantized model in two shards."""
    root = tmp_path_factory.mktemp("model")
    tiny_models.make("dit").save_pretrained(root / "dense")
    packed = DiTTransformer2DModel.from_pretrained(root / "dense", quantization_config=RTNConfig(bits=4))
    packed.save_pretrained(root / "packed", max_shard_size="40KB")
    assert len(list((root / "packed").glob("*.safetensors"))) == 2
    return root / "packed"
