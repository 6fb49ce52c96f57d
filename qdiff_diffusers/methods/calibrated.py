"""From data-free codes to the codes, scales and codebooks that a layer's real inputs ask for."""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats import WeightFormat
from .coders import CodebookCoder, ScalarCoder, make_coder
from .output_error import gain, prepare, row_errors
from .threads import block_threads
from .unbias import MAX_GAIN, sample_rows

BEAM = 16
SWEEPS = 8
SCALAR_TOLERANCE = 0.04  # of rounds of scalar formats, most of whose gain is that of the first pass
ERROR_ROWS = 128  # that tell the errors of scalar formats
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
    coder = make_coder(fmt, tensors, weight.shape[1], beam)
    fit = _fit_scalars if isinstance(coder, ScalarCoder) else _fit_codebooks
    with block_threads():
        found = fit(weight, hessian, coder, sweeps, [] if errors is None else errors)
    return tensors if found is None else found


def _fit_scalars(
    weight: Tensor, hessian: Tensor, coder: ScalarCoder, sweeps: int, errors: list[float]
) -> dict[str, Tensor] | None:
    """Codes and scales in one go. Rows are independent, so a few tell what the errors are."""
    some, tensors = sample_rows(weight, coder.pack(), ERROR_ROWS * weight.shape[1])
    total = row_errors(some, hessian).sum().clamp_min(1e-30)
    errors.append(float(row_errors(some - coder.format.dequantize(tensors, weight.shape[1]), hessian).sum() / total))
    left = coder.fit(weight, prepare(hessian), sweeps, SCALAR_TOLERANCE)
    left = left[:, :: -(-len(weight) // len(some))].sum(1) / total
    if not float(left[-1]) < errors[-1]:
        return None
    errors.extend(error for error in left.tolist() if error < errors[-1])
    return coder.pack()


def _fit_codebooks(
    weight: Tensor, hessian: Tensor, coder: CodebookCoder, sweeps: int, errors: list[float]
) -> dict[str, Tensor] | None:
    """Codes, scales and codebooks in turn."""
    total = row_errors(weight, hessian).sum().clamp_min(1e-30)

    def error() -> float:
        return float(row_errors(weight - coder.values, hessian).sum() / total)

    best, found = error(), None
    errors.append(best)
    coder.pass_on(weight, prepare(hessian, coder.step))
    for _ in range(sweeps):
        coder.descend(weight, hessian)
        _adapt(weight, hessian, coder)
        now = error()
        if not now < best:
            break
        gained, best, found = 1 - now / best, now, coder.pack()
        errors.append(now)
        if gained < TOLERANCE:
            break
    return found


def keep_gain(weight: Tensor, fmt: WeightFormat, tensors: dict[str, Tensor], hessian: Tensor) -> dict[str, Tensor]:
    """Tensors whose rows are rescaled so that their outputs keep the gain of those of ``weight`` (see unbias.py)."""
    coder = make_coder(fmt, tensors, weight.shape[1], BEAM)
    if not coder.can_rescale:
        return tensors
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
