"""Statistics of the layers' inputs over all recorded calls: second moments, and samples."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers.utils import logging
from filelock import FileLock
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..layers.timesteps import NAMES as TIMESTEP_NAMES
from .relay import NotAChainError, Relay, Run
from .second_moments import Layout, Triangle, input_count, input_rows, layout_of
from .store import Store, read_tensors, write_tensors
from .trajectories import call_model

SAMPLES = 2048  # samples of each layer's inputs, where a config needs more than second moments
SUMS, ROWS = "sums", "rows/"  # names of tensors in a file


class Seen(NamedTuple):
    """What one input of a layer adds to its statistics.

    Attributes:
        products: what ``layout`` makes a matrix of, the second moments; empty if they are not wanted.
        tokens: number of samples.
        rows: some of them, float32 ``[n, columns]``.
    """

    layout: Layout
    products: list[Tensor]
    tokens: int
    rows: Tensor


class InputStatistics:
    """Statistics of one layer's inputs, each token (or window of pixels) a sample.

    Attributes:
        hessian: float32 ``[columns, columns]``, the mean of ``x x^T`` with columns as in the stored matrix (a convolution's windows
            channels last); ``None`` if second moments were not collected. Made anew each time.
        tokens: number of samples.
        rows: some samples float32 ``[n, columns]`` of each timestep, if any are kept.
        saved_seconds: seconds that collecting would have taken, if the statistics were read from a file.
    """

    def __init__(self, layer: nn.Module) -> None:
        weight = layer.weight
        assert isinstance(weight, Tensor)
        self.columns = weight[0].numel()
        self.device = weight.device
        self.sums: dict[Layout, list[Tensor]] = {}
        self.tokens = 0
        self.kept: dict[float, list[Tensor]] = {}
        self.saved_seconds = 0.0

    def add(self, seen: Seen, timestep: float = 0.0) -> None:
        """Add what one input gave, which other layers may be given too."""
        if len(seen.rows):
            self.kept.setdefault(timestep, []).append(seen.rows)
        self.tokens += seen.tokens
        if not seen.products:
            return
        if seen.layout in self.sums:
            torch._foreach_add_(self.sums[seen.layout], seen.products)
        else:
            self.sums[seen.layout] = [p.clone() for p in seen.products]

    def save(self, path: Path, seconds: float) -> None:
        """Write everything to a safetensors file, with the ``seconds`` that collecting took.

        Raises:
            CalibrationError: there is no space, or no permission.
        """
        tensors = {f"{ROWS}{timestep!r}": rows for timestep, rows in self.rows.items()}
        if self.sums:
            tensors[SUMS] = self._sum()
        write_tensors(path, tensors, {"tokens": self.tokens, "seconds": seconds})

    def load(self, path: Path, second_moments: bool = True) -> bool:
        """Read what :meth:`save` wrote, second moments only if they are wanted. Returns whether all that could be read."""
        try:
            tensors, metadata = read_tensors(path)
        except (OSError, SafetensorError, ValueError):
            return False
        sums = tensors.pop(SUMS, None)
        if second_moments and sums is None:
            return False
        if second_moments and sums is not None:
            layout = Triangle(self.columns)
            self.sums = {layout: layout.products(sums.to(self.device, copy=True))}
        self.tokens, self.saved_seconds = metadata["tokens"], metadata["seconds"]
        self.kept = {float(name.removeprefix(ROWS)): [rows.to(self.device, copy=True)] for name, rows in tensors.items()}
        return True

    @property
    def hessian(self) -> Tensor | None:
        return self._sum().div_(max(self.tokens, 1)) if self.sums else None

    @property
    def rows(self) -> dict[float, Tensor]:
        return {timestep: torch.cat(rows) for timestep, rows in self.kept.items()}

    def _sum(self) -> Tensor:
        first, *others = (layout.matrix(products) for layout, products in self.sums.items())
        for other in others:  # images of other sizes may have been multiplied in another way
            first += other
        return first


@torch.no_grad()
def collect(
    model: nn.Module,
    names: Sequence[str],
    calls: Store,
    keep: int = 0,
    second_moments: bool = True,
    relay: Relay | None = None,
    following: Sequence[str] = (),
) -> dict[str, InputStatistics]:
    """Statistics of the named layers over all calls, and about ``keep`` samples of each layer's inputs.

    Args:
        relay: runs the calls from where it was left, as far as these layers need it.
        following: layers whose statistics will be collected next.
    """
    layers = {name: model.get_submodule(name) for name in names}

    def look(run: Run) -> dict[str, InputStatistics]:
        found = {name: InputStatistics(layer) for name, layer in layers.items()}
        watcher = _Watcher(found, -(-keep // max(1, len(calls))), second_moments)
        with watcher.watching(layers):
            progress = logging.tqdm(calls, desc="Collecting statistics", unit="call", total=len(calls), delay=2, leave=False)
            for number, call in enumerate(progress):
                watcher.begin(timestep_of(call["inputs"]))
                run(number, call["inputs"])
        return found

    if relay is not None:
        try:
            with relay.leg(names, following) as run:
                return look(run)
        except NotAChainError:
            relay.give_up()
    return look(lambda _, inputs: call_model(model, inputs))


def recall(
    model: nn.Module,
    names: Sequence[str],
    calls: Store,
    keep: int,
    folder: Path,
    second_moments: bool = True,
    relay: Relay | None = None,
    following: Sequence[str] = (),
) -> dict[str, InputStatistics]:
    """:func:`collect`, but statistics are read from ``folder`` if it has them, and written there if not. One process at a time.

    Raises:
        CalibrationError: the statistics cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        found = {name: InputStatistics(model.get_submodule(name)) for name in names}
        missing = [name for name in names if not found[name].load(folder / f"{name}.safetensors", second_moments)]
        if missing:
            start = time.perf_counter()
            found |= collect(model, missing, calls, SAMPLES, second_moments, relay, following)
            seconds = (time.perf_counter() - start) / len(missing)
            for name in missing:
                found[name].save(folder / f"{name}.safetensors", seconds)
    if not keep:
        for statistics in found.values():
            statistics.kept.clear()
    return found


def timestep_of(inputs: dict[str, Any]) -> float:
    """The timestep that a recorded call was made with; 0 if the model has no such argument."""
    found = next((inputs[name] for name in TIMESTEP_NAMES if inputs.get(name) is not None), 0.0)
    return float(torch.as_tensor(found).reshape(-1)[0])


class _Watcher:
    """Adds what layers are called with to their statistics.

    What an input gave is remembered for as long as the input lives and the model's call lasts: query, key and value share one, and
    all cross-attentions of a model share the prompt's.
    """

    def __init__(self, found: Mapping[str, InputStatistics], keep: int, second_moments: bool) -> None:
        self.found = found
        self.keep = keep
        self.second_moments = second_moments
        self.begin(0.0)

    def begin(self, timestep: float) -> None:
        """A new call of the model."""
        self.timestep = timestep
        self.memory: Any = WeakTensorKeyDictionary()  # input -> its version, and what it gave by the layer's geometry

    @contextmanager
    def watching(self, layers: Mapping[str, nn.Module]) -> Iterator[None]:
        def watch(statistics: InputStatistics) -> Any:
            return lambda layer, args: statistics.add(self.seen(layer, args[0]), self.timestep)

        handles = [layer.register_forward_pre_hook(watch(self.found[name])) for name, layer in layers.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def seen(self, layer: nn.Module, x: Tensor) -> Seen:
        """What input ``x`` of ``layer`` gives, computed once while ``x`` is unchanged."""
        if x.is_inference():  # it does not count its changes
            return self._look(layer, x)
        geometry = (layer.kernel_size, layer.stride, layer.padding, layer.dilation) if isinstance(layer, nn.Conv2d) else None
        version, known = self.memory.get(x, (None, {}))
        if version != x._version:
            known = {}
            self.memory[x] = x._version, known
        if geometry not in known:
            known[geometry] = self._look(layer, x)
        return known[geometry]

    def _look(self, layer: nn.Module, x: Tensor) -> Seen:
        x = x.detach()
        layout = layout_of(layer, x)
        products = layout.of(layer, x) if self.second_moments else []
        return Seen(layout, products, input_count(layer, x), input_rows(layer, x, self.keep))


def statistics_bytes(layer: nn.Module, keep: int, second_moments: bool) -> int:
    """Size of a layer's statistics with ``keep`` samples."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    columns = weight[0].numel()
    return 4 * columns * (keep + (Triangle(columns).height if second_moments else 0))
