"""Bootstrap intervals: the uncertainty of a score that comes from the choice of images."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

RESAMPLES = 1000
NORMAL_95 = 1.96


class Estimate(NamedTuple):
    """A number and half the width of its 95 % interval."""

    value: float
    margin: float

    @property
    def low(self) -> float:
        return self.value - self.margin

    @property
    def high(self) -> float:
        return self.value + self.margin


def mean_estimate(values: Tensor) -> Estimate:
    """Mean of ``values`` ``[samples]``, each resampled as a whole."""
    values = values.double()
    index = torch.randint(len(values), (RESAMPLES, len(values)), generator=torch.Generator().manual_seed(0))
    return Estimate(values.mean().item(), _margin(values[index].mean(1)) if len(values) > 1 else math.nan)


def bootstrap(statistic: Callable[[Tensor], float], samples: int, resamples: int) -> Estimate:
    """A statistic of all samples, with the interval that its spread over resampled sets gives.

    The interval is the estimate plus and minus 1.96 bootstrap standard errors (Efron and Tibshirani 1993, chapter 13). Quantiles
    of the resampled values would not do for a Frechet distance: a resampled set repeats samples, which makes the distance larger,
    but not more or less certain.

    Args:
        statistic: maps indices ``[samples]`` into the set to a number.
        samples: size of the set.
        resamples: number of resampled sets.
    """
    estimate = statistic(torch.arange(samples))
    if samples < 2:
        return Estimate(estimate, math.nan)
    generator = torch.Generator().manual_seed(0)
    drawn = (torch.randint(samples, (samples,), generator=generator) for _ in range(resamples))
    return Estimate(estimate, _margin(torch.tensor([statistic(index) for index in drawn], dtype=torch.float64)))


def _margin(resampled: Tensor) -> float:
    return NORMAL_95 * resampled.std().item()
