"""A kernel's machine code: its instructions, its loops, and what they are there for."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

MATRIX = {
    "HGMMA": "bits16",
    "HMMA": "bits16",
    "UTCHMMA": "bits16",
    "IGMMA": "int8",
    "IMMA": "int8",
    "UTCIMMA": "int8",
    "QGMMA": "fp8",
    "QMMA": "fp8",
    "UTCQMMA": "fp8",
    "OMMA": "fp8",
    "UTCOMMA": "fp8",
}
CONVERSIONS = {"I2F", "F2I", "I2FP", "F2F", "F2FP", "F2IP", "I2I", "I2IP", "FRND", "MUFU"}
SLOW_CONVERSIONS = {"I2F", "F2I", "F2F", "FRND", "MUFU"}  # 16 lanes per cycle; the others go with ordinary arithmetic
BARRIERS = {"BAR", "DEPBAR", "LDGDEPBAR", "SYNCS", "WARPSYNC", "WARPGROUP", "MEMBAR", "FENCE", "ARRIVES", "ERRBAR", "UTCBAR"}
CONTROL = set("BRA EXIT NOP CALL RET YIELD BSYNC BSSY BRX JMP WARPGROUPSET NANOSLEEP ELECT ACQBULK".split())  # noqa: SIM905
ADDRESSES = set("LEA S2R S2UR R2UR CS2R MOV IADD IADD3 VIADD IABS IMNMX LDC LDCU VOTE R2P P2R".split())  # noqa: SIM905
INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(.*?);")
LABEL = re.compile(r"\s*(\.L\S+):")


class Code(NamedTuple):
    """Instructions in order, ``(operation with its suffixes, text)``, and its loops as ``(first, last)``."""

    instructions: list[tuple[str, str]]
    loops: list[tuple[int, int]]


def parse(text: str) -> Code:
    """What nvdisasm -c prints."""
    instructions: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    end = None  # the first exit that is not conditional; what stands behind it and jumps back waits for a barrier, out of line
    for line in text.splitlines():
        if found := LABEL.match(line):
            labels[found[1]] = len(instructions)
        elif found := INSTRUCTION.match(line):
            instructions.append((found[1].split()[0], found[1]))
            if end is None and found[1].startswith("EXIT") and "@" not in found[0]:
                end = len(instructions)
    loops = []
    for index, (operation, whole) in enumerate(instructions):
        found = re.search(r"(\.L[^\s,;)`]+)", whole)
        backwards = found is not None and labels.get(found[1], index + 1) <= index
        if not (operation.startswith("BRA") and backwards and found is not None):
            continue
        first = labels[found[1]]
        returns = end is not None and first < end <= index
        if first != index and not returns:  # the last instruction jumps to itself
            loops.append((first, index))
    return Code(instructions, loops)


def outermost(loops: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Loops that lie in no other, those that share their beginning merged."""
    return [a for a in set(loops) if not any(b != a and b[0] <= a[0] and a[1] <= b[1] for b in loops)]


def main_loop(code: Code) -> tuple[int, int] | None:
    """The innermost loop with most matrix instructions, or None if none has any."""

    def products(loop: tuple[int, int]) -> int:
        return sum(operation.split(".")[0] in MATRIX for operation, _ in code.instructions[loop[0] : loop[1] + 1])

    counted = [(products(loop), loop) for loop in code.loops]
    inner = [
        (count, loop)
        for count, loop in counted
        if count and not any(n and b != loop and loop[0] <= b[0] and b[1] <= loop[1] for n, b in counted)
    ]
    return max(inner)[1] if inner else None


class Counts(NamedTuple):
    """Instructions of a stretch of code, per warp."""

    all: int
    matrix: dict[str, int]  # by operand type
    decode: int  # arithmetic and logic on data
    conversions: int
    slow_conversions: int
    address: int  # arithmetic on addresses, moves, uniform registers
    loads: dict[str, int]  # from global memory, by bits of a thread's load
    copies: dict[str, int]  # from global to shared memory, likewise
    shared_loads: dict[str, int]
    shared_stores: dict[str, int]
    barriers: int
    spilled: int  # loads and stores of spilled registers, bytes
    other: int


def count(instructions: Sequence[tuple[str, str]]) -> Counts:
    """Classes of a stretch of code."""
    kinds: Counter[str] = Counter()
    tables: dict[str, Counter[str]] = {name: Counter() for name in ("matrix", "loads", "copies", "shared_loads", "shared_stores")}
    slow = spilled = 0
    for operation, _ in instructions:
        base = operation.split(".")[0]
        if base in MATRIX:
            tables["matrix"][MATRIX[base]] += 1
        elif base in ("LDG", "LD"):
            tables["loads"][str(width(operation))] += 1
        elif base == "LDGSTS":
            tables["copies"][str(width(operation))] += 1
        elif base in ("LDS", "LDSM"):
            tables["shared_loads"][str(width(operation))] += 1
        elif base in ("STS", "STSM"):
            tables["shared_stores"][str(width(operation))] += 1
        elif base in ("LDL", "STL"):
            spilled += width(operation) // 8
        elif base in CONVERSIONS:
            kinds["conversions"] += 1
            slow += base in SLOW_CONVERSIONS
        elif base in BARRIERS:
            kinds["barriers"] += 1
        elif _is_address(base, operation):
            kinds["address"] += 1
        elif base in CONTROL or base.startswith(("ST", "UTMA", "LDT", "UBLK", "ATOM", "RED")):
            kinds["other"] += 1
        else:
            kinds["decode"] += 1
    return Counts(
        all=len(instructions),
        matrix=dict(tables["matrix"]),
        decode=kinds["decode"],
        conversions=kinds["conversions"],
        slow_conversions=slow,
        address=kinds["address"],
        loads=dict(tables["loads"]),
        copies=dict(tables["copies"]),
        shared_loads=dict(tables["shared_loads"]),
        shared_stores=dict(tables["shared_stores"]),
        barriers=kinds["barriers"],
        spilled=spilled,
        other=kinds["other"],
    )


def width(operation: str) -> int:
    """Bits that one thread moves."""
    parts = operation.split(".")
    if parts[0] in ("LDSM", "STSM"):
        return 32 * int(next((p for p in parts if p in ("2", "4")), "1"))
    for part in parts[1:]:
        if part in ("U8", "S8", "U16", "S16"):
            return int(part[1:])
        if part in ("64", "128", "256"):
            return int(part)
    return 32


def _is_address(base: str, operation: str) -> bool:
    if base == "IMAD":  # as a move, a sum or a wide product it makes addresses; as a shift it takes codes apart
        return not any(part in operation for part in (".SHL", ".U32"))
    return base in ADDRESSES or (base.startswith("U") and base[1:2].isupper())
