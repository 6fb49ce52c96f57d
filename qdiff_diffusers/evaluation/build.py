"""Builds the pipeline of a row, and measures its size and times."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoModel, DiffusionPipeline
from diffusers.utils import logging

from ..calibration.layerwise import SAVED
from ..calibration.quantize import CALIBRATION_LOG, quantize_source
from ..checkpoint.files import read_headers, weight_files
from ..checkpoint.folders import INDEX
from ..checkpoint.inspect import CheckpointInfo, inspect_components
from ..errors import ConfigError
from ..formats import TensorInfo
from ..layers import PackedLayer
from ..measuring.contenders import resident_bytes
from .peers import apply_peer, copy_in, find_peer, make_dense, stored_bits, target_layers, weight_shapes
from .rows import EvalRow, calibration_of
from .sampling import denoisers
from .store import MODEL, RECORDINGS
from .subject import Subject

Costs = dict[str, Any]


def build(row: EvalRow, subject: Subject, folder: Path, dtype: torch.dtype, device: str, costs: Costs) -> Any:
    """A pipeline with the row's weights, in ``dtype`` on ``device``. Fills in ``costs``.

    A config's model is written to ``folder / "model"``, and read from there if it exists already.

    Raises:
        Exception: any error that keeps this row from being built.
    """
    if row.kind == "reference":
        pipe = load_dense(subject, dtype)
        _add_costs(costs, pipe, _shapes(pipe), _dense_bytes(subject), None)
    elif row.kind == "peer":
        pipe = _with_peer(row, subject, dtype, device, costs)
    else:
        pipe = _quantized(row, subject, folder, dtype, costs)
    return pipe.to(device)


def load(source: str | Path, dtype: torch.dtype, **more: Any) -> Any:
    """Load a pipeline, without diffusers' progress bars and remarks."""
    with quiet_diffusers():
        return DiffusionPipeline.from_pretrained(str(source), dtype=dtype, **more)


def load_dense(subject: Subject, dtype: torch.dtype) -> Any:
    """The unquantized pipeline in ``dtype``, its weights rounded to 16 bits first, as a row's unquantized weights are."""
    pipe = load(subject.source, subject.stored_dtype)
    with quiet_diffusers():
        return pipe.to(dtype)


@contextmanager
def quiet_diffusers() -> Iterator[None]:
    """A context without diffusers' progress bars, and without its remarks about a pixel-space autoencoder."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()


def _quantized(row: EvalRow, subject: Subject, folder: Path, dtype: torch.dtype, costs: Costs) -> Any:
    shapes = _shapes(load(subject.source, subject.stored_dtype))
    if row.kind == "config":
        source = folder / MODEL
        if not (source / INDEX).is_file():
            shutil.rmtree(source, ignore_errors=True)
            seconds = _quantize(row, subject, source, folder.parent.parent / RECORDINGS)
        else:
            seconds = costs["quantize_seconds"]
    else:
        source, seconds = Path(row.target), None
    if (source / INDEX).is_file():
        pipe = load(source, dtype)
    else:
        with quiet_diffusers():
            model = AutoModel.from_pretrained(str(source), dtype=dtype)
        pipe = load(subject.source, dtype, **{_place_of(subject): model})
    size = sum(map(_bytes_in_16_bits, inspect_components(source)))
    _add_costs(costs, pipe, shapes, size, seconds)
    return pipe


def _quantize(row: EvalRow, subject: Subject, folder: Path, recordings: Path) -> float:
    """Quantize into ``folder``. Returns the seconds it took, loading and saving included.

    Rows that are calibrated on the same trajectories share them in ``recordings``; the time saved by that is counted all the same.
    """
    # Calibration needs float32: gradients and second moments of float16 activations overflow.
    dtype = subject.stored_dtype if row.calibration is None else torch.float32
    calibration, components = calibration_of(row, subject), list(subject.components)
    if calibration is not None and not calibration.recordings:
        calibration = replace(calibration, recordings=recordings)
    start = time.perf_counter()
    with quiet_diffusers():
        quantize_source(subject.source, row.config(), folder, calibration=calibration, components=components, dtype=dtype)
    seconds = time.perf_counter() - start
    logs = [json.loads(path.read_text()) for path in folder.glob(f"*/{CALIBRATION_LOG}")]
    return seconds + sum(entry.get(SAVED, 0.0) for log in logs for entry in log)


def _with_peer(row: EvalRow, subject: Subject, dtype: torch.dtype, device: str, costs: Costs) -> Any:
    """Convert twice: in 16 bits, as users do, to count bytes and seconds; and in ``dtype``, to draw.

    In a wider ``dtype`` linear layers are replaced by plain ones with the same weights.
    """
    peer = find_peer(row.target, torch.device(device))
    pipe = load_dense(subject, dtype).to(device)
    size, seconds = 0, 0.0
    bits = weights = 0.0
    converted = total = dense = 0
    for _, model in denoisers(pipe):
        shapes = weight_shapes(target_layers(model))
        count = float(sum(torch.Size(shape).numel() for shape in shapes.values()))
        narrow = model if dtype.itemsize == 2 else copy_in(model, torch.bfloat16)
        start = time.perf_counter()
        taken = apply_peer(peer, narrow, list(shapes))
        seconds, converted = seconds + time.perf_counter() - start, converted + len(taken)
        bits, weights, total = bits + count * stored_bits(narrow, shapes), weights + count, total + len(shapes)
        size += resident_bytes(narrow)
        if narrow is not model:
            dense += make_dense(model, apply_peer(peer, model, list(shapes)))
    costs |= {"bits_per_weight": round(bits / weights, 4), "size_bytes": size, "quantize_seconds": round(seconds, 3)}
    costs |= {"layers": converted, "target_layers": total, "drawn_dense": dense}
    return pipe


def _shapes(pipe: Any) -> dict[str, dict[str, tuple[int, ...]]]:
    """Shapes of the layers that every row quantizes, by component and name, from a dense pipeline."""
    return {name: weight_shapes(target_layers(model)) for name, model in denoisers(pipe)}


def _sparsity(layers: list[PackedLayer]) -> float:
    """Share of the packed weights that are stored as exactly zero."""
    sizes = [torch.Size(layer.weight_shape).numel() for layer in layers]
    zeros = sum(n * x.spec.zero_share(x.packed_tensors(), x.weight_shape) for n, x in zip(sizes, layers, strict=True))
    return round(zeros / sum(sizes), 5)


def _add_costs(
    costs: Costs, pipe: Any, shapes: dict[str, dict[str, tuple[int, ...]]], size: int | None, seconds: float | None
) -> None:
    bits = weights = 0.0
    packed: list[PackedLayer] = []
    for name, model in denoisers(pipe):
        count = float(sum(torch.Size(shape).numel() for shape in shapes[name].values()))
        bits, weights = bits + count * stored_bits(model, shapes[name]), weights + count
        packed += [layer for module in shapes[name] if isinstance(layer := model.get_submodule(module), PackedLayer)]
    costs |= {"bits_per_weight": round(bits / weights, 4), "size_bytes": size, "layers": len(packed)}
    costs["sparsity"] = _sparsity(packed) if packed else None
    costs |= {"quantize_seconds": None if seconds is None else round(seconds, 3)}
    costs["target_layers"] = sum(map(len, shapes.values()))


def _dense_bytes(subject: Subject) -> int | None:
    """Size of the components in 16 bits; ``None`` for a Hub name, whose files are not on this machine."""
    tensors = subject.tensors.values()
    return sum(_in_16_bits(info) for info in tensors) if tensors else None


def _bytes_in_16_bits(info: CheckpointInfo) -> int:
    """Size of a quantized component, counting what is not packed in 16 bits, whatever its stored dtype."""
    packed = {f"{name}.{leaf}" for name, layer in info.config.layers.items() for leaf in layer.spec.tensors(layer.shape)}
    tensors = read_headers(weight_files(info.folder)).items()
    return sum(tensor.nbytes if name in packed else _in_16_bits(tensor) for name, tensor in tensors)


def _in_16_bits(info: TensorInfo) -> int:
    return info.nbytes // max(1, info.dtype.itemsize // 2)


def _place_of(subject: Subject) -> str:
    """Name of the pipeline's component that a bare model replaces."""
    if len(subject.components) > 1:
        raise ConfigError(f"{subject.name} has {', '.join(subject.components)}; give a folder of the whole quantized pipeline")
    return subject.components[0]
