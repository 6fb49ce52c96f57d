"""Measured bit allocation: each layer's bits follow from the effect of its error on the model's output."""

from __future__ import annotations

import json
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging
from torch import Tensor, nn

from ..checkpoint.writing import write_text
from ..config import QDiffConfig
from ..methods import method_of, quantize_weight
from ..model.bit_allocation import Choice, allocate_bits, has_settings, with_settings
from . import parallel
from .settings import Calibration
from .store import Store
from .trajectories import call_model
from .tuning import guided_loss

TRIAL_CALLS = 4
SAMPLE_ROWS = 64  # rows of a weight on which the errors of all bit widths are compared


def allocate(
    model: nn.Module, targets: dict[str, QDiffConfig], calls: Store, calibration: Calibration, folder: Path
) -> dict[str, QDiffConfig]:
    """Choose the bits of each layer, so that their mean over all weights stays what the layers' configs ask for; or the rank of its
    low-rank branch, whichever ``config.alternatives()`` offers.

    Each layer in turn is quantized by itself, as its config says, and the model's loss on a few calls taken. A layer's loss at
    other bits is that loss times the ratio of its weight errors. Bits then go, step by step, where one lowers the loss most.

    Args:
        model: the full-precision model, which is unchanged afterwards.
        targets: config of each layer.
        calls: recorded calls of the model.
        folder: folder of the workspace in which the finished choice is kept.

    Returns:
        ``targets`` with other ``bits``, or ranks.

    Raises:
        ConfigError: a config leaves its bits to other settings.
    """
    for config in targets.values():
        config.alternatives()  # raises before any work if there are none
    path = folder / "choices.json"
    if not parallel.share(path.is_file(), 0):
        chosen = _choose(model, targets, calls, calibration) if parallel.rank() == 0 else {}
        chosen = parallel.share(chosen, 0)
        if parallel.rank() == 0:
            write_text(path, json.dumps(chosen))
    else:
        chosen = parallel.share(json.loads(path.read_text()) if parallel.rank() == 0 else {}, 0)
    return with_settings(targets, chosen)


def _choose(model: nn.Module, targets: dict[str, QDiffConfig], calls: Store, calibration: Calibration) -> dict[str, dict[str, Any]]:
    choices: dict[str, list[Choice]] = {}
    sizes: dict[str, int] = {}
    budget = 0.0
    losses = sensitivities(model, targets, calls, calibration.guidance_scale)
    for name, config in logging.tqdm(targets.items(), desc="Weighing widths", unit="layer", delay=2):
        weight = model.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        sizes[name] = weight.numel()
        rows = max(1, len(weight) // SAMPLE_ROWS) if method_of(config).few_rows_suffice else 1
        choices[name] = []
        for settings in config.alternatives():
            found = quantize_weight(weight.detach()[::rows], replace(config, **settings), config.seed)
            stored = found.spec.bits_per_weight(tuple(weight.shape))
            choices[name].append(Choice(stored, losses[name] * found.error, settings))
            budget += stored * sizes[name] if has_settings(config, settings) else 0
    return allocate_bits(choices, sizes, budget)


def sensitivities(
    model: nn.Module, targets: dict[str, QDiffConfig], calls: Store, guidance: float | None = None
) -> dict[str, float]:
    """Effect of each layer's error on the model's output: the model's loss with only this layer quantized, on a few calls, divided
    by the layer's relative squared weight error. The model is unchanged afterwards.
    """
    trial = [int(i) for i in torch.linspace(0, len(calls) - 1, min(TRIAL_CALLS, len(calls))).round()]
    out = {}
    for name, config in logging.tqdm(targets.items(), desc="Weighing layers", unit="layer", delay=2):
        loss, error = _with_one_quantized(model, name, config, calls, trial, guidance)
        out[name] = loss / max(error, 1e-12)
    return out


@torch.no_grad()
def _with_one_quantized(
    model: nn.Module, name: str, config: QDiffConfig, calls: Store, trial: list[int], guidance: float | None
) -> tuple[float, float]:
    """The model's loss with one layer quantized, and the relative error of its weight."""
    layer = model.get_submodule(name)
    exact = layer.weight
    assert isinstance(exact, nn.Parameter)
    found = quantize_weight(exact, config, config.seed + zlib.crc32(name.encode()))
    layer.weight = nn.Parameter(found.spec.dequantize(found.tensors, tuple(exact.shape), exact.dtype), requires_grad=False)
    try:
        losses = [
            guided_loss(call_model(model, c["inputs"]), c["output"], c["inputs"], guidance) for c in (calls[i] for i in trial)
        ]
    finally:
        layer.weight = exact
    return float(torch.stack(losses).mean()), found.error
