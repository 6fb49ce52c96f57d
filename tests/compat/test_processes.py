"""Quantized models in other processes."""

from __future__ import annotations

import multiprocessing
import pickle

import pytest
import tiny_models
import torch
from compat.child import work


@pytest.fixture(scope="module")
def elsewhere():
    """``elsewhere(name, model)``: the model's output in one spawned process that all tests share."""
    context = multiprocessing.get_context("spawn")
    models, results = context.Queue(), context.Queue()
    process = context.Process(target=work, args=(models, results), daemon=True)
    process.start()

    def run(name, model):
        models.put((name, pickle.dumps(model)))
        got, output = results.get(timeout=60)
        assert got == name
        return pickle.loads(output)

    yield run
    models.put(None)
    process.join(timeout=10)


@pytest.mark.row("multiprocessing, spawn")
def test_spawn(load, elsewhere, method):
    model = load()
    assert torch.allclose(elsewhere(method, model), tiny_models.run(model, "flux"), atol=1e-5)
