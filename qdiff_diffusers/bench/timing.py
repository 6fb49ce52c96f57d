"""Times of several calls in alternating order, each beside the baseline of the same moment.

Every round makes each call once, forwards in even rounds and backwards in odd ones, with the baseline timed anew every few
calls. A machine that slows down for a while slows both sides of a ratio; the median removes the rest.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from ..measuring.contenders import describe_failure

Function = Callable[[], Any]
BASELINE_EVERY = 4  # calls between two calls of the baseline: a slice of 10 ms does not separate them at small layers
MIN_ROUNDS, MAX_ROUNDS = 3, 30
SLOW_ROUNDS = 2  # rounds for a call that alone takes more than the budget
DEFAULT_CACHE_BYTES = 64 << 20


class Call(NamedTuple):
    """A call to time, and a twin with weights of its own, which is called before it where the caches were emptied.

    The twin loads the code and wakes the threads: inside a model these are warm, and only the weights are not. At
    1152 x 1152 and one token a cold interpreter alone would add 0.3 ms to 0.3 ms.
    """

    run: Function
    twin: Function | None = None


class Timer(Protocol):
    """Measures the seconds of one call."""

    def __call__(self, call: Call) -> float: ...


class CpuTimer:
    """Wall-clock time of one call.

    Args:
        flush: bytes to read before each call, so that weights come from memory as they do inside a model; 0 for none.
        clock: a function that returns rising seconds.
    """

    def __init__(self, flush: int = 0, clock: Callable[[], float] = time.perf_counter) -> None:
        self.buffer = torch.ones(flush // 4) if flush else None
        self.clock = clock

    def __call__(self, call: Call) -> float:
        if self.buffer is not None:
            self.buffer.sum()
            if call.twin is not None:
                call.twin()
        start = self.clock()
        call.run()
        return self.clock() - start


class CudaTimer:
    """Time between two CUDA events around one call, the L2 cache overwritten before it."""

    def __init__(self, flush: int = 256 << 20) -> None:
        self.buffer = torch.empty(flush, dtype=torch.int8, device="cuda")

    def __call__(self, call: Call) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.buffer.zero_()  # also gives the CPU a head start, so that eager launches queue up behind it
        start.record()
        call.run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def make_timer(device: torch.device, cold: bool) -> Timer:
    """The timer of a device. ``cold``: on a CPU, empty the caches before each call; a GPU's L2 is always emptied."""
    if device.type == "cuda":
        return CudaTimer()
    return CpuTimer(2 * cache_bytes() if cold else 0)


def cache_bytes() -> int:
    """Size of the CPU's largest cache."""
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        units = {"K": 1 << 10, "M": 1 << 20}
        sizes.append(int(text[:-1]) * units[text[-1]] if text[-1] in units else int(text))
    return max(sizes, default=DEFAULT_CACHE_BYTES)


@dataclass(frozen=True)
class Spread:
    """Median, quartiles and minimum of a sample."""

    median: float
    q1: float
    q3: float
    low: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        quartiles = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
        return cls(statistics.median(values), quartiles[0], quartiles[2], min(values))

    @property
    def relative(self) -> float:
        """Distance of the quartiles over the median."""
        return (self.q3 - self.q1) / self.median if self.median else 0.0


@dataclass
class Race:
    """Measurements of one call by :func:`race`: its seconds, the baseline's seconds beside each, or why it failed."""

    seconds: list[float] = field(default_factory=list)
    baseline: list[float] = field(default_factory=list)
    failure: str | None = None

    @property
    def ratios(self) -> list[float]:
        """Speed relative to the baseline, round by round; above 1 is faster."""
        return [base / own for base, own in zip(self.baseline, self.seconds, strict=True)]


def race(
    calls: Mapping[str, Call],
    baseline: Call,
    timer: Timer,
    budget: float,
    *,
    advance: Callable[[str], None] = lambda name: None,
    max_rounds: int = MAX_ROUNDS,
) -> dict[str, Race]:
    """Time every call in turn, many rounds.

    Args:
        calls: the calls to time, each of which has been called once, so that nothing is left to compile; one that raises drops out,
            with the reason.
        baseline: the call that the ratios refer to.
        budget: seconds for each call, from which and its first round the number of its rounds follows.
        advance: called with the name of each call in the first round.
    """
    races = {name: Race() for name in calls}
    timer(baseline)
    _round(list(calls), calls, races, baseline, timer, advance)
    rounds = {name: _affordable(entry, budget, max_rounds) for name, entry in races.items()}
    for i in range(1, max(rounds.values(), default=0)):
        turn = [name for name in calls if rounds[name] > i and races[name].failure is None]
        _round(turn if i % 2 == 0 else turn[::-1], calls, races, baseline, timer)
    return races


def _round(
    turn: list[str],
    calls: Mapping[str, Call],
    races: dict[str, Race],
    baseline: Call,
    timer: Timer,
    advance: Callable[[str], None] = lambda name: None,
) -> None:
    beside = 0.0
    for i, name in enumerate(turn):
        if i % BASELINE_EVERY == 0:
            beside = timer(baseline)
        try:
            seconds = timer(calls[name])
        except Exception as error:
            races[name].failure = describe_failure(error)
        else:
            races[name].seconds.append(seconds)
            races[name].baseline.append(beside)
        advance(name)


def _affordable(entry: Race, budget: float, max_rounds: int) -> int:
    """The number of rounds that fit the budget, by the first one."""
    if entry.failure is not None:
        return 0
    seconds = entry.seconds[0]
    if seconds > budget:
        return min(SLOW_ROUNDS, max_rounds)
    return min(max_rounds, max(MIN_ROUNDS, int(budget / max(seconds, 1e-9))))
