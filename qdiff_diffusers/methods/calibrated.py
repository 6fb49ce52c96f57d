"""From data-free codes to the codes, scales and codebooks that a layer's real inputs ask for."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..formats import WeightFormat
from .coders import CodebookCoder, ScalarCoder, make_coder
from .error_feedback import kept, prepare, row_blocks, row_errors, times
from .threads import block_threads, map_blocks
from .unbias import MAX_GAIN, sample_rows

BEAM = 20  # of the first pass; sweeps of descent, which begin with good codes, need a quarter of it
SWEEPS = 8
SCALAR_TOLERANCE = 0.04  # of rounds of scalar formats, most of whose gain is that of the first pass
ERROR_ROWS = 128  # that tell the errors of scalar formats
TOLERANCE = 0.01  # of rounds of codebook formats: stop when one lowers the error by less
BEAM_TOLERANCE = 0.02  # where codes are all there is to choose, by beam search: slow, and nearly done after the first pass
CODEBOOK_STEPS = 8  # of conjugate gradients per round


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
    log: list[float] = [] if errors is None else errors
    with block_threads():
        if isinstance(coder, ScalarCoder):
            found = _fit_scalars(weight, hessian, coder, sweeps, log)
        else:
            found = _fit_codebooks(weight, hessian, coder, sweeps, log)
    return tensors if found is None else found


def _fit_scalars(weight: Tensor, hessian: Tensor, coder: ScalarCoder, sweeps: int, errors: list[float]) -> dict[str, Tensor] | None:
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
    seen = times(weight, hessian)
    total = _product(weight, seen).clamp_min(1e-30)
    tolerance = BEAM_TOLERANCE if coder.stored is None and len(coder.codebooks) > 1 else TOLERANCE
    best, found = float(row_errors(weight - coder.values, hessian).sum() / total), None
    errors.append(best)
    left = float(coder.pass_on(weight, prepare(hessian, coder.step)).sum() / total)
    slopes = times(weight - coder.values, hessian)
    for _ in range(sweeps):
        coder.descend(weight, hessian, slopes)
        slopes = _adapt(weight, hessian, coder, seen, slopes)
        now = float(_product(weight - coder.values, slopes) / total)
        if not now < best:
            break
        best, found = now, coder.pack()
        errors.append(now)
        if now > (1 - tolerance) * left:
            break
        left = now
    return found


def _product(left: Tensor, right: Tensor) -> Tensor:
    """``<left, right>``, of few sums that grow long."""
    return (left * right).sum(1).sum()


def keep_gain(weight: Tensor, fmt: WeightFormat, tensors: dict[str, Tensor], hessian: Tensor) -> dict[str, Tensor]:
    """Tensors whose rows are rescaled so that their outputs keep the gain of those of ``weight`` (see unbias.py)."""
    coder = make_coder(fmt, tensors, weight.shape[1], BEAM)
    if not coder.can_rescale:
        return tensors
    with block_threads():
        factors = kept(weight, coder.values, hessian)
    coder.rescale(torch.where(factors.isfinite(), factors, 1.0).clamp(1 / MAX_GAIN, MAX_GAIN))
    return coder.pack()


def _adapt(weight: Tensor, hessian: Tensor, coder: CodebookCoder, seen: Tensor, slopes: Tensor) -> Tensor:
    """Scales, and a layer's own codebooks, for the present codes.

    Args:
        seen: ``weight @ hessian``.
        slopes: ``(weight - values) @ hessian``.

    Returns:
        the slopes for the new values.
    """
    if coder.stored is not None:
        _train_codebooks(weight, hessian, coder)
        slopes = times(weight - coder.values, hessian)
    factors = (seen * coder.values).sum(1) / ((seen - slopes) * coder.values).sum(1).clamp_min(1e-30)
    before = coder.scales
    coder.rescale(torch.where(factors.isfinite() & (factors > 0), factors, 1.0))
    if before.shape[1] > 1:
        return times(weight - coder.values, hessian)
    change = torch.where(before == 0, 1.0, coder.scales / before)
    return torch.lerp(seen, slopes, change)


def _train_codebooks(weight: Tensor, hessian: Tensor, coder: CodebookCoder) -> None:
    """The codebooks that are best for the codes, nearly: with codes and scales fixed the error is a quadratic function of their
    entries, which conjugate gradients lower step by step. Each step costs one product with the second moments."""
    rows, vectors, count = coder.codes.shape
    spread = coder.spread()

    def seen_by_entries(difference: Tensor) -> Tensor:
        """``difference [rows, columns]`` times the second moments, summed over the places where each entry stands."""

        def work(part: slice) -> Tensor:
            seen = (difference[part] @ hessian).mul_(spread[part] if len(spread) == rows else spread)
            points = F.pad(seen, (0, vectors * coder.step - coder.columns)).view(-1, coder.step)
            out = torch.zeros_like(coder.codebooks)
            for m in range(count):
                out[m].index_add_(0, coder.codes[part, :, m].reshape(-1), points)
            return out

        return torch.stack(map_blocks(work, difference, row_blocks(difference))).sum(0)

    curvature = torch.zeros_like(coder.codebooks[..., :1])
    mass = (spread.square() * hessian.diagonal()).expand(rows, -1)
    mass = F.pad(mass, (0, vectors * coder.step - coder.columns)).view(rows, vectors, coder.step).mean(2).flatten()
    for m in range(count):
        curvature[m, :, 0].index_add_(0, coder.codes[..., m].flatten(), mass)
    curvature.clamp_min_(float(mass.mean()) or 1.0)

    change = torch.zeros_like(coder.codebooks)
    left = seen_by_entries(weight - coder.values)
    direction = preconditioned = left / curvature
    size = (left * preconditioned).sum()
    for _ in range(CODEBOOK_STEPS):
        bent = seen_by_entries(coder.values_of(direction))
        along = (direction * bent).sum()
        if not float(along) > 0:
            break
        step = size / along
        change += step * direction
        left -= step * bent
        preconditioned = left / curvature
        size, before = (left * preconditioned).sum(), size
        direction = preconditioned + size / before * direction
    coder.replace_codebooks(coder.codebooks + change)
