"""Measures the thresholds of configs/cpu.json on this machine."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from ..bitpack import packed_bytes
from ..reference import Extras
from ._linear import linear, supports_integers
from ._thresholds import table
from ._weights import WEIGHTS, Weight

SIZE = 3072
TOKENS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
REPEATS = 12


def measure_thresholds(size: int = SIZE, repeats: int = REPEATS) -> dict[str, Any]:
    """Contents for configs/cpu.json: for each table entry the largest number of tokens at which the packed product is ahead.

    Every strategy runs ``repeats`` times, in turn with the others, and its least time counts. The default size needs about two
    minutes on two cores.
    """
    few: dict[str, dict[str, dict[str, int]]] = {"int8": {}, "other": {}}
    integers: dict[str, dict[str, int]] = {"int8": {}, "other": {}}
    for (kind, width), make in _weights().items():
        weight = make(size)
        for name, activations in (("int8", "int8"), ("other", "none")):
            extras = Extras(None, None, None, None, 0, activations)
            in_integers, packed = _thresholds(weight, extras, size, repeats)
            few[name].setdefault(kind, {})[width] = packed
            if width == "narrow":
                integers[name][kind] = in_integers
    return {"comment": table()["comment"], "few_tokens": few, "integer_tokens": integers}


def _thresholds(weight: Weight, extras: Extras, size: int, repeats: int) -> tuple[int, int]:
    """Largest numbers of tokens at which integers beat bfloat16, and the better of the two beats decoding."""
    in_integers = packed = 0
    ahead = True
    for tokens in TOKENS:
        x = torch.randn(tokens, size).bfloat16()
        strategies = ["bfloat16", "decoded", *(["integers"] if supports_integers(x, weight, extras) else [])]
        times = _times({strategy: partial(linear, x, weight, extras, strategy) for strategy in strategies}, repeats)
        fewest = min(times["bfloat16"], times.get("integers", times["bfloat16"]))
        ahead = ahead and times.get("integers", float("inf")) <= times["bfloat16"]
        if ahead:
            in_integers = tokens
        if fewest > times["decoded"]:
            break
        packed = tokens
    return in_integers, packed


def _times(runs: dict[str, Callable[[], Tensor]], repeats: int) -> dict[str, float]:
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(repeats + 1):
        for name, run in runs.items():
            start = perf_counter()
            run()
            best[name] = min(best[name], perf_counter() - start)
    return best


def _weights() -> dict[tuple[str, str], Callable[[int], Weight]]:
    """A random weight ``[size, size]`` for every format and width."""

    def codes(size: int, bits: int, count: int | None = None) -> Tensor:
        return torch.randint(-128, 128, (size, packed_bytes(count or size, bits)), dtype=torch.int8)

    def scales(size: int, group: int, dtype: torch.dtype) -> Tensor:
        return torch.rand(size, size // group).add(0.5).to(dtype)

    def books(size: int, count: int, vector_size: int) -> Weight:
        tables = torch.randint(-30, 30, (count, 256, vector_size), dtype=torch.int8)
        packed = codes(size, 8, -(-size // vector_size) * count)
        return _made("codebook", packed, tables, scales(size, size, torch.float16), size, size)

    def floats(size: int, encoding: str, bits: int) -> Weight:
        group = scales(size, 16, torch.float8_e4m3fn)
        return _made("minifloat", codes(size, bits), group, torch.ones(1), encoding, 16, size)

    def integers(size: int, bits: int, group: int) -> Weight:
        return _made("integer", codes(size, bits), scales(size, group, torch.float16), None, bits, group, size)

    return {
        ("codebook", "narrow"): lambda size: books(size, 4, 16),
        ("codebook", "wide"): lambda size: books(size, 2, 2),
        ("minifloat", "narrow"): lambda size: floats(size, "e2m1", 4),
        ("minifloat", "wide"): lambda size: floats(size, "e2m3", 6),
        ("integer", "narrow"): lambda size: integers(size, 4, 64),
        ("integer", "wide"): lambda size: integers(size, 8, size),
    }


def _made(kind: str, *arguments: Any) -> Weight:
    weight = WEIGHTS[kind](*arguments)
    assert weight is not None
    return weight
