"""The searches of ``nearest.py`` and ``additive.py`` in machine code: distances never leave the first-level cache.

What is compared is half the squared distance, ``|x - c|^2 / 2``. Numbers that are not negative are ordered as the integers with
their bits are, and the least of many integers is found sixteen at a time, which IEEE's rules forbid for floats. A run of distances
is looked at one by one only if its least beats what is known, which is rare once the first few entries have been seen.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from .compiled import compiled

RUN = 256  # entries compared at a time
CHUNK = 32  # of them that are looked at together
FREE = ("nnan", "nsz", "contract", "reassoc")
NOTHING = np.int32(0x7F800000)  # infinity


@njit(error_model="numpy", inline="always")
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


@compiled("void(f4[:,::1],f4[:,::1],f4[::1],i8[::1],f4[::1])", *FREE)
def search_nearest(points: Any, entries: Any, halves: Any, codes: Any, distances: Any) -> None:
    """Nearest entry of each point.

    Args:
        points: ``[n, d]``, d a multiple of 2.
        entries: ``[d, k]``, k a multiple of RUN.
        halves: ``[k]``, half the squared length of each entry.
        codes, distances: ``[n]``, the result and the squared distance.
    """
    d, k = entries.shape
    s = np.empty(RUN, np.float32)
    bits = s.view(np.int32)
    for p in range(points.shape[0]):
        half = np.float32(0)
        for j in range(d):
            half += points[p, j] * points[p, j] * np.float32(0.5)
        least, code = NOTHING, 0
        for start in range(0, k, RUN):
            own = halves[start : start + RUN]
            for e in range(RUN):
                s[e] = half + own[e]
            for j in range(0, d, 2):
                x, y = points[p, j], points[p, j + 1]
                first, second = entries[j, start : start + RUN], entries[j + 1, start : start + RUN]
                for e in range(RUN):
                    s[e] -= x * first[e] + y * second[e]
            found = bits[0]
            for e in range(RUN):
                found = min(found, bits[e])
            if found < least:
                least = found
                e = 0
                while bits[e] != found:
                    e += 1
                code = start + e
        codes[p] = code
        bits[0] = least
        distances[p] = max(np.float32(2) * s[0], np.float32(0))


@compiled("void(f4[:,::1],f4[:,:,::1],i8,f4[:,::1],i4[:,:,::1],i8,f4[:,::1],i4[:,:,::1])", *FREE)
def search_stage(
    base: Any, crossed: Any, stage: Any, distances: Any, paths: Any, width: Any, new_distances: Any, new_paths: Any
) -> None:
    """Continue every path of a beam with every entry of the next codebook, and keep the nearest, in no order.

    The least of each chunk tell a bound below which at least ``width`` candidates lie, and not many more.

    Args:
        base: ``[n, k]``, k a power of two: by how much an entry of the next codebook alone would change half a squared distance.
        crossed: ``[stage, k, k]``, products of the entries chosen so far, by codebook, with those of the next.
        distances, paths: ``[n, beam]`` and ``[n, beam, codebooks]``, of which ``stage``, 0 or more, are chosen.
        width: how many to keep, at most all there are.
        new_distances, new_paths: ``[n, width]`` and ``[n, width, codebooks]``.
    """
    k, beam = base.shape[1], distances.shape[1]
    total, chunk = beam * k, min(CHUNK, k)
    chunks = total // chunk
    scores = np.empty(total, np.float32)
    bits = scores.view(np.int32)
    least, kept, origin = np.empty(chunks, np.int32), np.empty(total, np.int32), np.empty(total, np.int32)
    floats = kept.view(np.float32)
    for p in range(base.shape[0]):
        own = base[p]
        for b in range(beam):
            before, s = distances[p, b], scores[b * k : (b + 1) * k]
            if stage == 0:
                for e in range(k):
                    s[e] = own[e] + before
            elif stage < 3:
                first, last = crossed[0, paths[p, b, 0]], crossed[stage - 1, paths[p, b, stage - 1]]
                weight = np.float32(stage - 1)  # of the second row, which for one is the first
                for e in range(k):
                    s[e] = own[e] + before + first[e] + weight * last[e]
            else:
                first, second, third = crossed[0, paths[p, b, 0]], crossed[1, paths[p, b, 1]], crossed[2, paths[p, b, 2]]
                for e in range(k):
                    s[e] = own[e] + before + first[e] + (second[e] + third[e])
                for j in range(3, stage):
                    row = crossed[j, paths[p, b, j]]
                    for e in range(k):
                        s[e] += row[e]
        for c in range(chunks):
            part = bits[c * chunk : (c + 1) * chunk]
            found = part[0]
            for e in range(chunk):
                found = min(found, part[e])
            least[c] = found
        bound = _bound(least, min(width, chunks), min(width, chunks) // 2) if width <= chunks else NOTHING
        count = 0
        for c in range(chunks):
            if least[c] <= bound:
                part = bits[c * chunk : (c + 1) * chunk]
                for e in range(chunk):
                    kept[count] = part[e]
                    origin[count] = c * chunk + e
                    count += part[e] <= bound
        bound = _bound(kept[:count], width, 0)
        place = 0
        for tied in range(2):  # what lies below the bound, then as many of those on it as there is room for
            for i in range(count):
                if place < width and (kept[i] == bound if tied else kept[i] < bound):
                    new_distances[p, place] = floats[i]
                    parent, entry = origin[i] // k, origin[i] % k
                    for j in range(stage):
                        new_paths[p, place, j] = paths[p, parent, j]
                    new_paths[p, place, stage] = entry
                    place += 1
