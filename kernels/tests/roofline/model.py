"""From instructions to microseconds. Every time here is a prediction; devices.py and the constants below are its assumptions.

A CTA's iteration takes as long as the slowest of: the matrix unit; issuing, one instruction of a warp per scheduler and cycle; slow
conversions, 16 lanes a cycle; loads and stores, 128 bytes a cycle; bytes from L2; look-ups in codebooks. CTAs that share a
multiprocessor share all of these. Where products run beside the warps (wgmma, tcgen05), Triton's loops wait for one before they
decode for the next, so a CTA by itself takes the sum of both. A launch is whole waves of CTAs, or the time its bytes take from
memory.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

from qdiff_kernels.gpu.weights import CODEBOOK, DENSE

from .compiled import Machine
from .devices import L2_BYTES, L2_RANDOM_BYTES, LATENCY, LAUNCH, REACHED, READ, SECTOR, Device
from .record import Kernel, Vendor
from .sass import Counts, count, main_loop, outermost, parse

SCHEDULERS = 4
BARRIER_CYCLES = 120  # of an iteration by itself: two barriers and the wait for a product. Read off machine code, not timed.
SLOW_LANES = 16  # of I2F and F2I per multiprocessor and cycle; 64 would halve what codebooks and int4 take
NARROW_WAVES = 4  # cycles of a warp's load of single or double bytes, which lie in as many rows
SCATTERED_WAVES = 16  # cycles of a warp's 32 look-ups in L1
CONFLICTS = 2  # by which random look-ups in shared memory take longer
WORST_WAVE = 0.35  # of the vendor's rate where its tiles do not fill the device; it splits columns then


class Analysis(NamedTuple):
    """A kernel's instructions: outside of loops, in each outermost loop, and in the loop with the products."""

    outside: Counts
    loops: list[Counts]
    main: Counts | None
    whole: Counts


@lru_cache(maxsize=4096)
def analyse(machine: Machine) -> Analysis:
    """Take a kernel's machine code apart."""
    code = parse(machine.sass)
    loops, main = outermost(code.loops), main_loop(code)
    inside = {index for first, last in loops for index in range(first, last + 1)}
    return Analysis(
        count([each for index, each in enumerate(code.instructions) if index not in inside]),
        [count(code.instructions[first : last + 1]) for first, last in loops],
        None if main is None else count(code.instructions[main[0] : main[1] + 1]),
        count(code.instructions),
    )


class Tile(NamedTuple):
    """What a CTA does in one iteration, and how many it makes."""

    rows: int
    tokens: int
    columns: int
    trips: float


def tile_of(kernel: Kernel) -> Tile:
    """From the tile sizes among a launch's arguments; a kernel without any is one iteration."""
    sizes, ctas = kernel.sizes, math.prod(kernel.grid)
    if "TILE.columns" in sizes:
        rows, tokens, columns = (sizes[f"TILE.{name}"] for name in ("rows", "tokens", "columns"))
        # What lies beyond rows and tokens is multiplied too, so tiles count as whole ones.
        splits = kernel.grid[1] if len(kernel.grid) > 1 else 1
        return Tile(rows, tokens, columns, max(1.0, math.ceil(_width(sizes) / columns) / splits))
    if "BM" in sizes and "BK" in sizes:
        width = _width(sizes)
        tiles = math.ceil(sizes["tokens"] / sizes["BM"]) * math.ceil(width / sizes["BK"])
        return Tile(0, sizes["BM"], sizes["BK"], max(1.0, tiles / ctas))
    if "BN" in sizes and "BK" in sizes:
        return Tile(sizes["BN"], 0, sizes["BK"], 1.0)
    return Tile(0, 0, 0, float(sizes.get("splits", 1)))


def _width(sizes: dict[str, int]) -> int:
    found = [value for name, value in sizes.items() if name == "columns" or (name.endswith(".columns") and "TILE" not in name)]
    if not found or "tokens" not in sizes:
        raise LookupError(f"roofline/model.py does not know the extent of a kernel whose sizes are {', '.join(sizes)}")
    return found[0]


def ctas_per_multiprocessor(machine: Machine, device: Device) -> int:
    """How many fit; 0 if not even one has the shared memory it needs."""
    by_registers = 65536 // (-(-machine.registers * 32 // 256) * 256 * machine.warps)
    by_shared = 0 if machine.shared > device.shared else (device.shared + 1024) // (machine.shared + 1024)
    return min(by_registers, by_shared, device.warps // machine.warps, device.ctas)


class Cycles(NamedTuple):
    """What one CTA needs of each part of a multiprocessor, in cycles of it."""

    matrix: float
    issue: float
    conversions: float
    loads: float  # and stores, of all kinds
    l2: float
    lookups: float

    @property
    def limit(self) -> str:
        """The part that it needs most of."""
        return max(self._fields, key=lambda name: getattr(self, name))


def cycles(counts: Counts, kernel: Kernel, machine: Machine, device: Device, tile: Tile) -> Cycles:
    """Of one iteration, or of code outside of loops."""
    warps, products = machine.warps, max(counts.matrix, key=counts.matrix.__getitem__, default="")
    matrix = 0.0
    if products and tile.rows:
        rate = getattr(device.rates, products) or device.rates.bits16
        matrix = tile.rows * tile.tokens * tile.columns / rate
    conversions = counts.slow_conversions * warps * 32 / SLOW_LANES
    waves = sum(
        n * _waves(bits) for table in (counts.copies, counts.shared_loads, counts.shared_stores) for bits, n in table.items()
    )
    waves += sum(n * (NARROW_WAVES if int(bits) < 32 else _waves(bits)) for bits, n in counts.loads.items())
    moved = 0.0
    if products and tile.rows and "tokens" in kernel.sizes:
        weights = tile.rows * tile.columns * _weight_bits(kernel) / 8
        moved = (weights + tile.tokens * tile.columns * _input_bytes(kernel)) / L2_BYTES
    lookups = _lookups(counts, kernel, machine, tile)
    return Cycles(matrix, counts.all * warps / SCHEDULERS, conversions, waves * warps, moved, lookups)


def _waves(bits: str) -> int:
    return max(1, int(bits) // 32)


def _weight_bits(kernel: Kernel) -> float:
    """Bits per weight that a kernel loads: of its codes, or of an operand that has been decoded before."""
    sizes = kernel.sizes
    if sizes.get("LAYOUT.kind") == DENSE:
        return 8.0
    return sizes.get("LAYOUT.bits", 16) * sizes.get("LAYOUT.books", 1) / sizes.get("LAYOUT.vector", 1)


def _input_bytes(kernel: Kernel) -> int:
    pointer = getattr(kernel.specialisation.signature.get("inputs"), "data", "*bf16")
    return 1 if "8" in pointer else 2


def _lookups(counts: Counts, kernel: Kernel, machine: Machine, tile: Tile) -> float:
    """Cycles that fetching a tile's codebook entries takes, wherever the machine code fetches them from."""
    if kernel.sizes.get("LAYOUT.kind") != CODEBOOK or not tile.rows:
        return 0.0
    pointer = getattr(kernel.specialisation.signature.get("w"), "table", None) or "*i8"
    vector, books = kernel.sizes["LAYOUT.vector"], kernel.sizes["LAYOUT.books"]
    entry = vector * (1 if "8" in pointer else 2)
    wanted = tile.rows * tile.columns / vector * books
    lanes = 32 * machine.warps
    narrow = sum(n for bits, n in counts.loads.items() if int(bits) < 32) * lanes
    wide = sum(n for table in (counts.loads, counts.copies) for bits, n in table.items() if int(bits) >= min(64, entry * 8)) * lanes
    wide -= tile.tokens * tile.columns * _input_bytes(kernel) / 16
    if narrow >= wanted * 2 and narrow > wide:  # each weight fetches its own byte
        return narrow / 32 * SCATTERED_WAVES
    if wide >= wanted / 2 and counts.copies.get("128") and entry >= 16:  # past L1
        return wanted * max(1, entry // SECTOR) * SECTOR / L2_RANDOM_BYTES
    if wide >= wanted / 2:
        return wanted / 32 * SCATTERED_WAVES
    return wanted * entry / 128 * CONFLICTS  # out of shared memory


class Prediction(NamedTuple):
    """A step of a layer."""

    name: str
    seconds: float
    limit: str  # what it waits for most
    ctas: int  # of its grid; 0 for a vendor's kernel


def predict_kernel(kernel: Kernel, machine: Machine, device: Device) -> Prediction:
    """Time of one launch."""
    analysis, tile = analyse(machine), tile_of(kernel)
    resident, grid = max(1, ctas_per_multiprocessor(machine, device)), math.prod(kernel.grid)
    loops = [cycles(each, kernel, machine, device, tile) for each in analysis.loops]
    outside = cycles(analysis.outside, kernel, machine, device, tile if not loops else Tile(0, 0, 0, 1))
    stages = kernel.sizes.get("num_stages", 3)

    def wave(each: int) -> float:
        total = _together(outside, each, device, 0)
        for counts, loop in zip(analysis.loops, loops, strict=True):
            fetches = counts.loads or counts.copies or counts.matrix  # others wait for a barrier, and have been counted there
            total += tile.trips * _together(loop, each, device, LATENCY / max(1, stages - 1) if fetches else 0)
        return total

    full, rest = divmod(grid, device.multiprocessors * resident)
    last = -(-rest // device.multiprocessors)
    busy = LATENCY + full * wave(resident) + (wave(last) if rest else 0.0)
    compute, memory = busy / device.clock, kernel.bytes / (device.bandwidth * READ)
    heaviest, together = max([outside, *loops], key=lambda c: max(c)), resident if full else last
    waits = together * max(heaviest) < LATENCY / max(1, stages - 1)
    limit = "memory" if memory > compute else "latency" if waits else heaviest.limit
    return Prediction(kernel.name, max(compute, memory) + LAUNCH, limit, grid)


def _together(need: Cycles, ctas: int, device: Device, latency: float) -> float:
    """Cycles in which ``ctas`` CTAs of one multiprocessor make an iteration each."""
    beside = max(need[1:])
    alone = need.matrix + beside if device.asynchronous else max(need.matrix, beside)
    return max(ctas * max(need), alone + (BARRIER_CYCLES if need.matrix else 0), latency)


def predict_vendor(step: Vendor, device: Device) -> Prediction:
    """Time of a torch operation."""
    memory = step.bytes / (device.bandwidth * READ)
    if step.product is None:
        return Prediction(step.name, memory + LAUNCH, "memory", 0)
    tokens, rows, columns = step.product
    kind = "bits16" if step.dtype is None or step.dtype.itemsize > 1 else "fp8" if step.dtype.is_floating_point else "int8"
    rate = getattr(device.rates, kind) or device.rates.bits16
    tiles = math.ceil(rows / 128) * math.ceil(tokens / 256) / device.multiprocessors
    filled = tiles / math.ceil(tiles) if tiles > 1 else max(WORST_WAVE, min(1.0, 2 * tiles))
    compute = tokens * rows * columns / (rate * device.multiprocessors * device.clock * REACHED * filled)
    return Prediction(step.name, max(compute, memory) + LAUNCH, "matrix" if compute > memory else "memory", 0)
