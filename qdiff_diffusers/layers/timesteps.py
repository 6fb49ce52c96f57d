"""Activation scales per timestep: how layers learn the timestep, which is an argument of the whole model only."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError
from .base import PackedLayer

NAMES = ("timestep", "timesteps")


class TimestepHook:
    """A forward hook that passes a model's timestep on to its layers. It can be copied and pickled with the model.

    The layers get the tensor as it is, without a look at its value: nothing waits for a GPU, and ``torch.compile`` sees plain
    assignments. In a batch the first element counts.
    """

    def __init__(self, model: nn.Module, layers: list[PackedLayer]) -> None:
        self.name, self.place = timestep_argument(model)
        self.layers = layers

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        timestep = kwargs[self.name] if self.name in kwargs else args[self.place]
        for layer in self.layers:
            layer.timestep = torch.as_tensor(timestep).reshape(-1)[:1]


def follow_timesteps(model: nn.Module) -> None:
    """Let the layers of ``model`` that store a scale per timestep know which one it is, from the next call on.

    Raises:
        ConfigError: the model's ``forward`` takes no timestep.
    """
    hooks = model._forward_pre_hooks
    for key in [key for key, hook in hooks.items() if isinstance(hook, TimestepHook)]:
        del hooks[key]
        model._forward_pre_hooks_with_kwargs.pop(key, None)
    layers = [layer for layer in model.modules() if isinstance(layer, PackedLayer) and layer.spec.input_scales > 1]
    if layers:
        model.register_forward_pre_hook(TimestepHook(model, layers), with_kwargs=True)


def timestep_argument(model: nn.Module) -> tuple[str, int]:
    """Name and place of the timestep among the arguments of a model's ``forward``.

    Raises:
        ConfigError: there is none.
    """
    parameters = [name for name in inspect.signature(type(model).forward).parameters if name != "self"]
    for name in NAMES:
        if name in parameters:
            return name, parameters.index(name)
    raise ConfigError(
        f"scales per timestep need a model that is told the timestep, and {type(model).__name__} takes {', '.join(parameters)}; "
        'use activation_scales="static"'
    )
