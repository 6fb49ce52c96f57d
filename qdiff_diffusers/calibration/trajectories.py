"""The full-precision model runs over its own sampler; every call of its denoiser is recorded with inputs and output."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.utils import logging
from torch import Tensor, nn

from ..errors import ConfigError
from . import parallel
from .settings import Calibration
from .store import Store

SEED_STRIDE = 1_000_003  # noise of calibration and of image sets, which count seeds from 0, does not coincide

# Calls are recorded as {"inputs": arguments by name, "output": tensor, "step": number in its trajectory}.
Call = dict[str, Any]


def record(pipe: Any, models: dict[str, nn.Module], calibration: Calibration, stores: dict[str, Store]) -> None:
    """Run all trajectories and fill one store per model.

    The processes of a distributed run each sample some of the batches, and exchange them; a batch is the same whoever runs it.

    Args:
        pipe: a pipeline, or a bare model.
        models: the pipeline's denoisers by name, or the model itself.
        calibration: settings of the calibration.
        stores: the stores to fill, by the same names.

    Raises:
        ConfigError: the pipeline or model cannot be run with the calibration's inputs.
    """
    run = _runner(pipe, calibration)
    starts = range(0, calibration.count, calibration.batch_size)
    for index, start in enumerate(logging.tqdm(starts, desc="Recording trajectories", unit="batch", delay=2)):
        samples = list(range(start, min(start + calibration.batch_size, calibration.count)))
        calls: dict[str, list[Call]] = {name: [] for name in models}
        if parallel.is_mine(index):
            generators = [torch.Generator().manual_seed(SEED_STRIDE * (calibration.seed + 1) + i) for i in samples]
            with torch.no_grad(), _recording(models, calls):
                run(samples, generators)
        for name, store in stores.items():
            for call in parallel.share(_kept(calls[name], calibration.timesteps), index):
                store.append(call)


def inputs_by_name(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a call of a module's ``forward`` by parameter name, tensors on the CPU."""
    inputs = dict(inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments)
    inputs |= inputs.pop("kwargs", {})
    inputs.pop("self")
    return detached(inputs)


def call_model(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """Output of ``model(**inputs)`` as a tensor; inputs are moved to the model's device."""
    device = next(model.parameters()).device
    return _first(model(**to_device(inputs, device)))


def _kept(calls: list[Call], count: int | None) -> list[Call]:
    if count is None or count >= len(calls):
        return calls
    chosen = torch.linspace(0, len(calls) - 1, count).round().long().tolist()
    return [calls[i] for i in chosen]


@contextmanager
def _recording(models: dict[str, nn.Module], calls: dict[str, list[Call]]) -> Iterator[None]:
    def hook(name: str) -> Callable[..., None]:
        def record_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            inputs = inputs_by_name(module, args, kwargs)
            call = {"inputs": inputs, "output": _first(output).detach().cpu(), "step": len(calls[name])}
            calls[name].append(call)

        return record_call

    handles = [model.register_forward_hook(hook(name), with_kwargs=True) for name, model in models.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _runner(pipe: Any, calibration: Calibration) -> Callable[[list[int], list[torch.Generator]], None]:
    if calibration.run is not None:
        custom = calibration.run
        return lambda samples, generators: custom(pipe, samples, generators)
    if isinstance(pipe, nn.Module):
        return _model_runner(pipe, calibration)
    return _pipeline_runner(pipe, calibration)


def _pipeline_runner(pipe: Any, calibration: Calibration) -> Callable[[list[int], list[torch.Generator]], None]:
    known = inspect.signature(pipe.__call__).parameters
    name, values = _conditions(calibration)
    expected = next((n for n in ("prompt", "class_labels") if n in known), None)
    if expected and expected != name:
        what = "prompts" if expected == "prompt" else "class labels"
        raise ConfigError(f"{type(pipe).__name__} needs {what} for calibration, got {name or 'neither'}")
    if name and name not in known:
        raise ConfigError(f"{type(pipe).__name__} takes no {name}; calibrate it with noise alone")
    options = {"num_inference_steps": calibration.steps, "guidance_scale": calibration.guidance_scale, "output_type": "latent"}
    options = {key: value for key, value in options.items() if key in known and value is not None}

    def run(samples: list[int], generators: list[torch.Generator]) -> None:
        conditions = {name: [values[i % len(values)] for i in samples]} if name else {"batch_size": len(samples)}
        pipe.set_progress_bar_config(disable=True)
        pipe(**conditions, generator=generators, **options)

    return run


def _model_runner(model: nn.Module, calibration: Calibration) -> Callable[[list[int], list[torch.Generator]], None]:
    """A plain sampler for a bare model, which knows neither guidance nor text."""
    from diffusers import DDIMScheduler

    parameters = inspect.signature(type(model).forward).parameters
    needed = [n for n, p in parameters.items() if p.default is p.empty and n not in ("self", "kwargs", "args")]
    config: Any = model.config
    if len(needed) != 2 or needed[1] not in ("timestep", "timesteps") or not hasattr(config, "in_channels"):
        raise ConfigError(
            f"{type(model).__name__} needs {', '.join(needed)}; calibrate the pipeline that it belongs to, or give run"
        )
    if calibration.prompts is not None:
        raise ConfigError(f"{type(model).__name__} alone takes no prompts; calibrate the pipeline that it belongs to")
    if calibration.class_labels is None and getattr(model, "class_embedding", None) is not None:
        raise ConfigError(f"{type(model).__name__} needs class_labels for calibration")
    scheduler: Any = calibration.scheduler or DDIMScheduler()
    size = config.sample_size if isinstance(config.sample_size, list | tuple) else (config.sample_size,) * 2
    _, labels = _conditions(calibration)

    def run(samples: list[int], generators: list[torch.Generator]) -> None:
        parameter = next(model.parameters())
        x = torch.stack([torch.randn(config.in_channels, *size, generator=g) for g in generators])
        x = x.to(parameter.device) * scheduler.init_noise_sigma
        extra = {"class_labels": torch.tensor([labels[i % len(labels)] for i in samples], device=x.device)} if labels else {}
        scheduler.set_timesteps(calibration.steps)
        for t in scheduler.timesteps:
            scaled = scheduler.scale_model_input(x, t)
            inputs = {needed[0]: scaled.to(parameter.dtype), needed[1]: t.to(x.device).expand(len(x)), **extra}
            output = _first(model(**inputs))[:, : config.in_channels]  # the rest is a learned variance
            x = scheduler.step(output.float(), t, x).prev_sample

    return run


def _conditions(calibration: Calibration) -> tuple[str | None, Sequence[Any]]:
    if calibration.prompts is not None:
        return "prompt", calibration.prompts
    if calibration.class_labels is not None:
        return "class_labels", calibration.class_labels
    return None, ()


def _first(output: Any) -> Tensor:
    found = output if isinstance(output, Tensor) else output[0]
    if not isinstance(found, Tensor):
        raise ConfigError(f"the model returns a {type(found).__name__}, which calibration cannot compare")
    return found


def detached(value: Any) -> Any:
    """A nested structure with its tensors on the CPU, without gradients."""
    return map_tensors(value, lambda t: t.detach().cpu())


def to_device(value: Any, device: torch.device) -> Any:
    """A nested structure with its tensors on ``device``."""
    return map_tensors(value, lambda t: t.to(device))


def map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """A nested structure with ``function`` of its tensors."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: map_tensors(item, function) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map_tensors(item, function) for item in value)
    return value
