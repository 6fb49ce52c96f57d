"""Stand-ins: tensors that represent rows of stored ones.

diffusers' converters of single files rename tensors, and cut and join them along their rows. A stand-in takes part in that and
remembers which rows of which stored tensors it is, so that nothing has to be read, let alone decoded, before it is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import CheckpointError

SAME = ("to", "contiguous", "clone", "detach", "float", "half", "bfloat16")  # only the dtype, the device or the memory changes


class Piece(NamedTuple):
    """Rows ``start .. stop - 1`` of a tensor of the file."""

    name: str
    start: int
    stop: int


class StandIn(torch.Tensor):
    """A quantized weight that has not been read: its logical shape, and the rows that it consists of.

    A piece is a named tuple with ``start`` and ``stop``; what else it holds says whose rows they are.
    """

    pieces: list[Any]

    @classmethod
    def of(cls, pieces: Sequence[Any], *row_shape: int) -> Any:
        """A stand-in that consists of these rows, each of ``row_shape``."""
        rows = sum(piece.stop - piece.start for piece in pieces)
        out = torch.empty(rows, *row_shape, device="meta", dtype=torch.float32).as_subclass(cls)
        out.pieces = list(pieces)
        return out

    def rows(self, start: int, stop: int) -> Any:
        """Some of the rows."""
        kept, first = [], 0
        for piece in self.pieces:
            low, high = max(start - first, 0), min(stop - first, piece.stop - piece.start)
            if low < high:
                kept.append(piece._replace(start=piece.start + low, stop=piece.start + high))
            first += piece.stop - piece.start
        return type(self).of(kept, *self.shape[1:])

    @classmethod
    def other(cls, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        """Result of a function that does not choose rows: an error, unless a subclass can decode them.

        Raises:
            CheckpointError: names the function.
        """
        raise CheckpointError(
            f"diffusers' converter of this model applies {name} to quantized weights, which is not a choice of rows"
        )

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        if name in ("chunk", "split", "tensor_split") and _dim(args, kwargs, 2) == 0:
            with torch._C.DisableTorchFunctionSubclass():
                sizes = [len(part) for part in func(torch.empty(args[0].shape, device="meta"), *args[1:], **kwargs)]
            ends = torch.tensor(sizes).cumsum(0).tolist()
            return tuple(args[0].rows(end - size, end) for size, end in zip(sizes, ends, strict=True))
        if name in ("cat", "concat", "concatenate"):
            if _dim(args, kwargs, 1) != 0 or not all(isinstance(part, cls) for part in args[0]):
                return cls.other(name, func, args, kwargs)
            return cls.of([piece for part in args[0] for piece in part.pieces], *args[0][0].shape[1:])
        if name == "__getitem__" and isinstance(args[1], slice) and args[1].step in (None, 1):
            return args[0].rows(*args[1].indices(len(args[0]))[:2])
        if name in SAME:
            return args[0]
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        if isinstance(result, Tensor) or (isinstance(result, tuple | list) and any(isinstance(r, Tensor) for r in result)):
            return cls.other(name, func, args, kwargs)
        return result


def _dim(args: Any, kwargs: Any, position: int) -> int:
    dim = kwargs.get("dim", args[position] if len(args) > position else 0)
    return int(dim)
