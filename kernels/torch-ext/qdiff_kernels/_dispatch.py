"""Which implementation of an op runs on which device.

Every op has a torch implementation, which is its specification. Faster ones register beside it under their own name and are
preferred in the order of ``PREFERENCE``; one that does not support a call's dtypes or shapes returns ``NotImplemented``, and the
next one is tried. ``use("torch")`` forces one, for debugging and for measuring.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

PREFERENCE: dict[str, tuple[str, ...]] = {
    "cuda": ("triton", "torch"),
    "xpu": ("triton", "torch"),
    "cpu": ("cpu", "torch"),
}
_implementations: dict[str, dict[str, Callable[..., Any]]] = {}
_forced: ContextVar[str | None] = ContextVar("forced implementation", default=None)


def implementation(op: str, name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: register a function as implementation ``name`` ("torch", "triton", "cpu") of ``op``."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        _implementations.setdefault(op, {})[name] = function
        return function

    return register


def chosen(op: str, device_type: str) -> str:
    """Name of the implementation of ``op`` that runs on ``device_type``."""
    available = _implementations[op]
    if (forced := _forced.get()) is not None:
        if forced not in available:
            raise ValueError(f"{op} has no implementation {forced!r}; it has {', '.join(sorted(available))}")
        return forced
    for name in PREFERENCE.get(device_type, ("torch",)):
        if name in available:
            return name
    return "torch"


def run(op: str, device_type: str, *args: Any) -> Any:
    """Run ``op`` with the first implementation for ``device_type`` that supports these arguments."""
    available = _implementations[op]
    if (forced := _forced.get()) is not None:
        result = available[chosen(op, device_type)](*args)
        if result is NotImplemented:
            raise ValueError(f"{op}: the implementation {forced!r} does not take these arguments")
        return result
    for name in (*PREFERENCE.get(device_type, ()), "torch"):
        if name in available and (result := available[name](*args)) is not NotImplemented:
            return result
    raise AssertionError(f"the torch implementation of {op} refused")


def implementations() -> dict[str, dict[str, str]]:
    """``{op: {device type: implementation}}`` for every op and every device type with a preference."""
    return {op: {device: chosen(op, device) for device in PREFERENCE} for op in sorted(_implementations)}


@contextmanager
def use(name: str | None) -> Iterator[None]:
    """Force one implementation ("torch", "triton", "cpu") while the context lasts; ``None`` restores the choice by device.

    It holds in this thread or asynchronous task only; threads that it starts choose by device.
    """
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)
