"""Reading a checkpoint's description, config.json and safetensors headers, without loading its weights."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import torch

from ..config import is_ours
from ..errors import CheckpointError
from ..formats import TensorInfo
from ..formats.layer_table import StoredLayer

MAX_HEADER = 100 << 20
MAX_BYTES = 1 << 62
NO_HEADER = "is not a safetensors file, or is cut off in its header"
# Names that diffusers and transformers give their files: diffusion_pytorch_model.fp16-00001-of-00002.safetensors and the like.
WEIGHTS = re.compile(r"(?:diffusion_pytorch_)?model(?:\.(?P<variant>[\w-]+?))?(?:-\d{5}-of-\d{5})?\.safetensors")
SHARD = re.compile(r"[\w-][\w.-]{0,200}\.safetensors")
INDEX = re.compile(r"(?:diffusion_pytorch_)?model\.safetensors\.index(?:\.(?P<variant>[\w-]+))?\.json")
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "C64": torch.complex64,
}
if hasattr(torch, "float8_e8m0fnu"):  # torch 2.7
    DTYPES["F8_E8M0"] = torch.float8_e8m0fnu


def read_header(path: str | Path) -> dict[str, TensorInfo]:
    """Shapes and dtypes of the tensors in a safetensors file, checked against the file's size.

    Raises:
        CheckpointError: the file is missing, truncated, or no safetensors file.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path} is not there; the checkpoint is incomplete")
    header = header_of(path)
    if header is None:
        raise CheckpointError(f"{path} {NO_HEADER}")
    try:
        entries = {k: _entry(k, v) for k, v in header.items() if k != "__metadata__"}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} has a malformed safetensors header: {error}") from error
    with path.open("rb") as file:
        data, size = 8 + _header_bytes(file), path.stat().st_size
    end = 0
    for name, (info, start, stop) in sorted(entries.items(), key=lambda item: item[1][1:]):
        if start != end or stop - start != info.nbytes:
            raise CheckpointError(
                f"{path} has a malformed safetensors header: tensor {name}, {info}, cannot lie at bytes {start} to {stop}"
            )
        end = stop
    if size != data + end:
        raise CheckpointError(f"{path} is truncated or damaged: {size} bytes, its header promises {data + end}")
    return {name: info for name, (info, _, _) in entries.items()}


def header_of(path: Path) -> dict[str, Any] | None:
    """The JSON object in a safetensors file's header, its content unchecked; ``None`` if the file is of another kind.

    Raises:
        CheckpointError: the file ends inside its header, or the header is no JSON object.
    """
    with path.open("rb") as file:
        length = _header_bytes(file)
        if not 0 < length <= MAX_HEADER:
            return None
        if length > path.stat().st_size:
            raise CheckpointError(f"{path} {NO_HEADER}")
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} has a malformed safetensors header: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} has a malformed safetensors header: {type(header).__name__} in the place of an object")
    return header


def _header_bytes(file: IO[bytes]) -> int:
    prefix = file.read(8)
    return int(struct.unpack("<Q", prefix)[0]) if len(prefix) == 8 else 0


def _entry(name: str, entry: Any) -> tuple[TensorInfo, int, int]:
    """One tensor's entry in a header: shape and dtype, the offset of its first byte and the offset after its last."""
    shape, offsets = entry["shape"], entry["data_offsets"]
    numbers = [*shape, *offsets]
    if len(offsets) != 2 or not all(type(n) is int and 0 <= n < MAX_BYTES for n in numbers):
        raise ValueError(f"tensor {name} has shape {shape!r} and offsets {offsets!r}")
    return TensorInfo(tuple(shape), _dtype(entry["dtype"])), offsets[0], offsets[1]


def read_headers(paths: Iterable[str | Path]) -> dict[str, TensorInfo]:
    """Shapes and dtypes of all tensors in a sharded checkpoint."""
    return {name: info for path in paths for name, info in read_header(path).items()}


def weight_files(folder: Path) -> list[Path]:
    """The files that ``from_pretrained(folder)`` reads: one file or the shards of an index, without files of other variants.

    Raises:
        CheckpointError: there are none, or the index is malformed.
    """
    found = sorted(folder.glob("*.safetensors"))
    variants = {match["variant"] or "": match for path in found if (match := WEIGHTS.fullmatch(path.name))}
    indices = {match["variant"] or "": path for path in sorted(folder.iterdir()) if (match := INDEX.fullmatch(path.name))}
    if known := sorted(variants.keys() | indices.keys()):
        variant = known[0]  # the one without a name comes first
        named = [p for p in found if (match := WEIGHTS.fullmatch(p.name)) and (match["variant"] or "") == variant]
        whole = [p for p in named if p == _whole_file(indices.get(variant))]
        if whole and whole[0].name.startswith("model"):
            return whole  # which transformers reads without a look at the index
        return check_index(indices[variant]) if variant in indices else named
    if not found:
        raise CheckpointError(f"{folder} holds no safetensors file")
    return found


def check_index(path: Path) -> list[Path]:
    """The shards that an index file lists, all of them plain files beside it.

    Raises:
        CheckpointError: the index is malformed, or names a file elsewhere or one that is not there.
    """
    shards = [path.parent / name for name in index_shards(path)]
    for shard in shards:
        if not shard.is_file():
            whole = _whole_file(path)
            if whole is not None and whole.is_file():
                raise CheckpointError(
                    f"{path} names {shard.name}, which is not there, and would be read instead of {whole.name} beside it; delete "
                    "the index if it is left from an earlier save"
                )
            raise CheckpointError(f"{path} names {shard.name}, which is not there; the checkpoint is incomplete")
    return shards


def _whole_file(index: Path | None) -> Path | None:
    """The single weight file that would stand for the shards of an index."""
    match = INDEX.fullmatch(index.name) if index else None
    if index is None or match is None:
        return None
    stem = index.name.partition(".")[0]
    return index.with_name(f"{stem}.{match['variant']}.safetensors" if match["variant"] else f"{stem}.safetensors")


def index_shards(path: Path) -> list[str]:
    """Names of the shards that an index file lists, whether they are there or not.

    Raises:
        CheckpointError: the index is malformed, or names something else than safetensors files beside it.
    """
    data = read_json(path)
    shards = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise CheckpointError(f"{path} needs a weight_map from tensor names to file names")
    if not shards or not isinstance(data.get("metadata"), dict):
        raise CheckpointError(f"{path} needs a metadata object, and tensors in its weight_map")
    for name in sorted(set(shards.values())):
        if not SHARD.fullmatch(name):
            raise CheckpointError(f"{path} names {name!r}, which is not a safetensors file beside it")
    return sorted(set(shards.values()))


def read_json(path: Path) -> Any:
    """The contents of a JSON file.

    Raises:
        CheckpointError: it is not valid JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error


def says_quantized(config: Path) -> bool:
    """Whether a config.json, valid or not, names qdiff as its model's quantization method."""
    try:
        return is_ours(json.loads(config.read_text(encoding="utf-8"))["quantization_config"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def check_tensors(layers: dict[str, StoredLayer], stored: dict[str, TensorInfo]) -> None:
    """Compare what config.json promises with what the files hold.

    Raises:
        CheckpointError: names the first tensor that is missing, misshapen, or of another dtype.
    """
    for name, layer in layers.items():
        for leaf, info in layer.spec.tensors(layer.shape).items():
            key = f"{name}.{leaf}"
            if key not in stored:
                raise CheckpointError(f"the checkpoint lacks tensor {key}; it is incomplete")
            if stored[key] != info:
                raise CheckpointError(f"tensor {key} is {stored[key]}, its layer's spec says {info}")


def check_shapes(shapes: dict[str, tuple[int, ...]], stored: dict[str, TensorInfo]) -> None:
    """Compare the shapes of a model's unpacked tensors with the files. Names that only one of the two has are passed over.

    Raises:
        CheckpointError: names the first tensor of another shape.
    """
    for name, shape in shapes.items():
        if name in stored and stored[name].shape != shape:
            found = list(stored[name].shape)
            raise CheckpointError(f"tensor {name} is {found} in the checkpoint, {list(shape)} in the model")


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise ValueError(f"dtype {name}")
    return DTYPES[name]
