"""The first denoising steps at higher precision: they decide the composition, and later steps correct no error in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

from torch import nn

from ..checkpoint.components import DENOISERS
from ..errors import ConfigError
from ..layers import PackedLayer


@contextmanager
def high_precision_steps(pipe: Any, count: int, denoiser: nn.Module | None = None, component: str | None = None) -> Iterator[None]:
    """A context in which every run of ``pipe`` takes its first ``count`` steps at higher precision.

    Steps are counted by the pipeline's scheduler, so calls that belong to one step (guidance in two passes) stay together.

    Args:
        pipe: a pipeline with a quantized denoiser.
        count: number of steps at the beginning of each run.
        denoiser: model for these steps, the full-precision one or one with more bits, on the same device; it needs memory of its
            own. Without it the packed weights are used with unquantized inputs, which needs none.
        component: name of the pipeline's denoiser; by default its quantized transformer or UNet (without ``denoiser`` all of them).

    Raises:
        ConfigError: the pipeline has no scheduler or no such component, or nothing would change.
    """
    if type(count) is not int or count < 0:
        raise ConfigError(f"count must be a number of steps, 0 or more, got {count!r}")
    scheduler = getattr(pipe, "scheduler", None)
    if scheduler is None or not hasattr(scheduler, "set_timesteps"):
        raise ConfigError(f"{type(pipe).__name__} has no scheduler whose steps could be counted")
    models = _quantized(pipe, component)
    if denoiser is not None and len(models) != 1:
        raise ConfigError(
            f"{type(pipe).__name__} has the denoisers {', '.join(models)}; name the component that denoiser stands in for"
        )
    switches = [_switch_inputs(name, m) if denoiser is None else _Dispatch(m, denoiser) for name, m in models.items()]
    with ExitStack() as stack:
        for switch in switches:
            stack.callback(switch, False)
            if isinstance(switch, _Dispatch):
                stack.enter_context(_replaced(switch.model, "forward", switch.forward))
        _count(scheduler, count, switches, stack)
        yield


class _Dispatch:
    """Sends calls of ``model`` to ``other`` while switched on, by a plain flag, for whose two values a caller is compiled."""

    def __init__(self, model: nn.Module, other: nn.Module) -> None:
        self.model, self.on = model, False
        original: Callable[..., Any] = model.forward

        @wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            return other(*args, **kwargs) if self.on else original(*args, **kwargs)

        self.forward = forward

    def __call__(self, on: bool) -> None:
        self.on = on


def _switch_inputs(name: str, model: nn.Module) -> Callable[[bool], None]:
    layers = [m for m in model.modules() if isinstance(m, PackedLayer) and m.spec.activations != "none"]
    if not layers:
        raise ConfigError(
            f"the inputs of {name}'s layers are not quantized; give a denoiser of higher precision for the first steps"
        )

    def switch(on: bool) -> None:
        for layer in layers:
            layer.exact_inputs = on

    return switch


def _count(scheduler: Any, count: int, switches: list[Callable[[bool], None]], stack: ExitStack) -> None:
    """Set the switches from the scheduler's own calls: on at the start of a run, off after ``count`` steps."""
    done = 0
    set_timesteps, step = scheduler.set_timesteps, scheduler.step

    def switch() -> None:
        for function in switches:
            function(done < count)

    @wraps(set_timesteps)
    def starting(*args: Any, **kwargs: Any) -> Any:
        nonlocal done
        done = 0
        switch()
        return set_timesteps(*args, **kwargs)

    @wraps(step)
    def stepping(*args: Any, **kwargs: Any) -> Any:
        nonlocal done
        result = step(*args, **kwargs)
        done += 1
        switch()
        return result

    stack.enter_context(_replaced(scheduler, "set_timesteps", starting))
    stack.enter_context(_replaced(scheduler, "step", stepping))


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """A context in which an attribute of one instance has another value; afterwards its former one, or the class's, is back."""
    before = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        delattr(owner, name)
        if before is not None:
            setattr(owner, name, before)


def _quantized(pipe: Any, component: str | None) -> dict[str, nn.Module]:
    names = [component] if component is not None else [name for name in pipe.components if name.startswith(DENOISERS)]
    parts = {name: getattr(pipe, name, None) for name in names}
    found = {
        name: m for name, m in parts.items() if isinstance(m, nn.Module) and any(isinstance(x, PackedLayer) for x in m.modules())
    }
    if not found:
        raise ConfigError(f"{type(pipe).__name__} has no quantized {component or ' or '.join(DENOISERS)}")
    return found
