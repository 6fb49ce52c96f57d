"""The kernels' own host code on tensors of the CPU, with each launch compiled for a GPU and run by the machine."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from compile_kernels import TARGETS, Launch, Specialisation, compile_specialisation, recorded, specialise

from .instructions import steps_of
from .machine import GlobalMemory, Machine, Step
from .text import Program, parse

CAPABILITIES = ("cuda:80", "cuda:89")  # whose matrix unit takes its operands from registers


class Compiled(NamedTuple):
    """A kernel, ready to run."""

    program: Program
    steps: list[Step]
    shared: int


@contextmanager
def executed(target: str) -> Iterator[list[str]]:
    """Launches run as compiled for ``target``, one of :data:`CAPABILITIES`. Yields the names of the kernels that ran.

    Raises:
        Fault: from the launch, if a GPU would not do what the program says, or not always the same.
        Unknown: from the launch, if the program has an instruction that is not known here.
    """
    names: list[str] = []

    def run(launch: Launch) -> None:
        execute(launch, target)
        names.append(launch.function.__name__)

    with recorded(run):
        yield names


def execute(launch: Launch, target: str) -> None:
    """Compile and run one launch."""
    wanted = specialise(launch)
    compiled = _compiled(_Key(wanted, target))
    memory = GlobalMemory()
    values = list(_run_time_values(launch, wanted, memory))
    names = sorted(compiled.program.parameters, key=lambda name: compiled.program.parameters[name][0])
    arguments = dict.fromkeys(names, 0) | dict(zip(names, values, strict=False))  # those left are scratch memory, which none uses
    x, y, z = (*launch.grid, 1, 1)[:3]
    Machine(compiled.program, compiled.steps, (x, y, z), arguments, memory, compiled.shared).run()


class _Key:
    def __init__(self, wanted: Specialisation, target: str) -> None:
        self.wanted, self.target, self.text = wanted, target, f"{wanted} {target}"

    def __hash__(self) -> int:
        return hash(self.text)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self.text == other.text


@lru_cache(maxsize=512)
def _compiled(key: _Key) -> Compiled:
    found = compile_specialisation(key.wanted, TARGETS[key.target])
    program = parse(found.asm["ptx"])
    return Compiled(program, steps_of(program), found.metadata.shared)


def _run_time_values(launch: Launch, wanted: Specialisation, memory: GlobalMemory) -> Iterator[int]:
    """Bits of the arguments that are not known when a kernel is compiled, in order."""

    def visit(value: Any, path: tuple[int, ...], name: str) -> Iterator[int]:
        if path in wanted.constants:
            return
        if isinstance(value, tuple):
            fields = getattr(value, "_fields", range(len(value)))
            for i, (item, field) in enumerate(zip(value, fields, strict=True)):
                yield from visit(item, (*path, i), f"{name}.{field}")
        elif isinstance(value, torch.Tensor):
            if value.numel():
                memory.add(value.data_ptr(), _bytes_of(value), name)
            yield value.data_ptr()
        else:
            yield struct.unpack("<I", struct.pack("<f", value))[0] if isinstance(value, float) else int(value)

    for i, parameter in enumerate(launch.function.params):
        yield from visit(launch.arguments[parameter.name], (i,), parameter.name)


def _bytes_of(tensor: torch.Tensor) -> Any:
    """The memory from a tensor's first element to its last, as numpy bytes."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())  # type: ignore[call-overload]
    first = tensor.storage_offset() * tensor.element_size()
    return whole[first : first + (last + 1) * tensor.element_size()].numpy()
