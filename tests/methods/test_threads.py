"""Working on several threads leaves torch's number of threads, which every thread has for itself, as it was."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from qdiff_diffusers import AQConfig, FPConfig, QDiffConfig, RTNConfig, SVDQuantConfig, VQConfig
from qdiff_diffusers.methods import quantize_weight
from qdiff_diffusers.methods.threads import block_threads, map_blocks

METHODS: dict[str, Callable[[], QDiffConfig]] = {
    "aq": lambda: AQConfig(bits=2),
    "vq": lambda: VQConfig(bits=2),
    "fp": lambda: FPConfig(bits=4),
    "svdquant": lambda: SVDQuantConfig(bits=4, rank=4),
    "rtn": lambda: RTNConfig(bits=4),
}


@pytest.fixture(autouse=True)
def three_threads() -> Iterator[None]:
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(1)


def in_thread(function: Callable[[], Any]) -> Any:
    """Result of a function in a new thread."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


def test_inside_operations_run_on_one_thread_and_blocks_on_all() -> None:
    seen: set[str] = set()

    def work(part: slice) -> int:
        seen.add(threading.current_thread().name)
        return torch.get_num_threads()

    with block_threads():
        assert torch.get_num_threads() == 1
        counts = map_blocks(work, torch.zeros(64, 4), weights=4)
    assert set(counts) == {1}
    assert all(name.startswith("ThreadPool") for name in seen)
    assert torch.get_num_threads() == 3


def test_a_thread_that_begins_meanwhile_gets_the_usual_number() -> None:
    with block_threads():
        assert in_thread(torch.get_num_threads) == 3
    assert in_thread(torch.get_num_threads) == 3


def test_a_thread_with_a_number_of_its_own_keeps_it_and_changes_nobody_elses() -> None:
    def work() -> list[int]:
        torch.set_num_threads(2)
        with block_threads():
            inside = torch.get_num_threads()
        return [inside, torch.get_num_threads()]

    assert in_thread(work) == [1, 2]
    assert torch.get_num_threads() == 3


def test_the_way_without_torchs_library_restores_the_usual_number_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """What macOS and Windows use."""
    monkeypatch.setattr("qdiff_diffusers.methods.threads._thread_setters", lambda: None)
    with block_threads():
        assert torch.get_num_threads() == 1
        assert in_thread(torch.get_num_threads) == 3
    assert torch.get_num_threads() == in_thread(torch.get_num_threads) == 3


def test_an_error_inside_restores_it() -> None:
    with pytest.raises(ZeroDivisionError), block_threads():
        raise ZeroDivisionError
    assert torch.get_num_threads() == in_thread(torch.get_num_threads) == 3


@pytest.mark.parametrize("method", METHODS)
def test_quantizing_in_several_threads_leaves_it_alone(method: str) -> None:
    weight = torch.randn(64, 64)
    expected = quantize_weight(weight, METHODS[method]())
    found: list[Any] = []

    def work() -> None:
        found.append((quantize_weight(weight, METHODS[method]()), torch.get_num_threads()))

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [count for _, count in found] == [3] * 6
    assert torch.get_num_threads() == in_thread(torch.get_num_threads) == 3
    for quantized, _ in found:
        for name, tensor in expected.tensors.items():
            assert torch.equal(quantized.tensors[name].view(torch.uint8), tensor.view(torch.uint8)), name
