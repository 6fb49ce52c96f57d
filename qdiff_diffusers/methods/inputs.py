"""Static quantization of a layer's inputs: scales, and the choice between signed and unsigned numbers, by squared error.

arXiv 2408.06995 quantizes activations with one calibrated scale per tensor, found like those of weights. We do so for integers
only: of floating-point numbers the search cuts off what lies above the samples, for next to no gain below.

Inputs that a GELU or SiLU has bounded below waste half of the signed numbers; shifted by that bound they are quantized to unsigned
ones (SVDQuant, MSFP).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from qdiff_kernels import rotate
from qdiff_kernels.activations import FP8_MAX, UFP8_MAX, UINT8_MAX, dequantize_activations, quantize_activations
from torch import Tensor

from .clips import ClipSearch, search_clips
from .config import QDiffConfig
from .grids import Grid
from .scales import ScaleStore

# GELU is nowhere below -0.17, SiLU nowhere below -0.279. Multiples of 1/64 and 1/32 are exact in 16 bits.
BOUNDS = (0.171875, 0.28125)
# The whole filter errs least in every layer; but it weakens the same directions at every step, which adds up where noise does not.
NOISE_SHARE = 0.1
HEADROOM = 2.0  # of floating-point numbers above the largest sample: they lose nothing by it, and what is cut off errs most
Samples = Mapping[float, Tensor]  # timestep -> rows [n, columns] of what the layer's stored matrix is multiplied by


def treat(
    rows: Tensor,
    channels: int,
    *,
    smooth: Tensor | None = None,
    rotation: int = 0,
    activations: str = "none",
    shift: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """What a packed weight is multiplied by: float32 ``rows [n, taps * channels]`` shifted, smoothed, rotated and quantized."""
    x = _transformed(rows, channels, smooth, rotation, shift)
    if activations != "none":
        x = dequantize_activations(*quantize_activations(x, activations, shift, scale), activations)
    return x.reshape(rows.shape)


def fit_inputs(
    samples: Samples,
    config: QDiffConfig,
    channels: int,
    *,
    smooth: Tensor | None = None,
    rotation: int = 0,
    shiftable: bool = False,
) -> dict[str, Tensor]:
    """The stored tensors that a config's activations need besides their kind.

    Args:
        samples: of the layer's raw inputs.
        config: ``activations``, ``activation_scales`` and ``unsigned``.
        channels: of the inputs.
        smooth: divides them, float32 ``[channels]``.
        rotation: Hadamard block.
        shiftable: whether the layer has a bias to undo a shift, and no zero padding.

    Returns:
        ``shift`` (float32 ``[channels]``) where unsigned numbers err less, ``input_scales`` and ``input_steps`` where scales are
        static; nothing for 16-bit inputs.
    """
    if config.activations is None:
        return {}
    kind = config.activations
    static = config.activation_scales != "token"
    raw = dict(samples) if config.activation_scales == "timestep" else {0.0: torch.cat(list(samples.values()))}

    def fit(shift: Tensor | None) -> tuple[float, dict[str, Tensor]]:
        values = {step: _transformed(rows, channels, smooth, rotation, shift) for step, rows in raw.items()}
        tensors = {} if shift is None else {"shift": shift}
        if not static:
            return sum(_error(x, kind, shift) for x in values.values()), tensors
        found = {step: _static_scale(x, kind, shift) for step, x in sorted(values.items())}
        tensors["input_scales"] = torch.cat(list(found.values()))
        if len(found) > 1:
            tensors["input_steps"] = torch.tensor(list(found), dtype=torch.float32, device=tensors["input_scales"].device)
        return sum(_error(x, kind, shift, found[step]) for step, x in values.items()), tensors

    choices = [fit(None)]
    lowest = min(float(rows.min()) for rows in raw.values())
    bound = next((b for b in BOUNDS if lowest >= -b), None)
    if config.unsigned and shiftable and not rotation and bound is not None:
        choices.append(fit(next(iter(raw.values())).new_full((channels,), bound)))
    return min(choices, key=lambda choice: choice[0])[1]


def input_noise(
    samples: Samples | None,
    config: QDiffConfig,
    channels: int,
    *,
    share: float = 1.0,
    smooth: Tensor | None = None,
    rotation: int = 0,
) -> Tensor | None:
    """``share`` of the mean squared error ``[columns]`` that quantizing to a few bits leaves in each input of a packed weight;
    ``None`` if there are no samples, or so many bits that it does not matter."""
    if not samples or not share or not config.has_noisy_inputs:
        return None
    rows = torch.cat(list(samples.values()))
    exact = _transformed(rows, channels, smooth, rotation, None).reshape(rows.shape)
    noisy = treat(rows, channels, smooth=smooth, rotation=rotation, activations=str(config.activations))
    return (noisy - exact).square().mean(0).mul_(share)


def for_noisy_inputs(weight: Tensor, hessian: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """The matrix whose product with noisy inputs comes closest to that of ``weight`` with exact ones, and their second moments.

    With noise n that is not correlated with x, ``E |W x - A (x + n)|^2`` is least for the Wiener filter
    ``A = W H (H + D)^-1``: what noise drowns in one channel is read off the channels that are correlated with it.

    Args:
        weight: float32 ``[rows, columns]``.
        hessian: ``[columns, columns]``, positive definite: H, the second moments of exact inputs.
        noise: ``[columns]``, D's diagonal.

    Returns:
        A, and ``H + D``.
    """
    noisy = hessian + torch.diag(noise)
    factor = torch.linalg.cholesky(noisy.double())
    return torch.cholesky_solve((weight @ hessian).double().T, factor).T.to(weight).contiguous(), noisy


def _transformed(rows: Tensor, channels: int, smooth: Tensor | None, rotation: int, shift: Tensor | None) -> Tensor:
    """``[n * taps, channels]``."""
    x = rows.reshape(-1, channels)
    x = x if shift is None else x + shift
    x = x if smooth is None else x / smooth
    return rotate(x, rotation) if rotation else x


def _error(x: Tensor, kind: str, shift: Tensor | None, scale: Tensor | None = None) -> float:
    return float((dequantize_activations(*quantize_activations(x, kind, shift, scale), kind) - x).square().sum())


def _static_scale(x: Tensor, kind: str, shift: Tensor | None) -> Tensor:
    """Scale float32 ``[1]`` for all of ``x``, which holds samples of what is to come; of inputs that are all zero, 1."""
    peak = x.abs().max().view(1)
    if kind == "fp8":
        scale = peak * (HEADROOM / (UFP8_MAX if shift is not None else FP8_MAX))
    else:
        low, high = (0, UINT8_MAX) if shift is not None else (-127, 127)
        integers = Grid(8, tuple(map(float, range(low, high + 1))), unit=1.0, high=high, low=-low)
        scale, _ = search_clips(x.reshape(1, -1), integers, peak, None, ScaleStore("float32"), ClipSearch())
    return torch.where(scale > 0, scale, 1.0)
