"""A quick part of docs/model_classes.md, which ``benchmarks/model_classes.py`` makes over every class and method."""

from __future__ import annotations

import re
from pathlib import Path

import diffusers
import pytest
from classes.class_walk import class_names, configurations, walk

PAGE = Path(__file__).parents[2] / "docs" / "model_classes.md"
QUICK = {
    "Flux2Transformer2DModel": "svdquant",
    "QwenImageTransformer2DModel": "fp",
    "ZImageTransformer2DModel": "rtn",
    "LTXVideoTransformer3DModel": "aq",
    "UNetSpatioTemporalConditionModel": "rtn",
    "UNetMotionModel": "fp",
    "Transformer2DModel": "vq",
}


@pytest.mark.parametrize(("name", "method"), QUICK.items())
def test_a_class_survives_quantizing_saving_and_reloading(name, method):
    assert walk(name, method).status == "works"


def test_classes_are_found_without_a_list():
    names = class_names()
    assert len(names) > 60
    assert {"FluxTransformer2DModel", "UNet2DConditionModel", "HunyuanDiT2DModel"} <= set(names)
    assert not any("Autoencoder" in name for name in names)


def test_a_class_that_nobody_has_configured_shows_up_as_such(monkeypatch):
    new = type("BrandNewTransformer2DModel", (diffusers.ModelMixin,), {})
    monkeypatch.setattr(diffusers, new.__name__, new, raising=False)
    monkeypatch.setattr(type(diffusers), "__dir__", lambda module: [new.__name__], raising=False)
    assert class_names() == [new.__name__]
    assert walk(new.__name__, "rtn").status == "no tiny configuration yet"


def test_the_page_lists_the_classes_of_the_diffusers_that_it_names():
    page = PAGE.read_text()
    (version,) = re.findall(r"^Every transformer and UNet class that diffusers ([\d.]+) exports", page, re.MULTILINE)
    if version != diffusers.__version__:
        pytest.skip(f"docs/model_classes.md is about diffusers {version}")
    assert re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE) == class_names()


def test_every_configuration_is_of_a_class_of_some_diffusers():
    assert all(set(entry) == {"config", "inputs"} for entry in configurations().values())
