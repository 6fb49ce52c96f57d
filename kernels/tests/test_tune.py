"""The tuner: which products it tunes, how it times them, and that configurations which do not fit are skipped."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
from qdiff_kernels.gpu import configs, ops
from qdiff_kernels.gpu.configs import LinearConfig
from triton.runtime.errors import OutOfResources

from qdiff_diffusers.bench.defaults import default_layers

CPU = torch.device("cpu")


@pytest.fixture
def tuner():
    spec = importlib.util.spec_from_file_location("tuner", Path(__file__).parents[1] / "tune.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def product(tuner):
    return next(iter(tuner.products(default_layers(), "integer8 row int8", (32, 128), CPU)))


def test_every_default_of_every_method_is_tuned(tuner):
    keys = {product.key for product in tuner.products(default_layers(), "", (16, 768), CPU)}
    for layer in default_layers():
        inputs = ["none", *set(tuner.KINDS) & set(layer.activations)]
        for activations in inputs:
            assert tuner.random_product(layer, activations, (16, 768), CPU).key in keys, layer.name


def test_what_methods_do_unasked_is_tuned_first(tuner):
    names = list(dict.fromkeys(product.name for product in tuner.products(default_layers(), "", (16, 768), CPU)))
    headlines = [layer.name for layer in default_layers() if layer.headline]
    assert set(names[: len(headlines)]) <= set(headlines)


@pytest.mark.parametrize("only", ["fp 4", "minifloat4 g16 fp8", "svdquant 4 g32"])
def test_words_choose_products_by_key_and_by_layer(tuner, only):
    found = list(tuner.products(default_layers(), only, (16, 768), CPU))
    assert found
    assert all(all(word in f"{product.name} {product.key}" for word in only.split()) for product in found)


@pytest.mark.parametrize("layer", [layer.name for layer in default_layers()])
def test_random_weights_are_finite_and_not_all_alike(tuner, layer):
    chosen = next(each for each in default_layers() if each.name == layer)
    dense = tuner.random_product(chosen, "none", (16, 768), CPU).dense
    assert torch.isfinite(dense).all()
    assert dense.std() > 0


def test_a_configuration_without_room_reaches_the_tuner_and_is_skipped(tuner, product, monkeypatch):
    tried = []

    def launch(weight, x, extras, config):
        tried.append(config)

        def once(fitting):
            if fitting.stages > 1:
                raise OutOfResources(300_000, 232_448, "shared memory")
            return product.dense.new_tensor(0) + x.float() @ product.dense.T

        return configs.fit("key", config, once)

    monkeypatch.setattr(ops, "product", launch)
    watch = SimpleNamespace(device=CPU, time=lambda call: 1.0)
    entry = tuner.tune(product, 1, LinearConfig(16, 32, 64, stages=4), watch)
    assert entry["config"]["stages"] == 1  # as it was launched, not as it was asked for
    assert {config.stages for config in tried} > {1, 4}


def test_nothing_is_recorded_where_no_configuration_runs(tuner, product, monkeypatch):
    def launch(*_):
        raise OutOfResources(300_000, 232_448, "shared memory")

    monkeypatch.setattr(ops, "product", launch)
    watch = SimpleNamespace(device=CPU, time=lambda call: 1.0)
    assert tuner.tune(product, 1, LinearConfig(16, 32, 64), watch) is None


def test_a_wrong_result_stops_the_tuner(tuner, product, monkeypatch):
    monkeypatch.setattr(ops, "product", lambda weight, x, extras, config: torch.full((len(x), weight.rows), float("nan")))
    watch = SimpleNamespace(device=CPU, time=lambda call: 1.0)
    with pytest.raises(SystemExit, match="off the reference"):
        tuner.tune(product, 1, LinearConfig(16, 32, 64), watch)


@pytest.mark.parametrize("tokens", [1, 64, 4096])
def test_calls_are_timed_as_graphs_at_every_number_of_tokens(tuner, monkeypatch, tokens):
    replayed, called = [], []
    event = SimpleNamespace(record=lambda: None, elapsed_time=lambda other: 2.0)
    watch = tuner.Stopwatch(CPU)
    watch.module = SimpleNamespace(Event=lambda enable_timing: event, synchronize=lambda: None)
    watch.device = torch.device("cuda")
    monkeypatch.setattr(tuner, "capture", lambda call: call() or (lambda: replayed.append(tokens)))
    assert watch.time(lambda: called.append(tokens), repeats=5) == 2e-3
    assert (len(replayed), len(called)) == (5, 2)  # warmed up and captured, then only replayed
