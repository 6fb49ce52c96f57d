"""Reading a checkpoint's description, config.json and safetensors headers, without loading its weights."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

from .config import QDiffConfig, QDiffMethod, StoredLayer
from .errors import CheckpointError
from .formats import TensorInfo

MAX_HEADER = 100 << 20
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
}


class LayerInfo(NamedTuple):
    """One row of ``qdiff inspect``."""

    name: str
    method: str
    description: str
    shape: tuple[int, ...]
    bits_per_weight: float
    nbytes: int
    error: float | None


class CheckpointInfo(NamedTuple):
    """A quantized checkpoint, seen from outside."""

    config: QDiffConfig
    layers: list[LayerInfo]
    folder: Path
    total_bytes: int

    @property
    def packed_bytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)

    @property
    def packed_weights(self) -> int:
        return sum(math.prod(layer.shape) for layer in self.layers)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight over the packed layers."""
        return 8 * self.packed_bytes / max(1, self.packed_weights)


def read_header(path: str | Path) -> dict[str, TensorInfo]:
    """Shapes and dtypes of the tensors in a safetensors file, checked against the file's size.

    Raises:
        CheckpointError: not a safetensors file, or a truncated one.
    """
    path = Path(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 0 < length <= min(MAX_HEADER, size):
            raise CheckpointError(f"{path} is not a safetensors file, or is cut off in its header")
        try:
            header = json.loads(file.read(length))
            entries = {k: v for k, v in header.items() if k != "__metadata__"}
            end = max((v["data_offsets"][1] for v in entries.values()), default=0)
            infos = {k: TensorInfo(tuple(v["shape"]), _dtype(v["dtype"])) for k, v in entries.items()}
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise CheckpointError(f"{path} has a malformed safetensors header: {error}") from error
    if size != 8 + length + end:
        raise CheckpointError(f"{path} is truncated or damaged: {size} bytes, its header promises {8 + length + end}")
    return infos


def read_headers(paths: Iterable[str | Path]) -> dict[str, TensorInfo]:
    """The headers of a sharded checkpoint, merged."""
    return {name: info for path in paths for name, info in read_header(path).items()}


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
                raise CheckpointError(f"tensor {key} is {_show(stored[key])}, its layer's spec says {_show(info)}")


def inspect_checkpoint(source: str | Path, revision: str | None = None) -> CheckpointInfo:
    """Describe a quantized model or pipeline.

    Args:
        source: a model folder, a pipeline folder (its quantized component is found), or a Hub name.

    Raises:
        CheckpointError: there is nothing there, it is not a qdiff checkpoint, or it is malformed.
    """
    return _describe(_component_folders(_resolve(source, revision))[0])


def inspect_components(source: str | Path, revision: str | None = None) -> list[CheckpointInfo]:
    """Describe every quantized component of a model or pipeline; like :func:`inspect_checkpoint` otherwise."""
    return [_describe(folder) for folder in _component_folders(_resolve(source, revision))]


def _describe(folder: Path) -> CheckpointInfo:
    config = QDiffConfig.from_dict(_quantization_config(folder) or {})
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder} holds no safetensors file")
    check_tensors(config.layers, read_headers(files))
    layers = [
        LayerInfo(
            name,
            (config.config_for(name) or config).method_name,
            layer.spec.describe(),
            layer.shape,
            layer.spec.bits_per_weight(layer.shape),
            layer.spec.nbytes(layer.shape),
            layer.error,
        )
        for name, layer in config.layers.items()
    ]
    return CheckpointInfo(config, layers, folder, sum(f.stat().st_size for f in files))


def _resolve(source: str | Path, revision: str | None) -> Path:
    return Path(source) if Path(source).exists() else _download(str(source), revision)


def _component_folders(root: Path) -> list[Path]:
    """The folders whose config.json carries a qdiff quantization_config: the root or some of its direct subfolders."""
    if not root.is_dir():
        raise CheckpointError(f"{root} is not a folder; give a model or pipeline folder, or a Hub name")
    candidates = (root, *sorted(p for p in root.iterdir() if p.is_dir()))
    found = [folder for folder in candidates if _quantization_config(folder)]
    if not found:
        method = QDiffMethod.QDIFF.value
        raise CheckpointError(f"{root} holds no qdiff checkpoint: no config.json with quant_method {method!r}")
    return found


def _quantization_config(folder: Path) -> dict[str, Any] | None:
    path = folder / "config.json"
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text()).get("quantization_config")
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    is_ours = isinstance(config, dict) and config.get("quant_method") == QDiffMethod.QDIFF.value
    return config if is_ours else None


def _download(name: str, revision: str | None) -> Path:
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=["*.json", "*.safetensors"]))
    except (HFValidationError, RepositoryNotFoundError) as error:
        raise CheckpointError(f"{name} is neither a local folder nor a model on the Hub") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise CheckpointError(f"{name} is no local folder, and the Hub could not be reached: {error}") from error


def hub_name(path: str | Path) -> str | None:
    """``org/name`` of a file in the Hub's cache (``.../models--org--name/snapshots/...``); ``None`` for any other file."""
    for part in Path(path).parts:
        if part.startswith("models--"):
            return part.removeprefix("models--").replace("--", "/", 1)
    return None


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise ValueError(f"dtype {name}")
    return DTYPES[name]


def _show(info: TensorInfo) -> str:
    return f"{str(info.dtype).removeprefix('torch.')} {list(info.shape)}"
