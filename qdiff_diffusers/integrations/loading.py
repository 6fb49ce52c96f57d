"""``from_pretrained`` in several threads at once.

While they construct a model, the loaders change the whole process: accelerate's and PEFT's ``init_empty_weights`` replace
``nn.Module.register_parameter``, diffusers and transformers set torch's default dtype, both replace functions of ``torch.nn.init``,
and transformers switches the tying of weights off. A second thread that starts meanwhile builds its model under the first one's
settings, takes them for what was there before, and leaves them for good: tensors stay on the meta device, buffers get another
model's dtype, text encoders lose their embedding. Quantized and dense models are hit alike, and by each other.

Here the device of new parameters and the tying of weights become settings of each thread, and because of the other settings
models are constructed one after the other. Downloading, reading and quantizing, which take the time, still run side by side.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from ..config import is_ours
from .patches import MARKER, require

# Held by the thread that changes settings of the process. Reentrant, as a model may construct others.
_constructing = threading.RLock()

if hasattr(os, "register_at_fork"):  # a forked process must not inherit it from a thread that it does not have
    os.register_at_fork(before=_constructing.acquire, after_in_parent=_constructing.release, after_in_child=_constructing.release)


@contextmanager
def one_at_a_time(original: Any, *args: Any, **kwargs: Any) -> Iterator[Any]:
    """A context manager that changes the process: one thread at a time enters it."""
    with _constructing, original(*args, **kwargs) as value:
        yield value


def call_alone(original: Any, *args: Any, **kwargs: Any) -> Any:
    """A function during which no other thread may change the process."""
    with _constructing:
        return original(*args, **kwargs)


class _Scopes(threading.local):
    """For each ``ModelMixin.from_pretrained`` that this thread is in: the default dtypes before each change that holds the lock."""

    def __init__(self) -> None:
        self.dtypes: list[list[torch.dtype]] = []


_scopes = _Scopes()


def from_pretrained(original: Any, cls: Any, *args: Any, **kwargs: Any) -> Any:
    """``ModelMixin.from_pretrained``, after which this thread holds no lock, whatever went wrong."""
    if is_ours(kwargs.get("quantization_config")):
        require("diffusers")
    _scopes.dtypes.append([])
    try:
        return original(cls, *args, **kwargs)
    finally:
        if changed := _scopes.dtypes[-1]:
            torch.set_default_dtype(changed[0])
        _release()
        _scopes.dtypes.pop()


def set_default_dtype(original: Any, *args: Any, **kwargs: Any) -> Any:
    """``ModelMixin._set_default_torch_dtype``: from here until weights are read a model is constructed."""
    if _scopes.dtypes:
        _constructing.acquire()
        _scopes.dtypes[-1].append(torch.get_default_dtype())
    return original(*args, **kwargs)


def read_weights(original: Any, *args: Any, **kwargs: Any) -> Any:
    """``ModelMixin._load_pretrained_model``: the model has been constructed, and the default dtype is what it was."""
    _release()
    return original(*args, **kwargs)


def _release() -> None:
    """Release the lock that keeps other threads from constructing models, if this thread holds it."""
    while _scopes.dtypes and _scopes.dtypes[-1]:
        _scopes.dtypes[-1].pop()
        _constructing.release()


def from_pretrained_encoder(original: Any, cls: Any, *args: Any, **kwargs: Any) -> Any:
    """``PreTrainedModel.from_pretrained`` of transformers."""
    if is_ours(kwargs.get("quantization_config")):
        require("transformers")
    return original(cls, *args, **kwargs)


_device: ContextVar[torch.device | None] = ContextVar("device of new parameters", default=None)
_tying: ContextVar[bool] = ContextVar("whether weights are tied", default=True)


class _Registration:
    """``nn.Module.register_parameter`` while any thread is in ``init_on_device``; moves the parameters of those threads only."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.users = 0
        self.original: Callable[..., None] = nn.Module.register_parameter

        def register_parameter(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
            self.original(module, name, param)
            device = _device.get()
            if param is not None and device is not None and not _peft_skips():
                module._parameters[name] = _moved(module._parameters[name], device)

        self.replacement = register_parameter

    @contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        with self.lock:
            self.users += 1
            if self.users == 1:
                found = _without_leftovers(nn.Module.register_parameter)
                self.original = self.original if found is self.replacement else found  # left by a context that ended after ours
                nn.Module.register_parameter = self.replacement  # type: ignore[method-assign, assignment]
        token = _device.set(device)
        try:
            yield
        finally:
            _device.reset(token)
            with self.lock:
                self.users -= 1
                if self.users == 0 and nn.Module.register_parameter is self.replacement:
                    nn.Module.register_parameter = self.original  # type: ignore[method-assign]


_registration = _Registration()


@contextmanager
def init_on_device(original: Any, device: torch.device, include_buffers: bool | None = None) -> Iterator[Any]:
    """accelerate's and PEFT's context in which new parameters go to ``device``, restricted to this thread."""
    if include_buffers or os.environ.get("ACCELERATE_INIT_INCLUDE_BUFFERS"):  # for which torch has a context of the thread's own
        with original(device, include_buffers=include_buffers) as value:
            yield value
    else:
        with _registration.on(device):
            yield


@contextmanager
def skip_init_on_device(original: Any) -> Iterator[None]:
    """PEFT's context that suspends :func:`init_on_device`, restricted to this thread."""
    token = _device.set(None)
    try:
        yield
    finally:
        _device.reset(token)


@contextmanager
def no_tie_weights(original: Any) -> Iterator[None]:
    """transformers' context in which no weights are tied, restricted to this thread."""
    tie = sys.modules["transformers.modeling_utils"].PreTrainedModel.tie_weights
    if not hasattr(tie, MARKER):
        with original():
            yield
        return
    token = _tying.set(False)
    try:
        yield
    finally:
        _tying.reset(token)


def tie_weights(original: Any, *args: Any, **kwargs: Any) -> Any:
    """``PreTrainedModel.tie_weights``; see :func:`no_tie_weights`."""
    return original(*args, **kwargs) if _tying.get() else None


def _moved(parameter: Any, device: torch.device) -> Any:
    """A parameter of the same class and attributes on another device."""
    attributes = parameter.__dict__ | {"requires_grad": parameter.requires_grad}
    initialized = attributes.pop("_is_hf_initialized", None)  # no argument of the constructor
    moved = type(parameter)(parameter.to(device), **attributes)
    if initialized is not None:
        moved._is_hf_initialized = initialized
    return moved


def _peft_skips() -> bool:
    """Whether PEFT is in its own ``skip_init_on_device``, which code may have bound before it was wrapped."""
    peft = sys.modules.get("peft.utils.integrations")
    return bool(getattr(getattr(peft, "_init_on_device", None), "_skip", False))


def _without_leftovers(register: Any) -> Any:
    """``register_parameter`` without what threads left behind that entered ``init_on_device`` before it was wrapped."""
    while getattr(register, "__name__", "") == "register_empty_parameter":
        names, cells = register.__code__.co_freevars, register.__closure__
        register = cells[names.index("old_register_parameter")].cell_contents
    return register
