"""ControlNets and other models that start as a copy of a quantized model.

diffusers' ControlNets and motion models copy their base's blocks through state dicts, some with ``strict=False``: packed layers
would be skipped silently and the copy would keep its random weights. They get the dense equivalent instead.
"""

from __future__ import annotations

import copy
import sys
from types import CodeType, ModuleType
from typing import Any

from diffusers.utils import logging
from torch import nn

from ..layers.offloading import without_group_offloading
from ..model.packing import dequantize_model, packed_layers
from .patches import MARKER, wrap

logger = logging.get_logger(__name__)

FROM_DENSE = f"{__name__}:from_dense"
OTHER_CONSTRUCTORS = ("from_pretrained", "from_config", "from_single_file", "from_pipe")  # constructors that take no model


def install(model_mixin: Any) -> None:
    """Wrap the copying constructors of every subclass of ``model_mixin``, existing and future; calling it again changes nothing."""
    original = vars(model_mixin).get("__init_subclass__")
    if hasattr(original, MARKER):
        return

    def init_subclass(cls: type, **kwargs: Any) -> None:
        if original is None:
            super(model_mixin, cls).__init_subclass__(**kwargs)
        else:
            original.__func__(cls, **kwargs)
        wrap_constructors(cls)

    setattr(init_subclass, MARKER, (FROM_DENSE,))
    model_mixin.__init_subclass__ = classmethod(init_subclass)
    for kind in _subclasses(model_mixin):
        wrap_constructors(kind)


def install_in_package(package: ModuleType) -> None:
    """Wrap the copying constructors of those classes in a package's modules that are parts of models."""
    for name, module in list(sys.modules.items()):
        if name.startswith(f"{package.__name__}.") and module is not None:
            for value in list(vars(module).values()):
                if isinstance(value, type) and value.__module__ == name:
                    wrap_constructors(value)


def wrap_constructors(kind: type) -> None:
    """Let the copying constructors that ``kind`` itself defines accept quantized models, as their dense equivalents."""
    for name, method in list(vars(kind).items()):
        if copies(name, method):
            wrap(kind, name, FROM_DENSE, lambda: from_dense)


def copies(name: str, method: Any) -> bool:
    """Whether a class's attribute is a constructor that copies weights through state dicts.

    One that passes on modules as they are, as Z-Image's ControlNet does, passes on packed ones just as well.
    """
    if not name.startswith("from_") or name in OTHER_CONSTRUCTORS or not isinstance(method, classmethod):
        return False
    function: Any = method.__func__
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return _names(function.__code__, "load_state_dict")


def _names(code: CodeType, name: str) -> bool:
    return name in code.co_names or any(_names(inner, name) for inner in code.co_consts if isinstance(inner, CodeType))


def _subclasses(kind: type) -> list[type]:
    found: list[type] = type.__subclasses__(kind)
    return [*found, *(deeper for subclass in found for deeper in _subclasses(subclass))]


def from_dense(construct: Any, cls: Any, *args: Any, **kwargs: Any) -> Any:
    """A constructor that copies models, called with the dense equivalents of quantized ones."""
    args = tuple(dense_equivalent(value) for value in args)
    return construct(cls, *args, **{name: dense_equivalent(value) for name, value in kwargs.items()})


def dense_equivalent(value: Any) -> Any:
    """A dense copy of a quantized model or of a part of one, in memory and without hooks; anything else as it is."""
    if not isinstance(value, nn.Module) or not packed_layers(value):
        return value
    logger.info(f"{type(value).__name__} is quantized: what is made of it starts as a copy of its dense equivalent")
    with without_group_offloading(value):
        dense: Any = copy.deepcopy(value)
    _remove_hooks(dense)
    if getattr(dense, "hf_quantizer", None) is not None:
        return dense.dequantize()
    dequantize_model(dense)
    return dense


def _remove_hooks(model: nn.Module) -> None:
    """Remove accelerate's and diffusers' hooks from a copy: those of diffusers would keep calling the original's ``forward``."""
    if any("_hf_hook" in module.__dict__ for module in model.modules()):
        from accelerate.hooks import remove_hook_from_module

        remove_hook_from_module(model, recurse=True)
    for module in model.modules():
        for name in ("_diffusers_hook", "forward"):
            module.__dict__.pop(name, None)
