"""How the tensors of a diffusers model lie inside those of ComfyUI's model of the same family.

A table has one line per module: ComfyUI's name, ``<-``, and diffusers' names whose rows follow each other in it.

    double_blocks.N.img_attn.qkv <- transformer_blocks.N.attn.{to_q to_k to_v}

``N`` stands for a number and ``LAST`` for the largest one. ``a|b`` is ``a`` in one version of ComfyUI and ``b`` in another.
``x.{a b}`` is short for ``x.a x.b``. What follows the module's name (``.weight``, ``.bias``, a submodule) is kept. ``~name``
exchanges the two halves of the rows. ``name:in`` has as many rows as the weight has columns; parts without a mark share the
remaining rows equally. ``x.lin[*] <- y.table[6,*]`` is one tensor in two shapes; ``*`` is what the others leave. Names in no line
are the same in both. The first line that fits counts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

Shape = tuple[int, ...]


class Part(NamedTuple):
    """A diffusers tensor that fills rows of a ComfyUI tensor.

    Attributes:
        key: name of the diffusers tensor.
        swapped: whether the halves of its rows are exchanged.
        shape: what ComfyUI reshapes it to, with one -1; empty if it keeps its shape.
    """

    key: str
    swapped: bool = False
    shape: Shape = ()


class Slice(NamedTuple):
    """Rows ``start`` to ``stop`` of a ComfyUI tensor, which are the diffusers tensor ``key``.

    Attributes:
        swapped: whether the halves of the rows are exchanged.
        shape: what diffusers reshapes them to, with one -1; empty if they keep their shape.
    """

    key: str
    start: int
    stop: int
    swapped: bool = False
    shape: Shape = ()

    def shape_of(self, native: Shape) -> Shape:
        """The shape of the diffusers tensor, from that of the ComfyUI tensor."""
        return reshaped((self.stop - self.start, *native[1:]) if native else (), self.shape)


class Source(NamedTuple):
    """One diffusers module in a line of a table."""

    name: str
    swapped: bool
    as_columns: bool
    shape: Shape


class Rule(NamedTuple):
    """One line of a table."""

    native: str
    sources: tuple[Source, ...]
    shape: Shape


class MissingPart(ValueError):
    """A fused tensor cannot be assembled, because one of its parts is missing."""


def parse(table: str) -> list[Rule]:
    """Rules from a table; lines that are empty or start with ``#`` are skipped."""
    lines = (line.strip() for line in table.splitlines())
    return [_rule(line) for line in lines if line and not line.startswith("#")]


def _rule(line: str) -> Rule:
    native, arrow, names = line.partition(" <- ")
    if not arrow:
        raise ValueError(f"a rule reads 'native <- diffusers ...', got {line!r}")
    names = re.sub(r"(\S*)\{(.*?)\}", lambda m: " ".join(m[1] + name for name in m[2].split()), names)
    native, native_shape = _shape(native.strip())
    sources = tuple(_source(name) for name in names.split())
    if any(bool(source.shape) != bool(native_shape) for source in sources) or (native_shape and len(sources) > 1):
        raise ValueError(f"a rule with shapes has one of each program's, got {line!r}")
    return Rule(native, sources, native_shape)


def _source(text: str) -> Source:
    name, shape = _shape(text.removeprefix("~").removesuffix(":in"))
    return Source(name, text.startswith("~"), text.endswith(":in"), shape)


def _shape(name: str) -> tuple[str, Shape]:
    """``x[6,*]`` -> ``x``, ``(6, -1)``."""
    name, _, sizes = name.partition("[")
    shape = tuple(-1 if size == "*" else int(size) for size in sizes.removesuffix("]").split(",")) if sizes else ()
    if sizes and shape.count(-1) != 1:
        raise ValueError(f"a shape has one *, got {name}[{sizes}")
    return name, shape


def reshaped(shape: Shape, template: Shape) -> Shape:
    """The shape that ``reshape(template)`` gives a tensor of ``shape``; an empty template leaves it."""
    rest = math.prod(shape) // -math.prod(template)
    return tuple(rest if size == -1 else size for size in template) if template else shape


def matches(name: str, key: str) -> bool:
    """Whether a tensor belongs to the module that ``name`` stands for."""
    return _compile(name).fullmatch(key) is not None


def to_native(rules: list[Rule], keys: Iterable[str]) -> dict[str, list[Part]]:
    """Which diffusers tensors make up each ComfyUI tensor.

    Raises:
        MissingPart: names the part of a fused tensor that is not among ``keys``.
    """
    keys = list(keys)
    numbered = [_numbered(rule, keys) for rule in rules]
    patterns = [
        (_compile(source.name), rule, position, source) for rule in numbered for position, source in enumerate(rule.sources)
    ]
    found: dict[str, dict[int, Part]] = {}
    wanted: dict[str, Rule] = {}
    for key in keys:
        native, position, part = key, 0, Part(key)
        for pattern, rule, index, source in patterns:
            if match := pattern.fullmatch(key):
                native, position, part = _fill(rule.native, match), index, Part(key, source.swapped, rule.shape)
                wanted[native] = rule
                break
        found.setdefault(native, {})[position] = part
    for native, rule in wanted.items():
        if lost := set(range(len(rule.sources))) - set(found[native]):
            raise MissingPart(f"{native} needs {rule.sources[min(lost)].name}, which is not there")
    return {native: [parts[i] for i in sorted(parts)] for native, parts in found.items()}


def to_diffusers(rules: list[Rule], shapes: Mapping[str, Shape]) -> dict[str, list[Slice]]:
    """Which rows of each ComfyUI tensor are which diffusers tensor; the inverse of :func:`to_native`."""
    patterns = [(_compile(rule.native), rule) for rule in (_numbered(rule, shapes) for rule in rules)]
    out = {}
    for key, shape in shapes.items():
        rows = shape[0] if shape else 1
        for pattern, rule in patterns:
            if match := pattern.fullmatch(key):
                columns = shapes.get(f"{key.rpartition('.')[0]}.weight", shape)[-1]
                out[key] = _slices(rule, match, rows, columns)
                break
        else:
            out[key] = [Slice(key, 0, rows)]
    return out


def _slices(rule: Rule, match: re.Match[str], rows: int, columns: int) -> list[Slice]:
    marked = sum(source.as_columns for source in rule.sources)
    share = (rows - marked * columns) // max(1, len(rule.sources) - marked)
    out, start = [], 0
    for source in rule.sources:
        stop = start + (columns if source.as_columns else share)
        out.append(Slice(_fill(source.name, match), start, stop, source.swapped, source.shape))
        start = stop
    return out


def _numbered(rule: Rule, keys: Iterable[str]) -> Rule:
    """The rule with the number that its ``LAST`` stands for in a model with these tensors, whichever program named them."""
    if "LAST" not in rule.native:
        return rule
    lists = "|".join(re.escape(name.partition("LAST")[0]) for name in (rule.native, *(s.name for s in rule.sources)))
    last = str(max((int(m[1]) for key in keys if (m := re.match(rf"(?:{lists})(\d+)\.", key))), default=0))
    sources = tuple(source._replace(name=source.name.replace("LAST", last)) for source in rule.sources)
    return rule._replace(native=rule.native.replace("LAST", last), sources=sources)


def _compile(name: str) -> re.Pattern[str]:
    """A pattern of whole keys: the module's name and whatever follows it."""
    parts = [r"(\d+)" if part == "N" else f"(?:{re.escape(part).replace(chr(92) + '|', '|')})" for part in name.split(".")]
    return re.compile(r"\.".join(parts) + r"(?P<rest>(?:\..+)?)")


def _fill(name: str, match: re.Match[str]) -> str:
    """``name`` with the numbers of ``match`` for its ``N``, and with what followed the matched name."""
    numbers = iter(match.groups()[:-1])
    return ".".join(next(numbers) if part == "N" else part.partition("|")[0] for part in name.split(".")) + match["rest"]
