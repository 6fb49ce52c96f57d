"""Choices that training makes, candidates (VQ4DiT) and roundings: all settle, however few steps there are, and what training saw
last is what is stored."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qdiff_diffusers import FPConfig, QDiffConfig, RTNConfig, VQConfig
from qdiff_diffusers.calibration import Tuning
from qdiff_diffusers.calibration.trainable import CandidateWeight, RoundedWeight, make_trainable
from qdiff_diffusers.methods import quantize_weight

ROWS, COLUMNS = 64, 96


VQ = VQConfig(bits=2, codebook="layer", rotation=False, row_scales=False)
ROUNDED = {"integers": RTNConfig(bits=3), "one encoding": FPConfig(weight_format="e2m1"), "nvfp4": FPConfig(weight_format="nvfp4")}


class Trained:
    """A weight after some steps towards the dense one's outputs."""

    def __init__(self, config: QDiffConfig, tuning: Tuning) -> None:
        generator = torch.Generator().manual_seed(0)
        self.dense = torch.randn(ROWS, COLUMNS, generator=generator)
        mixing = torch.randn(COLUMNS, COLUMNS, generator=generator) / COLUMNS**0.5
        self.x = torch.randn(256, COLUMNS, generator=generator) @ mixing
        found = quantize_weight(self.dense, config)
        self.format = found.spec.format
        self.before = self.format.dequantize(found.tensors, COLUMNS)
        self.weight: Any = make_trainable(self.format, found.tensors, COLUMNS, self.dense, tuning)
        kind = torch.optim.RMSprop if tuning.assignments == "candidates" else torch.optim.Adam  # the tuner's
        optimizer = kind([self.weight.logits], lr=0.1)
        for step in range(tuning.steps):
            optimizer.zero_grad()
            ((self.weight() - self.dense) @ self.x.T).square().mean().backward()
            optimizer.step()
            self.weight.after_step(0.0, (step + 1) / tuning.steps)
        self.seen = self.weight().detach()
        self.stored = self.format.dequantize(self.weight.pack(), COLUMNS)

    def error(self, matrix: Tensor) -> float:
        """Of the outputs."""
        return float(((matrix - self.dense) @ self.x.T).square().mean())


@pytest.mark.parametrize("start", ["distance", "uniform"])
@pytest.mark.parametrize("candidates", [2, 3, 4])
@pytest.mark.parametrize("steps", [1, 7, 60])
def test_all_assignments_settle_and_nothing_changes_when_they_are_packed(steps: int, candidates: int, start: str) -> None:
    found = Trained(VQ, Tuning(steps=steps, assignments="candidates", candidates=candidates, start=start))
    assert isinstance(found.weight, CandidateWeight) and found.weight.settled.all()
    assert torch.allclose(found.stored, found.seen, rtol=1e-3)  # the scale is stored in float16


@pytest.mark.parametrize("candidates", [2, 3])
def test_outputs_come_closer_than_with_the_nearest_entries(candidates: int) -> None:
    found = Trained(VQ, Tuning(steps=60, assignments="candidates", candidates=candidates))
    assert found.error(found.stored) < 0.7 * found.error(found.before)


@pytest.mark.parametrize("name", ROUNDED)
@pytest.mark.parametrize("steps", [1, 7, 60])
def test_all_roundings_settle_and_nothing_changes_when_they_are_packed(steps: int, name: str) -> None:
    found = Trained(ROUNDED[name], Tuning(steps=steps, assignments="rounding"))
    assert isinstance(found.weight, RoundedWeight)
    assert torch.allclose(found.stored, found.seen, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ROUNDED)
def test_outputs_come_closer_than_with_the_nearest_levels(name: str) -> None:
    found = Trained(ROUNDED[name], Tuning(steps=60, assignments="rounding"))
    assert found.error(found.stored) < 0.7 * found.error(found.before)
