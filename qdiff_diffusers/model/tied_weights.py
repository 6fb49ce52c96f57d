"""Layers that share one weight: a text encoder's embedding, its copies and the output projection.

transformers ties them by the names of their weights, which packed layers do not have. The one that the file holds is packed; the
others are emptied before loading and take its tensors afterwards, as plain references. Saved files hold them once.
"""

from __future__ import annotations

from typing import Any, cast

from torch import nn

from ..layers import PackedLayer, pack_layer, set_tensor, unsupported_reason

WEIGHT = ".weight"


def followers(model: Any, name: str) -> list[str]:
    """Names of the layers whose weight is that of layer ``name``."""
    ties = getattr(model, "all_tied_weights_keys", None) or {}
    return [target.removesuffix(WEIGHT) for target, source in ties.items() if source == name + WEIGHT and target.endswith(WEIGHT)]


def leader(model: Any, name: str) -> str:
    """The layer whose weight stands for that of ``name``: itself, if it shares none."""
    ties = getattr(model, "all_tied_weights_keys", None) or {}
    return ties.get(name + WEIGHT, name + WEIGHT).removesuffix(WEIGHT)


def untie(model: Any, name: str) -> list[str]:
    """Take the weights from the layers that follow ``name``, so that loading neither expects nor fills them. Returns their names.

    Raises:
        ValueError: one of them is of a kind that cannot be packed.
    """
    names = followers(model, name)
    for follower in names:
        module = model.get_submodule(follower)
        if reason := unsupported_reason(module):
            raise ValueError(f"layer {name} cannot be packed: {follower}, which shares its weight, is a {reason}")
    for follower in names:
        module = model.get_submodule(follower)
        module._parameters.pop("weight")
        module._is_hf_initialized = True  # or transformers would fill the weight that is gone
        del model.all_tied_weights_keys[follower + WEIGHT]
    return names


def tie(model: Any, name: str, names: list[str]) -> None:
    """Give the layers ``names`` the tensors of the packed layer ``name``."""
    source = cast(PackedLayer, model.get_submodule(name))
    for follower in names:
        module: nn.Module = model.get_submodule(follower)
        pack_layer(module, source.spec, source.compute_dtype, {leaf: getattr(source, leaf) for leaf in source.tensor_infos()})
        for leaf in source.packed_tensors():
            set_tensor(module, leaf, getattr(source, leaf), persistent=leaf not in source._non_persistent_buffers_set)


def tie_dense(model: Any, name: str, names: list[str]) -> None:
    """Undo :func:`untie` and :func:`tie` after all of these layers became dense again."""
    weight = model.get_submodule(name).weight
    for follower in names:
        set_tensor(model.get_submodule(follower), "weight", weight)
        model.all_tied_weights_keys[follower + WEIGHT] = name + WEIGHT
