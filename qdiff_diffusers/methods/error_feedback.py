"""Codes chosen by the error they cause at a layer's output, ``tr((W - Q) H (W - Q)^T)`` with H the inputs' second moments.

Two passes share one step, "choose codes for some columns under a metric". The first walks through the columns once and lets
those that follow make up for each error (GPTQ, Frantar et al. 2022; over vectors: GPTVQ, QuIP#'s LDLQ). The second is
coordinate descent, which starts from any codes and never raises the error (AQLM's objective, solved vector by vector).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

CHUNK = 128  # columns whose errors are passed on one by one; those after them are brought up to date once per chunk
DAMPING_TRIES = 8


class Coder(Protocol):
    """Codes of a weight matrix, chosen some columns at a time.

    Attributes:
        step: columns that are chosen together.
        values: float32 ``[rows, columns]``, what the present codes stand for.
    """

    step: int
    values: Tensor

    def choose(self, columns: slice, targets: Tensor, factor: Tensor) -> Tensor:
        """Values ``[rows, n]`` of the codes that nearly minimise ``|(targets - values) @ factor|^2`` in each row, and keep them
        as proposed codes; n is ``step``, or less at the end of a row."""

    def accept(self, columns: slice, rows: Tensor) -> None:
        """Let the proposed codes of these columns count in ``rows`` (bool ``[rows]``)."""


def damped(hessian: Tensor, damping: float) -> Tensor:
    """``hessian`` float32 ``[n, n]`` plus ``damping`` times its mean diagonal; inputs that never occur count a little."""
    diagonal = hessian.diagonal().mean().clamp_min(1e-12)
    return hessian + torch.diag(torch.full_like(hessian.diagonal(), damping) * diagonal)


def row_errors(difference: Tensor, hessian: Tensor) -> Tensor:
    """``d H d^T`` of each row, ``[rows]``."""
    return ((difference @ hessian) * difference).sum(1)


def pass_on_errors(weight: Tensor, hessian: Tensor, coder: Coder) -> None:
    """Choose all codes, first column to last, each error made up for by the columns after it.

    Args:
        weight: float32 ``[rows, columns]``.
        hessian: float32 ``[columns, columns]``, positive definite.
        coder: whose codes are replaced.
    """
    upper = inverse_factor(hessian)
    target = weight.clone()
    columns, step = weight.shape[1], coder.step
    chunk = max(step, CHUNK // step * step)
    everything = torch.ones(len(weight), dtype=torch.bool, device=weight.device)
    for start in range(0, columns, chunk):
        stop = min(start + chunk, columns)
        errors = torch.zeros(len(weight), stop - start, dtype=torch.float32, device=weight.device)
        for first in range(start, stop, step):
            part = slice(first, min(first + step, stop))
            inverse = torch.linalg.inv(upper[part, part])
            values = coder.choose(part, target[:, part], inverse)
            coder.accept(part, everything)
            error = (target[:, part] - values) @ inverse
            errors[:, first - start : part.stop - start] = error
            target[:, part.stop : stop] -= error @ upper[part, part.stop : stop]
        target[:, stop:] -= errors @ upper[start:stop, stop:]


def descend(weight: Tensor, hessian: Tensor, coder: Coder) -> None:
    """One sweep of coordinate descent: codes of some columns at a time, all others fixed. No row's error rises."""
    residual = weight - coder.values
    gradient = residual @ hessian
    columns, step = weight.shape[1], coder.step
    chunk = max(step, CHUNK // step * step)
    for start in range(0, columns, chunk):
        stop = min(start + chunk, columns)
        changes = torch.zeros(len(weight), stop - start, dtype=torch.float32, device=weight.device)
        for first in range(start, stop, step):
            part = slice(first, min(first + step, stop))
            block = hessian[part, part]
            old = coder.values[:, part].clone()
            factor = torch.linalg.cholesky(block)
            target = old + torch.cholesky_solve(gradient[:, part].T, factor).T
            new = coder.choose(part, target, factor)
            better = ((target - new) @ factor).square().sum(1) < ((target - old) @ factor).square().sum(1)
            coder.accept(part, better)
            change = torch.where(better[:, None], new - old, 0)
            changes[:, first - start : part.stop - start] = change
            gradient[:, part.stop : stop] -= change @ hessian[part, part.stop : stop]
        gradient[:, stop:] -= changes @ hessian[start:stop, stop:]


def inverse_factor(hessian: Tensor) -> Tensor:
    """Upper triangular U with ``U^T U = hessian^-1``, in float64 inside; more damping where the matrix is nearly singular."""
    wide = hessian.double()
    extra = 0.0
    for _ in range(DAMPING_TRIES):
        lower, failed = torch.linalg.cholesky_ex(damped(wide, extra))
        if not int(failed):
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not int(failed):
                return upper.to(hessian.dtype)
        extra = max(1e-6, extra * 10)
    raise ValueError("the inputs' second moments hold NaN or infinity")


def gain(weight: Tensor, values: Tensor, hessian: Tensor) -> Tensor:
    """Factor ``[rows]`` on each row of ``values`` that brings its output closest to that of ``weight``."""
    seen = values @ hessian
    return (seen * weight).sum(1) / (seen * values).sum(1).clamp_min(1e-30)
