"""What PTX instructions do, for all threads at once. Names and semantics: NVIDIA's PTX ISA.

Sums of the matrix unit are added in float64 and rounded once; hardware keeps a few bits less. Division, square root and the like
are exact where hardware may err in the last bit.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np

from .floats import F32, F64, U32, e4m3, narrow, to_e4m3, widen
from .machine import WARP, Array, Copy, Fault, Machine, Mask, Step, unsigned
from .text import Address, Instruction, Program

BOOL, U64, I64 = (np.dtype(name) for name in ("?", "u8", "i8"))
Build = Callable[[Instruction], Step]
TABLE: dict[str, Build] = {}


class Unknown(Exception):
    """An instruction, or a form of it, that is not known here."""


def steps_of(program: Program) -> list[Step]:
    """What each instruction does.

    Raises:
        Unknown: naming the first that is not known.
    """
    found: list[Step] = []
    for instruction in program.instructions:
        kind = instruction.opcode[0]
        try:
            build = TABLE["branch" if kind in ("bra", "ret", "exit") else kind]
            found.append(build(instruction))
        except (KeyError, ValueError) as error:
            raise Unknown(f"line {instruction.line} of the PTX: {instruction.text} ({error})") from error
    return found


def _known(*names: str) -> Callable[[Build], Build]:
    def add(build: Build) -> Build:
        TABLE.update(dict.fromkeys(names, build))
        return build

    return add


def dtype_of(name: str) -> np.dtype[np.generic]:
    """numpy's type of a PTX type, bfloat16 and pairs as their bits."""
    if name == "pred":
        return BOOL
    if name in ("bf16", "bf16x2", "f16x2", "e4m3x2"):
        return U32 if name in ("bf16x2", "f16x2") else np.dtype("u2")
    kind, bits = name[0], int(name[1:])
    return np.dtype(f"{'u' if kind == 'b' else {'s': 'i'}.get(kind, kind)}{bits // 8}")


# Operands


def _number(machine: Machine, operand: Any, name: str) -> Array:
    """An operand as numbers; bfloat16 ones as float32."""
    held = machine.read(operand, dtype_of(name))
    return widen(held) if name == "bf16" else held


def _bits(values: Array, name: str) -> Array:
    return narrow(values) if name == "bf16" else values.astype(dtype_of(name))


# Arithmetic

BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "add": operator.add,
    "sub": operator.sub,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


def _shift(machine: Machine, operand: Any, dtype: np.dtype[np.generic]) -> tuple[Array, Array]:
    """The amount, at most one bit less than all, and where it is all or more."""
    amount, bits = machine.read(operand, U32), 8 * dtype.itemsize
    return np.minimum(amount, bits - 1).astype(dtype), amount >= bits


@_known("add", "sub", "mul", "min", "max", "div", "rem", "and", "or", "xor", "shl", "shr", "copysign")
def _binary(instruction: Instruction) -> Step:
    kind, name = instruction.opcode[0], instruction.opcode[-1]
    modifiers = set(instruction.opcode[1:-1])
    if unknown := modifiers - {"rn", "lo", "hi", "wide", "full", "ftz", "approx", "NaN", "sat"} or "sat" in modifiers:
        raise ValueError(f"modifier {unknown}")
    target, first, second = instruction.operands
    dtype = dtype_of(name)
    floating = name[0] == "f" or name == "bf16"

    def work(machine: Machine, mask: Mask | None) -> None:
        a = _number(machine, first, name)
        if kind in ("shl", "shr"):
            amount, beyond = _shift(machine, second, dtype)
            a = np.where(beyond, 0, a << amount) if kind == "shl" else a >> amount
            if kind == "shr" and dtype.kind == "u":
                a = np.where(beyond, 0, a)
            machine.write(target, np.asarray(a).astype(dtype), mask)
            return
        b = _number(machine, second, name)
        with np.errstate(all="ignore"):
            machine.write(target, _bits(np.asarray(calculate(a, b)), wide), mask)

    wide = name if "wide" not in modifiers else f"{name[0]}{2 * int(name[1:])}"

    def calculate(a: Array, b: Array) -> Any:
        if kind == "mul":
            if "wide" in modifiers:
                return a.astype(dtype_of(wide)) * b.astype(dtype_of(wide))
            if "hi" in modifiers:
                return (a.astype(I64) * b.astype(I64)) >> (8 * dtype.itemsize)
            return a * b
        if kind in ("min", "max"):
            propagate = not floating or "NaN" in modifiers
            return getattr(np, f"{kind}imum" if propagate else f"f{kind}")(a, b)
        if kind == "div":
            return a / b if floating else _truncated(a, b)
        if kind == "rem":
            return a - b * _truncated(a, b)
        if kind == "copysign":
            return np.copysign(b, a)
        return BINARY[kind](a, b)

    return work


def _truncated(a: Array, b: Array) -> Any:
    """Integer division towards zero."""
    safe = np.where(b == 0, 1, b)
    quotient = a // safe
    return (quotient + ((a - quotient * safe != 0) & ((a < 0) != (safe < 0)))).astype(a.dtype)


@_known("abs", "neg", "not", "sqrt", "rsqrt", "rcp", "ex2", "lg2", "tanh", "popc", "clz")
def _unary(instruction: Instruction) -> Step:
    kind, name = instruction.opcode[0], instruction.opcode[-1]
    target, source = instruction.operands
    functions: dict[str, Callable[[Any], Any]] = {
        "abs": np.abs,
        "neg": np.negative,
        "not": np.invert,
        "sqrt": np.sqrt,
        "rsqrt": lambda a: 1 / np.sqrt(a),
        "rcp": lambda a: 1 / a,
        "ex2": np.exp2,
        "lg2": np.log2,
        "tanh": np.tanh,
    }
    function = functions[kind]

    def work(machine: Machine, mask: Mask | None) -> None:
        with np.errstate(all="ignore"):
            machine.write(target, _bits(np.asarray(function(_number(machine, source, name))), name), mask)

    return work


@_known("fma", "mad")
def _multiply_add(instruction: Instruction) -> Step:
    name, modifiers = instruction.opcode[-1], instruction.opcode[1:-1]
    target, *factors = instruction.operands
    wide = f"{name[0]}{2 * int(name[1:])}" if "wide" in modifiers else name
    exact = F64 if name in ("f16", "f32", "bf16") else dtype_of(wide)

    def work(machine: Machine, mask: Mask | None) -> None:
        a, b = (_number(machine, factor, name).astype(exact) for factor in factors[:2])
        c = _number(machine, factors[2], wide).astype(exact)
        with np.errstate(all="ignore"):
            machine.write(target, _bits(np.asarray(a * b + c), wide), mask)

    return work


UNSIGNED_NAMES = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}


@_known("setp")
def _compare(instruction: Instruction) -> Step:
    if len(instruction.opcode) != 3:
        raise ValueError("a form of setp")
    name = instruction.opcode[2]
    comparison = instruction.opcode[1]
    unordered = comparison.endswith("u") and name[0] in "fb" and len(comparison) == 3
    plain = comparison[:2] if unordered else UNSIGNED_NAMES.get(comparison, comparison)
    function = getattr(operator, plain)
    target, first, second = instruction.operands

    def work(machine: Machine, mask: Mask | None) -> None:
        a, b = _number(machine, first, name), _number(machine, second, name)
        found = function(a, b)
        if unordered:
            found = found | np.isnan(a) | np.isnan(b)
        elif comparison == "ne" and a.dtype.kind == "f":
            found = found & ~(np.isnan(a) | np.isnan(b))
        machine.write(target, np.broadcast_to(found, machine.lanes), mask)

    return work


@_known("selp")
def _select(instruction: Instruction) -> Step:
    dtype = dtype_of(instruction.opcode[1])
    target, first, second, chosen = instruction.operands

    def work(machine: Machine, mask: Mask | None) -> None:
        found = np.where(machine.read(chosen, BOOL), machine.read(first, dtype), machine.read(second, dtype))
        machine.write(target, found.astype(dtype), mask)

    return work


@_known("bfe")
def _extract(instruction: Instruction) -> Step:
    dtype = dtype_of(instruction.opcode[1])
    target, source, position, length = instruction.operands

    def work(machine: Machine, mask: Mask | None) -> None:
        value = machine.read(source, dtype)
        at, size = (int(machine.read(each, U32)) & 0xFF for each in (position, length))
        bits = 8 * dtype.itemsize
        size = min(size, bits - at)
        up, down = (np.asarray(each, dtype) for each in (bits - size - at, bits - size))
        machine.write(target, (value << up) >> down, mask)

    return work


@_known("prmt")
def _permute(instruction: Instruction) -> Step:
    if instruction.opcode != ("prmt", "b32"):
        raise ValueError("a mode of prmt")
    target, first, second, selector = instruction.operands

    def work(machine: Machine, mask: Mask | None) -> None:
        joined = machine.read(first, U32).astype(U64) | (machine.read(second, U32).astype(U64) << np.uint64(32))
        chosen = machine.read(selector, U32).astype(U64)
        result = np.zeros((), U64)
        for i in range(4):
            nibble = (chosen >> np.uint64(4 * i)) & np.uint64(15)
            byte = (joined >> ((nibble & np.uint64(7)) * np.uint64(8))) & np.uint64(0xFF)
            byte = np.where(nibble >= 8, np.where(byte & np.uint64(0x80), np.uint64(0xFF), np.uint64(0)), byte)
            result = result | (byte << np.uint64(8 * i))
        machine.write(target, result.astype(U32), mask)

    return work


@_known("cvt")
def _convert(instruction: Instruction) -> Step:
    *modifiers, into, source = instruction.opcode[1:]
    if unknown := set(modifiers) - {"rn", "rna", "rzi", "rni", "rmi", "rpi", "ftz", "satfinite"}:
        raise ValueError(f"modifier {unknown}")
    if into in PAIRS:
        return _convert_pair(instruction, into, source)
    target, given = instruction.operands
    to_integer = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}
    rounding = next((to_integer[each] for each in modifiers if each in to_integer), None)
    floating = into[0] == "f" or into == "bf16"

    def work(machine: Machine, mask: Mask | None) -> None:
        value = _number(machine, given, source)
        with np.errstate(all="ignore"):
            if rounding is not None:
                value = rounding(value)
            if not floating and value.dtype.kind == "f":  # beyond its range: the nearest that it has; of NaN zero
                limits = np.iinfo(dtype_of(into))
                value = np.clip(np.where(np.isnan(value), 0, value).astype(F64), limits.min, limits.max)
            if into == "bf16" and value.dtype.kind in "iu":
                value = value.astype(F64)
            machine.write(target, _bits(np.asarray(value), into), mask)

    return work


def _convert_pair(instruction: Instruction, into: str, source: str) -> Step:
    """Two numbers in halves of a register, the first operand in the upper one, from two registers or from halves of one."""
    if source != "f32" and (source, into) != ("e4m3x2", "f16x2"):
        raise ValueError(f"pairs of {source}")
    target, *given = instruction.operands
    half = PAIRS[into]

    def work(machine: Machine, mask: Mask | None) -> None:
        if source == "f32":
            upper, lower = (_number(machine, each, "f32") for each in given)
        else:
            codes = machine.read(given[0], np.dtype("u2"))
            upper, lower = e4m3(codes >> np.uint16(8)), e4m3(codes & np.uint16(0xFF))
        with np.errstate(all="ignore"):
            upper, lower = half(upper), half(lower)
        joined = dtype_of(into)
        machine.write(target, (upper.astype(joined) << joined.type(4 * joined.itemsize)) | lower.astype(joined), mask)

    return work


PAIRS: dict[str, Callable[[Array], Array]] = {
    "bf16x2": narrow,
    "f16x2": lambda values: values.astype(np.float16).view(np.uint16),
    "e4m3x2": to_e4m3,
}


@_known("mov", "cvta")
def _move(instruction: Instruction) -> Step:
    dtype = dtype_of(instruction.opcode[-1])
    target, source = instruction.operands

    def work(machine: Machine, mask: Mask | None) -> None:
        if isinstance(target, tuple):
            _unpack(machine, target, machine.read(source, unsigned(8 * dtype.itemsize)), mask)
        elif isinstance(source, tuple):
            machine.write(target, _pack(machine, source, dtype), mask)
        elif isinstance(source, str):
            machine.write(target, np.broadcast_to(_special(machine, source), machine.lanes).astype(dtype), mask)
        else:
            machine.write(target, machine.read(source, dtype), mask)

    return work


def _unpack(machine: Machine, parts: tuple[Any, ...], value: Array, mask: Mask | None) -> None:
    bits = 8 * value.dtype.itemsize // len(parts)
    for i, part in enumerate(parts):
        machine.write(part, (value >> (bits * i)).astype(unsigned(bits)), mask)


def _pack(machine: Machine, parts: tuple[Any, ...], dtype: np.dtype[np.generic]) -> Array:
    bits = 8 * dtype.itemsize // len(parts)
    found = np.zeros((), unsigned(8 * dtype.itemsize))
    for i, part in enumerate(parts):
        found = found | (machine.read(part, unsigned(bits)).astype(found.dtype) << found.dtype.type(bits * i))
    return found


def _special(machine: Machine, name: str) -> Array:
    x, y, _ = machine.grid
    cta = machine.cta
    values: dict[str, Any] = {
        "global_smem": 0,
        "%tid.x": machine.thread,
        "%laneid": machine.thread % WARP,
        "%warpid": machine.thread // WARP,
        "%ntid.x": machine.program.threads,
        "%ctaid.x": cta % x,
        "%ctaid.y": cta // x % y,
        "%ctaid.z": cta // (x * y),
        "%nctaid.x": x,
        "%nctaid.y": y,
        "%nctaid.z": machine.grid[2],
    }
    if name not in values:
        raise Unknown(name)
    return np.asarray(values[name])


# Memory


@_known("ld", "st")
def _memory(instruction: Instruction) -> Step:
    kind, space, *modifiers, name = instruction.opcode
    if space not in ("param", "global", "shared"):
        raise ValueError(f"memory {space}")
    count = next((int(each[1:]) for each in modifiers if each in ("v2", "v4", "v8")), 1)
    dtype = dtype_of(name)
    size = dtype.itemsize * count
    where, held = instruction.operands if kind == "st" else reversed(instruction.operands)
    registers = held if isinstance(held, tuple) else (held,)
    assert isinstance(where, Address)

    def parameter(machine: Machine, mask: Mask | None) -> None:
        value = machine.arguments[str(where.base)]
        machine.write(registers[0], np.full(machine.lanes, value, unsigned(8 * dtype.itemsize)), mask)

    def load(machine: Machine, mask: Mask | None) -> None:
        lanes = machine.chosen(mask)
        data = np.zeros((machine.lanes, size), np.uint8)
        data[lanes] = load_bytes(machine, space, machine.addresses(where, 64 if space == "global" else 32)[lanes], lanes, size)
        words = data.view(dtype)
        for i, register in enumerate(registers):
            machine.write(register, np.ascontiguousarray(words[:, i]), mask)

    def store(machine: Machine, mask: Mask | None) -> None:
        lanes = machine.chosen(mask)
        words = [np.broadcast_to(machine.read(each, unsigned(8 * dtype.itemsize)), machine.lanes)[lanes] for each in registers]
        data = np.ascontiguousarray(np.stack(words, 1)).view(np.uint8)
        at = machine.addresses(where, 64 if space == "global" else 32)[lanes]
        if space == "shared":
            machine.shared.store(lanes, machine.shared.places(lanes, at, size), data)
            return
        for numbers, buffer, offsets in machine.memory.find(at, size):
            buffer[offsets[:, None] + np.arange(size)] = data[numbers]

    return parameter if space == "param" else load if kind == "ld" else store


def load_bytes(machine: Machine, space: str, addresses: Any, lanes: Any, size: int) -> Any:
    """Bytes ``[lanes, size]`` of shared or global memory."""
    if space == "shared":
        return machine.shared.load(lanes, machine.shared.places(lanes, addresses, size))
    data = np.zeros((len(lanes), size), np.uint8)
    for numbers, buffer, offsets in machine.memory.find(addresses, size):
        data[numbers] = buffer[offsets[:, None] + np.arange(size)]
    return data


@_known("cp")
def _copy(instruction: Instruction) -> Step:
    if instruction.opcode[:2] != ("cp", "async"):
        raise ValueError("a kind of cp")
    if instruction.opcode[2] == "commit_group":
        return lambda machine, mask: _commit(machine, mask)
    if instruction.opcode[2] in ("wait_group", "wait_all"):
        left = instruction.operands[0] if instruction.operands else 0
        return lambda machine, mask: _wait(machine, mask, int(left))  # type: ignore[arg-type]
    target, source, size = instruction.operands[:3]
    filled = instruction.operands[3] if len(instruction.operands) > 3 else size
    assert isinstance(size, int)

    def work(machine: Machine, mask: Mask | None) -> None:
        lanes = machine.chosen(mask)
        wanted = np.broadcast_to(machine.read(filled, U32), machine.lanes)[lanes].astype(np.int64)
        places = machine.shared.places(lanes, machine.addresses(target, 32)[lanes], size)
        machine.shared.reserve(lanes, places)
        data = np.zeros((len(lanes), size), np.uint8)  # what is not filled becomes zero
        at = machine.addresses(source, 64)[lanes]
        for count in np.unique(wanted[wanted > 0]):
            chosen = np.flatnonzero(wanted == count)
            if int(count) != size:
                raise Fault(f"an asynchronous copy of {count} of {size} bytes")
            data[chosen] = load_bytes(machine, "global", at[chosen], lanes[chosen], size)
        machine.shared.pending[places] = True
        machine.copies.append(Copy(lanes, places, data, machine.committed[lanes]))

    return work


def _commit(machine: Machine, mask: Mask | None) -> None:
    machine.committed[machine.chosen(mask)] += 1


def _wait(machine: Machine, mask: Mask | None, left: int) -> None:
    """What these threads have copied is there, but for the last ``left`` groups."""
    active = np.ones(machine.lanes, bool) if mask is None else mask
    waiting: list[Copy] = []
    for lanes, places, data, group in machine.copies:
        ready = active[lanes] & (group < machine.committed[lanes] - left)
        machine.shared.pending[places[ready]] = False
        machine.shared.put(lanes[ready], places[ready], data[ready])
        if not ready.all():
            waiting.append(Copy(lanes[~ready], places[~ready], data[~ready], group[~ready]))
    machine.copies = waiting


@_known("bar", "barrier")
def _barrier(instruction: Instruction) -> Step:
    if instruction.opcode[1:] == ("warp", "sync"):
        return lambda machine, mask: machine.whole_warps(mask)
    if instruction.opcode[1:] != ("sync",) or len(instruction.operands) != 1:
        raise ValueError("a kind of barrier")
    return lambda machine, mask: machine.barrier(mask)


@_known("branch")
def _branch(instruction: Instruction) -> Step:
    return lambda machine, mask: None  # the machine sees to these


# What the threads of a warp do together


def _by_warp(values: Array, machine: Machine) -> Array:
    return np.broadcast_to(values, machine.lanes).reshape(-1, WARP)


@_known("shfl")
def _shuffle(instruction: Instruction) -> Step:
    mode = instruction.opcode[2]
    target, source, operand, clamp, _ = instruction.operands
    if clamp != 31 or mode not in ("bfly", "idx") or isinstance(target, tuple):
        raise ValueError("a form of shfl")

    def work(machine: Machine, mask: Mask | None) -> None:
        machine.whole_warps(mask)
        values, lane = _by_warp(machine.read(source, U32), machine), np.arange(WARP)
        amount = _by_warp(machine.read(operand, U32), machine).astype(np.int64)
        other = (lane ^ amount) if mode == "bfly" else amount & (WARP - 1)
        machine.write(target, np.take_along_axis(values, other, 1).reshape(-1), mask)

    return work


@_known("redux")
def _reduce(instruction: Instruction) -> Step:
    kind, name = instruction.opcode[2], instruction.opcode[-1]
    if "abs" in instruction.opcode or "NaN" in instruction.opcode:
        raise ValueError("a form of redux")
    function = {"max": np.max, "min": np.min, "add": np.sum, "or": np.bitwise_or.reduce, "and": np.bitwise_and.reduce}[kind]
    target, source, _ = instruction.operands

    def work(machine: Machine, mask: Mask | None) -> None:
        machine.whole_warps(mask)
        found = function(_by_warp(machine.read(source, dtype_of(name)), machine), axis=1)
        machine.write(target, np.repeat(found.astype(dtype_of(name)), WARP), mask)

    return work


@_known("ldmatrix")
def _load_matrix(instruction: Instruction) -> Step:
    if instruction.opcode[1:4] != ("sync", "aligned", "m8n8") or instruction.opcode[-1] != "b16":
        raise ValueError("a form of ldmatrix")
    transposed = "trans" in instruction.opcode
    targets, where = instruction.operands
    targets = targets if isinstance(targets, tuple) else (targets,)

    def work(machine: Machine, mask: Mask | None) -> None:
        machine.whole_warps(mask)
        active = np.flatnonzero((np.ones(machine.lanes, bool) if mask is None else mask).reshape(-1, WARP)[:, 0])
        addresses = machine.addresses(where, 32)
        for i, target in enumerate(targets):  # threads 8 i .. 8 i + 7 say where the rows of matrix i are
            lanes = (active[:, None] * WARP + 8 * i + np.arange(8)).reshape(-1)
            rows = machine.shared.load(lanes, machine.shared.places(lanes, addresses[lanes], 16)).view(np.uint16).reshape(-1, 8, 8)
            if transposed:
                rows = np.ascontiguousarray(rows.transpose(0, 2, 1))
            words = np.zeros((machine.lanes // WARP, WARP), U32)
            words[active] = rows.reshape(len(active), 64).view(U32)  # thread 4 r + c holds columns 2 c and 2 c + 1 of row r
            machine.write(target, words.reshape(-1), mask)

    return work


@_known("mma")
def _matrix_product(instruction: Instruction) -> Step:
    shape = instruction.opcode[3]
    into, left, right, added = instruction.opcode[-4:]
    if instruction.opcode[1:3] != ("sync", "aligned") or (into, added) not in (("f32", "f32"), ("s32", "s32")) or left != right:
        raise ValueError("a form of mma")
    if shape not in ("m16n8k8", "m16n8k16", "m16n8k32"):
        raise ValueError(f"shape {shape}")
    depth = int(shape.partition("k")[2])
    target, first, second, third = instruction.operands

    def elements(machine: Machine, registers: Any) -> Array:
        """float64 ``[warps, threads, registers, elements of a register]``."""
        words = np.stack([_by_warp(machine.read(each, U32), machine) for each in registers], 2)
        if left == "bf16":
            return widen(words.view(np.uint16)).reshape(*words.shape, 2).astype(F64)
        if left == "f16":
            return words.view(np.float16).reshape(*words.shape, 2).astype(F64)
        if left in ("s8", "u8"):
            return words.view(dtype_of(left)).reshape(*words.shape, 4).astype(F64)
        if left == "e4m3":
            return e4m3(words.view(np.uint8)).reshape(*words.shape, 4).astype(F64)
        if left == "tf32":
            return (words & np.uint32(0xFFFFE000)).view(F32)[..., None].astype(F64)
        raise Unknown(left)

    def work(machine: Machine, mask: Mask | None) -> None:
        machine.whole_warps(mask)
        a, b = elements(machine, first), elements(machine, second)
        warps, _, _, per = a.shape
        # Thread 4 g + t: of A rows g and g + 8, of B column g; columns per t .. and, half the depth on, the same again.
        a = a.reshape(warps, 8, 4, 2, 2, per).transpose(0, 4, 1, 3, 2, 5).reshape(warps, 16, depth)
        b = b.reshape(warps, 8, 4, 2, per).transpose(0, 3, 2, 4, 1).reshape(warps, depth, 8)
        kind = dtype_of(into)
        c = np.stack([_by_warp(machine.read(each, kind), machine) for each in third], 2).astype(F64)
        c = c.reshape(warps, 8, 4, 2, 2).transpose(0, 3, 1, 2, 4).reshape(warps, 16, 8)
        with np.errstate(all="ignore"):
            found = (a @ b + c).astype(kind)
        found = found.reshape(warps, 2, 8, 4, 2).transpose(0, 2, 3, 1, 4).reshape(warps * WARP, 4)
        for i, register in enumerate(target):  # type: ignore[arg-type]
            machine.write(register, np.ascontiguousarray(found[:, i]), mask)

    return work
