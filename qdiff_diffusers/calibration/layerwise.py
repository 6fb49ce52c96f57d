"""The first stage: each layer is quantized for its inputs in the full-precision model, independently of all others."""

from __future__ import annotations

import time
import zlib
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from diffusers.utils import logging
from safetensors import SafetensorError
from torch import Tensor, nn

from ..config import QDiffConfig
from ..errors import CalibrationError
from ..formats import LayerSpec
from ..formats.layer_table import StoredLayer
from ..methods import LayerInputs, format_target, quantize_weight
from . import parallel
from .relay import Relay
from .settings import Calibration
from .statistics import SAMPLES, InputStatistics, collect, recall, statistics_bytes
from .store import Store, groups_within, read_tensors, write_tensors

SAVED = "saved_seconds"  # key in the log: seconds saved by reading the recordings of an earlier calibration


class FinishedLayer(NamedTuple):
    """A quantized layer: its entry in config.json, its tensors, and facts for the log such as time and error."""

    stored: StoredLayer
    tensors: dict[str, Tensor]
    facts: dict[str, Any]

    def target(self, weight: Tensor) -> Tensor:
        """The matrix that the format's tensors approximate, float32 ``[rows, columns]``, given the dense weight."""
        return format_target(weight, self.stored.spec, self.tensors)


def quantize_layers(
    model: nn.Module,
    targets: dict[str, QDiffConfig],
    calibration: Calibration,
    calls: Store | None,
    folder: Path,
    kept: Path | None = None,
) -> dict[str, FinishedLayer]:
    """Quantize all layers, reading those that an earlier run finished.

    Statistics of as many layers at a time as ``calibration.memory_limit`` holds are collected in one pass over the calls, which
    goes on from where the pass before ended in a chain of blocks. In a distributed run each process takes some of these groups.

    Args:
        model: the full-precision model, which is not changed.
        targets: config of each layer.
        calls: recorded calls, or ``None`` to quantize without data.
        folder: folder of the workspace in which finished layers are kept.
        kept: folder for statistics of these calls that other calibrations read.

    Raises:
        CalibrationError: a layer's inputs hold NaN or infinity, or the workspace cannot be written.
    """
    finished = {name: layer for name in targets if (layer := _read(folder / f"{name}.safetensors"))}
    finished = parallel.share(finished, 0)
    left = [name for name in targets if name not in finished]
    share = -(-len(left) // parallel.world_size())
    wanted = {name: calls is not None and (calibration.hessian or targets[name].needs_samples) for name in left}
    keep = SAMPLES if any(targets[name].takes_samples for name in left) else 0
    sizes = {name: statistics_bytes(model.get_submodule(name), keep, calibration.hessian) * wanted[name] for name in left}
    groups = [part for group in groups_within(sizes, calibration.memory_limit) for part in _split(group, share)]
    seen = [[name for name in group if wanted[name]] if parallel.is_mine(i) else [] for i, group in enumerate(groups)]
    relay = Relay(model, calls, folder.with_name("relay"), calibration.memory_limit) if calls and sum(map(bool, seen)) > 1 else None
    progress = logging.tqdm(total=len(left), desc="Quantizing layers", unit="layer", delay=2)
    for index, group in enumerate(groups):
        found: dict[str, FinishedLayer] = {}
        if parallel.is_mine(index):
            statistics: dict[str, InputStatistics] = {}
            if calls is not None and seen[index]:
                look = partial(recall, folder=kept) if kept else collect
                following = list(chain.from_iterable(seen[index + 1 :]))
                statistics = look(
                    model, seen[index], calls, keep, second_moments=calibration.hessian, relay=relay, following=following
                )
            for name in group:
                found[name] = _quantize(model.get_submodule(name), name, targets[name], calibration, statistics.pop(name, None))
                _write(folder / f"{name}.safetensors", found[name])
                progress.update()
        finished |= found
    if relay is not None:
        relay.close()
    for index, group in enumerate(groups):
        finished |= parallel.share({name: finished[name] for name in group if name in finished}, index)
    progress.close()
    return {name: finished[name] for name in targets}


def _quantize(
    layer: Any, name: str, config: QDiffConfig, calibration: Calibration, statistics: InputStatistics | None
) -> FinishedLayer:
    start = time.perf_counter()
    seed = config.seed + zlib.crc32(name.encode())
    errors: list[float] = []
    inputs = None
    if statistics and statistics.tokens:
        hessian, rows = statistics.hessian, statistics.rows
        inputs = LayerInputs(hessian, calibration.damping, errors, rows, _is_shiftable(layer), calibration.noise_share)
    try:
        spec, tensors, error = quantize_weight(layer.weight, config, seed, inputs)
    except ValueError as failure:
        raise CalibrationError(f"layer {name} {list(layer.weight.shape)}: {failure}") from failure
    facts: dict[str, Any] = {"seconds": round(time.perf_counter() - start, 3), "output_errors": [float(f"{e:.4g}") for e in errors]}
    if statistics and statistics.saved_seconds:
        facts[SAVED] = round(statistics.saved_seconds, 3)
    stored = StoredLayer(spec, tuple(layer.weight.shape), float(f"{error:.4g}"))
    return FinishedLayer(stored, {key: t.cpu() for key, t in tensors.items()}, facts)


def _is_shiftable(layer: Any) -> bool:
    """Whether a constant added to every input adds a constant to every output, so that the bias can absorb it."""
    if layer.bias is None:
        return False
    return not isinstance(layer, nn.Conv2d) or (layer.weight[0, 0].numel() == 1 and layer.padding in (0, (0, 0)))


def _split(group: list[str], size: int) -> list[list[str]]:
    """Pieces of at most ``size``, so that every process has something to do."""
    return [group[i : i + size] for i in range(0, len(group), size)]


def _write(path: Path, layer: FinishedLayer) -> None:
    stored = layer.stored
    metadata = {"spec": stored.spec.to_dict(), "shape": list(stored.shape), "error": stored.error, "facts": layer.facts}
    write_tensors(path, layer.tensors, metadata)


def _read(path: Path) -> FinishedLayer | None:
    if not path.is_file():
        return None
    try:
        tensors, metadata = read_tensors(path)
        stored = StoredLayer(LayerSpec.from_dict(metadata["spec"]), tuple(metadata["shape"]), metadata["error"])
    except (OSError, SafetensorError, ValueError, KeyError):
        return None  # not finished
    return FinishedLayer(stored, {name: t.clone() for name, t in tensors.items()}, metadata["facts"])
