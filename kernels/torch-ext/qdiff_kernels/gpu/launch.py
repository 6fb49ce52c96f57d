"""Calls that are planned once and repeated: the second of a kind costs a look-up and its launches.

Deciding what to launch, and Triton's binding of 30 to 50 arguments to a compiled kernel, take 50 to 100 us of Python for a layer.
Both depend only on what a call's arguments are (shapes, strides, dtypes, alignment, plain values), never on what its tensors hold
or on which tensors they are. So the first call of a kind is carried out step by step and written down as a :class:`Recipe`, and
later ones follow it with their own tensors. No tensor is kept: layers that were moved, offloaded, changed or copied are arguments
like any others.

Functions that are repeated allocate with :func:`empty`, launch with :func:`launch` and leave everything else that makes or changes
a tensor to :func:`call`. A call in which torch does anything besides is not repeated: it runs in full each time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import JITFunction

TENSORS = (Tensor, Parameter)
MOST_RECIPES = 1 << 12  # a model at one resolution needs tens
TRIES = 4  # to write a kind of call down: the first may fill caches or meet tiles that are too large


class View(NamedTuple):
    """A tensor among those a recipe holds, or another look at the same memory."""

    slot: int
    dtype: torch.dtype | None = None  # None: the tensor as it is
    shape: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()

    def of(self, held: list[Any]) -> Tensor:
        tensor = held[self.slot]
        return tensor if self.dtype is None else tensor.view(self.dtype).as_strided(self.shape, self.stride)


class Group(NamedTuple):
    """An argument that is a named tuple, with blanks for its tensors."""

    make: Callable[[list[Any]], Any]
    leaves: tuple[Any, ...]
    blanks: tuple[tuple[int, View], ...]

    def of(self, held: list[Any]) -> Any:
        leaves = list(self.leaves)
        for place, view in self.blanks:
            leaves[place] = held[view.slot] if view.dtype is None else view.of(held)
        return self.make(leaves)


class Step(NamedTuple):
    """A call of a function, with blanks for arguments that hold tensors."""

    function: Callable[..., Any]
    given: tuple[Any, ...]
    blanks: tuple[tuple[int, View | Group], ...]
    keep: bool  # whether the result is a tensor, to be held

    @classmethod
    def of(cls, function: Callable[..., Any], arguments: tuple[Any, ...], keep: bool = False) -> Step:
        """A step whose arguments are plain values, views and groups."""
        blanks = tuple((place, a) for place, a in enumerate(arguments) if isinstance(a, View | Group))
        return cls(function, tuple(None if isinstance(a, View | Group) else a for a in arguments), blanks, keep)


class Recipe(NamedTuple):
    """What one kind of call does, in order."""

    steps: list[Step]
    result: View


class _State(threading.local):
    recorder: _Recorder | None = None


_state = _State()
_recipes: dict[Any, Recipe | int] = {}  # or how often a call could not be written down


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """``torch.empty``."""
    recorder = _state.recorder
    if recorder is None:
        return torch.empty(shape, dtype=dtype, device=device)
    return recorder.step(torch.empty, (shape,), {"dtype": dtype, "device": device})


def call(function: Callable[..., Any], *arguments: Any) -> Any:
    """``function(*arguments)``, which decides by what its arguments are, not by what they hold."""
    recorder = _state.recorder
    return function(*arguments) if recorder is None else recorder.step(function, arguments, {})


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, num_warps: int = 4, num_stages: int = 3, **constants: Any) -> None:
    """``kernel[grid](*arguments, **constants, num_warps=..., num_stages=...)``.

    Args:
        arguments: all run-time arguments of the kernel in order: tensors, numbers, ``None`` and named tuples of them.
        constants: all its ``tl.constexpr`` arguments, which come last.
    """
    recorder = _state.recorder
    run = kernel[grid] if isinstance(kernel, JITFunction) else partial(kernel[grid], **constants)  # interpreted
    if recorder is None:
        run(*arguments, **constants, num_warps=num_warps, num_stages=num_stages)
        return
    with recorder.allowing():
        compiled = run(*arguments, **constants, num_warps=num_warps, num_stages=num_stages)
    if isinstance(kernel, JITFunction):
        if compiled is None:  # nothing is compiled where launches are only looked at
            recorder.fail()
            return
        arguments += tuple(map(constants.__getitem__, kernel.arg_names[len(arguments) :]))
        run = compiled[(*grid, 1, 1)[:3]]
    recorder.add_launch(run, arguments, isinstance(kernel, JITFunction))


def repeated(content: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator of a function of tensors and plain values: write down what its first call of a kind does, and repeat that.

    Args:
        content: called with the same arguments: what follows from the contents of tensors and decides, hashable. The function gets
            it as its first argument, and looks at the contents of no tensor itself.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def run(*arguments: Any) -> Any:
            known = content(*arguments)
            key = (function, known, *map(_kind_of, arguments))
            recipe = _recipes.get(key, 0)
            if isinstance(recipe, Recipe):
                return _follow(recipe, arguments)
            if _state.recorder is not None or recipe >= TRIES:
                return function(known, *arguments)
            recorder = _state.recorder = _Recorder([a for a in arguments if isinstance(a, Tensor)])
            try:
                with recorder:
                    result = function(known, *arguments)
            finally:
                _state.recorder = None
            if len(_recipes) >= MOST_RECIPES:
                _recipes.clear()
            written = recorder.recipe(result) if isinstance(result, Tensor) else None
            _recipes[key] = recipe + 1 if written is None else written
            return result

        return run

    return decorate


def _kind_of(argument: Any) -> Any:
    """All that may decide about a tensor, or a plain value itself."""
    kind = type(argument)
    if kind in TENSORS:
        return argument.dtype, argument.shape, argument.stride(), argument.data_ptr() & 15, argument.device
    return (*argument,) if kind is list else (kind, argument)


def _follow(recipe: Recipe, arguments: tuple[Any, ...]) -> Tensor:
    held: list[Any] = [a for a in arguments if type(a) in TENSORS]
    for function, given, blanks, keep in recipe.steps:
        filled = list(given)
        for place, blank in blanks:
            filled[place] = blank.of(held)
        found = function(*filled)
        if keep:
            held.append(found)
    return recipe.result.of(held)


class _Recorder(TorchDispatchMode):
    """Writes down the steps of one call, and whether torch has done anything that is not among them."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        self.held: list[Any] = []  # alive until the end: no other tensor may get their addresses meanwhile
        self.slots: dict[int, int] = {}
        self.steps: list[Step] = []
        self.complete = all(type(t) in TENSORS for t in tensors)
        self.inside = False
        for tensor in tensors:
            self.complete &= tensor.data_ptr() not in self.slots  # of two that share memory, who knows which one is meant
            self._hold(tensor)

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        result = function(*arguments, **(keywords or {}))
        if not self.inside and not _only_looks(function, arguments, result):
            self.fail()
        return result

    def fail(self) -> None:
        """What happens is more than can be written down."""
        self.complete = False

    @contextmanager
    def allowing(self) -> Iterator[None]:
        """What torch does in here belongs to a step."""
        self.inside = True
        try:
            yield
        finally:
            self.inside = False

    def step(self, function: Callable[..., Any], arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        with self.allowing():
            result = function(*arguments, **keywords)
        given = tuple(self._view(a) if isinstance(a, Tensor) else a for a in arguments)
        self.steps.append(Step.of(partial(function, **keywords) if keywords else function, given, isinstance(result, Tensor)))
        if isinstance(result, Tensor):
            self._hold(result)
        return result

    def add_launch(self, function: Callable[..., Any], arguments: tuple[Any, ...], compiled: bool) -> None:
        """``compiled``: for the tensors' dtypes and strides, so that their addresses are enough."""

        def look(tensor: Tensor) -> View:
            return View(self._slot(tensor)) if compiled else self._view(tensor)

        def described(argument: Any) -> Any:
            if isinstance(argument, Tensor):
                return look(argument)
            if not isinstance(argument, tuple):
                return argument
            blanks = tuple((place, look(leaf)) for place, leaf in enumerate(argument) if isinstance(leaf, Tensor))
            leaves = tuple(None if isinstance(leaf, Tensor) else leaf for leaf in argument)
            return Group(type(argument)._make, leaves, blanks) if blanks else argument  # type: ignore[attr-defined]

        self.steps.append(Step.of(function, tuple(map(described, arguments))))

    def recipe(self, result: Tensor) -> Recipe | None:
        view = self._view(result)
        return Recipe(self.steps, view) if self.complete else None

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        super().__exit__(kind, error, trace)
        self.complete &= error is None

    def _hold(self, tensor: Tensor) -> None:
        self.slots[tensor.data_ptr()] = len(self.held)
        self.held.append(tensor)

    def _slot(self, tensor: Tensor) -> int:
        slot = self.slots.get(tensor.data_ptr()) if tensor.numel() else None
        if slot is None:
            self.fail()
        return slot or 0

    def _view(self, tensor: Tensor) -> View:
        slot = self._slot(tensor)
        held = self.held[slot]
        if (held.dtype, held.shape, held.stride()) == (tensor.dtype, tensor.shape, tensor.stride()):
            return View(slot)
        self.complete &= held.dtype.itemsize == tensor.dtype.itemsize
        return View(slot, tensor.dtype, tuple(tensor.shape), tensor.stride())


def _only_looks(function: Any, arguments: tuple[Any, ...], result: Any) -> bool:
    """Whether the result of an operator is its first argument, or a view of it."""
    if function._schema.is_mutable or not isinstance(result, Tensor) or not arguments or not isinstance(arguments[0], Tensor):
        return False
    return result.untyped_storage().data_ptr() == arguments[0].untyped_storage().data_ptr()


def start_again() -> None:
    """The call begins anew with smaller tiles: not this one but the next is written down."""
    if _state.recorder is not None:
        _state.recorder.fail()
