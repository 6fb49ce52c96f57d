"""Bits where they count: each layer's share follows from what its error does to the model's output."""

from __future__ import annotations

import heapq
import json
import zlib
from dataclasses import replace
from pathlib import Path

import torch
from diffusers.utils import logging
from torch import Tensor, nn

from ..config import QDiffConfig
from ..errors import ConfigError
from ..methods import quantize_weight
from . import parallel
from .settings import Calibration
from .store import Store
from .trajectories import call_model
from .tuning import guided_loss

TRIAL_CALLS = 4
SAMPLE_ROWS = 64  # of a weight, on which the errors of all bit widths are compared


def allocate(
    model: nn.Module, targets: dict[str, QDiffConfig], calls: Store, calibration: Calibration, folder: Path
) -> dict[str, QDiffConfig]:
    """Choose the bits of each layer, so that their mean over all weights stays what the layers' configs ask for.

    Each layer in turn is quantized by itself, as its config says, and the model's loss on a few calls taken. A layer's loss at
    other bits is that loss times the ratio of its weight errors. Bits then go, step by step, where one takes off most loss.

    Args:
        model: in full precision; it is the same afterwards.
        targets: config of each layer, with ``bits``.
        calls: recorded calls.
        folder: of the workspace, for the finished choice.

    Returns:
        ``targets`` with other ``bits``.

    Raises:
        ConfigError: a config leaves its bits to other settings.
    """
    if fixed := [name for name, config in targets.items() if config.bits is None]:
        raise ConfigError(f"mixed bits need a config with bits, which {fixed[0]} has not")
    path = folder / "allocation.json"
    if not parallel.share(path.is_file(), 0):
        chosen = _choose(model, targets, calls, calibration) if parallel.rank() == 0 else {}
        chosen = parallel.share(chosen, 0)
        if parallel.rank() == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(chosen))
    else:
        chosen = parallel.share(json.loads(path.read_text()) if parallel.rank() == 0 else {}, 0)
    return {name: _at(config, chosen[name]) for name, config in targets.items()}


def _choose(model: nn.Module, targets: dict[str, QDiffConfig], calls: Store, calibration: Calibration) -> dict[str, float]:
    trial = [int(i) for i in torch.linspace(0, len(calls) - 1, min(TRIAL_CALLS, len(calls))).round()]
    costs: dict[str, list[tuple[float, float, float]]] = {}  # per layer, rising: stored bits, expected loss, nominal bits
    sizes: dict[str, int] = {}
    budget = 0.0
    for name, config in logging.tqdm(targets.items(), desc="Weighing layers", unit="layer", delay=2):
        layer = model.get_submodule(name)
        weight = layer.weight
        assert isinstance(weight, Tensor)
        sizes[name] = weight.numel()
        loss = _loss_without(model, layer, name, config, calls, trial, calibration.guidance_scale)
        sample = weight.detach()[:: max(1, len(weight) // SAMPLE_ROWS)]
        errors, stored = {}, {}
        for bits in config.bit_choices:
            found = quantize_weight(sample, _at(config, bits), config.seed)
            errors[bits] = found.error
            stored[bits] = found.spec.bits_per_weight(tuple(weight.shape))
        assert config.bits is not None
        budget += stored[config.bits] * sizes[name]
        unit = loss / max(errors[config.bits], 1e-12)
        costs[name] = sorted((stored[bits], unit * errors[bits], bits) for bits in config.bit_choices)
    return spend(costs, sizes, budget)


def spend(costs: dict[str, list[tuple[float, float, float]]], sizes: dict[str, int], budget: float) -> dict[str, float]:
    """Give every layer the fewest bits, then more where they lower the expected loss most per stored bit.

    Args:
        costs: per layer, rising: stored bits per weight, expected loss, nominal bits.
        sizes: weights of each layer.
        budget: stored bits of all weights together.

    Returns:
        nominal bits of each layer.
    """
    level = dict.fromkeys(costs, 0)
    left = budget - sum(costs[name][0][0] * sizes[name] for name in costs)
    queue: list[tuple[float, str, int]] = []

    def offer(name: str) -> None:
        """The step up, however long, that gains most per bit from where the layer is."""
        here = costs[name][level[name]]
        steps = [
            ((here[1] - loss) / ((bits - here[0]) * sizes[name]), i)
            for i, (bits, loss, _) in enumerate(costs[name])
            if i > level[name] and bits > here[0] and loss < here[1]
        ]
        if steps:
            gain, i = max(steps)
            heapq.heappush(queue, (-gain, name, i))

    for name in costs:
        offer(name)
    while queue:
        _, name, i = heapq.heappop(queue)
        price = (costs[name][i][0] - costs[name][level[name]][0]) * sizes[name]
        if price <= left:
            left -= price
            level[name] = i
            offer(name)
    return {name: costs[name][level[name]][2] for name in costs}


@torch.no_grad()
def _loss_without(
    model: nn.Module, layer: nn.Module, name: str, config: QDiffConfig, calls: Store, trial: list[int], guidance: float | None
) -> float:
    """The model's loss with one layer quantized."""
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
    return float(torch.stack(losses).mean())


def _at(config: QDiffConfig, bits: float) -> QDiffConfig:
    return config if bits == config.bits else replace(config, bits=bits)
