"""A model's recorded calls, run from block to block: each pass goes on from what the last block of the pass before gave.

Statistics of a large model's layers do not fit into memory all at once, and are collected in several passes over the calls. A model
that is a chain of blocks need not begin every pass at its first block, nor end it at its last: the blocks before those looked at
only pass on what the last of them gave before, and the call is broken off after those looked at. So all passes together run each
block about once, not once each.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .store import Store
from .trajectories import call_model, map_tensors

Run = Callable[[int, dict[str, Any]], Any]  # number of a call, and its inputs


class NotAChainError(Exception):
    """A block needs more than what the block before it gives."""


class _BlockReachedError(Exception):
    """Nothing more is needed of this call."""


class Relay:
    """Runs a model's calls in legs.

    What blocks before the last gave is not kept: the model gets NaN in its place, of the same shape. If any of it arrives at a
    block that is run, the model is no chain (a UNet's later blocks take from the earlier ones): :class:`NotAChainError` is raised.

    Args:
        model: the model, which is unchanged between legs.
        calls: its recorded calls.
        folder: for what does not fit into memory; emptied.
        memory_limit: bytes of one block's outputs to hold in memory.
    """

    def __init__(self, model: nn.Module, calls: Store, folder: Path, memory_limit: int) -> None:
        self.model = model
        self.folder = folder
        self.memory_limit = memory_limit
        shutil.rmtree(folder, ignore_errors=True)
        self.blocks, self.strays = _chain(model, calls[0]["inputs"])
        self.done = 0  # blocks that need not be run again
        self.given: Store | None = None  # what the last of them gave at each call
        self.layouts: dict[tuple[int, int], Any] = {}  # outputs on the meta device, by the numbers of the call and of the block

    def close(self) -> None:
        """Remove what was written."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def give_up(self) -> None:
        """Run all further calls whole."""
        self.blocks, self.given = [], None
        self.close()

    @contextmanager
    def leg(self, names: Sequence[str], following: Sequence[str]) -> Iterator[Run]:
        """A pass over all calls, in their order, in which the layers ``names`` are run, by the function that this gives.

        Args:
            following: the layers of later legs.

        Raises:
            NotAChainError: while a call runs.
        """
        own = [self._block_of(name) for name in names]
        later = [index for name in following if (index := self._block_of(name)) is not None]
        inside = [index for index in own if index is not None]
        if not self.blocks:
            yield lambda _, inputs: call_model(self.model, inputs)
            return
        whole = len(inside) < len(own)  # layers outside the blocks are somewhere before, after or between them
        first = 0 if whole else self.done
        last = len(self.blocks) - 1 if whole else max(inside)
        end = min([*later, last + 1])  # the block that the next leg begins with
        kept = Store(self.folder / str(end), self.memory_limit) if later and end > self.done else None
        device, current = next(self.model.parameters()).device, 0

        def stand_in(index: int) -> Callable[..., Any]:
            def forward(*_: Any, **__: Any) -> Any:
                if (current, index) not in self.layouts:
                    raise NotAChainError
                known = _tensors(self.given[current]) if index == first - 1 and self.given is not None else None
                return map_tensors(self.layouts[current, index], lambda t: _made(t, next(known) if known else None, device))

            return forward

        def check(_: nn.Module, args: Any, kwargs: Any) -> None:
            if first > 1 and any(t.is_floating_point() and t.isnan().any() for t in _tensors((args, kwargs))):
                raise NotAChainError

        def note(index: int) -> Callable[..., None]:
            def hook(_: nn.Module, __: Any, output: Any) -> None:
                self.layouts[current, index] = map_tensors(
                    output, lambda t: t.new_empty_strided(t.shape, t.stride(), device="meta")
                )
                if kept is not None and index == end - 1:
                    kept.append(output)
                if index == last and not whole:
                    raise _BlockReachedError

            return hook

        def run(number: int, inputs: dict[str, Any]) -> None:
            nonlocal current
            current = number
            with suppress(_BlockReachedError):
                call_model(self.model, inputs)
            if kept is not None and len(kept) != number + 1:
                raise NotAChainError

        with ExitStack() as stack:
            for index, name in enumerate(self.blocks[: last + 1]):
                block = self.model.get_submodule(name)
                if index < first:
                    block.forward = stand_in(index)
                    stack.callback(delattr, block, "forward")
                else:
                    stack.callback(block.register_forward_pre_hook(check, with_kwargs=True).remove)
                    stack.callback(block.register_forward_hook(note(index)).remove)
            yield run
        if kept is not None:
            if self.given is not None:
                shutil.rmtree(self.given.folder, ignore_errors=True)
            self.given, self.done = kept, end

    def _block_of(self, layer: str) -> int | None:
        """The number of the block that a layer runs in, and nowhere else."""
        if layer in self.strays:
            return None
        return next((i for i, block in enumerate(self.blocks) if layer.startswith(f"{block}.")), None)


def block_names(model: nn.Module) -> list[str]:
    """The outermost modules in ``nn.ModuleList``s, where diffusers' models keep their repeated blocks, in order."""
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    outermost = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    return [f"{name}.{i}" for name in outermost for i in range(len(model.get_submodule(name)))]  # type: ignore[arg-type]


@torch.inference_mode(False)
@torch.no_grad()
def _chain(model: nn.Module, inputs: dict[str, Any]) -> tuple[list[str], set[str]]:
    """The names of a model's blocks in the order in which they run, and of modules in them that also run outside of their block.

    There are none if one of them does not run once and by itself, changes its inputs, or gives something else than plain tensors,
    so that what it once gave could not stand in for it to the last bit.
    """
    names = {id(model.get_submodule(name)): name for name in block_names(model)}
    everywhere = [id(module) for _, module in model.named_modules(remove_duplicate=False)]
    # By hooks that move weights, for instance, or by torch.compile.
    patched = any("forward" in vars(m) or getattr(m, "_compiled_call_impl", None) for m in model.modules())
    if len(names) < 2 or patched or len(set(everywhere)) < len(everywhere):
        return [], set()
    order: list[str] = []
    running: list[str] = []
    strays: set[str] = set()
    plain = True

    versions: list[list[Any]] = []

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        nonlocal plain
        name = names[id(module)]
        plain &= not running and name not in order
        versions.append(_versions((args, kwargs)))
        running.append(name)
        order.append(name)

    def leave(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        nonlocal plain
        running.pop()
        plain &= versions.pop() == _versions((args, kwargs))
        parts = output if type(output) in (tuple, list) else (output,)
        plain &= all(part is None or (isinstance(part, Tensor) and 0 not in part.stride()) for part in parts)

    def watch(block: str, inner: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any) -> None:
            if running != [block]:
                strays.add(f"{block}.{inner}")

        return hook

    with ExitStack() as stack:
        for name in names.values():
            block = model.get_submodule(name)
            stack.callback(block.register_forward_pre_hook(enter, with_kwargs=True).remove)
            stack.callback(block.register_forward_hook(leave, with_kwargs=True).remove)
            for inner, module in block.named_modules():
                if module is not block:
                    stack.callback(module.register_forward_pre_hook(watch(name, inner)).remove)
        call_model(model, inputs)
    return (order, strays) if plain and len(order) == len(names) else ([], set())


def _versions(value: Any) -> list[Any]:
    """Counts of the changes to tensors; those of inference mode keep none, and equal nothing."""
    return [object() if t.is_inference() else t._version for t in _tensors(value)]


def _layout(t: Tensor) -> Tensor:
    return t.new_empty_strided(t.shape, t.stride(), device="meta")


def _made(layout: Tensor, value: Tensor | None, device: torch.device) -> Tensor:
    """A tensor of the shape, strides and dtype of ``layout`` with the given value, or with none."""
    out = torch.empty_strided(layout.shape, layout.stride(), dtype=layout.dtype, device=device)
    return out.copy_(value) if value is not None else out.fill_(torch.nan if out.is_floating_point() else 0)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
