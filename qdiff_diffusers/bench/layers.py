"""Single layers: every contender at every shape and number of tokens."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigError
from ..measuring import peers
from ..measuring.contenders import Contender, describe_failure, plain, resident_bytes, select
from . import ours
from .results import Results
from .timing import Call, Race, Spread, make_timer, race

LINEAR = ("1152x1152", "1152x4608", "3072x3072", "3072x12288", "12288x3072", "3072x18432")
CONV = tuple(f"conv{channels}@{pixels}" for channels in (320, 640, 1280) for pixels in (64, 32, 16))
TOKENS = (1, 2, 16, 64, 256, 1024, 4096)
ADALN = "3072x18432"  # a modulation: one row for each image of the batch
CONV_BATCH = 2
COLD_TOKENS = 64  # up to this many tokens, reading the weight from memory takes most of the time
GRAPH_TOKENS = 16  # up to this many tokens, launching kernels takes most of the time on a GPU
CHECKED_ROWS = 16
BROKEN = 1.0  # relative error from which a result is broken

Advance = Callable[[str], None]


@dataclass(frozen=True)
class Shape:
    """A linear layer ``columns`` -> ``rows``, or a 3x3 convolution of as many channels over square images of ``pixels``."""

    name: str
    columns: int
    rows: int
    pixels: int = 0

    @classmethod
    def parse(cls, text: str) -> Shape:
        """A shape from ``INxOUT`` or ``convCHANNELS@PIXELS``.

        Raises:
            ConfigError: the text has neither form.
        """
        if match := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text):
            return cls(text, int(match[1]), int(match[2]))
        if match := re.fullmatch(r"conv([1-9]\d*)@([1-9]\d*)", text):
            return cls(text, int(match[1]), int(match[1]), int(match[2]))
        raise ConfigError(f"unknown shape {text!r}; write INxOUT such as 3072x12288, or convCHANNELS@PIXELS such as conv640@32")

    def tokens(self, wanted: Sequence[int]) -> list[int]:
        """The numbers of tokens to measure at: one for a convolution, 1 and 2 for an adaLN layer."""
        if self.pixels:
            return [CONV_BATCH * self.pixels**2]
        if self.name == ADALN:
            return [m for m in wanted if m <= 2] or [1, 2]
        return list(wanted)

    def layer(self, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """A layer with Student-t weights (5 degrees of freedom, the tails of trained ones), the same in every run."""
        generator = torch.Generator().manual_seed(self.rows * 31 + self.columns)
        made = nn.Conv2d(self.columns, self.rows, 3, padding=1) if self.pixels else nn.Linear(self.columns, self.rows)
        weight = made.weight.data
        normal = torch.randn(weight.shape, generator=generator)
        chi = torch.randn((5, *weight.shape), generator=generator).square_().sum(0)
        weight.copy_(normal * (chi / 5).rsqrt_() * weight[0].numel() ** -0.5)
        return made.to(device, dtype).requires_grad_(False)

    def input(self, tokens: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        generator = torch.Generator().manual_seed(tokens)
        shape = (CONV_BATCH, self.columns, self.pixels, self.pixels) if self.pixels else (tokens, self.columns)
        return torch.randn(shape, generator=generator).to(device, dtype)


def contenders_for(device: torch.device, packer: ours.Packer, only: Sequence[str] | None) -> list[Contender]:
    """All contenders, or those that ``only`` selects."""
    return select([*plain(), *ours.contenders(packer, device), *peers.contenders(device)], only)


def count_cells(shapes: Sequence[Shape], tokens: Sequence[int], only: Sequence[str] | None, device: torch.device) -> int:
    """Number of cells of a run, for a progress bar."""
    each = len(contenders_for(device, ours.Packer(), only))
    return each * sum(len(shape.tokens(tokens)) for shape in shapes)


@torch.no_grad()
def run_layers(
    results: Results,
    shapes: Sequence[Shape],
    tokens: Sequence[int],
    *,
    device: torch.device,
    dtype: torch.dtype,
    budget: float,
    only: Sequence[str] | None = None,
    advance: Advance = lambda what: None,
) -> None:
    """Make the measurements that ``results`` does not hold yet; the file is written after each shape and number of tokens.

    Args:
        budget: seconds to spend on each contender, shape and number of tokens.
        advance: called for each contender, shape and number of tokens, with the contender's name.
    """
    for shape in shapes:
        bench = _Bench(shape, results, device, dtype, budget, advance)
        contenders = contenders_for(device, ours.Packer(), only)
        counts = shape.tokens(tokens)
        for contender in contenders:
            bench.prepare(contender, counts)
        for count in counts:
            bench.measure(count)
            results.write()


class _Entry(NamedTuple):
    """A contender at one shape: its layer, a twin with weights of its own, and facts that its cells share."""

    contender: Contender
    module: nn.Module
    twin: nn.Module
    row: dict[str, Any]


class _Bench:
    """One shape: the dense layer, and the contenders built from it."""

    def __init__(
        self, shape: Shape, results: Results, device: torch.device, dtype: torch.dtype, budget: float, advance: Advance
    ) -> None:
        self.shape, self.results, self.device, self.dtype, self.budget = shape, results, device, dtype, budget
        self.advance = advance
        self.layer, self.twin = shape.layer(device, dtype), shape.layer(device, dtype)
        self.built: dict[str, _Entry] = {}

    def prepare(self, contender: Contender, counts: Sequence[int]) -> None:
        """Build a contender, or record why it cannot be built."""
        wanted = [count for count in counts if self.results.missing(self.key(contender, count))]
        for _ in range(len(counts) - len(wanted)):
            self.advance(contender.name)
        if not wanted:
            return
        row = {"shape": self.shape.name, "contender": contender.name, "family": contender.family, "bits": contender.bits}
        reason = contender.unavailable(self.device)
        if reason is None and not isinstance(self.layer, contender.layers):
            reason = "does not do convolutions"
        if reason is None:
            start = time.perf_counter()
            try:
                module, twin = contender.build(self.layer), contender.build(self.layer)
            except Exception as error:
                reason = describe_failure(error)
        if reason is not None:
            for count in wanted:
                self.results.add(self.key(contender, count), **row, tokens=count, reason=reason)
                self.advance(contender.name)
            return
        size = resident_bytes(module)
        row |= {"bytes": size, "stored_bits": ours.stored_bits(module) or 8 * size / self.layer.weight.numel()}  # type: ignore[operator]
        row |= {"build_seconds": time.perf_counter() - start, "format": ours.describe(module), "note": contender.note}
        self.built[contender.name] = _Entry(contender, module, twin, row)

    def key(self, contender: Contender, count: int) -> tuple[str, ...]:
        return ("layer", self.shape.name, str(count), contender.name)

    def measure(self, count: int) -> None:
        """Check and time every contender at one number of tokens."""
        x = self.shape.input(count, self.device, self.dtype)
        cells: dict[str, dict[str, Any]] = {}
        for name, entry in self.built.items():
            if self.results.missing(self.key(entry.contender, count)):
                lookup = ours.lookup_share(entry.module, count)
                cells[name] = entry.row | {"tokens": count, "lookup_share": lookup} | self._check(entry, x)
        calls = {name: self._call(self.built[name], x) for name, cell in cells.items() if not cell.get("reason")}
        timer = make_timer(self.device, self._cold(count))
        baseline = Call(_step(self.layer, x), _step(self.twin, x))
        for name, raced in race(calls, baseline, timer, self.budget, advance=self.advance).items():
            cells[name] |= describe_race(raced)
        if self.device.type == "cuda" and count <= GRAPH_TOKENS:
            self._measure_graphs(calls, baseline, cells)
        for name, cell in cells.items():
            self.results.add(self.key(self.built[name].contender, count), **cell)

    def _measure_graphs(self, calls: dict[str, Call], baseline: Call, cells: dict[str, dict[str, Any]]) -> None:
        """Time the calls from CUDA graphs too, where launching costs next to nothing."""
        graphs = {}
        for name, call in calls.items():
            try:
                graphs[name] = Call(capture(call.run))
            except Exception as error:
                cells[name]["graph"] = {"reason": describe_failure(error)}
        for name, entry in race(graphs, Call(capture(baseline.run)), make_timer(self.device, cold=True), self.budget).items():
            cells[name]["graph"] = describe_race(entry)

    def _cold(self, count: int) -> bool:
        """Whether caches are emptied first. A convolution, whose count is its batch here, never waits for its weight."""
        return not self.shape.pixels and count <= COLD_TOKENS

    def _call(self, entry: _Entry, x: Tensor) -> Call:
        return Call(_step(entry.module, x), _step(entry.twin, x))

    def _check(self, entry: _Entry, x: Tensor) -> dict[str, Any]:
        """Relative error of the output against float64 with the original weight; or why the output is broken."""
        try:
            output = entry.module(x)
            if self._cold(len(x)):
                entry.twin(x)
            error = self._error(entry.module, x, output)
        except Exception as failure:
            self.advance(entry.contender.name)
            return {"reason": describe_failure(failure)}
        if error <= BROKEN:
            return {"error": error}
        self.advance(entry.contender.name)
        return {"error": None, "reason": f"broken: its output is {100 * error:.0f} % off"}

    def _error(self, module: nn.Module, x: Tensor, output: Tensor) -> float:
        """Relative error on a few evenly spaced tokens, or on a corner of the image with pixels away from the edge."""
        stands_for = getattr(getattr(module, "_orig_mod", module), "stands_for", lambda weight: weight)
        assert isinstance(self.layer.weight, Tensor) and isinstance(self.layer.bias, Tensor)
        weight, bias = stands_for(self.layer.weight).double(), self.layer.bias.double()
        if self.shape.pixels:
            corner = min(self.shape.pixels, 8)
            expected = F.conv2d(F.pad(x[:1, :, :corner, :corner].double(), (1, 0, 1, 0)), weight, bias)
            found = output[:1, :, : expected.shape[2], : expected.shape[3]].double()
        else:
            rows = torch.linspace(0, len(x) - 1, min(len(x), CHECKED_ROWS)).long().to(x.device)
            expected, found = F.linear(x[rows].double(), weight, bias), output[rows].double()
        return float((found - expected).norm() / expected.norm())


def _step(module: nn.Module, x: Tensor) -> Callable[[], Any]:
    def step() -> Any:
        with torch.no_grad():
            return module(x)

    return step


def describe_race(entry: Race) -> dict[str, Any]:
    """The measurements of a race that a cell stores."""
    if entry.failure is not None or not entry.seconds:
        return {"reason": entry.failure or "was not timed"}
    return {
        "rounds": len(entry.seconds),
        "ms": asdict(Spread.of([1e3 * seconds for seconds in entry.seconds])),
        "baseline_ms": asdict(Spread.of([1e3 * seconds for seconds in entry.baseline])),
        "ratio": asdict(Spread.of(entry.ratios)),
        "best_ratio": min(entry.baseline) / min(entry.seconds),
    }


def capture(function: Callable[[], Any]) -> Callable[[], Any]:
    """A CUDA graph of one call."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay
