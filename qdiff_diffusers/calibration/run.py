"""A whole calibration: record trajectories, quantize layer by layer, then tune all layers together; every step is resumable."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging
from filelock import FileLock  # torch depends on it
from torch import Tensor, nn

from ..checkpoint.folders import check_writable, clear, content, held
from ..checkpoint.writing import write_text
from ..config import QDiffConfig
from ..errors import ConfigError
from ..integrations.diffusers_quantizer import QDiffQuantizer
from ..layers.timesteps import timestep_argument
from ..model.fused import with_common_scales
from ..model.packing import pack_finished
from . import parallel
from .allocation import allocate
from .blocks import apply, tune_blocks
from .fingerprints import NoDigestError, digest, input_facts
from .layerwise import SAVED, FinishedLayer, quantize_layers
from .settings import ASSIGNMENTS, Calibration
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
    """Quantize models in place for their inputs on their own trajectories. Keeps the workspace; see :func:`discard_workspace`.

    Args:
        pipe: the pipeline that the models belong to, or the bare model.
        models: full-precision denoisers by name.
        config: method and settings; each model gets a copy that describes its layers.
        calibration: settings of the calibration.
        workspace: default for ``calibration.workspace``; without either nothing is kept for another run.

    Returns:
        a log per model: time and error of each layer, block or stretch of steps.

    Raises:
        ConfigError: the calibration does not suit the pipeline, or the workspace holds other work.
        CalibrationError: the calibration cannot go on; finished work stays in the workspace.
    """
    parallel.join()
    for name, model in models.items():
        if getattr(model, "is_quantized", False):
            raise ConfigError(f"{name} is quantized already; calibration begins with the full-precision model")
        if any(c.activation_scales == "timestep" for c in config.with_overrides()):
            timestep_argument(model)  # raises where there is none
    how = calibration.tuning.assignments
    allowed = [name for name in ASSIGNMENTS if any(c.moves_by(name) for c in config.with_overrides())]
    if calibration.tuning.wanted and how not in allowed:
        raise ConfigError(
            f'tuning: assignments="{how}" moves no codes of method {config.method_name} with these settings; '
            f"choose one of {', '.join(allowed)}"
        )
    facts = _input_facts(pipe, models, calibration, workspace)
    with _workspace(facts, config, calibration, workspace if facts else None) as (folder, keep):
        needed = config.needs_calibration or calibration.hessian or calibration.mixed or calibration.tuning.wanted
        shared = _recordings(facts, calibration)
        calls: dict[str, Store] = {}
        saved = 0.0
        if needed and shared:
            with FileLock(f"{shared}.lock"):
                calls, saved = _recorded(pipe, models, calibration, shared, True)
        elif needed:
            calls, _ = _recorded(pipe, models, calibration, folder, keep)
        logs: dict[str, list[dict[str, Any]]] = {}
        for name, model in models.items():
            statistics = shared / name / "moments" if shared else None
            logs[name] = [{"stage": "recording", SAVED: round(saved / len(models), 3)}] if saved else []
            logs[name] += _calibrate(model, config, calibration, calls.get(name), folder / name, statistics)
        return logs


def _input_facts(pipe: Any, models: dict[str, nn.Module], calibration: Calibration, default: Path | None) -> dict[str, Any] | None:
    """Facts by which another run recognises work that is kept for it; ``None`` if none is kept.

    Raises:
        ConfigError: work is to be kept, but the calibration's inputs cannot be compared.
    """
    if not (calibration.workspace or calibration.recordings or default):
        return None
    try:
        return input_facts(pipe, models, calibration)
    except NoDigestError as error:
        way_out = "give the pipeline without it"
        if calibration.run is not None:
            way_out = "leave it out of `run`, or give run_key, a name for what `run` draws"
        if calibration.workspace or calibration.recordings:
            raise ConfigError(f"a workspace and recordings must know what they are of, but {error}; {way_out}") from error
        logger.warning("If this calibration is interrupted, it cannot be resumed: %s; %s", error, way_out)
        return None


def _recordings(facts: dict[str, Any] | None, calibration: Calibration) -> Path | None:
    """The folder of ``calibration.recordings`` that belongs to these very trajectories of these models."""
    if not calibration.recordings:
        return None
    if parallel.world_size() > 1:
        logger.warning("recordings are not shared by distributed runs: trajectories are recorded anew")
        return None
    key = digest([facts, {name: getattr(calibration, name) for name in TRAJECTORIES}])
    return Path(calibration.recordings) / key


def _recorded(
    pipe: Any, models: dict[str, nn.Module], calibration: Calibration, folder: Path, keep: bool
) -> tuple[dict[str, Store], float]:
    """Recorded calls of each model, and the seconds saved if they are an earlier run's."""
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
        write_text(marker, json.dumps({"calls": counts, "seconds": time.perf_counter() - start}))
    return stores, 0.0


def _calibrate(
    model: nn.Module, config: QDiffConfig, calibration: Calibration, calls: Store | None, folder: Path, kept: Path | None
) -> list[dict[str, Any]]:
    tuning = calibration.tuning
    quantizer = QDiffQuantizer.of_model(model, config)
    if calibration.mixed and calls is not None:
        quantizer.targets = allocate(model, quantizer.targets, calls, calibration, folder)
    quantizer.targets = with_common_scales(model, quantizer.targets)
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
    quantizer.quantization_config.layers.update({name: layer.stored for name, layer in layers.items()})
    pack_finished(model, _on_device(model, layers), quantizer.compute_dtype)
    if whole and calls is not None:
        log += tune_model(model, calls, calibration, dense, folder)
    quantizer.quantization_config.provenance["calibration"] = {k: v for k, v in calibration.settings().items() if v is not None}
    quantizer.attach(model)
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
    facts: dict[str, Any] | None, config: QDiffConfig, calibration: Calibration, default: Path | None
) -> Iterator[tuple[Path, bool]]:
    """A folder for finished work, and whether it outlives the run."""
    chosen = Path(calibration.workspace) if calibration.workspace else default
    if chosen is None:
        with tempfile.TemporaryDirectory(prefix="qdiff-calibration-") as folder:
            yield Path(folder), False
        return
    with held(chosen) if parallel.rank() == 0 else nullcontext():
        if parallel.rank() == 0:
            wanted = {"config": config.settings(), "calibration": calibration.settings(), "inputs": facts}
            _prepare(chosen, json.loads(json.dumps(wanted)), replace=not calibration.workspace)
        parallel.share(None, 0)
        yield chosen, True


def check_places(calibration: Calibration) -> None:
    """Make sure, before anything is loaded, that the folders which a calibration names can be written.

    Raises:
        ConfigError: a folder cannot be written.
    """
    for name in ("workspace", "recordings"):
        if path := getattr(calibration, name):
            try:
                check_writable(Path(path))
            except ConfigError as error:
                raise ConfigError(f"{name} cannot be kept in {path}: {error}") from error


def discard_workspace(calibration: Calibration | None, default: Path | None) -> None:
    """Remove the workspace of a calibration whose result is safe."""
    chosen = calibration.workspace if calibration and calibration.workspace else default
    if chosen and parallel.rank() == 0:
        shutil.rmtree(chosen, ignore_errors=True)


def _prepare(folder: Path, wanted: dict[str, Any], replace: bool) -> None:
    """Prepare the workspace for a run; the work of an earlier run stays if it had the same settings and inputs.

    Raises:
        ConfigError: the workspace holds another run's work, which may not be replaced, or other files.
    """
    marker = folder / RUN
    if marker.is_file():
        other = _differences(marker, wanted)
        if not other:
            logger.warning("Resuming the calibration in %s", folder)
            return
        if not replace:
            raise ConfigError(
                f"{folder} holds the work of another calibration (other {other}); remove it, or choose another workspace"
            )
        logger.warning("Starting anew: what %s holds is from a calibration with other %s", folder, other)
        clear(folder)
    elif content(folder):
        raise ConfigError(f"the workspace {folder} holds other files; choose another folder")
    write_text(marker, json.dumps(wanted))


def _differences(marker: Path, wanted: dict[str, Any]) -> str:
    """Names of the settings and inputs that a workspace was begun with and that differ from ``wanted``."""
    try:
        begun = json.loads(marker.read_text())
    except ValueError:  # truncated, or not written by qdiff
        return "settings, which cannot be read"
    names = []
    for section, values in wanted.items():
        earlier = begun.get(section)
        earlier = earlier if isinstance(earlier, dict) else {}
        names += [name for name in {**values, **earlier} if values.get(name) != earlier.get(name)]
    return ", ".join(dict.fromkeys(names))
