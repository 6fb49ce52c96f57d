"""The loops of ``columns.py`` in machine code, bit for bit: numba, where it is installed.

Rows are independent of one another, so vector registers hold one column of many rows, and what one column's error does to another
is one multiplication and one addition for all of them. No sum is reordered and no product fused with a sum, which is what
makes results those of torch.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from .compiled import compiled

TILE = 64  # rows: sixteen at a time is what a vector register holds, and LLVM makes vectors only of longer loops

_inline: Any = njit(error_model="numpy", inline="always")


@_inline
def _tile() -> Any:
    return np.empty(TILE, np.float32)


@_inline
def _load(target: Any, source: Any, row: Any, first: Any, count: Any, fill: Any) -> None:
    for r in range(TILE):
        target[r] = fill
    for r in range(count):
        target[r] = source[row, first + r]


@_inline
def _nearest(wanted: Any, edges: Any, bases: Any, depth: Any, rank: Any) -> None:
    """Ranks of the levels nearest to ``wanted``, by bisection of the ``2**depth - 1`` midpoints that begin at each base."""
    for r in range(TILE):
        rank[r] = bases[r]
    step = (1 << depth) >> 1
    while step > 0:
        for r in range(TILE):
            rank[r] += np.uint32(step) if edges[np.uint32(rank[r] + np.uint32(step - 1))] < wanted[r] else np.uint32(0)
        step >>= 1


@compiled(
    "void(f4[:,::1],f4[:,::1],f4[:,::1],f4[::1],f4[::1],f4[::1],i8,f4[:,::1],f4[:,::1],i4[:,::1],i8[::1],"
    "f4[:,::1],i2[:,::1],f4[:,::1],f4[::1])"
)
def columns_pass_block(
    targets: Any,
    exact: Any,
    feedback: Any,
    pivots: Any,
    levels: Any,
    edges: Any,
    bits: Any,
    scales: Any,
    zeros: Any,
    bases: Any,
    groups: Any,
    values: Any,
    ranks: Any,
    errors: Any,
    losses: Any,
) -> None:
    columns, rows = targets.shape
    t = np.empty((columns, TILE), np.float32)
    s, z, safe = np.empty(TILE, np.float32), np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    base, rank = np.empty(TILE, np.uint32), np.empty(TILE, np.uint32)
    x, v, e, loss = (
        np.empty(TILE, np.float32),
        np.empty(TILE, np.float32),
        np.empty(TILE, np.float32),
        np.empty(TILE, np.float32),
    )
    for first in range(0, rows, TILE):
        count = min(TILE, rows - first)
        for j in range(columns):
            _load(t[j], targets, j, first, count, np.float32(0))
        for r in range(TILE):
            loss[r] = 0
        group = -1
        for i in range(columns):
            if groups[i] != group:
                group = groups[i]
                _load(s, scales, group, first, count, np.float32(0))
                _load(z, zeros, group, first, count, np.float32(0))
                _load(base, bases, group, first, count, np.uint32(0))
                for r in range(TILE):
                    safe[r] = s[r] if s[r] != 0 else np.float32(1)
            for r in range(TILE):
                x[r] = (t[i, r] - z[r]) / safe[r]
            _nearest(x, edges, base, bits, rank)
            _load(e, exact, i, first, count, np.float32(0))
            for r in range(TILE):
                v[r] = levels[rank[r]] * s[r] + z[r]
                x[r] = t[i, r] - v[r]
                loss[r] += x[r] * x[r] * pivots[i]
                e[r] -= v[r]
            for r in range(count):
                values[i, first + r] = v[r]
                ranks[i, first + r] = rank[r]
                errors[i, first + r] = e[r]
            row = feedback[i]
            for j in range(i + 1, columns):
                f, tj = row[j], t[j]
                for r in range(TILE):
                    tj[r] += e[r] * f
        for r in range(count):
            losses[first + r] += loss[r]


@_inline
def _see(q: Any, t: Any, block: Any, begin: Any, end: Any, seen: Any, along: Any, square: Any) -> None:
    """What a group's levels do to the gradient of its columns and those after it, and the slope and curvature of its scale."""
    for k in range(begin, len(seen)):
        for r in range(TILE):
            seen[k, r] = 0
    for r in range(TILE):
        along[r] = 0
        square[r] = 0
    for j in range(begin, end):
        for r in range(TILE):
            along[r] += q[j, r] * t[j, r]
        for k in range(begin, len(seen)):
            f, qj, sk = block[j, k], q[j], seen[k]
            for r in range(TILE):
                sk[r] += qj[r] * f
    for j in range(begin, end):
        for r in range(TILE):
            square[r] += q[j, r] * seen[j, r]


@_inline
def _see_zero(t: Any, block: Any, seen: Any, begin: Any, end: Any, ones: Any, sums: Any, cross: Any) -> Any:
    """The same for its zero: slope, curvature, which is the same in all rows, and what it has in common with the scale."""
    whole = np.float32(0)
    for k in range(begin, len(ones)):
        ones[k] = 0
    for j in range(begin, end):
        for k in range(begin, len(ones)):
            ones[k] += block[j, k]
    for r in range(TILE):
        sums[r] = 0
        cross[r] = 0
    for j in range(begin, end):
        whole += ones[j]
        for r in range(TILE):
            sums[r] += t[j, r]
            cross[r] += seen[j, r]
    return whole


@_inline
def _best_scale(s: Any, unit: Any, top: Any, bottom: Any, steps: Any, cuts: Any, depth: Any, x: Any, rank: Any, ds: Any) -> None:
    """Changes ``ds`` of scales ``s`` that can be stored, nearest to ``top / bottom``, which may be zero or none."""
    origin = np.zeros(TILE, np.uint32)
    sign = np.empty(TILE, np.float32)
    for r in range(TILE):
        sign[r] = np.float32(-1) if s[r] < 0 else np.float32(1)
        ds[r] = s[r]
        if bottom[r] > 0:
            ds[r] = s[r] + top[r] / bottom[r]
        x[r] = ds[r] * sign[r] / unit[r]
    _nearest(x, cuts, origin, depth, rank)
    for r in range(TILE):
        stored = x[r]
        if depth > 0:
            stored = steps[rank[r]]
        ds[r] = stored * unit[r] * sign[r] - s[r] if x[r] > 0 and stored > 0 and s[r] != 0 else np.float32(0)


@_inline
def _best_zero(x: Any, z: Any, steps: Any, cuts: Any, depth: Any, v: Any, rank: Any, dz: Any) -> None:
    """Changes ``dz`` of zeros ``z`` that can be stored, so that they are nearest to ``x``."""
    origin = np.zeros(TILE, np.uint32)
    for r in range(TILE):
        v[r] = abs(x[r])
    _nearest(v, cuts, origin, depth, rank)
    for r in range(TILE):
        stored = v[r]
        if depth > 0:
            stored = steps[rank[r]]
        dz[r] = (-stored if x[r] < 0 else stored) - z[r]


@_inline
def _pass_change(t: Any, row: Any, change: Any, begin: Any) -> None:
    """Tell the columns from ``begin`` on of a column's ``change``, through its ``row`` of the second moments."""
    for j in range(begin, len(t)):
        f, tj = row[j], t[j]
        for r in range(TILE):
            tj[r] -= change[r] * f


@compiled(
    "void(f4[:,::1],f4[:,::1],f4[:,::1],f4[::1],f4[::1],i8,f4[::1],f4[::1],i8,f4[:,::1],f4[:,::1],f4[::1],i4[:,::1],i8[::1],"
    "f4[:,::1],i2[:,::1],f4[:,::1],f4[::1],i8)"
)
def columns_descend_block(
    gradient: Any,
    exact: Any,
    block: Any,
    levels: Any,
    edges: Any,
    bits: Any,
    steps: Any,
    cuts: Any,
    depth: Any,
    scales: Any,
    zeros: Any,
    units: Any,
    bases: Any,
    groups: Any,
    values: Any,
    ranks: Any,
    errors: Any,
    gains: Any,
    refit: Any,
) -> None:
    columns, rows = gradient.shape
    t, seen, q = np.empty((columns, TILE), np.float32), np.empty((columns, TILE), np.float32), np.empty((columns, TILE), np.float32)
    ones = np.empty(columns, np.float32)
    s, z, safe, unit = _tile(), _tile(), _tile(), _tile()
    base, rank = np.empty(TILE, np.uint32), np.empty(TILE, np.uint32)
    x, v, d, gain = _tile(), _tile(), _tile(), _tile()
    along, square, sums, cross, top, bottom, ds, dz = _tile(), _tile(), _tile(), _tile(), _tile(), _tile(), _tile(), _tile()
    for first in range(0, rows, TILE):
        count = min(TILE, rows - first)
        for j in range(columns):
            _load(t[j], gradient, j, first, count, np.float32(0))
        for r in range(TILE):
            gain[r] = 0
            unit[r] = 1
        for r in range(count):
            unit[r] = units[first + r]
        begin = 0
        while begin < columns:
            group = groups[begin]
            end = begin + 1
            while end < columns and groups[end] == group:
                end += 1
            _load(s, scales, group, first, count, np.float32(0))
            _load(z, zeros, group, first, count, np.float32(0))
            _load(base, bases, group, first, count, np.uint32(0))
            if refit > 0:
                for j in range(begin, end):
                    for r in range(TILE):
                        q[j, r] = 0
                    for r in range(count):
                        q[j, r] = levels[ranks[j, first + r]]
                _see(q, t, block, begin, end, seen, along, square)
                whole = np.float32(0)
                if refit > 1:  # the scale that is best if the zero follows
                    whole = _see_zero(t, block, seen, begin, end, ones, sums, cross)
                    for r in range(TILE):
                        top[r] = along[r] - cross[r] * sums[r] / whole
                        bottom[r] = square[r] - cross[r] * cross[r] / whole
                    _best_scale(s, unit, top, bottom, steps, cuts, depth, x, rank, ds)
                    for r in range(TILE):  # then the zero that is best with the scale as it is stored
                        x[r] = z[r] + (sums[r] - cross[r] * ds[r]) / whole
                    _best_zero(x, z, steps, cuts, depth, v, rank, dz)
                else:
                    _best_scale(s, unit, along, square, steps, cuts, depth, x, rank, ds)
                    for r in range(TILE):
                        dz[r] = 0
                for r in range(TILE):
                    won = ds[r] * (np.float32(2) * along[r] - ds[r] * square[r])
                    if refit > 1:
                        won += dz[r] * (np.float32(2) * (sums[r] - ds[r] * cross[r]) - dz[r] * whole)
                    keep = won > 0
                    ds[r] = ds[r] if keep else np.float32(0)
                    dz[r] = dz[r] if keep else np.float32(0)
                    gain[r] += won if keep else np.float32(0)
                    s[r] = s[r] + ds[r]
                    z[r] = z[r] + dz[r]
                for r in range(count):
                    scales[group, first + r] = s[r]
                    zeros[group, first + r] = z[r]
                for j in range(begin, end):
                    for r in range(count):
                        values[j, first + r] = q[j, r] * s[r] + z[r]
                        errors[j, first + r] = exact[j, first + r] - values[j, first + r]
                for k in range(begin, columns):
                    tk, sk = t[k], seen[k]
                    for r in range(TILE):
                        tk[r] -= ds[r] * sk[r]
                if refit > 1:
                    _pass_change(t, ones, dz, begin)
            for r in range(TILE):
                safe[r] = s[r] if s[r] != 0 else np.float32(1)
            for i in range(begin, end):
                pivot = block[i, i]
                _load(d, values, i, first, count, np.float32(0))
                for r in range(TILE):
                    x[r] = (d[r] + t[i, r] / pivot - z[r]) / safe[r]
                _nearest(x, edges, base, bits, rank)
                moved = 0
                for r in range(TILE):
                    v[r] = levels[rank[r]] * s[r] + z[r]
                    d[r] = v[r] - d[r]
                    gain[r] += d[r] * (np.float32(2) * t[i, r] - d[r] * pivot)
                for r in range(count):
                    moved += d[r] != 0
                if moved == 0:
                    continue
                for r in range(count):
                    values[i, first + r] = v[r]
                    ranks[i, first + r] = rank[r] if d[r] != 0 else ranks[i, first + r]
                    errors[i, first + r] = exact[i, first + r] - v[r]
                _pass_change(t, block[i], d, i + 1)
            begin = end
        for r in range(count):
            gains[first + r] += gain[r]
