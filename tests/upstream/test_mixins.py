"""diffusers' own quantization tests, if a checkout is at hand.

QDIFF_DIFFUSERS_CHECKOUT=path/to/diffusers pytest tests/upstream
"""

from __future__ import annotations

import functools
import importlib.util

import pytest
from classes import class_walk
from upstream import mixins


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "test" not in metafunc.fixturenames:
        return
    if mixins.checkout() is None:
        reason = f"set {mixins.VARIABLE} to a checkout of diffusers' repository to run its quantization tests"
        nothing = pytest.param("", "", "", "", marks=pytest.mark.skip(reason=reason), id="no checkout")
        metafunc.parametrize(("mixin", "test", "model", "method"), [nothing])
        return
    cases = [(mixin, test, model, method) for mixin, test in mixins.tests() for model in mixins.MODELS for method in mixins.METHODS]
    metafunc.parametrize(("mixin", "test", "model", "method"), cases, ids=["-".join(case[1:]) for case in cases])


@pytest.fixture(scope="session")
def dense_folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("upstream")
    known = class_walk.configurations()

    @functools.cache
    def folder(name: str):
        kind = mixins.MODELS[name]
        class_walk.make(kind, known[kind]).save_pretrained(root / name)
        return root / name

    return folder


def test_upstream(mixin, test, model, method, dense_folder, tmp_path, record_property):
    record_property("row", test)
    record_property("model", model)
    record_property("method", method)
    instance = mixins.adapter(mixin, model, dense_folder(model))
    message, reason = mixins.known(test, model) or ("", "")
    try:
        mixins.call(instance, test, mixins.settings(method, model), tmp_path)
    except Exception as error:
        if not reason or message not in str(error):
            raise
        pytest.xfail(reason)
    assert not reason, f"passes, though mixins.KNOWN says that it cannot: {reason}"


def test_a_folder_that_is_no_checkout_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv(mixins.VARIABLE, str(tmp_path))
    with pytest.raises(FileNotFoundError, match="must be a checkout"):
        mixins.upstream.__wrapped__()


def test_every_model_has_a_tiny_configuration():
    assert set(mixins.MODELS.values()) <= class_walk.configurations().keys()
    assert importlib.util.find_spec("diffusers") is not None
