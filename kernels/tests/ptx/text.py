"""A PTX program as a list of instructions. The grammar is what LLVM writes for Triton's kernels, inline assembly included."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

WIDTHS = {"pred": 1} | {f"{kind}{bits}": bits for bits in (8, 16, 32, 64) for kind in "bsuf"}


@dataclass(frozen=True, slots=True)
class Register:
    """A register of each thread. ``slot`` is its number in the program; blocks of inline assembly have registers of their own."""

    slot: int
    bits: int


@dataclass(frozen=True, slots=True)
class Address:
    """``[base + offset]``; without a base, of a parameter or of the beginning of shared memory."""

    base: Register | str
    offset: int


Operand = Register | Address | int | float | str | tuple["Operand", ...]


class Instruction(NamedTuple):
    """One statement.

    Attributes:
        opcode: with its modifiers, split at the dots.
        guard: the predicate that threads need to take part, if any.
        negated: whether they need its opposite.
        line: in the PTX text, counted from 1.
    """

    opcode: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: Register | None
    negated: bool
    line: int
    text: str


class Program(NamedTuple):
    """A kernel.

    Attributes:
        labels: number of the instruction after each.
        parameters: name -> (place in the call, bits).
        threads: of a CTA.
    """

    instructions: list[Instruction]
    labels: dict[str, int]
    parameters: dict[str, tuple[int, int]]
    registers: int
    threads: int


def parse(text: str) -> Program:
    """Read the one kernel of a PTX module.

    Raises:
        SyntaxError: a statement is of a kind that is not known here.
    """
    reader = _Reader()
    signature, _, body = text.partition(".entry")[2].partition("\n{")
    names = re.findall(r"\.param\s+\.([a-z]+)(\d+)[^,)]*?(\w+_param_\d+)", signature)
    parameters = {name: (place, int(bits)) for place, (_, bits, name) in enumerate(names)}
    threads = re.search(r"\.reqntid\s+(\d+)", signature)
    if threads is None:
        raise SyntaxError("the kernel does not say how many threads it has")
    first = text[: len(text) - len(body)].count("\n") + 1
    for number, line in enumerate(body.split("\n"), first):
        if line.startswith("}") and len(reader.scopes) == 1:
            break
        reader.read(line.partition("//")[0], number)
    targets = {str(each.operands[0]) for each in reader.instructions if each.opcode[0] == "bra"}
    if lost := targets - reader.labels.keys():
        raise SyntaxError(f"no statement has the label {', '.join(sorted(lost))}")
    return Program(reader.instructions, reader.labels, parameters, reader.slots, int(threads[1]))


class _Reader:
    def __init__(self) -> None:
        self.instructions: list[Instruction] = []
        self.labels: dict[str, int] = {}
        self.scopes: list[dict[str, Register]] = [{}]
        self.families: list[dict[str, int]] = [{}]  # prefix of numbered registers -> bits
        self.slots = 0

    def read(self, line: str, number: int) -> None:
        """One line: labels, braces of inline assembly, declarations, statements."""
        line = line.strip()
        while line:
            if found := re.match(r"(\$?\w+):\s*", line):
                self.labels[found[1]] = len(self.instructions)
            elif found := re.match(r"\{\s*(?=$|\.reg)", line):
                self.scopes.append({})
                self.families.append({})
            elif found := re.match(r"\}\s*$", line):
                self.scopes.pop()
                self.families.pop()
            elif found := re.match(r"\.reg\s+\.(\w+)\s+([^;]*);\s*", line):
                for name in found[2].split(","):
                    self._declare(name.strip(), WIDTHS[found[1]])
            elif found := re.match(r"(\.(loc|pragma|file)\b.*$)|;\s*", line):
                pass
            elif found := re.match(r"([^;]+);\s*", line):
                self._statement(found[1].strip(), number)
            else:
                raise SyntaxError(f"line {number}: {line}")
            line = line[found.end() :]

    def _declare(self, name: str, bits: int) -> None:
        if "<" in name:
            self.families[-1][name.partition("<")[0]] = bits
        else:
            self._new(name, bits)

    def _new(self, name: str, bits: int) -> Register:
        register = self.scopes[-1][name] = Register(self.slots, bits)
        self.slots += 1
        return register

    def _register(self, name: str) -> Register | None:
        prefix = name.rstrip("0123456789")
        for scope, families in zip(reversed(self.scopes), reversed(self.families), strict=True):
            if name in scope:
                return scope[name]
            if prefix in families:
                register = scope[name] = Register(self.slots, families[prefix])
                self.slots += 1
                return register
        return None

    def _statement(self, text: str, number: int) -> None:
        guard, negated, rest = None, False, text
        if found := re.match(r"@(!?)([%\w]+)\s+", text):
            guard, negated, rest = self._register(found[2]), found[1] == "!", text[found.end() :]
        opcode, _, operands = rest.partition(" " if " " in rest.split("\t")[0] else "\t")
        parsed = tuple(self._operand(each, number) for each in _split(operands))
        self.instructions.append(Instruction(tuple(opcode.strip().split(".")), parsed, guard, negated, number, text))

    def _operand(self, text: str, number: int) -> Operand:
        text = text.strip()
        if text.startswith("{"):
            return tuple(self._operand(each, number) for each in _split(text[1:-1]))
        if text.startswith("["):
            base, _, offset = (part.strip() for part in text[1:-1].partition("+"))
            return Address(self._register(base) or base, int(offset or "0", 0))
        if found := re.fullmatch(r"0f([0-9A-Fa-f]{8})", text):
            return int(found[1], 16)  # the bits
        if found := re.fullmatch(r"0d([0-9A-Fa-f]{16})", text):
            return int(found[1], 16)
        if re.fullmatch(r"-?(0x[0-9A-Fa-f]+|\d+)U?", text):
            return int(text.rstrip("U"), 0)
        return self._register(text) or text


def _split(text: str) -> list[str]:
    """At commas outside of braces and brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "{[") - (letter in "}]")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part for part in parts if part.strip()]
