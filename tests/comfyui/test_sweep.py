"""Every stock node that changes a MODEL, on packed models: the same image as with decoded weights, wherever those work.

Nodes are found in ComfyUI's own list. Left out are those that need more than a MODEL and settings, and the ones that compile. Each
runs on the UNet and on one of the transformers; on all of them, which takes minutes, with QDIFF_COMFY_SWEEP=all.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from comfyui import host
from comfyui.test_patches import TOLERANCE, models, run_nothing
from comfyui.test_stock_nodes import conditioning, sample

__all__ = ["models"]  # a fixture

UNET, *TRANSFORMERS = FAMILIES = ("sdxl", "flux", "sd3", "wan", "qwen")
EVERYTHING = os.environ.get("QDIFF_COMFY_SWEEP") == "all"
MODELS = ("model", "model1", "model2")
LEFT_OUT = ("TorchCompileModel", "SelectModelDevice", "MultiGPU_WorkUnits")  # what they want is no part of a test's machine
# Merging block by block is one node for many models, which differ in their settings.
MERGES = {
    "sdxl": "ModelMergeSDXL",
    "flux": "ModelMergeFlux1",
    "sd3": "ModelMergeSD3_2B",
    "wan": "ModelMergeWAN2_1",
    "qwen": "ModelMergeQwenImage",
}
# Settings that make nodes act on models with two blocks and in two steps.
SETTINGS: dict[str, Any] = {
    "layers": "0",
    "double_layers": "0",
    "single_layers": "1",
    "start_percent": 0.0,
    "end_percent": 1.0,
    "rescaling_scale": 0.3,
    "block_number": 1,
    "tile_size": 32,
    "ratio": 0.4,
    "multiplier": 0.5,
    "strength": 0.7,
    "context_length": 1,
    "context_overlap": 0,
    "width": 64,
    "height": 64,
    "dtype": "fp32",
}
MERGED = 0.25  # share of every block in merges block by block


@pytest.fixture(scope="module")
def nodes():
    """Stock nodes with a MODEL in and out, by name: the class and what else it is given."""
    host.pack()
    import nodes

    arguments, sys.argv = sys.argv, sys.argv[:1]
    try:
        asyncio.run(nodes.init_builtin_extra_nodes())
    finally:
        sys.argv = arguments
    found = {}
    for name, kind in sorted(nodes.NODE_CLASS_MAPPINGS.items()):
        if "MODEL" in kind.RETURN_TYPES[:1] and name not in LEFT_OUT and not name.startswith("QDiff"):
            inputs = kind.INPUT_TYPES().get("required", {})
            values = {key: value(key, spec) for key, spec in inputs.items() if key not in MODELS}
            if set(inputs) & set(MODELS) and None not in values.values():
                found[name] = kind, values
    return found


def value(name: str, spec: Any) -> Any:
    """What a setting is set to, ``None`` for what is no setting."""
    kind, options = spec[0], spec[1] if len(spec) > 1 else {}
    choices = kind if isinstance(kind, list) else options.get("options", [])
    if name.endswith(".") or name in ("input", "middle", "out"):
        return MERGED
    if name in SETTINGS and (not choices or SETTINGS[name] in choices):
        return SETTINGS[name]
    if choices:
        return options.get("default", choices[-1])
    return options.get("default", options.get("min")) if kind in ("INT", "FLOAT", "BOOLEAN", "STRING") else None


def applied(kind: Any, values: dict[str, Any], model: Any, other: Any) -> Any:
    inputs = kind.INPUT_TYPES()["required"]
    values = values | {name: other if name == "model2" else model for name in MODELS if name in inputs}
    if hasattr(kind, "EXECUTE_NORMALIZED"):
        return kind.EXECUTE_NORMALIZED(**values).result[0]
    return getattr(kind(), kind.FUNCTION)(**values)[0]


def image(model: Any, family: str) -> torch.Tensor:
    positive, _ = conditioning(family)
    other = [[positive[0][0].flip(1), positive[0][1]]]  # not what is guided away from
    run_nothing(model)
    return sample(model, family, other, cfg=3.0)


def chosen(nodes: dict[str, Any], family: str) -> dict[str, Any]:
    """The nodes that a run tries on a family."""
    merges = [name for name in nodes if name.startswith("ModelMerge")]
    others = [name for name in nodes if name not in merges]
    if EVERYTHING:
        names = [*others, *merges]
    elif family == UNET:
        names = others
    else:
        names = others[TRANSFORMERS.index(family) :: len(TRANSFORMERS)]
    return {name: nodes[name] for name in {*names, MERGES[family]}}


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_stock_node_does_to_packed_models_what_it_does_to_decoded_ones(family, models, nodes):
    packed, stock = models(family)
    errors: dict[str, Any] = {}
    for name, (kind, values) in chosen(nodes, family).items():
        try:
            wanted = image(applied(kind, values, stock, stock), family)
        except Exception:
            continue  # it is for another family
        if torch.isfinite(wanted).all():
            errors[name] = difference(wanted, lambda: image(applied(kind, values, packed, packed), family))  # noqa: B023
    assert not {name: error for name, error in errors.items() if not (isinstance(error, float) and error < 10 * TOLERANCE)}
    assert MERGES[family] in errors and len(errors) > (30 if family == UNET else 5)


def difference(wanted: torch.Tensor, compute: Callable[[], torch.Tensor]) -> float | Exception:
    """Relative to the largest number; or what went wrong."""
    try:
        return ((compute() - wanted).abs().max() / wanted.abs().max()).item()
    except Exception as failure:
        return failure
