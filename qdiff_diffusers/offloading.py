"""Group offloading to disk, with codebooks that layers share.

diffusers writes the tensors of each group to a safetensors file, and safetensors refuses tensors that share memory. Layers that
are to be written get codebooks of their own first; they are small, and on disk most of the time.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

from .packing import packed_layers

FUNCTION = "_apply_group_offloading"


def prepare_for_disk(module: ModuleType) -> None:
    """Wrap ``module._apply_group_offloading(model, config)``; calling it again changes nothing."""
    original = getattr(module, FUNCTION, None)
    if original is None or hasattr(original, "of_qdiff"):
        return

    @functools.wraps(original)
    def apply(model: Any, config: Any) -> Any:
        if getattr(config, "offload_to_disk_path", None) is not None:
            for layer in packed_layers(model).values():
                if getattr(layer.spec.format, "table", None) is not None:
                    layer.codebooks = layer.packed_tensors()["codebooks"].clone()
        return original(model, config)

    apply.of_qdiff = True  # type: ignore[attr-defined]
    setattr(module, FUNCTION, apply)
