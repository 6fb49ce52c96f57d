"""A safetensors file written tensor by tensor, so that no more than one needs to be in memory."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from ..checkpoint.files import DTYPES, read_header
from ..errors import CheckpointError
from ..formats import TensorInfo

NAMES = {dtype: name for name, dtype in DTYPES.items()}
ALIGNMENT = 8


class Source:
    """The tensors of some safetensors files: headers of all, and data read one tensor at a time."""

    def __init__(self, files: Iterable[Path]) -> None:
        self.infos: dict[str, TensorInfo] = {}
        self.metadata: dict[str, str] = {}
        self._files: dict[str, Path] = {}
        for file in files:
            header = read_header(file)
            self.infos |= header
            self._files |= dict.fromkeys(header, file)
            with safe_open(file, "pt") as opened:
                self.metadata |= opened.metadata() or {}

    def get(self, name: str) -> Tensor:
        """Read one tensor."""
        with safe_open(self._files[name], "pt") as file:
            return file.get_tensor(name)

    def get_all(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Read several tensors, by name."""
        return {name: self.get(name) for name in names}


def stored_bytes(infos: Mapping[str, TensorInfo]) -> int:
    """Number of bytes that the tensors take in a file."""
    return sum(info.nbytes for info in infos.values())


def write_file(
    path: Path, infos: Mapping[str, TensorInfo], tensors: Iterable[tuple[str, Tensor]], metadata: dict[str, str]
) -> None:
    """Write ``tensors``, whose names, order, shapes and dtypes must be those of ``infos``.

    Raises:
        CheckpointError: a tensor differs from ``infos``, or is missing.
    """
    with path.open("wb") as file:
        file.write(_header(infos, metadata))
        expected = iter(infos.items())
        for name, tensor in tensors:
            wanted = next(expected, ("no more tensors", None))
            given = (name, TensorInfo(tuple(tensor.shape), tensor.dtype))
            if given != wanted:
                raise CheckpointError(f"while writing {path}: got {given}, expected {wanted}")
            data = tensor.detach().cpu().contiguous().flatten()
            file.write(data.view(torch.uint8).numpy().tobytes() if data.numel() else b"")
        if (lacking := next(expected, None)) is not None:
            raise CheckpointError(f"while writing {path}: {lacking[0]} never came")


def _header(infos: Mapping[str, TensorInfo], metadata: dict[str, str]) -> bytes:
    header: dict[str, object] = {"__metadata__": metadata}
    end = 0
    for name, info in infos.items():
        start, end = end, end + info.nbytes
        header[name] = {"dtype": NAMES[info.dtype], "shape": list(info.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
