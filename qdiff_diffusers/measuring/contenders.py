"""Contenders of a benchmark: each converts a dense layer into its own kind of layer."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError

Convert = Callable[[nn.Module], nn.Module]
OURS = "ours"


@dataclass(frozen=True)
class Contender:
    """One row of a benchmark.

    Attributes:
        name: unique name.
        family: "torch", "ours" or the peer's distribution, by which ``--only`` selects.
        convert: function from a dense bf16 layer, which it may change, to the layer to time. It raises where the peer cannot do it.
        bits: nominal bits per weight, of the codes alone.
        install: arguments of ``pip install`` for the peer.
        modules: modules that it imports; the peer is "not installed" if one is missing.
        devices: device types that it runs on.
        layers: kinds of layer that it converts.
        compiled: whether to run it under ``torch.compile``.
        note: remark that a reader of its row needs.
    """

    name: str
    family: str
    convert: Convert
    bits: float
    install: str = ""
    modules: tuple[str, ...] = ()
    devices: tuple[str, ...] = ("cpu", "cuda", "xpu", "mps")
    layers: tuple[type[nn.Module], ...] = (nn.Linear,)
    compiled: bool = False
    note: str = ""

    def unavailable(self, device: torch.device) -> str | None:
        """Why this contender cannot run on ``device`` in this environment; ``None`` if it can."""
        if device.type not in self.devices:
            return f"does not run on {device.type}"
        missing = [name for name in self.modules if not _found(name)]
        return f"not installed: pip install {self.install}" if missing else None

    def build(self, layer: nn.Module) -> nn.Module:
        """A converted copy of ``layer``, ready to be called."""
        with torch.no_grad():
            built = self.convert(copy.deepcopy(layer)).eval()
        return compiled(built) if self.compiled else built


def compiled(module: nn.Module) -> nn.Module:
    """``torch.compile``, a graph for each input shape, however many there are."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 512)
    torch._dynamo.config.accumulated_recompile_limit = max(torch._dynamo.config.accumulated_recompile_limit, 4096)
    out: nn.Module = torch.compile(module, dynamic=False)  # type: ignore[assignment]
    return out


def plain() -> list[Contender]:
    """Contenders of plain torch. The eager row is a second copy of the baseline, whose distance from 1 is the noise."""
    both = (nn.Linear, nn.Conv2d)
    return [
        Contender("torch", "torch", lambda layer: layer, 16, layers=both, note="a second copy of the baseline"),
        Contender("torch-compile", "torch", lambda layer: layer, 16, layers=both, compiled=True),
    ]


def select(contenders: Sequence[Contender], only: Iterable[str] | None) -> list[Contender]:
    """The contenders whose family is in ``only``, or whose name matches a word of it, which may hold ``*``.

    Raises:
        ConfigError: a word matches no contender.
    """
    if only is None:
        return list(contenders)
    words = list(only)
    for word in words:
        if not any(_fits(word, contender) for contender in contenders):
            families = ", ".join(dict.fromkeys(c.family for c in contenders))
            raise ConfigError(f"unknown contender {word!r}; families are {families}, and `qdiff bench list` shows every name")
    return [c for c in contenders if any(_fits(word, c) for word in words)]


def _fits(word: str, contender: Contender) -> bool:
    return word == contender.family or fnmatch(contender.name, word)


def _found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def resident_bytes(module: nn.Module) -> int:
    """Bytes of every tensor that a module holds, those inside tensor subclasses and quantization states included, each once."""
    storages: dict[int, int] = {}
    seen: set[int] = set()

    def visit(value: object, depth: int) -> None:
        if id(value) in seen or depth > 6:
            return
        seen.add(id(value))
        if isinstance(value, Tensor):
            if hasattr(value, "__tensor_flatten__"):
                for name in value.__tensor_flatten__()[0]:
                    visit(getattr(value, name), depth + 1)
            elif value.device.type != "meta":
                storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        if isinstance(value, nn.Module):
            for child in (*value.parameters(), *value.buffers(), *value.modules()):
                visit(child, depth)
        if isinstance(value, dict):
            for child in value.values():
                visit(child, depth + 1)
        elif isinstance(value, (list, tuple)):
            for child in value:
                visit(child, depth + 1)
        elif (fields := getattr(value, "__dict__", None)) is not None and not isinstance(value, type):
            visit(fields, depth + 1)

    visit(module, 0)
    return sum(storages.values())


def describe_failure(error: BaseException) -> str:
    """A one-line description of an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def detached(layer: nn.Module) -> nn.Module:
    """A copy of a layer with parameters of its own, which a peer may change as it likes."""
    out = copy.copy(layer)
    out._parameters = {
        name: None if value is None else nn.Parameter(value.detach().clone(), requires_grad=False)
        for name, value in layer._parameters.items()
    }
    return out


def first_tensor(output: Any) -> Tensor:
    """The sample of a diffusers model's output."""
    return output if isinstance(output, Tensor) else output[0]
