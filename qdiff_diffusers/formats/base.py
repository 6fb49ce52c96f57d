"""What all weight formats share: the description of their tensors, and strict conversion to and from JSON."""

from __future__ import annotations

import math
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

GroupSize = int | Literal["row", "tensor"]

SCALE_DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "e4m3": torch.float8_e4m3fn,
    "e8m0": torch.int8,  # the exponent byte: value 2**(byte - 127)
}


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.bfloat16`` -> "bfloat16", as it stands in config.json."""
    return str(dtype).removeprefix("torch.")


class TensorInfo(NamedTuple):
    """Shape and dtype of one stored tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{dtype_name(self.dtype)} {list(self.shape)}"


@dataclass(frozen=True)
class WeightFormat:
    """How a weight matrix ``[rows, columns]`` is stored. Subclasses say what their codes mean.

    ``scales`` has one entry per group of ``group_size`` columns of a row ("row": one per row, "tensor": one in all).
    """

    kind: ClassVar[str]

    def tensors(self, rows: int, columns: int) -> dict[str, TensorInfo]:
        """Name, shape and dtype of every tensor that stores a ``[rows, columns]`` weight."""
        raise NotImplementedError

    def largest_level(self, tensors: dict[str, Tensor]) -> float:
        """Bound on the magnitude of what scales multiply."""
        raise NotImplementedError

    def op_arguments(self, tensors: dict[str, Tensor], columns: int) -> tuple[Any, ...]:
        """The packed weight as the arguments of this format's kernels."""
        raise NotImplementedError

    def dequantize(self, tensors: dict[str, Tensor], columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Dense ``[rows, columns]`` weight, as stored (rotated and smoothed, without the low-rank branch)."""
        raise NotImplementedError

    def describe(self) -> str:
        """A few words for tables."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind} | non_default_fields(self)


def scale_shape(group_size: GroupSize, rows: int, columns: int) -> tuple[int, int]:
    """Shape ``[rows or 1, groups]`` of a scale tensor."""
    if group_size == "tensor":
        return (1, 1)
    if group_size == "row":
        return (rows, 1)
    return (rows, -(-columns // group_size))


def group_columns(group_size: GroupSize, columns: int) -> int:
    """Columns that share a scale."""
    return group_size if isinstance(group_size, int) else columns


def check_group_size(group_size: GroupSize) -> None:
    valid = group_size >= 1 and not isinstance(group_size, bool) if isinstance(group_size, int) else group_size in ("row", "tensor")
    if not valid:
        raise ValueError(f'group_size must be a positive integer, "row" or "tensor", got {group_size!r}')


def check_range(name: str, value: Any, low: int, high: int) -> None:
    if not _is_int(value) or not low <= value <= high:
        raise ValueError(f"{name} must be an integer from {low} to {high}, got {value!r}")


def check_choice(name: str, value: Any, choices: Any) -> None:
    if value not in tuple(choices):
        raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, got {value!r}")


def check_flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, got {value!r}")


def describe_groups(group_size: GroupSize) -> str:
    return f"g{group_size}" if isinstance(group_size, int) else f"per {group_size}"


def non_default_fields(instance: Any) -> dict[str, Any]:
    """Fields of a dataclass that differ from their defaults, JSON-able."""
    out: dict[str, Any] = {}
    for f in fields(instance):
        value = getattr(instance, f.name)
        if f.default is MISSING or value != f.default:
            out[f.name] = list(value) if isinstance(value, tuple) else value
    return out


def strict_from_dict(cls: type, data: dict[str, Any], what: str) -> Any:
    """Build a dataclass from JSON, refusing unknown and missing keys by name."""
    known = {f.name: f for f in fields(cls)}
    unknown = sorted(set(data) - set(known))
    if unknown:
        raise ValueError(f"{what} has unknown keys {', '.join(unknown)}; this version knows {', '.join(known)}")
    missing = [name for name, f in known.items() if f.default is MISSING and name not in data]
    if missing:
        raise ValueError(f"{what} lacks {', '.join(missing)}")
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in data.items()})


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
