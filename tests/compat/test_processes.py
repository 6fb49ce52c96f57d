"""Quantized models in other processes."""

from __future__ import annotations

import multiprocessing
import pickle

import pytest
import tiny_models
import torch
from compat.child import work, work_in_parallel

pytestmark = pytest.mark.serial


@pytest.fixture(scope="module")
def elsewhere():
    """``elsewhere(name, model)``: the model's output in one spawned process that all tests share."""
    context = multiprocessing.get_context("spawn")
    models, results = context.Queue(), context.Queue()
    process = context.Process(target=work, args=(models, results), daemon=True)
    process.start()

    def run(name, model):
        models.put((name, pickle.dumps(model)))
        got, output = results.get(timeout=300)
        assert got == name
        return pickle.loads(output)

    yield run
    models.put(None)
    process.join(timeout=10)


@pytest.mark.row("multiprocessing, spawn")
def test_spawn(load, elsewhere, method):
    model = load()
    assert torch.allclose(elsewhere(method, model), tiny_models.run(model, "flux"), atol=1e-5)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """``two_ranks(name, model)``: the outputs of two spawned processes, each of which computes half of the sequence."""
    context = multiprocessing.get_context("spawn")
    meeting_point = tmp_path_factory.mktemp("ranks") / "meet"
    queues, results = [context.Queue() for _ in range(2)], context.Queue()
    arguments = [(rank, str(meeting_point), queues[rank], results) for rank in range(2)]
    processes = [context.Process(target=work_in_parallel, args=each, daemon=True) for each in arguments]
    for process in processes:
        process.start()

    def run(name, model):
        for models in queues:
            models.put((name, pickle.dumps(model)))
        found = [results.get(timeout=300) for _ in queues]
        assert {(got, rank) for got, rank, _ in found} == {(name, 0), (name, 1)}
        return [pickle.loads(output) for _, _, output in found]

    yield run
    for models, process in zip(queues, processes, strict=True):
        models.put(None)
        process.join(timeout=10)


@pytest.mark.row("context parallel")
def test_context_parallel(load, two_ranks, method, note):
    """Ulysses over two processes."""
    note("tried on two CPU processes; ring attention has no CPU kernel")
    model = load()
    expected = tiny_models.run(model, "flux")
    for output in two_ranks(method, model):
        assert torch.allclose(output, expected, atol=1e-5)
