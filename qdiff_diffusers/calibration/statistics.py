"""Statistics of the layers' inputs over all recorded calls: second moments, largest magnitudes, samples."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.utils import logging
from filelock import FileLock
from safetensors import SafetensorError
from torch import Tensor, nn

from ..layers.timesteps import NAMES as TIMESTEP_NAMES
from .store import Store, read_tensors, write_tensors
from .trajectories import call_model

SAMPLES = 2048  # samples of each layer's inputs, where a config needs more than second moments
ROWS = "rows/"


class Moments(NamedTuple):
    """Statistics of one input: sum of ``x x^T``, largest magnitude per channel, number of samples, and some of the samples."""

    sums: Tensor
    largest: Tensor
    tokens: int
    rows: Tensor


class InputStatistics:
    """Statistics of one layer's inputs, each token (or window of pixels) a sample.

    Attributes:
        hessian: float32 ``[columns, columns]``, the mean of ``x x^T`` with columns as in the stored matrix: a convolution's
            windows channels last.
        largest: float32 ``[channels]``, the largest magnitude in each input channel.
        tokens: number of samples.
        rows: some samples float32 ``[n, columns]`` of each timestep, if any are kept.
        saved_seconds: seconds that collecting would have taken, if the statistics were read from a file.
    """

    def __init__(self, layer: nn.Module) -> None:
        weight = layer.weight
        assert isinstance(weight, Tensor)
        columns = weight[0].numel()
        self.sums = torch.zeros(columns, columns, device=weight.device)
        self.largest = torch.zeros(weight.shape[1], device=weight.device)
        self.tokens = 0
        self.kept: dict[float, list[Tensor]] = {}
        self.saved_seconds = 0.0

    def add(self, moments: Moments, timestep: float = 0.0) -> None:
        """Add the moments of one input."""
        if len(moments.rows):
            self.kept.setdefault(timestep, []).append(moments.rows)
        self.sums += moments.sums
        self.tokens += moments.tokens
        torch.maximum(self.largest, moments.largest, out=self.largest)

    def save(self, path: Path, seconds: float) -> None:
        """Write everything to a safetensors file, with the ``seconds`` that collecting took.

        Raises:
            CalibrationError: there is no space, or no permission.
        """
        rows = {f"{ROWS}{timestep!r}": rows for timestep, rows in self.rows.items()}
        write_tensors(path, {"sums": self.sums, "largest": self.largest} | rows, {"tokens": self.tokens, "seconds": seconds})

    def load(self, path: Path) -> bool:
        """Read what :meth:`save` wrote. Returns whether it could be read."""
        try:
            tensors, metadata = read_tensors(path)
        except (OSError, SafetensorError, ValueError):
            return False
        on_device = {name: t.to(self.sums.device, copy=True) for name, t in tensors.items()}
        self.sums, self.largest, self.tokens = on_device.pop("sums"), on_device.pop("largest"), metadata["tokens"]
        self.saved_seconds = metadata["seconds"]
        self.kept = {float(name.removeprefix(ROWS)): [rows] for name, rows in on_device.items()}
        return True

    @property
    def hessian(self) -> Tensor:
        return self.sums / max(self.tokens, 1)

    @property
    def rows(self) -> dict[float, Tensor]:
        return {timestep: torch.cat(rows) for timestep, rows in self.kept.items()}


def input_moments(layer: nn.Module, x: Tensor, keep: int = 0) -> Moments:
    """Moments of one input of ``layer``, and ``keep`` of its samples."""
    samples, channels = token_matrix(layer, x.detach()), x.shape[-3] if isinstance(layer, nn.Conv2d) else x.shape[-1]
    chosen = torch.linspace(0, len(samples) - 1, min(keep, len(samples)), device=x.device).round().long()
    return Moments(samples.T @ samples, samples.view(-1, channels).abs().amax(0), len(samples), samples[chosen])


def token_matrix(layer: nn.Module, x: Tensor) -> Tensor:
    """Inputs of a layer as float32 rows ``[tokens, columns]`` that its stored matrix multiplies."""
    if not isinstance(layer, nn.Conv2d):
        return x.reshape(-1, x.shape[-1]).float()
    x = x if x.ndim == 4 else x[None]
    assert not isinstance(layer.padding, str)
    taps = F.unfold(x.float(), layer.kernel_size, layer.dilation, layer.padding, layer.stride)  # [batch, in * kh * kw, pixels]
    taps = taps.unflatten(1, (x.shape[1], -1)).permute(0, 3, 2, 1)
    return taps.reshape(-1, taps.shape[2] * taps.shape[3])


@torch.no_grad()
def collect(model: nn.Module, names: Sequence[str], calls: Store, keep: int = 0) -> dict[str, InputStatistics]:
    """Statistics of the named layers over all calls, and about ``keep`` samples of each layer's inputs."""
    layers = {name: model.get_submodule(name) for name in names}
    found = {name: InputStatistics(layer) for name, layer in layers.items()}
    now: dict[str, Any] = {"keep": -(-keep // max(1, len(calls))), "timestep": 0.0}
    with _watching(layers, found, now):
        for call in logging.tqdm(calls, desc="Collecting statistics", unit="call", total=len(calls), delay=2, leave=False):
            now["timestep"] = timestep_of(call["inputs"])
            call_model(model, call["inputs"])
    return found


def recall(model: nn.Module, names: Sequence[str], calls: Store, keep: int, folder: Path) -> dict[str, InputStatistics]:
    """:func:`collect`, but statistics are read from ``folder`` if it has them, and written there if not. One process at a time.

    Raises:
        CalibrationError: the statistics cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        found = {name: InputStatistics(model.get_submodule(name)) for name in names}
        missing = [name for name in names if not found[name].load(folder / f"{name}.safetensors")]
        if missing:
            start = time.perf_counter()
            found |= collect(model, missing, calls, SAMPLES)
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


@contextmanager
def _watching(layers: Mapping[str, nn.Module], found: Mapping[str, InputStatistics], now: dict[str, Any]) -> Iterator[None]:
    last: dict[str, Any] = {"x": None, "geometry": None}

    def add(layer: nn.Module, x: Tensor, statistics: InputStatistics) -> None:
        geometry = (layer.kernel_size, layer.stride, layer.padding, layer.dilation) if isinstance(layer, nn.Conv2d) else None
        if x is not last["x"] or geometry != last["geometry"]:  # query, key and value, for instance, share one input
            last.update(x=x, geometry=geometry, moments=input_moments(layer, x, now["keep"]))
        statistics.add(last["moments"], now["timestep"])

    def watch(statistics: InputStatistics) -> Any:
        return lambda layer, args: add(layer, args[0], statistics)

    handles = [layer.register_forward_pre_hook(watch(found[name])) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def hessian_bytes(layer: nn.Module) -> int:
    """Size of a layer's second moments."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return 4 * weight[0].numel() ** 2
