"""Probes: fixed inputs for the denoiser and its layers, on which a row's outputs are compared with the 16-bit model's.

The inputs are recorded on the 16-bit model's own trajectories, so that they are the same for every row, and an error of one step
does not propagate to the following ones.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.writing import written_file
from ..measuring.contenders import first_tensor
from .metrics import relative_error
from .peers import target_layers
from .sampling import denoisers

LAYER_STEPS = 4  # steps, evenly spaced, whose layer inputs are kept
TOKENS = 64  # tokens of a linear layer's input kept at each of them
WINDOW = 16  # pixels on a side of the window kept of a convolution's input
PLAIN = (Tensor, str, int, float, bool, type(None))


class Probes:
    """Inputs, and the 16-bit model's outputs for them.

    Attributes:
        steps: one entry per call of a denoiser: ``{"component", "timestep", "args", "kwargs", "output"}``.
        layers: ``component.layer`` -> ``(input, output)``.
    """

    def __init__(self, steps: list[dict[str, Any]], layers: dict[str, tuple[Tensor, Tensor]]) -> None:
        self.steps, self.layers = steps, layers

    def save(self, path: Path) -> None:
        with written_file(path) as part:
            torch.save({"steps": self.steps, "layers": self.layers}, part)

    def to(self, device: str) -> None:
        """Move everything to a device."""
        self.steps, self.layers = _map(self.steps, device), _map(self.layers, device)

    @classmethod
    def load(cls, path: Path) -> Probes:
        return cls(**torch.load(path, weights_only=True))


@torch.no_grad()
def record(pipe: Any, draw: Callable[[], Any]) -> Probes:
    """Run ``draw`` on the 16-bit pipeline and record its denoisers' inputs and outputs.

    A call with arguments that cannot be stored is left out.
    """
    steps: list[dict[str, Any]] = []
    with ExitStack() as stack:
        for name, model in denoisers(pipe):
            hook = model.register_forward_hook(_recorder(name, steps), with_kwargs=True)
            stack.callback(hook.remove)
        draw()
    layers: dict[str, list[Tensor]] = {}
    models = dict(denoisers(pipe))
    for i in _spread(len(steps), LAYER_STEPS):
        step = steps[i]
        with ExitStack() as stack:
            for name, layer in target_layers(models[step["component"]]).items():
                inputs = layers.setdefault(f"{step['component']}.{name}", [])
                hook = layer.register_forward_pre_hook(_keeper(inputs))
                stack.callback(hook.remove)
            models[step["component"]](*step["args"], **step["kwargs"])
    return Probes(steps, {name: _answered(models, name, inputs) for name, inputs in layers.items() if inputs})


@torch.no_grad()
def step_errors(pipe: Any, probes: Probes, on_step: Callable[[], None] = lambda: None) -> list[tuple[float, float]]:
    """``(timestep, relative error)`` of the denoisers' outputs, in the order of the steps; calls at one timestep are averaged."""
    models = dict(denoisers(pipe))
    found: dict[float, list[float]] = {}
    for step in probes.steps:
        output = first_tensor(models[step["component"]](*step["args"], **step["kwargs"]))
        found.setdefault(step["timestep"], []).append(relative_error(output, step["output"]))
        on_step()
    return [(timestep, sum(errors) / len(errors)) for timestep, errors in found.items()]


@torch.no_grad()
def layer_errors(pipe: Any, probes: Probes) -> dict[str, float]:
    """``component.layer`` -> relative error of its output for the 16-bit model's input. Layers that are gone are left out."""
    models = dict(denoisers(pipe))
    out = {}
    for name, (inputs, reference) in probes.layers.items():
        component, _, path = name.partition(".")
        try:
            layer = models[component].get_submodule(path)
        except AttributeError:
            continue
        out[name] = relative_error(layer(inputs)[None], reference[None])
    return out


def _recorder(component: str, steps: list[dict[str, Any]]) -> Any:
    def hook(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if _is_plain(args) and _is_plain(kwargs):
            question = {"component": component, "timestep": _timestep(model, args, kwargs, len(steps))}
            # Schedulers change their tensors in place.
            answer = first_tensor(output).clone()
            steps.append(question | {"args": _map(args), "kwargs": _map(kwargs), "output": answer})

    return hook


def _keeper(inputs: list[Tensor]) -> Any:
    def hook(layer: nn.Module, args: tuple[Any, ...]) -> None:
        inputs.append(_sample_of(layer, args[0]).clone())

    return hook


def _sample_of(layer: nn.Module, x: Tensor) -> Tensor:
    """A few tokens of a linear layer's input, a window of a convolution's."""
    if isinstance(layer, nn.Conv2d):
        top, left = ((size - min(size, WINDOW)) // 2 for size in x.shape[-2:])
        return x[:1, :, top : top + WINDOW, left : left + WINDOW]
    tokens = x.reshape(-1, x.shape[-1])
    return tokens[_spread(len(tokens), TOKENS)]


def _answered(models: dict[str, nn.Module], name: str, inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    component, _, path = name.partition(".")
    x = torch.cat(list(inputs))
    return x, models[component].get_submodule(path)(x)


def _timestep(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], position: int) -> float:
    """The timestep that the denoiser was called with; the position of the call if it takes none."""
    given = inspect.signature(model.forward).bind(*args, **kwargs).arguments.get("timestep")
    return float(torch.as_tensor(given).flatten()[0]) if given is not None else float(position)


def _spread(count: int, wanted: int) -> list[int]:
    """``wanted`` of ``count`` indices, the first and the last among them, or all."""
    if count <= wanted:
        return list(range(count))
    return [round(i * (count - 1) / (wanted - 1)) for i in range(wanted)]


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return isinstance(value, PLAIN)


def _map(value: Any, device: str | None = None) -> Any:
    """Copies of all tensors inside, on ``device`` if one is given."""
    if isinstance(value, Tensor):
        return value.clone() if device is None else value.to(device)
    if isinstance(value, dict):
        return {key: _map(item, device) for key, item in value.items()}
    return type(value)(_map(item, device) for item in value) if isinstance(value, (list, tuple)) else value
