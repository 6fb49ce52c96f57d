"""The searches of ``nearest.py`` and ``additive.py`` in machine code: distances never leave the first-level cache.

What is compared is half a squared distance, ``|x - c|^2 / 2``, or what it is without the part that all entries share. The least of
many integers is found sixteen at a time, which IEEE's rules forbid for floats; numbers that are not negative are ordered as the
integers with their bits are. A run of distances is looked at one by one only if its least beats what is known, which is rare once
the first few entries have been seen.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import njit

from .compiled import compiled

RUN = 256  # entries compared at a time
FREE = ("nnan", "nsz", "contract", "reassoc")
NOTHING = np.int32(0x7F800000)  # infinity
QUARTERS = 4  # of a codebook, whose entries at the same place are looked at together
FAR = np.float32(1 << 24)  # units of what one entry adds to a path's distance, at most
FARTHEST = np.int32(1 << 29)  # units of a path's distance

_inline: Any = njit(error_model="numpy", inline="always")


@_inline
def _bound(numbers: Any, wanted: Any, more: Any) -> Any:
    """A number that ``wanted`` of ``numbers`` do not exceed, or up to ``more`` others: by bisection, without sorting."""
    low, high = numbers[0], numbers[0]
    for i in range(len(numbers)):
        low, high = min(low, numbers[i]), max(high, numbers[i])
    while low < high:
        middle = np.int32(low + ((np.int64(high) - np.int64(low)) >> 1))
        count = np.int32(0)
        for i in range(len(numbers)):
            count += np.int32(numbers[i] <= middle)
        if count >= wanted:
            high = middle
            if count <= wanted + more:
                break
        else:
            low = middle + np.int32(1)
    return high


@_inline
def _take(sums: Any, start: Any, i: Any, best: Any, code: Any) -> None:
    """Let point ``i`` have the least of a run, if it beats what the point has."""
    bits = sums.view(np.int32)
    found = bits[0]
    for e in range(RUN):
        found = min(found, bits[e])
    if found < best[i]:
        e = 0
        while bits[e] != found:
            e += 1
        best[i], code[i] = found, start + e


@compiled("void(f4[:,::1],f4[::1],f4[:,::1],f4[::1],i8[::1],f4[::1])", *FREE)
def search_nearest(points: Any, origins: Any, entries: Any, halves: Any, codes: Any, least: Any) -> None:
    """The entry of least ``origin + half - <x, c>`` for each point x, four points at a time.

    Args:
        points: ``[n, d]``, n a multiple of 4 and d of 2.
        origins: ``[n]``, so large that the sum is not negative: half the squared length of a point gives half the squared distance.
        entries: ``[d, k]``, k a multiple of RUN.
        halves: ``[k]``, half the squared length of each entry.
        codes, least: ``[n]``, the result and its sum.
    """
    d, k = entries.shape
    s, t, u, v = np.empty(RUN, np.float32), np.empty(RUN, np.float32), np.empty(RUN, np.float32), np.empty(RUN, np.float32)
    best, code = np.empty(4, np.int32), np.empty(4, np.int64)
    floats = best.view(np.float32)
    for p in range(0, points.shape[0], 4):
        x = points[p : p + 4]
        o0, o1, o2, o3 = origins[p], origins[p + 1], origins[p + 2], origins[p + 3]
        for i in range(4):
            best[i], code[i] = NOTHING, 0
        for start in range(0, k, RUN):
            own, one, two = halves[start : start + RUN], entries[0, start : start + RUN], entries[1, start : start + RUN]
            a0, a1, a2, a3 = x[0, 0], x[1, 0], x[2, 0], x[3, 0]
            b0, b1, b2, b3 = x[0, 1], x[1, 1], x[2, 1], x[3, 1]
            for e in range(RUN):
                s[e] = own[e] + o0 - a0 * one[e] - b0 * two[e]
                t[e] = own[e] + o1 - a1 * one[e] - b1 * two[e]
                u[e] = own[e] + o2 - a2 * one[e] - b2 * two[e]
                v[e] = own[e] + o3 - a3 * one[e] - b3 * two[e]
            for j in range(2, d, 2):
                one, two = entries[j, start : start + RUN], entries[j + 1, start : start + RUN]
                a0, a1, a2, a3 = x[0, j], x[1, j], x[2, j], x[3, j]
                b0, b1, b2, b3 = x[0, j + 1], x[1, j + 1], x[2, j + 1], x[3, j + 1]
                for e in range(RUN):
                    s[e] = s[e] - a0 * one[e] - b0 * two[e]
                    t[e] = t[e] - a1 * one[e] - b1 * two[e]
                    u[e] = u[e] - a2 * one[e] - b2 * two[e]
                    v[e] = v[e] - a3 * one[e] - b3 * two[e]
            _take(s, start, 0, best, code)
            _take(t, start, 1, best, code)
            _take(u, start, 2, best, code)
            _take(v, start, 3, best, code)
        for i in range(4):
            codes[p + i], least[p + i] = code[i], floats[i]


@compiled("void(f4[:,::1],f4[::1],f4[:,::1],i4[:,::1],f4[:,:,::1],i8[::1])", *FREE)
def search_near(points: Any, halves: Any, entries: Any, lists: Any, near: Any, codes: Any) -> None:
    """Go from the entry that a point x has to the one of least ``half - <x, c>`` among those near it, and on until none is better.

    Args:
        points: ``[n, d]``.
        halves: ``[k]``.
        entries: ``[k, d]``.
        lists: ``[k, count]``, which entries are near each.
        near: ``[k, d, count]``, those entries.
        codes: ``[n]``, where each point begins, and the result.
    """
    d, count = near.shape[1:]
    gains = np.empty(count, np.float32)
    bits = gains.view(np.int32)
    for p in range(points.shape[0]):
        code, found = codes[p], np.int32(1)
        best = halves[code]
        for j in range(d):
            best -= points[p, j] * entries[code, j]
        while found > 0:  # as the bits of a gain are
            own, coordinates = lists[code], near[code]
            for e in range(count):
                gains[e] = best - halves[own[e]]
            for j in range(d):
                x, row = points[p, j], coordinates[j]
                for e in range(count):
                    gains[e] += x * row[e]
            found = bits[0]
            for e in range(count):
                found = max(found, bits[e])
            if found > 0:
                e = 0
                while bits[e] != found:
                    e += 1
                code, best = own[e], best - gains[e]
        codes[p] = code


@_inline
def _score(scores: Any, least: Any, own: Any, before: Any, crossed: Any, pair: Any, path: Any, stage: Any) -> None:
    """Distances of one path continued with every entry of the next codebook, and the least of those at each place of a quarter."""
    k, quarter = len(scores), len(least)
    if stage == 0:
        for e in range(k):
            scores[e] = own[e] + before
    elif stage == 1:
        first = crossed[pair, path[0]]
        for e in range(k):
            scores[e] = own[e] + before + first[e]
    elif stage == 2:
        first, second = crossed[pair, path[0]], crossed[pair + 1, path[1]]
        for e in range(k):
            scores[e] = own[e] + before + first[e] + second[e]
    else:
        first, second, third = crossed[pair, path[0]], crossed[pair + 1, path[1]], crossed[pair + 2, path[2]]
        for e in range(k):
            scores[e] = own[e] + before + first[e] + second[e] + third[e]
        for j in range(3, stage):
            row = crossed[pair + j, path[j]]
            for e in range(k):
                scores[e] += row[e]
    a, b = scores[:quarter], scores[quarter : 2 * quarter]
    c, d = scores[2 * quarter : 3 * quarter], scores[3 * quarter :]
    for e in range(quarter):
        least[e] = min(min(a[e], b[e]), min(c[e], d[e]))


@_inline
def _below(scores: Any, leasts: Any, all_least: Any, parents: Any, bound: Any, kept: Any, origin: Any) -> Any:
    """Gather the distances of up to ``bound`` and where they stand; their number. Most places are passed over by quarters."""
    k, quarter = scores.shape[1], leasts.shape[1]
    flat = scores.reshape(-1)
    places = 0
    for e in range(quarter):
        origin[places] = e
        places += all_least[e] <= bound
    hits = 0
    for i in range(places):
        e = origin[i]
        for b in range(parents):
            kept[hits] = b * k + e
            hits += leasts[b, e] <= bound
    for i in range(hits):
        origin[len(origin) - hits + i] = kept[i]
    count = 0
    for i in range(hits):
        at = origin[len(origin) - hits + i]
        for _ in range(QUARTERS):
            kept[count] = flat[at]
            origin[count] = at
            count += flat[at] <= bound
            at += quarter
    return count


def _search_beam(base: Any, crossed: Any, beam: Any, codes: Any) -> None:
    """Beam search: the best paths through the first codebooks are each continued with every entry of the next, in integers.

    The least at each place of the quarters tell a bound below which at least ``beam`` continuations lie, and not many more.

    Args:
        base: float32 ``[n, books, k]``, k a multiple of QUARTERS: what an entry alone adds to half a distance, in units.
        crossed: integers ``[books * (books - 1) / 2, k, k]``: what entry e of codebook m adds to that after entry c of codebook j
            is at ``[m * (m - 1) / 2 + j, c, e]``.
        beam: how many paths to keep.
        codes: int64 ``[n, books]``, the result.
    """
    n, books, k = base.shape
    quarter = k // QUARTERS
    scores, leasts, all_least = np.empty((beam, k), np.int32), np.empty((beam, quarter), np.int32), np.empty(quarter, np.int32)
    own, kept, origin = np.empty(k, np.int32), np.empty(beam * k, np.int32), np.empty(2 * beam * k, np.int32)
    distances, both = np.empty(beam, np.int32), np.zeros((2, beam, books), np.int32)
    for p in range(n):
        parents, distances[0] = 1, 0
        for m in range(books):
            paths, longer, pair = both[m % 2], both[1 - m % 2], m * (m - 1) // 2
            one = base[p, m]
            for e in range(k):
                own[e] = np.int32(np.floor(max(min(one[e], FAR), -FAR) + np.float32(0.5)))
            if m == books - 1:
                least, parent, entry = FARTHEST, 0, 0
                s, low = scores[0], leasts[0]
                for b in range(parents):
                    _score(s, low, own, distances[b], crossed, pair, paths[b], m)
                    found = low[0]
                    for e in range(quarter):
                        found = min(found, low[e])
                    if found < least:
                        e = 0
                        while s[e] != found:
                            e += 1
                        least, parent, entry = found, b, e
                for j in range(m):
                    codes[p, j] = paths[parent, j]
                codes[p, m] = entry
                continue
            for e in range(quarter):
                all_least[e] = NOTHING
            for b in range(parents):
                low = leasts[b]
                _score(scores[b], low, own, distances[b], crossed, pair, paths[b], m)
                for e in range(quarter):
                    all_least[e] = min(all_least[e], low[e])
            width = min(beam, parents * k)
            bound = _bound(all_least, width, width // 2) if width <= quarter else NOTHING
            count = _below(scores, leasts, all_least, parents, bound, kept, origin)
            bound = _bound(kept[:count], width, 0)
            room = width
            for i in range(count):
                room -= kept[i] < bound
            place = 0
            for i in range(count):  # what lies below the bound, and as many of those on it as there is room for
                on = kept[i] == bound and room > 0
                if on or kept[i] < bound:
                    room -= on
                    parent, entry = origin[i] // k, origin[i] % k
                    distances[place] = min(kept[i], FARTHEST)
                    for j in range(m):
                        longer[place, j] = paths[parent, j]
                    longer[place, m] = entry
                    place += 1
            parents = width


@cache
def beam_search(kind: str) -> Any:
    """The beam search over tables of ``kind``, "i2" or "i4"."""
    return compiled(f"void(f4[:,:,::1],{kind}[:,:,::1],i8,i8[:,::1])")(_search_beam)
