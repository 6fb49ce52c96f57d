"""Calibration from beginning to end: trajectories, layer by layer, then all together; resumable at every step."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging
from filelock import FileLock  # torch depends on it
from torch import Tensor, nn

from ..config import QDiffConfig
from ..errors import ConfigError
from ..layers.timesteps import timestep_argument
from ..packing import pack_finished
from ..quantizer import QDiffQuantizer
from . import parallel
from .allocation import allocate
from .blocks import apply, tune_blocks
from .layerwise import SAVED, FinishedLayer, quantize_layers
from .settings import Calibration
from .store import Store
from .trajectories import record
from .tuning import tune_model

logger = logging.get_logger(__name__)
RUN, RECORDED = "run.json", "recorded"
# What trajectories depend on, besides the pipeline.
TRAJECTORIES = ("class_labels", "samples", "steps", "guidance_scale", "batch_size", "timesteps", "seed")


@torch.inference_mode(False)
def calibrate(
    pipe: Any, models: dict[str, nn.Module], config: QDiffConfig, calibration: Calibration, workspace: Path | None = None
) -> dict[str, list[dict[str, Any]]]:
    """Quantize models in place for what they see on their own trajectories.

    Args:
        pipe: the pipeline that the models belong to, or the bare model.
        models: full-precision denoisers by name.
        config: method and settings; each model gets a copy that describes its layers.
        calibration: what to run.
        workspace: default for ``calibration.workspace``; without either nothing is kept for another run.

    Returns:
        a log per model: what each layer, block or stretch of steps cost and achieved.

    Raises:
        ConfigError: the calibration does not suit the pipeline, or the workspace holds other work.
        CalibrationError: it cannot go on; finished work stays in the workspace.
    """
    parallel.join()
    for name, model in models.items():
        if getattr(model, "is_quantized", False):
            raise ConfigError(f"{name} is quantized already; calibration begins with the full-precision model")
        if any(c.activation_scales == "timestep" for c in config.with_overrides()):
            timestep_argument(model)  # raises where there is none
    how = calibration.tuning.assignments
    if calibration.tuning.wanted and not any(c.moves_by(how) for c in config.with_overrides()):
        raise ConfigError(
            f'tuning: assignments="{how}" moves no codes of method {config.method_name}: "rounding" is for scalar formats (fp, '
            'svdquant, rtn), "candidates" for a single codebook (vq), "pv" and "fixed" for all'
        )
    prints = _fingerprints(models)
    with _workspace(prints, config, calibration, workspace) as (folder, keep):
        needed = config.needs_calibration or calibration.hessian or calibration.mixed or calibration.tuning.wanted
        shared = _recordings(pipe, prints, calibration)
        calls: dict[str, Store] = {}
        saved = 0.0
        if needed and shared:
            with FileLock(f"{shared}.lock"):
                calls, saved = _recorded(pipe, models, calibration, shared, True)
        elif needed:
            calls, _ = _recorded(pipe, models, calibration, folder, keep)
        logs: dict[str, list[dict[str, Any]]] = {}
        for name, model in models.items():
            statistics = shared / name / "statistics" if shared else None
            logs[name] = [{"stage": "recording", SAVED: round(saved / len(models), 3)}] if saved else []
            logs[name] += _calibrate(model, config.fresh(), calibration, calls.get(name), folder / name, statistics)
        return logs


def _recordings(pipe: Any, prints: dict[str, str], calibration: Calibration) -> Path | None:
    """The folder of ``calibration.recordings`` that belongs to these very trajectories of models with these fingerprints."""
    if not calibration.recordings:
        return None
    if parallel.world_size() > 1:
        logger.warning("recordings are not shared by distributed runs: trajectories are recorded anew")
        return None
    parts = {name: part for name, part in getattr(pipe, "components", {}).items() if name not in prints}
    facts: dict[str, Any] = {name: getattr(calibration, name) for name in TRAJECTORIES}
    facts |= {"prompts": calibration.prompts, "pipeline": type(pipe).__name__, "models": prints}
    facts |= {"schedulers": [str(getattr(s, "config", None)) for s in (calibration.scheduler, parts.get("scheduler"))]}
    facts |= {"parts": _fingerprints({name: part for name, part in parts.items() if isinstance(part, nn.Module)})}
    digest = hashlib.sha256(json.dumps(facts, default=list).encode()).hexdigest()[:16]
    folder = Path(calibration.recordings) / digest
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"recordings cannot be kept in {calibration.recordings}: {error}") from error
    return folder


def _recorded(
    pipe: Any, models: dict[str, nn.Module], calibration: Calibration, folder: Path, keep: bool
) -> tuple[dict[str, Store], float]:
    """Recorded calls of each model, new or of an earlier run; and the seconds that the latter saves."""
    keep = keep and parallel.rank() == 0
    own = folder if keep else folder / f"process-{parallel.rank()}"
    stores = {name: Store(own / name / "calls", calibration.memory_limit, keep) for name in models}
    marker = folder / RECORDED
    if parallel.share(marker.is_file(), 0) and parallel.world_size() == 1:
        for store in stores.values():
            store.adopt()
        earlier = json.loads(marker.read_text())
        if [len(store) for store in stores.values()] == earlier["calls"]:
            return stores, earlier["seconds"]
        stores = {name: Store(own / name / "calls", calibration.memory_limit, keep) for name in models}
    start = time.perf_counter()
    record(pipe, models, calibration, stores)
    if empty := [name for name, store in stores.items() if not len(store)]:
        raise ConfigError(f"{', '.join(empty)} was never called on the calibration's trajectories; leave it out")
    if keep:
        counts = [len(store) for store in stores.values()]
        marker.write_text(json.dumps({"calls": counts, "seconds": time.perf_counter() - start}))
    return stores, 0.0


def _calibrate(
    model: nn.Module, config: QDiffConfig, calibration: Calibration, calls: Store | None, folder: Path, kept: Path | None
) -> list[dict[str, Any]]:
    tuning = calibration.tuning
    quantizer = QDiffQuantizer.of_model(model, config)
    if calibration.mixed and calls is not None:
        quantizer.targets = allocate(model, quantizer.targets, calls, calibration, folder)
    seen = calls if calibration.hessian or config.needs_calibration else None
    layers = quantize_layers(model, quantizer.targets, calibration, seen, folder / "layers", kept)
    log = [{"stage": "layer", "name": name, **layer.facts} for name, layer in layers.items()]
    if calls is not None and tuning.wanted and tuning.objective == "blocks":
        tuned = tune_blocks(model, layers, calls, calibration, folder / "blocks", quantizer.compute_dtype)
        layers = apply(model, layers, tuned)
        log += [entry for block in tuned.values() for entry in block.log]
    whole = calls is not None and tuning.wanted and tuning.objective == "model"
    wants_dense = whole and tuning.assignments in ("candidates", "rounding")
    dense = {name: layer.target(_weight(model, name)) for name, layer in layers.items()} if wants_dense else {}
    config.layers = {name: layer.stored for name, layer in layers.items()}
    pack_finished(model, _on_device(model, layers), quantizer.compute_dtype)
    if whole and calls is not None:
        log += tune_model(model, calls, calibration, dense, folder)
    config.provenance["calibration"] = {k: v for k, v in calibration.settings().items() if v is not None}
    quantizer.take(model)
    return log


def _weight(model: nn.Module, name: str) -> Tensor:
    weight = model.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return weight


def _on_device(model: nn.Module, layers: dict[str, FinishedLayer]) -> dict[str, Any]:
    devices = {name: _weight(model, name).device for name in layers}
    return {name: (layer.stored, {k: t.to(devices[name]) for k, t in layer.tensors.items()}) for name, layer in layers.items()}


@contextmanager
def _workspace(
    prints: dict[str, str], config: QDiffConfig, calibration: Calibration, default: Path | None
) -> Iterator[tuple[Path, bool]]:
    """A folder for finished work, and whether it outlives a failure. It is removed in the end if all went well."""
    chosen = Path(calibration.workspace) if calibration.workspace else default
    if chosen is None:
        with tempfile.TemporaryDirectory(prefix="qdiff-calibration-") as folder:
            yield Path(folder), False
        return
    wanted = {"config": config.settings(), "calibration": calibration.settings(), "models": prints}
    wanted = json.loads(json.dumps(wanted))
    if parallel.rank() == 0:
        _prepare(chosen, wanted, replace=not calibration.workspace)
    parallel.share(None, 0)
    yield chosen, True
    if parallel.rank() == 0:
        shutil.rmtree(chosen, ignore_errors=True)


def _prepare(folder: Path, wanted: dict[str, Any], replace: bool) -> None:
    marker = folder / RUN
    if marker.is_file():
        if json.loads(marker.read_text()) == wanted:
            logger.warning("Resuming the calibration in %s", folder)
            return
        if not replace:
            raise ConfigError(f"{folder} holds the work of another calibration; remove it, or choose another workspace")
        shutil.rmtree(folder)
    elif folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"the workspace {folder} holds other files; choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    marker.write_text(json.dumps(wanted))


def _fingerprints(models: dict[str, nn.Module]) -> dict[str, str]:
    """Of names, shapes and sums of all parameters: another model's work is not taken for this one's."""
    out = {}
    for name, model in models.items():
        digest = hashlib.sha256()
        for key, p in model.named_parameters():
            digest.update(f"{key} {list(p.shape)} {p.dtype} {float(p.detach().sum(dtype=torch.float64)):.6g};".encode())
        out[name] = digest.hexdigest()[:16]
    return out
