"""From data-free codes to the codes, scales and codebooks that a layer's real inputs ask for."""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats import WeightFormat
from .coders import CodebookCoder, ScalarCoder, make_coder
from .error_feedback import descend, gain, pass_on_errors, row_errors
from .unbias import MAX_GAIN

BEAM = 16
SWEEPS = 8
TOLERANCE = 0.01  # AQLM's: stop when a round lowers the error by less
CODEBOOK_STEPS, CODEBOOK_RATE = 40, 1e-3  # per round; the rate is relative to an entry's size
BETAS = (0.0, 0.95)


def fit_to_inputs(
    weight: Tensor,
    fmt: WeightFormat,
    tensors: dict[str, Tensor],
    hessian: Tensor,
    *,
    beam: int = BEAM,
    sweeps: int = SWEEPS,
    errors: list[float] | None = None,
) -> dict[str, Tensor]:
    """Lower the error at the layer's output, beginning with any packed form of its weight.

    Args:
        weight: float32 ``[rows, columns]``, what the packed tensors stand for.
        fmt, tensors: its packed form.
        hessian: float32 ``[columns, columns]``, mean of ``x x^T`` over the layer's inputs, in the space of ``weight``, damped.
        beam: width of the search for codes.
        sweeps: most rounds of scales, codebooks and codes.
        errors: takes the relative output error after each round; it falls monotonically.

    Returns:
        the tensors of the best round.

    Raises:
        ValueError: the Hessian holds NaN or infinity.
    """
    total = row_errors(weight, hessian).sum().clamp_min(1e-30)
    coder = make_coder(fmt, tensors, weight.shape[1], beam)

    def error() -> float:
        return float(row_errors(weight - coder.values, hessian).sum() / total)

    best, found = error(), coder.pack()
    log = [best] if errors is None else errors
    log += [] if errors is None else [best]
    pass_on_errors(weight, hessian, coder)
    for _ in range(sweeps):
        descend(weight, hessian, coder)
        _adapt(weight, hessian, coder)
        now = error()
        if not now < best:
            break
        gained, best, found = 1 - now / best, now, coder.pack()
        log.append(now)
        if gained < TOLERANCE:
            break
    return found


def keep_gain(weight: Tensor, fmt: WeightFormat, tensors: dict[str, Tensor], hessian: Tensor) -> dict[str, Tensor]:
    """Tensors whose rows are rescaled so that their outputs keep the gain of those of ``weight`` (see unbias.py)."""
    coder = make_coder(fmt, tensors, weight.shape[1], BEAM)
    seen = weight @ hessian
    factors = (seen * weight).sum(1) / (seen * coder.values).sum(1)
    coder.rescale(torch.where(factors.isfinite(), factors, 1.0).clamp(1 / MAX_GAIN, MAX_GAIN))
    return coder.pack()


def _adapt(weight: Tensor, hessian: Tensor, coder: CodebookCoder | ScalarCoder) -> None:
    """Scales, and a layer's own codebooks, for the present codes."""
    if isinstance(coder, CodebookCoder) and coder.stored is not None:
        _train_codebooks(weight, hessian, coder)
    factors = gain(weight, coder.values, hessian)
    coder.rescale(torch.where(factors.isfinite() & (factors > 0), factors, 1.0))


def _train_codebooks(weight: Tensor, hessian: Tensor, coder: CodebookCoder) -> None:
    """Adam on codebooks and scales against the output error, as AQLM does it."""
    factor = torch.linalg.cholesky(hessian)
    codebooks = coder.codebooks.clone().requires_grad_()
    log_scales = torch.zeros(len(coder.scales), 1, dtype=torch.float32, device=weight.device, requires_grad=True)
    spread = float(coder.codebooks.square().mean().sqrt())
    groups = [
        {"params": [codebooks], "lr": CODEBOOK_RATE * spread},
        {"params": [log_scales], "lr": CODEBOOK_RATE},
    ]
    optimizer = torch.optim.Adam(groups, betas=BETAS, amsgrad=True)
    with torch.enable_grad():
        for _ in range(CODEBOOK_STEPS):
            values = coder.values_of(codebooks) * log_scales.exp()
            loss = ((weight - values) @ factor).square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    coder.replace_codebooks(codebooks.detach())
    coder.rescale(log_scales.detach()[:, 0].exp())
