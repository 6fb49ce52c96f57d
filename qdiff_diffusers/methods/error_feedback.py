"""Codes chosen by the error they cause at a layer's output, ``tr((W - Q) H (W - Q)^T)`` with H the inputs' second moments.

Two passes share one step, "choose codes for some columns under a metric". The first walks through the columns once and lets
those that follow make up for each error (GPTQ, Frantar et al. 2022; over vectors: GPTVQ, QuIP#'s LDLQ). The second is
coordinate descent, which starts from any codes and never raises the error (AQLM's objective, solved vector by vector).

Either goes through blocks of columns: one matrix product tells a block of all that has happened before it, and inside the block
columns tell each other. Rows are independent, so a few hundred of them at a time go through everything, and however many threads
share them, the result is the same to the bit. Scalars: ``columns.py``. Vectors: ``coders.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .threads import map_blocks

ROWS = 256  # at a time: enough for a matrix product at full speed, few enough for the caches
DAMPING_TRIES = 8


class Moments(NamedTuple):
    """Second moments, prepared for all rows.

    Attributes:
        matrix: float32 ``[columns, columns]``, positive definite.
        order: int64 ``[columns]``, in which codes are chosen.
        feedback: float32 ``[columns, columns]``, in that order: the matrix is ``U D U^T`` with U unit upper triangular.
        pivots: float32 ``[columns]``, D.
    """

    matrix: Tensor
    order: Tensor
    feedback: Tensor
    pivots: Tensor


class Coder(Protocol):
    """Codes of a weight matrix in some format.

    Attributes:
        step: columns that are chosen together.
        values: float32 ``[rows, columns]``, what the present codes stand for.
    """

    step: int
    values: Tensor

    def pass_on(self, weight: Tensor, moments: Moments) -> Tensor:
        """Choose all codes of ``weight`` in the order of the moments, each error made up for by the columns after it.

        Returns:
            the error that is left in each row, float32 ``[rows]``.
        """

    def descend(self, weight: Tensor, hessian: Tensor) -> Tensor:
        """One sweep of coordinate descent: some columns at a time, all others fixed. No row's error rises.

        Returns:
            by how much each row's error falls, float32 ``[rows]``.
        """


def damped(hessian: Tensor, damping: float) -> Tensor:
    """``hessian`` float32 ``[n, n]`` plus ``damping`` times its mean diagonal; inputs that never occur count a little."""
    diagonal = hessian.diagonal().mean().clamp_min(1e-12)
    return hessian + torch.diag(torch.full_like(hessian.diagonal(), damping) * diagonal)


def row_errors(difference: Tensor, hessian: Tensor) -> Tensor:
    """``d H d^T`` of each row, ``[rows]``."""
    return _in_rows(lambda part: ((difference[part] @ hessian) * difference[part]).sum(1), difference)


def prepare(hessian: Tensor, step: int = 1, in_order: bool = False) -> Moments:
    """Factor second moments float32 ``[columns, columns]``, positive definite.

    With ``U D U^T`` a row's error is ``sum_j D_j (e_j + sum_{i<j} e_i U_ij)^2``: each code is chosen so that its own error undoes
    what those before it left (QuIP's form of GPTQ, which needs no inverse). The inputs that vary most go first, those that hardly
    matter last: they make up for the others, and nobody for them. In float32 it is the factor of moments that differ by a
    ten-millionth, far less than damping adds; sweeps of descent take the moments themselves.

    Args:
        step: columns that stay together.
        in_order: first column to last instead.

    Raises:
        ValueError: the moments hold NaN or infinity.
    """
    if not torch.isfinite(hessian.sum()) and not torch.isfinite(hessian).all():
        raise ValueError("the inputs' second moments hold NaN or infinity")
    columns = torch.arange(len(hessian), device=hessian.device)
    order = columns if in_order else _by_size(hessian.diagonal(), step)
    last_first = order.flip(0)
    lower = cholesky(hessian[last_first][:, last_first])
    roots = lower.diagonal().clone()
    return Moments(hessian, order, lower.div_(roots).flip(0, 1), roots.square_().flip(0))


def pass_on_errors(weight: Tensor, hessian: Tensor, coder: Coder) -> Tensor:
    """Choose all codes, first column to last, each error made up for by the columns after it.

    Args:
        weight: float32 ``[rows, columns]``.
        hessian: float32 ``[columns, columns]``, positive definite.
        coder: whose codes are replaced.

    Returns:
        the error that is left in each row, float32 ``[rows]``.
    """
    return coder.pass_on(weight, prepare(hessian, coder.step, in_order=True))


def descend(weight: Tensor, hessian: Tensor, coder: Coder) -> Tensor:
    """One sweep of coordinate descent, see :meth:`Coder.descend`."""
    return coder.descend(weight, hessian)


def times(matrix: Tensor, hessian: Tensor) -> Tensor:
    """``matrix @ hessian``, some rows at a time."""
    return _in_rows(lambda part: matrix[part] @ hessian, matrix)


def kept(weight: Tensor, values: Tensor, hessian: Tensor) -> Tensor:
    """Factor ``[rows]`` on each row of ``values`` that keeps the gain of the outputs of ``weight``."""

    def work(part: slice) -> Tensor:
        seen = weight[part] @ hessian
        return (seen * weight[part]).sum(1) / (seen * values[part]).sum(1)

    return _in_rows(work, weight)


def row_blocks(matrix: Tensor, rows: int = ROWS) -> int:
    """Weights of the blocks in which :func:`map_blocks` should take ``matrix``: some rows on a CPU, all on a GPU."""
    return rows * matrix.shape[1] if matrix.device.type == "cpu" else max(1, matrix.numel())


def _in_rows(work: Callable[[slice], Tensor], matrix: Tensor) -> Tensor:
    return torch.cat(map_blocks(work, matrix, row_blocks(matrix)))


def _by_size(diagonal: Tensor, step: int) -> Tensor:
    """Columns ordered by falling ``diagonal [columns]``, or steps of neighbours by its mean; a short last step counts too."""
    columns = torch.arange(len(diagonal), device=diagonal.device)
    number = columns // step
    sums = torch.zeros(-(-len(diagonal) // step), dtype=torch.float64, device=diagonal.device)
    sizes = sums.clone().index_add_(0, number, torch.ones_like(diagonal, dtype=torch.float64))
    sums.index_add_(0, number, diagonal.double())
    place = torch.empty_like(sums, dtype=torch.long)
    place[(sums / sizes).argsort(descending=True, stable=True)] = torch.arange(len(sums), device=diagonal.device)
    return place[number].argsort(stable=True)


def cholesky(matrix: Tensor) -> Tensor:
    """Lower factor of a matrix; more damping where it is nearly singular."""
    extra = 0.0
    for _ in range(DAMPING_TRIES):
        lower, failed = torch.linalg.cholesky_ex(damped(matrix, extra) if extra else matrix)
        if not int(failed):
            return lower
        extra = max(1e-6, extra * 10)
    raise ValueError("the inputs' second moments cannot be factored: they are not those of any inputs")
