"""The second stage: gradient descent on the packed weights against the full-precision model, all layers (or a block's) together."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging
from safetensors import SafetensorError
from torch import Tensor, nn

from ..errors import CalibrationError
from ..formats import dtype_name
from ..model.packing import packed_layers
from .settings import Calibration, Tuning
from .store import Store, read_tensors, write_tensors
from .trained import TrainedLayer, training
from .trajectories import Call, call_model

logger = logging.get_logger(__name__)
STEP_OVERHEAD = 1.3  # time of the optimizer and of encoding anew, relative to the gradient's
SAVE_EVERY = 50  # steps between two snapshots
TRIAL_CALLS = 16  # calls on which the loss is taken before and after
RMS_ALPHA = 0.9  # VQ4DiT's released code
ADAM_BETAS = (0.9, 0.95)  # PV-Tuning's


class Tuner:
    """Optimises trained layers, and other parameters of the model, step by step; its state can be saved and restored.

    Args:
        layers: the layers in training, by name.
        dense: further parameters, by name.
        tuning: settings.
        loss_unit: the loss before tuning, which penalties are relative to.
    """

    def __init__(self, layers: dict[str, TrainedLayer], dense: dict[str, nn.Parameter], tuning: Tuning, loss_unit: float) -> None:
        self.layers = layers
        self.tuning = tuning
        self.total = tuning.steps  # over which learning rates fall to 0
        self.step_number = 0
        self.loss_unit = loss_unit
        self.names: dict[str, nn.Parameter] = {}
        groups = []

        def add(parameters: dict[str, nn.Parameter], rate: float, steady: bool = False) -> None:
            self.names.update(parameters)
            groups.append({"params": list(parameters.values()), "lr": rate, "initial_lr": rate, "steady": steady})

        for name, layer in layers.items():
            for i, group in enumerate(layer.packed.groups()):
                rate = tuning.code_lr if group.kind == "codes" else tuning.lr
                # Choices have to be made in the end, so what makes them must not slow down.
                steady = group.kind == "codes" and tuning.assignments in ("candidates", "rounding")
                add({f"{name}.{i}.{j}": p for j, p in enumerate(group.parameters)}, rate * group.size, steady)
            for part, factor in (("down", layer.down), ("up", layer.up)):
                if factor is not None:
                    add({f"{name}.{part}": factor}, tuning.lr * _size(factor))
        for name, parameter in dense.items():
            add({name: parameter}, tuning.lr * _size(parameter))
        candidates = tuning.assignments == "candidates"
        self.optimizer: torch.optim.Optimizer = (
            torch.optim.RMSprop(groups, alpha=RMS_ALPHA) if candidates else torch.optim.Adam(groups, betas=ADAM_BETAS)
        )

    def step(self, loss: Tensor) -> float:
        """One optimizer step down the gradient of ``loss`` and of the weights' own penalties. Returns the loss.

        Raises:
            CalibrationError: the loss is not a number.
        """
        value = float(loss.detach())
        if not math.isfinite(value):
            raise CalibrationError(f"the loss became {value} in step {self.step_number}; lower tuning's lr or code_lr")
        penalties = [p for layer in self.layers.values() if (p := layer.packed.penalty()) is not None]
        total = loss + self.loss_unit * sum(penalties) / len(penalties) if penalties else loss
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        decay = 1 - self.step_number / max(self.total, 1)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * (1 if group["steady"] else decay)
        self.optimizer.step()
        for layer in self.layers.values():
            stale = layer.packed.after_step(self.tuning.fraction, (self.step_number + 1) / max(self.total, 1))
            if self.tuning.reset_changed:
                for parameter, mask in stale.items():
                    if "exp_avg" in self.optimizer.state.get(parameter, {}):
                        self.optimizer.state[parameter]["exp_avg"].masked_fill_(mask, 0)
        self.step_number += 1
        return value

    def forget_momentum(self) -> None:
        """Zero the first moments and keep the second, for a step whose data are unrelated to those before."""
        for state in self.optimizer.state.values():
            if "exp_avg" in state:
                state["exp_avg"].zero_()

    def state(self) -> dict[str, Tensor]:
        """Everything that a run needs to continue exactly."""
        out = {"step": torch.tensor(self.step_number), "total": torch.tensor(self.total)}
        for name, parameter in self.names.items():
            out[f"parameter/{name}"] = parameter.detach()
            for key, value in self.optimizer.state.get(parameter, {}).items():
                out[f"optimizer/{key}/{name}"] = torch.as_tensor(value)
        for name, layer in self.layers.items():
            for key, value in layer.packed.state().items():
                out[f"codes/{key}/{name}"] = value
        return {key: value.clone() for key, value in out.items()}

    @torch.no_grad()
    def restore(self, state: dict[str, Tensor]) -> None:
        """Inverse of :meth:`state`."""
        self.step_number, self.total = int(state["step"]), int(state["total"])
        for key, value in state.items():
            kind, _, rest = key.partition("/")
            if kind == "parameter":
                self.names[rest].copy_(value)
            elif kind == "optimizer":
                field, _, name = rest.partition("/")
                self.optimizer.state[self.names[name]][field] = value.clone().to(self.names[name].device if value.ndim else "cpu")
            elif kind == "codes":
                field, _, name = rest.partition("/")
                self.layers[name].packed.restore(field, value)


def tune_model(
    model: nn.Module, calls: Store, calibration: Calibration, dense: dict[str, Tensor], folder: Path
) -> list[dict[str, Any]]:
    """Distil the recorded model into the packed one: each step takes the next call of the teacher's trajectories.

    Args:
        model: the model with packed layers, which are changed in place.
        calls: recorded calls with the teacher's outputs.
        dense: float32 matrices that the layers' formats approximate, for the assignments that need them.
        folder: folder of the workspace in which snapshots are kept.

    Returns:
        a log of the mean loss between snapshots. If the loss on a sample of calls has not fallen, the model is as it was.
    """
    tuning = calibration.tuning
    guidance = calibration.guidance_scale

    def loss_of(call: Call) -> Tensor:
        return guided_loss(call_model(model, call["inputs"]), call["output"], call["inputs"], guidance)

    others = _dense_parameters(model) if tuning.dense else {}
    return tune(packed_layers(model), others, calls, loss_of, tuning, dense, folder / "tuning.safetensors", "Tuning the model")


def tune(
    layers: dict[str, Any],
    others: dict[str, nn.Parameter],
    calls: Store,
    loss_of: Callable[[Call], Tensor],
    tuning: Tuning,
    dense: dict[str, Tensor],
    snapshot: Path,
    description: str,
) -> list[dict[str, Any]]:
    """Tune packed layers and other parameters against ``loss_of`` recorded calls; see :func:`tune_model`."""
    trained = {name: TrainedLayer(layer, dense.get(name), tuning) for name, layer in layers.items()}
    rough = _in_bfloat16(tuning.precision, layers)
    before = {name: parameter.detach().clone() for name, parameter in others.items()}
    log: list[dict[str, Any]] = []
    trial = [int(i) for i in torch.linspace(0, len(calls) - 1, min(TRIAL_CALLS, len(calls))).round()]
    first = _mean_loss(calls, trial, loss_of)

    def loss_to_lower(call: Call) -> Tensor:
        with rough or nullcontext():
            return loss_of(call)

    tuner = Tuner(trained, others, tuning, loss_unit=first)
    for parameter in others.values():
        parameter.requires_grad_(True)
    if snapshot.is_file():
        log = _resume(tuner, snapshot)
    elif tuning.minutes:
        tuner.total = _steps_within(tuning.minutes, trained, calls, loss_to_lower)
    progress = logging.tqdm(total=tuner.total, initial=tuner.step_number, desc=description, unit="step", delay=2)
    losses: list[float] = []
    with training(trained), torch.enable_grad():
        while tuner.step_number < tuner.total:
            call = calls[tuner.step_number % len(calls)]
            if tuning.reset_at_wrap and call["step"] == 0:
                tuner.forget_momentum()
            losses.append(tuner.step(loss_to_lower(call)))
            progress.update()
            if tuner.step_number % SAVE_EVERY == 0 or tuner.step_number == tuner.total:
                log.append({"stage": "tuning", "step": tuner.step_number, "loss": float(f"{sum(losses) / len(losses):.6g}")})
                losses = []
                write_tensors(snapshot, tuner.state(), {"log": log})
    progress.close()
    end = _conclude(tuner, before, others, first, lambda: _mean_loss(calls, trial, loss_of))
    end["precision"] = "bfloat16" if rough else dtype_name(next(iter(layers.values())).compute_dtype)
    if not end["kept"]:
        logger.warning(
            "%s did not lower the loss (%.4g before, %.4g after) and was taken back; other steps, lr or code_lr may do better",
            description,
            end["loss_before"],
            end["loss_after"],
        )
    return [*log, end]


def guided_loss(student: Tensor, teacher: Tensor, inputs: dict[str, Any], guidance: float | None) -> Tensor:
    """Mean squared difference of outputs; of guided outputs if the call has a conditional and an unconditional half.

    ``guided = unconditional + g * (conditional - unconditional)``. Pipelines differ in which half comes first: those with class
    labels put the conditional one there, those with prompts the other.
    """
    difference = student.float() - teacher.to(student.device).float()
    if guidance is None or guidance == 1 or not _is_doubled(inputs):
        return difference.square().mean()
    first, second = difference.chunk(2)
    conditional, unconditional = (first, second) if "class_labels" in inputs else (second, first)
    return (unconditional + guidance * (conditional - unconditional)).square().mean()


def _is_doubled(inputs: dict[str, Any]) -> bool:
    sample = next((v for v in inputs.values() if isinstance(v, Tensor) and v.ndim > 2), None)
    if sample is None or len(sample) % 2:
        return False
    first, second = sample.chunk(2)
    return torch.equal(first, second)


def _in_bfloat16(precision: str, layers: dict[str, Any]) -> torch.autocast | None:
    """A context in which a float32 model's products are made in bfloat16, if they are to be; a model of 16 bits makes its own.

    Losses that decide whether the result is kept are taken without it.
    """
    layer = next(iter(layers.values()))
    device = next(iter(layer.packed_tensors().values())).device.type
    wanted = precision == "bfloat16" or (precision == "auto" and multiplies_bfloat16(device))
    return torch.autocast(device, torch.bfloat16) if wanted and layer.compute_dtype == torch.float32 else None


def multiplies_bfloat16(device: str) -> bool:
    """Whether a kind of device has instructions that multiply bfloat16 numbers faster than float32 ones: any GPU that knows the
    type, CPUs with AMX or AVX-512 BF16."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device == "cpu" and (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def _conclude(
    tuner: Tuner, before: dict[str, Tensor], others: dict[str, nn.Parameter], first: float, mean_loss: Callable[[], float]
) -> dict[str, Any]:
    """Write the result into the layers; undo it if the loss is not lower than before."""
    packed = {
        name: {k: t.detach().clone() for k, t in layer.layer[0].packed_tensors().items()} for name, layer in tuner.layers.items()
    }
    for layer in tuner.layers.values():
        layer.write_back()
    for parameter in others.values():
        parameter.requires_grad_(False)
    last = mean_loss()
    if not last < first:
        for name, layer in tuner.layers.items():
            for key, tensor in packed[name].items():
                getattr(layer.layer[0], key).data = tensor
        with torch.no_grad():
            for name, parameter in others.items():
                parameter.copy_(before[name])
    return {"stage": "tuned", "loss_before": float(f"{first:.6g}"), "loss_after": float(f"{last:.6g}"), "kept": last < first}


@torch.no_grad()
def _mean_loss(calls: Store, indices: list[int], loss_of: Callable[[Call], Tensor]) -> float:
    return sum(float(loss_of(calls[i])) for i in indices) / len(indices)


def _steps_within(minutes: float, trained: dict[str, TrainedLayer], calls: Store, loss_of: Callable[[Call], Tensor]) -> int:
    """Number of steps that fit into ``minutes``, at least 1, judged by the time of two gradients that are thrown away."""
    seconds = 0.0
    with training(trained), torch.enable_grad():
        for i in range(2):
            start = time.perf_counter()
            loss_of(calls[i % len(calls)]).backward()
            seconds = time.perf_counter() - start
    for layer in trained.values():
        layer.zero_grad(set_to_none=True)
    return max(1, int(minutes * 60 / (seconds * STEP_OVERHEAD)))


def _resume(tuner: Tuner, snapshot: Path) -> list[dict[str, Any]]:
    try:
        state, metadata = read_tensors(snapshot)
        tuner.restore(state)
    except (OSError, SafetensorError, KeyError) as error:
        raise CalibrationError(f"cannot resume from {snapshot}: {error}; remove it to tune from the beginning") from error
    return list(metadata["log"])


def _dense_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Floating parameters that are not packed: biases, norms, embeddings, layers left in 16 bits."""
    return {name: p for name, p in model.named_parameters() if p.is_floating_point() and p.dtype != torch.float8_e4m3fn}


def _size(parameter: Tensor) -> float:
    """Root mean square of a tensor, which its learning rate is relative to."""
    return float(parameter.detach().float().square().mean().sqrt()) or 1.0
