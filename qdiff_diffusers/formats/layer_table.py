"""The table of packed layers that ``quantization_config`` carries, written and read; docs/format.md has its layout."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from ..errors import CheckpointError
from . import LayerSpec


class StoredLayer(NamedTuple):
    """One packed layer of a checkpoint: its spec, the logical weight shape and the relative squared weight error."""

    spec: LayerSpec
    shape: tuple[int, ...]
    error: float | None


def write_layers(layers: Mapping[str, StoredLayer]) -> dict[str, Any]:
    """The table, JSON-able: ``specs``, each once, and for each layer the number of its own; nothing if there are no layers."""
    if not layers:
        return {}
    index = {spec: i for i, spec in enumerate(dict.fromkeys(layer.spec for layer in layers.values()))}
    return {
        "specs": [spec.to_dict() for spec in index],
        "layers": {name: [index[layer.spec], list(layer.shape), _number(layer.error)] for name, layer in layers.items()},
    }


def _number(error: float | None) -> float | None:
    """JSON has no NaN and no infinity, which earlier releases wrote for weights that their scales could not hold."""
    return error if error is not None and math.isfinite(error) else None


def read_layers(specs: Any, layers: Any) -> dict[str, StoredLayer]:
    """Inverse of :func:`write_layers`.

    Raises:
        CheckpointError: a spec or a layer is malformed.
    """
    if not specs and not layers:
        return {}
    if not isinstance(specs, list) or not isinstance(layers, dict):
        raise CheckpointError("quantization_config needs a list of specs and an object of layers")
    read = []
    for i, data in enumerate(specs):
        try:
            read.append(LayerSpec.from_dict(data))
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"spec {i} of quantization_config: {error}") from error
    out = {}
    for name, entry in layers.items():
        try:
            out[name] = _read_layer(read, *entry)
            out[name].spec.tensors(out[name].shape)
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"layer {name} of quantization_config, {entry!r}: {error}") from error
    return out


def _read_layer(specs: list[LayerSpec], index: Any, shape: Any, error: Any) -> StoredLayer:
    if type(index) is not int or not 0 <= index < len(specs):
        raise ValueError(f"there is no spec {index!r}")
    if not isinstance(shape, list) or not all(type(n) is int for n in shape):
        raise ValueError(f"a shape is a list of integers, not {shape!r}")
    if not (error is None or type(error) in (int, float)):
        raise ValueError(f"an error is a number or null, not {error!r}")
    return StoredLayer(specs[index], tuple(shape), error)
