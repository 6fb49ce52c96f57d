"""Every test here is one cell of docs/compatibility.md: its row is the test's ``row`` marker, its column the ``method``.

A cell passes when the model still does what it did before ("works"), or when it is refused with a message that says what to do
("refused": the test passes through ``refuses``). What cannot be tried on a CPU is skipped with a reason.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from torch import nn

from qdiff_diffusers import AQConfig, FPConfig, RTNConfig, SVDQuantConfig, VQConfig

METHODS = {
    "aq": lambda: AQConfig(num_codebooks=1, codebook_bits=8, vector_size=4, codebook="shared", rotation=True, effort=0),
    "vq": lambda: VQConfig(codebook_bits=4, vector_size=2, restarts=1, activations="fp8"),
    "fp": lambda: FPConfig(weight_format="nvfp4"),
    "svdquant": lambda: SVDQuantConfig(bits=4, rank=2, rounds=1, activations="int4"),
    "rtn": lambda: RTNConfig(bits=4, activations="int8"),
}
Load = Callable[..., nn.Module]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "row(name): the row of docs/compatibility.md that a test fills")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "method" in metafunc.fixturenames:
        metafunc.parametrize("method", METHODS)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch._dynamo.reset()


@pytest.fixture
def cell(request: pytest.FixtureRequest, record_property: Callable[[str, Any], None]) -> Iterator[None]:
    """Tells the table which cell a test is."""
    record_property("row", request.node.get_closest_marker("row").args[0])
    record_property("method", request.node.callspec.params["method"])
    yield


@pytest.fixture
def refuses(record_property: Callable[[str, Any], None]) -> Callable[..., Any]:
    """``with refuses("part of the message"):`` around what must end in an error that a user can act on."""

    @contextmanager
    def expect(match: str, kind: type[Exception] = ValueError) -> Iterator[None]:
        with pytest.raises(kind, match=match) as caught:
            yield
        record_property("refused", str(caught.value))

    return expect


@pytest.fixture
def note(record_property: Callable[[str, Any], None]) -> Callable[[str], None]:
    """A remark for the row, in the table's footnotes."""
    return functools.partial(record_property, "note")


@pytest.fixture(scope="session")
def dense_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``dense_folder(name)``: where the tiny model of that name lies, saved in float32."""
    root = tmp_path_factory.mktemp("dense")

    @functools.cache
    def folder(name: str) -> Path:
        tiny_models.make(name).save_pretrained(root / name)
        return root / name

    return folder


@pytest.fixture(scope="session")
def packed_folder(tmp_path_factory: pytest.TempPathFactory, dense_folder: Callable[[str], Path]) -> Callable[..., Path]:
    """``packed_folder(name, method)``: the same, quantized."""
    root = tmp_path_factory.mktemp("packed")

    @functools.cache
    def folder(name: str, method: str) -> Path:
        target = root / name / method
        kind = type(tiny_models.make(name))
        kind.from_pretrained(dense_folder(name), quantization_config=METHODS[method]()).save_pretrained(target)
        return target

    return folder


@pytest.fixture
def load(cell: None, packed_folder: Callable[..., Path], method: str) -> Load:
    """``load(name, **kwargs)``: the quantized tiny model of that name."""

    def load_model(name: str = "flux", **kwargs: Any) -> nn.Module:
        return type(tiny_models.make(name)).from_pretrained(packed_folder(name, method), **kwargs)

    return load_model


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative error of ``a``."""
    return float((a.float() - b.float()).norm() / b.float().norm())
