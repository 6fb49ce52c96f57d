"""Layers that share one weight: a text encoder's embedding, its copies and the output projection.

transformers ties layers by the names of their weights, which packed layers do not have. The layer whose weight the file holds is
packed; the layers tied to it are emptied before loading and refer to its tensors afterwards. Saved files hold the tensors once.
"""

from __future__ import annotations

from typing import Any, cast

from torch import nn

from ..layers import PackedLayer, pack_layer, set_tensor, unsupported_reason

WEIGHT = ".weight"


def tied_layers(model: Any, name: str) -> list[str]:
    """Names of the other layers that share the weight of layer ``name``, which holds it."""
    ties = getattr(model, "all_tied_weights_keys", None) or {}
    return [target.removesuffix(WEIGHT) for target, source in ties.items() if source == name + WEIGHT and target.endswith(WEIGHT)]


def weight_holder(model: Any, name: str) -> str:
    """Name of the layer that holds the weight of layer ``name``: ``name`` itself, unless it is tied to another."""
    ties = getattr(model, "all_tied_weights_keys", None) or {}
    return ties.get(name + WEIGHT, name + WEIGHT).removesuffix(WEIGHT)


def untie(model: Any, name: str) -> list[str]:
    """Remove the weights of the layers tied to ``name``, so that loading neither expects nor fills them.

    Returns:
        the names of these layers.

    Raises:
        ValueError: one of these layers is of a kind that cannot be packed.
    """
    names = tied_layers(model, name)
    for tied in names:
        module = model.get_submodule(tied)
        if reason := unsupported_reason(module):
            raise ValueError(f"layer {name} cannot be packed: {tied}, which shares its weight, is a {reason}")
    for tied in names:
        module = model.get_submodule(tied)
        module._parameters.pop("weight")
        module._is_hf_initialized = True  # or transformers would fill the weight that is gone
        del model.all_tied_weights_keys[tied + WEIGHT]
    return names


def tie(model: Any, name: str, names: list[str]) -> None:
    """Give the layers ``names`` the tensors of the packed layer ``name``."""
    source = cast(PackedLayer, model.get_submodule(name))
    for tied in names:
        module: nn.Module = model.get_submodule(tied)
        pack_layer(module, source.spec, source.compute_dtype, {leaf: getattr(source, leaf) for leaf in source.tensor_infos()})
        for leaf in source.packed_tensors():
            set_tensor(module, leaf, getattr(source, leaf), persistent=leaf not in source._non_persistent_buffers_set)


def tie_dense(model: Any, name: str, names: list[str]) -> None:
    """Undo :func:`untie` and :func:`tie` once all layers are dense again: the layers ``names`` share the weight of ``name``."""
    weight = model.get_submodule(name).weight
    for tied in names:
        set_tensor(model.get_submodule(tied), "weight", weight)
        model.all_tied_weights_keys[tied + WEIGHT] = name + WEIGHT
