"""GGUF files (of llama.cpp's ggml) with diffusion models: the block formats that qdiff's formats hold exactly.

A tensor is a sequence of blocks of 32 weights (256 for the K-quants) with their scales; weights of a row follow each other.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from ..checkpoint.stand_ins import Piece, StandIn
from ..config import QDiffConfig, RTNConfig
from ..errors import CheckpointError, ConfigError
from ..formats import CodebookFormat, IntegerFormat, WeightFormat
from ..formats.layer_table import StoredLayer
from .nunchaku_folder import Advance
from .single_file import convert_single_file

MAGIC = b"GGUF"
ALIGNMENT = 32
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
DENSE = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
IQ4_NL_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
Blocks = dict[str, Tensor]  # codes [blocks, weights], scales [blocks, groups], zeros likewise


class Kind(NamedTuple):
    """A block format of GGUF: name, sizes, the qdiff format it becomes, and a function that reads ``uint8 [blocks, bytes]``."""

    name: str
    weights: int
    nbytes: int
    format: WeightFormat
    read: Callable[[Tensor], Blocks]


def _half(block: Tensor, start: int) -> Tensor:
    return block[:, start : start + 2].contiguous().view(torch.float16)


def _nibbles(data: Tensor) -> Tensor:
    """``[blocks, 16]`` bytes -> 32 codes: the low nibbles, then the high ones."""
    return torch.cat([data & 15, data >> 4], 1)


def _fifth_bits(data: Tensor) -> Tensor:
    """32 bits in four bytes -> ``[blocks, 32]``, lowest first, as the value 16 or 0."""
    return ((data[:, :, None] >> torch.arange(8, dtype=torch.uint8)) & 1).flatten(1) << 4


def _q4_0(block: Tensor) -> Blocks:
    return {"codes": _nibbles(block[:, 2:]), "scales": _half(block, 0)}


def _q4_1(block: Tensor) -> Blocks:
    return {"codes": _nibbles(block[:, 4:]), "scales": _half(block, 0), "zeros": _half(block, 2)}


def _q5_0(block: Tensor) -> Blocks:
    return {"codes": _nibbles(block[:, 6:]) | _fifth_bits(block[:, 2:6]), "scales": _half(block, 0)}


def _q5_1(block: Tensor) -> Blocks:
    codes = _nibbles(block[:, 8:]) | _fifth_bits(block[:, 4:8])
    return {"codes": codes, "scales": _half(block, 0), "zeros": _half(block, 2)}


def _q8_0(block: Tensor) -> Blocks:
    return {"codes": block[:, 2:] ^ 128, "scales": _half(block, 0)}


def _k_scales(block: Tensor) -> Blocks:
    """Scales and zeros of Q4_K and Q5_K: eight pairs of six-bit numbers in bytes 4 to 15, times the halves before them."""
    low, middle, high = block[:, 4:8], block[:, 8:12], block[:, 12:16]
    scales = torch.cat([low & 63, (high & 15) | ((low >> 6) << 4)], 1)
    minima = torch.cat([middle & 63, (high >> 4) | ((middle >> 6) << 4)], 1)
    return {"scales": _half(block, 0).float() * scales, "zeros": -(_half(block, 2).float() * minima)}


def _pairs(data: Tensor) -> Tensor:
    """``[blocks, 128]`` bytes -> 256 codes: of every 32 bytes the low nibbles, then the high ones."""
    parts = data.unflatten(1, (4, 32))
    return torch.stack([parts & 15, parts >> 4], 2).flatten(1)


def _q4_k(block: Tensor) -> Blocks:
    return _k_scales(block) | {"codes": _pairs(block[:, 16:])}


def _q5_k(block: Tensor) -> Blocks:
    fifth = (block[:, 16:48, None] >> torch.arange(8, dtype=torch.uint8)) & 1  # bit i of byte j: weight 32 i + j
    return _k_scales(block) | {"codes": _pairs(block[:, 48:]) | (fifth.transpose(1, 2).flatten(1) << 4)}


def _q6_k(block: Tensor) -> Blocks:
    low, high = block[:, :128].unflatten(1, (2, 64)), block[:, 128:192].unflatten(1, (2, 32))
    low = torch.stack([low & 15, low >> 4], 2).flatten(2).unflatten(2, (4, 32))
    high = (high[:, :, None] >> torch.tensor([0, 2, 4, 6], dtype=torch.uint8)[:, None]) & 3
    scales = block[:, 192:208].contiguous().view(torch.int8).float()
    return {"codes": (low | (high << 4)).flatten(1), "scales": _half(block, 208).float() * scales}


KINDS: dict[int, Kind] = {
    2: Kind("Q4_0", 32, 18, IntegerFormat(4, 32), _q4_0),
    3: Kind("Q4_1", 32, 20, IntegerFormat(4, 32, symmetric=False), _q4_1),
    6: Kind("Q5_0", 32, 22, IntegerFormat(5, 32), _q5_0),
    7: Kind("Q5_1", 32, 24, IntegerFormat(5, 32, symmetric=False), _q5_1),
    8: Kind("Q8_0", 32, 34, IntegerFormat(8, 32), _q8_0),
    12: Kind("Q4_K", 256, 144, IntegerFormat(4, 32, symmetric=False, scale_dtype="float32"), _q4_k),
    13: Kind("Q5_K", 256, 176, IntegerFormat(5, 32, symmetric=False, scale_dtype="float32"), _q5_k),
    14: Kind("Q6_K", 256, 210, IntegerFormat(6, 16, scale_dtype="float32"), _q6_k),
    20: Kind("IQ4_NL", 32, 18, CodebookFormat(1, 4, 1, group_size=32, codebook_dtype="int8"), _q4_0),
}
REFUSED = {
    10: "Q2_K",
    11: "Q3_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    29: "IQ1_M",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
}


class Entry(NamedTuple):
    """A tensor of the file: shape, type number, offset of its first byte."""

    shape: tuple[int, ...]
    kind: int
    start: int


class GgufFile:
    """A GGUF file whose quantized weights are read on demand.

    Raises:
        CheckpointError: the file is malformed or truncated, or has a block format that no qdiff format holds exactly.
    """

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            entries = _read_header(file, path)
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # copied on write, as torch requires
        self.entries = {}
        for name, entry in entries.items():
            if entry.kind not in DENSE and entry.kind not in KINDS:
                kind = REFUSED.get(entry.kind, f"type {entry.kind}")
                known = ", ".join(kind.name for kind in KINDS.values())
                raise CheckpointError(f"tensor {name} of {path} is {kind}, which cannot be stored exactly; {known} and 16 bits can")
            if entry.start + _nbytes(name, entry) > len(self._data):
                raise CheckpointError(f"{path} is truncated: tensor {name} ends behind its end")
            self.entries[name] = entry
        self.tensors: dict[str, Tensor] = {name: self._tensor(name, entry) for name, entry in self.entries.items()}

    def _tensor(self, name: str, entry: Entry) -> Tensor:
        if entry.kind in KINDS:
            if len(entry.shape) != 2:
                raise CheckpointError(f"tensor {name} is quantized and has shape {list(entry.shape)}; only matrices can be read")
            return StandIn.of([Piece(name, 0, entry.shape[0])], entry.shape[1])
        return self._bytes(entry.start, _nbytes(name, entry)).view(DENSE[entry.kind]).view(entry.shape)

    def _bytes(self, start: int, count: int) -> Tensor:
        if not count:
            return torch.empty(0, dtype=torch.uint8)
        return torch.frombuffer(self._data, dtype=torch.uint8, count=count, offset=start).clone()

    def format(self, pieces: list[Piece]) -> WeightFormat:
        kinds = {self.entries[piece.name].kind for piece in pieces}
        if len(kinds) > 1:
            names = ", ".join(f"{piece.name} ({KINDS[self.entries[piece.name].kind].name})" for piece in pieces)
            raise CheckpointError(f"one layer of the model would be made of rows of several formats: {names}")
        return KINDS[kinds.pop()].format

    def store(self, pieces: list[Piece], columns: int) -> dict[str, Tensor]:
        fmt = self.format(pieces)
        kind = KINDS[self.entries[pieces[0].name].kind]
        row_bytes = columns // kind.weights * kind.nbytes
        data = [
            self._bytes(self.entries[p.name].start + p.start * row_bytes, (p.stop - p.start) * row_bytes).view(-1, kind.nbytes)
            for p in pieces
        ]
        blocks = kind.read(torch.cat(data))
        rows = sum(piece.stop - piece.start for piece in pieces)
        parts = {name: value.reshape(rows, -1) for name, value in blocks.items()}
        codes = parts["codes"].to(torch.int16)
        if isinstance(fmt, CodebookFormat):
            books = torch.tensor(IQ4_NL_VALUES, dtype=torch.int8).view(1, 16, 1)
            return fmt.pack(codes[:, :, None], books, parts["scales"])
        assert isinstance(fmt, IntegerFormat)
        return fmt.pack(codes - (1 << (fmt.bits - 1)) if fmt.symmetric else codes, parts["scales"], parts.get("zeros"))


def _nbytes(name: str, entry: Entry) -> int:
    count = 1
    for size in entry.shape:
        count *= size
    if entry.kind in DENSE:
        return count * DENSE[entry.kind].itemsize
    kind = KINDS[entry.kind]
    if entry.shape[-1] % kind.weights:
        raise CheckpointError(f"tensor {name} has rows of {entry.shape[-1]}, no multiple of the {kind.weights} of {kind.name}")
    return count // kind.weights * kind.nbytes


def _read_header(file: BinaryIO, path: Path) -> dict[str, Entry]:
    try:
        if file.read(4) != MAGIC:
            raise CheckpointError(f"{path} is not a GGUF file")
        version, tensors, pairs = struct.unpack("<IQQ", file.read(20))
        if version not in (2, 3):
            raise CheckpointError(f"{path} is of GGUF version {version}; versions 2 and 3 are known")
        metadata = {_string(file): _value(file, _number(file, "I")) for _ in range(pairs)}
        found = {}
        for _ in range(tensors):
            name, dimensions = _string(file), _number(file, "I")
            shape = tuple(reversed([_number(file, "Q") for _ in range(dimensions)]))
            found[name] = Entry(shape, _number(file, "I"), _number(file, "Q"))
    except (struct.error, UnicodeDecodeError, OverflowError, MemoryError) as error:
        raise CheckpointError(f"{path} has a malformed GGUF header: {error}") from error
    alignment = metadata.get("general.alignment", ALIGNMENT)
    start = -(-file.tell() // alignment) * alignment
    return {name: entry._replace(start=start + entry.start) for name, entry in found.items()}


def _number(file: BinaryIO, code: str) -> Any:
    return struct.unpack(f"<{code}", file.read(struct.calcsize(code)))[0]


def _string(file: BinaryIO) -> str:
    return file.read(_number(file, "Q")).decode()


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == STRING:
        return _string(file)
    if kind == ARRAY:
        inner, count = _number(file, "I"), _number(file, "Q")
        return [_value(file, inner) for _ in range(count)]
    if kind not in NUMBERS:
        raise CheckpointError(f"a GGUF header has a value of type {kind}, which is not known")
    return _number(file, NUMBERS[kind])


def convert_gguf(
    source: str | Path,
    output_dir: str | Path,
    *,
    config: str | Path | None = None,
    overwrite: bool = False,
    advance: Advance | None = None,
) -> Path:
    """Write a GGUF file as a qdiff checkpoint: every code and scale stays as it is.

    Args:
        source: the file, in diffusers' layout or one that diffusers converts.
        output_dir: folder to write, which appears only once it is complete.
        config: folder or config.json of the dense model.
        overwrite: replace a model that is in ``output_dir``.
        advance: called with (tensors written, tensors in all, name) after each tensor.

    Raises:
        ConfigError: there is no such file, no config, or ``output_dir`` holds something that must not be replaced.
        CheckpointError: the file is damaged, incomplete, or has a format that cannot be stored exactly.
    """
    path = Path(source)
    if not path.is_file():
        raise ConfigError(f"{path} is not a file")

    def settings(layers: dict[str, StoredLayer]) -> QDiffConfig:
        bits = max((int(getattr(layer.spec.format, "bits", 4)) for layer in layers.values()), default=8)
        return RTNConfig(bits=bits, group_size=32)  # type: ignore[call-arg]

    return convert_single_file(GgufFile(path), path, Path(output_dir), settings, config, overwrite, advance)
