"""Threads, memory and order of a launch. All CTAs of a grid run side by side: a register is an array over their threads.

Threads take an instruction together as long as they are at the same place, and those furthest behind go first. What lockstep would
hide is looked for: a byte of shared memory that one warp writes and another reads or writes needs a barrier in between, and what an
asynchronous copy brings is there when it has been waited for, not before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .text import Address, Instruction, Operand, Program, Register

WARP = 32
STEPS = 2_000_000  # instructions after which a kernel is taken to run forever
Array = NDArray[np.generic]
Mask = NDArray[np.bool_]
Step = Callable[["Machine", Mask | None], None]


class Fault(Exception):
    """What a GPU would not do, or would do differently each time."""


class Copy(NamedTuple):
    """An asynchronous copy on its way."""

    lanes: NDArray[np.int64]
    target: NDArray[np.int64]  # bytes of shared memory, [lanes, size]
    data: NDArray[np.uint8]
    group: NDArray[np.int64]


class GlobalMemory:
    """Tensors of the host under their own addresses; nothing else can be reached."""

    def __init__(self) -> None:
        self.buffers: list[tuple[int, NDArray[np.uint8], str]] = []
        self._starts = self._ends = np.zeros(0, np.int64)

    def add(self, start: int, data: NDArray[np.uint8], name: str) -> None:
        """Memory that a kernel may use."""
        if any(start == known for known, _, _ in self.buffers):
            return
        self.buffers.append((start, data, name))
        self.buffers.sort(key=lambda each: each[0])
        self._starts = np.array([start for start, _, _ in self.buffers])
        self._ends = np.array([start + len(data) for start, data, _ in self.buffers])

    def find(self, addresses: NDArray[np.int64], size: int) -> list[tuple[NDArray[np.int64], NDArray[np.uint8], NDArray[np.int64]]]:
        """Which of ``addresses`` lie in which buffer: (their numbers, the buffer, offsets in it).

        Raises:
            Fault: one is not aligned to ``size``, or not wholly inside.
        """
        if (addresses % size).any():
            raise Fault(f"address {int(addresses[(addresses % size) != 0][0]):#x} is not aligned to {size} bytes")
        number = np.searchsorted(self._starts, addresses, side="right") - 1
        outside = (number < 0) | (addresses + size > self._ends[number])
        if outside.any():
            lane = int(np.argmax(outside))
            raise Fault(f"{size} bytes at {int(addresses[lane]):#x} are outside of memory: {self._near(int(addresses[lane]))}")
        found = []
        for each in np.unique(number):
            chosen = np.flatnonzero(number == each)
            start, data, _ = self.buffers[each]
            found.append((chosen, data, addresses[chosen] - start))
        return found

    def _near(self, address: int) -> str:
        start, data, name = min(self.buffers, key=lambda each: min(abs(address - each[0]), abs(address - each[0] - len(each[1]))))
        return f"{address - start} bytes after the beginning of {name}, which has {len(data)}"


class SharedMemory:
    """Shared memory of all CTAs, with who last wrote and read each byte, and after how many barriers."""

    def __init__(self, ctas: int, size: int, lane_cta: NDArray[np.int64], lane_warp: NDArray[np.int64]) -> None:
        self.size, self.lane_cta, self.lane_warp = size, lane_cta, lane_warp
        self.data = np.zeros(ctas * size, np.uint8)
        self.written, self.read = np.full(ctas * size, -1, np.int32), np.full(ctas * size, -1, np.int32)
        self.writer, self.reader = np.full(ctas * size, -1, np.int32), np.full(ctas * size, -1, np.int32)
        self.pending = np.zeros(ctas * size, bool)
        self.epoch = np.zeros(ctas, np.int32)

    def places(self, lanes: NDArray[np.int64], addresses: NDArray[np.int64], size: int) -> NDArray[np.int64]:
        """Numbers ``[lanes, size]`` of bytes.

        Raises:
            Fault: an address is not aligned, or outside.
        """
        if (addresses % size).any():
            raise Fault(f"shared address {int(addresses[(addresses % size) != 0][0])} is not aligned to {size} bytes")
        if len(addresses) and (int(addresses.min()) < 0 or int(addresses.max()) + size > self.size):
            raise Fault(f"shared addresses {int(addresses.min())} to {int(addresses.max()) + size}: there are {self.size} bytes")
        found: NDArray[np.int64] = (self.lane_cta[lanes] * self.size + addresses)[:, None] + np.arange(size)
        return found

    def load(self, lanes: NDArray[np.int64], places: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Bytes ``[lanes, size]``.

        Raises:
            Fault: another warp wrote them since the last barrier, they were never written, or are still being copied.
        """
        now, warp = self.epoch[self.lane_cta[lanes]][:, None], self.lane_warp[lanes][:, None]
        if self.pending[places].any():
            raise Fault("shared memory is read while an asynchronous copy to it has not been waited for")
        written = self.written[places]
        if (written < 0).any():
            raise Fault("shared memory is read that nothing has written")
        if ((written == now) & (self.writer[places] != warp)).any():
            raise Fault("shared memory is read that another warp has written since the last barrier")
        several = (self.read[places] == now) & (self.reader[places] != warp)
        self.reader[places] = np.where(several, -2, np.broadcast_to(warp, places.shape))  # -2: more than one warp
        self.read[places] = now
        return self.data[places]

    def reserve(self, lanes: NDArray[np.int64], places: NDArray[np.int64], data: NDArray[np.uint8] | None = None) -> None:
        """These lanes are about to write ``data``, or what is not known yet.

        Raises:
            Fault: another warp has read there since the last barrier, or has written something else.
        """
        now, warp = self.epoch[self.lane_cta[lanes]][:, None], self.lane_warp[lanes][:, None]
        if ((self.read[places] == now) & (self.reader[places] != warp)).any():
            raise Fault("shared memory is written that another warp has read since the last barrier")
        other = (self.written[places] == now) & (self.writer[places] != warp)
        if (other if data is None else other & (self.data[places] != data)).any():
            raise Fault("shared memory is written that another warp has written since the last barrier")
        if self.pending[places].any():
            raise Fault("shared memory is written while an asynchronous copy to it has not been waited for")

    def store(self, lanes: NDArray[np.int64], places: NDArray[np.int64], data: NDArray[np.uint8]) -> None:
        """Write bytes ``[lanes, size]``.

        Raises:
            Fault: as :meth:`reserve`, or these threads write different numbers to one place.
        """
        self.reserve(lanes, places, data)
        self.put(lanes, places, data)
        if (self.data[places] != data).any():
            raise Fault("shared memory is written with different numbers at once")

    def put(self, lanes: NDArray[np.int64], places: NDArray[np.int64], data: NDArray[np.uint8]) -> None:
        """Write without looking."""
        self.data[places] = data
        self.written[places] = self.epoch[self.lane_cta[lanes]][:, None]
        self.writer[places] = self.lane_warp[lanes][:, None]


class Machine:
    """A launch on its way.

    Args:
        program: the kernel.
        steps: what each of its instructions does.
        grid: CTAs in x, y and z.
        arguments: name of a parameter -> its bits.
        shared: bytes of shared memory of a CTA.
    """

    def __init__(
        self,
        program: Program,
        steps: list[Step],
        grid: tuple[int, int, int],
        arguments: dict[str, int],
        memory: GlobalMemory,
        shared: int,
    ) -> None:
        self.program, self.steps, self.grid, self.arguments, self.memory = program, steps, grid, arguments, memory
        ctas, threads = grid[0] * grid[1] * grid[2], program.threads
        self.lanes = ctas * threads
        lane = np.arange(self.lanes)
        self.thread, self.cta = lane % threads, lane // threads
        self.shared = SharedMemory(ctas, max(shared, 16), self.cta, self.thread // WARP)
        self.registers: list[Array | None] = [None] * program.registers
        self.copies: list[Copy] = []
        self.committed = np.zeros(self.lanes, np.int64)
        self.place = np.zeros(self.lanes, np.int64)  # of each thread, where they are not all at one
        self.all = np.arange(self.lanes)

    def run(self) -> None:
        """To the end.

        Raises:
            Fault: naming the instruction.
        """
        end, place = len(self.program.instructions), 0
        together = True
        for _ in range(STEPS):
            if together:
                active = None
            else:
                place = int(self.place.min())
                active = self.place == place
            if place >= end:
                return
            instruction = self.program.instructions[place]
            try:
                next_places = self._step(place, instruction, active)
            except Fault as fault:
                raise Fault(f"{fault}\nline {instruction.line} of the PTX: {instruction.text}") from None
            if together and not isinstance(next_places, np.ndarray):
                place = next_places
                continue
            self.place = np.where(True if active is None else active, next_places, self.place)
            first = int(self.place[0])
            together = bool((self.place == first).all())
            place = first
        raise Fault(f"{STEPS} instructions and no end")

    def _step(self, place: int, instruction: Instruction, active: Mask | None) -> int | NDArray[np.int64]:
        mask = active
        if instruction.guard is not None:
            guard = self.read(instruction.guard, np.dtype(bool))
            chosen = ~guard if instruction.negated else guard
            mask = chosen if active is None else chosen & active
            if mask.all():
                mask = None
        kind = instruction.opcode[0]
        if kind in ("bra", "ret", "exit"):
            target = len(self.program.instructions) if kind != "bra" else self.program.labels[str(instruction.operands[0])]
            if mask is None:
                return target
            return np.where(mask, target, place + 1) if mask.any() else place + 1
        if mask is None or mask.any():
            self.steps[place](self, mask)
        return place + 1

    def chosen(self, mask: Mask | None) -> NDArray[np.int64]:
        """Numbers of the lanes that take part."""
        return self.all if mask is None else np.flatnonzero(mask)

    def whole_warps(self, mask: Mask | None) -> None:
        """Threads of a warp act as one.

        Raises:
            Fault: some of them do not take part.
        """
        if mask is not None:
            warps = mask.reshape(-1, WARP)
            if (warps.any(1) != warps.all(1)).any():
                raise Fault("some threads of a warp do not take part")

    def barrier(self, mask: Mask | None) -> None:
        """All threads of each CTA that takes part have arrived.

        Raises:
            Fault: some are elsewhere.
        """
        arrived = np.ones(self.lanes, bool) if mask is None else mask
        by_cta = arrived.reshape(len(self.shared.epoch), -1)
        if (by_cta.any(1) != by_cta.all(1)).any():
            raise Fault("a barrier that some threads of a CTA do not reach")
        self.shared.epoch[by_cta.all(1)] += 1

    def read(self, operand: Operand, dtype: np.dtype[np.generic]) -> Array:
        """A register or a literal as numbers of a type; of a wider register the lower bits."""
        if isinstance(operand, int):
            return _bits_of(operand, dtype)
        assert isinstance(operand, Register), operand
        held = self.registers[operand.slot]
        if held is None:
            held = np.zeros(self.lanes, unsigned(operand.bits))
        if held.dtype.itemsize != dtype.itemsize:
            held = held.astype(unsigned(dtype.itemsize * 8))
        return held.view(dtype) if held.dtype != dtype else held

    def write(self, register: Operand, value: Array, mask: Mask | None) -> None:
        """Set a register; a narrower number is extended by its sign, if its type has one."""
        if register == "_":
            return
        assert isinstance(register, Register), register
        wanted = unsigned(register.bits)
        if value.dtype.itemsize != wanted.itemsize:
            value = value.astype(np.dtype(f"i{wanted.itemsize}") if value.dtype.kind == "i" else wanted)
        bits = np.ascontiguousarray(np.broadcast_to(value, self.lanes)).view(wanted)
        if mask is not None:
            old = self.registers[register.slot]
            bits = np.where(mask, bits, np.zeros((), wanted) if old is None else old)
        self.registers[register.slot] = bits

    def addresses(self, operand: Operand, bits: int) -> NDArray[np.int64]:
        """Of each lane."""
        assert isinstance(operand, Address), operand
        if isinstance(operand.base, str):
            return np.full(self.lanes, operand.offset, np.int64)
        base = self.read(operand.base, np.dtype(f"i{bits // 8}"))
        return base.astype(np.int64) + operand.offset


def _bits_of(literal: int, dtype: np.dtype[np.generic]) -> Array:
    if dtype.kind == "b":
        return np.array(bool(literal))
    size = dtype.itemsize
    return np.array(literal & ((1 << (8 * size)) - 1), unsigned(8 * size)).view(dtype)


def unsigned(bits: int) -> np.dtype[np.generic]:
    """The type that holds the bits of a register."""
    return np.dtype(bool) if bits == 1 else np.dtype(f"u{bits // 8}")
