"""Description of a quantized checkpoint, layer by layer, without loading its weights."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors import safe_open

from ..config import QDiffMethod, is_ours
from ..errors import CheckpointError
from ..formats import codebook_table
from .files import check_tensors, read_header, read_headers, weight_files
from .quantization import Quantization


class LayerInfo(NamedTuple):
    """One row of ``qdiff inspect``."""

    name: str
    method: str
    description: str
    shape: tuple[int, ...]
    bits_per_weight: float
    nbytes: int
    error: float | None

    @property
    def num_weights(self) -> int:
        return math.prod(self.shape)


class CheckpointInfo(NamedTuple):
    """A quantized checkpoint: its config, layers and sizes."""

    config: Quantization
    layers: list[LayerInfo]
    folder: Path
    total_bytes: int

    @property
    def packed_bytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)

    @property
    def packed_weights(self) -> int:
        return sum(layer.num_weights for layer in self.layers)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight over the packed layers."""
        return 8 * self.packed_bytes / max(1, self.packed_weights)


def inspect_checkpoint(source: str | Path, revision: str | None = None) -> CheckpointInfo:
    """Describe a quantized model or pipeline.

    Args:
        source: a model folder, a pipeline folder (its quantized component is found), or a Hub name.

    Raises:
        CheckpointError: ``source`` does not exist, is no qdiff checkpoint, or is malformed.
    """
    return _describe(_component_folders(_resolve(source, revision))[0])


def inspect_components(source: str | Path, revision: str | None = None) -> list[CheckpointInfo]:
    """Describe every quantized component of a model or pipeline; like :func:`inspect_checkpoint` otherwise."""
    return [_describe(folder) for folder in _component_folders(_resolve(source, revision))]


def zero_shares(info: CheckpointInfo) -> Iterator[tuple[str, float]]:
    """Name of each packed layer and the share of its weights that are stored as exactly zero; reads the codes."""
    files = weight_files(info.folder)
    places = {key: path for path in files for key in read_header(path)}
    with ExitStack() as stack:
        opened = {path: stack.enter_context(safe_open(path, "pt")) for path in files}
        for name, layer in info.config.layers.items():
            tensors = {
                leaf: opened[places[f"{name}.{leaf}"]].get_tensor(f"{name}.{leaf}") for leaf in layer.spec.tensors(layer.shape)
            }
            if isinstance(table := getattr(layer.spec.format, "table", None), str):
                tensors["codebooks"] = codebook_table(table)
            yield name, layer.spec.zero_share(tensors, layer.shape)


def _describe(folder: Path) -> CheckpointInfo:
    config = Quantization.from_dict(_quantization_config(folder) or {})
    files = weight_files(folder)
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
    return config if is_ours(config) else None


def _download(name: str, revision: str | None) -> Path:
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=["*.json", "*.safetensors"]))
    except (HFValidationError, RepositoryNotFoundError) as error:
        raise CheckpointError(f"{name} is neither a local folder nor a model on the Hub") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise CheckpointError(f"{name} is no local folder, and the Hub could not be reached: {error}") from error
