"""VQ4DiT's candidates: however few steps there are, all assignments settle, and what training saw last is what is stored."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qdiff_diffusers import VQConfig
from qdiff_diffusers.calibration import Tuning
from qdiff_diffusers.formats import WeightFormat
from qdiff_diffusers.methods import quantize_weight
from qdiff_diffusers.methods.trainable import CandidateWeight, make_trainable

ROWS, COLUMNS = 64, 96


def trained(steps: int, candidates: int, start: str = "distance") -> tuple[CandidateWeight, WeightFormat, Tensor, Tensor, Tensor]:
    """A weight after ``steps`` steps towards the dense one's outputs; its format; what it was before; the dense one; inputs."""
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(ROWS, COLUMNS, generator=generator)
    mixing = torch.randn(COLUMNS, COLUMNS, generator=generator) / COLUMNS**0.5
    x = torch.randn(256, COLUMNS, generator=generator) @ mixing
    found = quantize_weight(dense, VQConfig(bits=2, codebook="layer", rotation=False, row_scales=False))
    tuning = Tuning(steps=steps, assignments="candidates", candidates=candidates, start=start)
    weight = make_trainable(found.spec.format, found.tensors, COLUMNS, dense, tuning)
    assert isinstance(weight, CandidateWeight)
    optimizer = torch.optim.RMSprop([weight.logits], lr=0.1, alpha=0.9)
    for step in range(steps):
        optimizer.zero_grad()
        ((weight() - dense) @ x.T).square().mean().backward()
        optimizer.step()
        weight.after_step(0.0, (step + 1) / steps)
    before = found.spec.format.dequantize(found.tensors, COLUMNS)
    return weight, found.spec.format, before, dense, x


@pytest.mark.parametrize("start", ["distance", "uniform"])
@pytest.mark.parametrize("candidates", [2, 3, 4])
@pytest.mark.parametrize("steps", [1, 7, 60])
def test_all_assignments_settle_and_nothing_changes_when_they_are_packed(steps: int, candidates: int, start: str) -> None:
    weight, fmt, _, _, _ = trained(steps, candidates, start)
    assert weight.settled.all()
    seen = weight().detach()
    stored = fmt.dequantize(weight.pack(), COLUMNS)
    assert torch.allclose(stored, seen, rtol=1e-3)  # the scale is stored in float16


@pytest.mark.parametrize("candidates", [2, 3])
def test_outputs_come_closer_than_with_the_nearest_entries(candidates: int) -> None:
    weight, fmt, before, dense, x = trained(60, candidates)
    after = fmt.dequantize(weight.pack(), COLUMNS)

    def error(matrix: Tensor) -> float:
        return float(((matrix - dense) @ x.T).square().mean())

    assert error(after) < 0.7 * error(before)
