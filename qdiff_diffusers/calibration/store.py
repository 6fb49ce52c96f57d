"""Tensors of recorded calls, in memory up to a limit and in memory-mapped files beyond it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..checkpoint.writing import written_file
from ..errors import CalibrationError, OutputError
from ..formats import dtype_name

STRUCTURE = "structure"


class Store:
    """An append-only list of nested structures of tensors, such as the arguments of a call.

    Args:
        folder: folder for the files; with ``keep`` every entry is written there, so that another run can read it.
        memory_limit: bytes to hold in memory.
    """

    def __init__(self, folder: Path, memory_limit: int, keep: bool = False) -> None:
        self.folder = folder
        self.memory_limit = memory_limit
        self.keep = keep
        self.held: dict[int, Any] = {}
        self.held_bytes = 0
        self.nbytes = 0  # bytes of all entries
        self.length = 0

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(self.length))

    def append(self, value: Any) -> None:
        """Add an entry: tensors, numbers, strings, booleans and ``None`` in dicts, lists and tuples."""
        tensors: list[Tensor] = []
        structure = _flatten(value, tensors)
        size = sum(t.nbytes for t in tensors)
        self.nbytes += size
        fits = self.held_bytes + size <= self.memory_limit
        if fits:
            self.held[self.length] = _unflatten(structure, [t.detach().cpu().clone() for t in tensors])
            self.held_bytes += size
        if self.keep or not fits:
            write_tensors(self.path(self.length), {str(i): t for i, t in enumerate(tensors)}, {STRUCTURE: structure})
        self.length += 1

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < self.length:
            raise IndexError(index)
        if index in self.held:
            return self.held[index]
        tensors, metadata = read_tensors(self.path(index))
        return _unflatten(metadata[STRUCTURE], [tensors[str(i)] for i in range(len(tensors))])

    def path(self, index: int) -> Path:
        return self.folder / f"{index:06}.safetensors"

    def adopt(self) -> int:
        """Add the entries that an earlier run left in the folder, up to the first that cannot be read. Returns their number."""
        self.length = 0
        while self.path(self.length).is_file() and _readable(self.path(self.length)):
            self.length += 1
        return self.length


def groups_within(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Consecutive names whose sizes add up to at most ``limit``; a name that alone is larger stands alone."""
    groups: list[list[str]] = []
    used = limit
    for name, size in sizes.items():
        if used + size > limit or not groups:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += size
    return groups


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write a safetensors file whose metadata are JSON; it appears when it is complete.

    Raises:
        CalibrationError: there is no space, or no permission.
    """
    data = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    try:
        with written_file(path) as part:
            save_file(data, part, {key: json.dumps(value) for key, value in metadata.items()})
    except OutputError as error:
        raise CalibrationError(f"{error}; finished work is kept: run it again") from error


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Inverse of :func:`write_tensors`; tensors stay mapped to the file until they are used."""
    with safe_open(path, "pt") as file:
        metadata = {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
        return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118


def _readable(path: Path) -> bool:
    try:
        read_tensors(path)
    except (OSError, SafetensorError, ValueError):
        return False
    return True


def _flatten(value: Any, tensors: list[Tensor]) -> Any:
    """``value`` as JSON; its tensors are appended to ``tensors`` and replaced by their positions there."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return {"tensor": len(tensors) - 1}
    if isinstance(value, dict):
        return {"dict": {str(key): _flatten(item, tensors) for key, item in value.items()}}
    if isinstance(value, list | tuple):
        return {type(value).__name__ if type(value) in (list, tuple) else "tuple": [_flatten(item, tensors) for item in value]}
    if isinstance(value, torch.dtype):
        return {"dtype": dtype_name(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    raise CalibrationError(f"the model is called with a {type(value).__name__}, which cannot be recorded")


def _unflatten(structure: Any, tensors: list[Tensor]) -> Any:
    ((kind, content),) = structure.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _unflatten(item, tensors) for key, item in content.items()}
    if kind == "list":
        return [_unflatten(item, tensors) for item in content]
    if kind == "tuple":
        return tuple(_unflatten(item, tensors) for item in content)
    return getattr(torch, content) if kind == "dtype" else content
