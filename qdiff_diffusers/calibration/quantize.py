"""Load a model or pipeline, quantize it, calibrated or not, and write the result at once."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoint.components import DENOISERS, pipeline_components
from ..checkpoint.folders import reserved
from ..checkpoint.prequantized import check_dense, check_source, refuse_quantized_model
from ..checkpoint.quantization import Quantization
from ..checkpoint.writing import write_text
from ..config import QDiffConfig
from ..errors import ConfigError, QDiffError
from ..model.fused import shares_scales
from ..model.packing import packed_layers
from ..model.patterns import one_config_for_all
from . import parallel
from .run import calibrate, check_places, discard_workspace
from .settings import Calibration, as_calibration

CALIBRATION_LOG = "calibration.json"


def quantize_source(
    source: Any,
    config: QDiffConfig | Quantization,
    output_dir: str | Path | None = None,
    *,
    calibration: Any = None,
    components: str | Sequence[str] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    overwrite: bool = False,
    use_safetensors: bool | None = None,
    variant: str | None = None,
    revision: str | None = None,
) -> Any:
    """:func:`qdiff_diffusers.quantize` without the upload, with the same arguments."""
    if isinstance(config, Quantization):  # config of another model
        config = config.requested().config
    _check_kinds(source, config, dtype)
    if calibration is None:
        config.check_uncalibrated()
    stored = isinstance(source, str | Path)
    if output_dir is None and stored:
        raise ConfigError("give output_dir, the folder to write")
    if output_dir is not None and not isinstance(output_dir, str | Path):
        raise ConfigError(f"output_dir must be the path of a folder, got {output_dir!r}")
    loading = {"use_safetensors": use_safetensors, "variant": variant, "revision": revision}
    loading = {key: value for key, value in loading.items() if value is not None}
    if loading and not stored:
        raise ConfigError(f"{', '.join(loading)} say how to read files; {type(source).__name__} is loaded already")
    components = [components] if isinstance(components, str) else components
    settings = None
    if calibration is not None or not stored or shares_scales(config):  # scales that follow from several weights
        settings = as_calibration({"hessian": False} if calibration is None else calibration)
        if settings.tuning.wanted and shares_scales(config):
            raise ConfigError(f"tuning moves the scales that {config.target} has in common for some layers; leave it out")
    if output_dir is None:
        loaded, _ = _quantize(source, config, settings, components, dtype, loading, None)
        discard_workspace(settings, None)
        return loaded
    folder = Path(output_dir)
    if calibration is not None:
        parallel.join()
    with reserved(folder, overwrite, source) if parallel.rank() == 0 else nullcontext() as output:
        workspace = parallel.share(output and output.workspace, 0)
        loaded, log = _quantize(source, config, settings, components, dtype, loading, workspace)
        check_finite(loaded)
        if output:
            with output.written() as new:
                _save(loaded, new, log)
    discard_workspace(settings, workspace)
    parallel.share(None, 0)  # kept until the result is written
    return folder


def _check_kinds(source: Any, config: Any, dtype: Any) -> None:
    """Raise a :class:`ConfigError` if ``source``, ``config`` or ``dtype`` is of the wrong type."""
    if not isinstance(config, QDiffConfig):
        raise ConfigError(f'config must be a qdiff config such as AQConfig(bits=2) or QDiffConfig(method="aq"), got {config!r}')
    if not isinstance(dtype, torch.dtype):
        raise ConfigError(f"dtype must be a torch.dtype such as torch.bfloat16, got {dtype!r}")
    is_model = isinstance(source, nn.Module) and hasattr(source, "config")
    is_pipeline = not isinstance(source, type) and hasattr(source, "components")
    if not isinstance(source, str | Path) and not is_model and not is_pipeline:
        kind = source.__name__ if isinstance(source, type) else type(source).__name__
        raise ConfigError(f"source must be a folder, a Hub name, or a model or pipeline of diffusers in memory, got {kind}")


def _quantize(
    source: Any,
    config: QDiffConfig,
    calibration: Calibration | None,
    components: Sequence[str] | None,
    dtype: torch.dtype,
    loading: dict[str, Any],
    workspace: Path | None,
) -> tuple[Any, dict[str, Any]]:
    """The quantized model or pipeline, and the logs of its calibration."""
    stored = isinstance(source, str | Path)
    log: dict[str, Any] = {}
    if calibration is None:
        loaded = _load(source, config, components, dtype, loading)
    else:
        check_places(calibration)
        loaded = _load(source, None, components, dtype, loading) if stored else source
        models = _models(loaded, components)
        for name, model in models.items():
            refuse_quantized_model(model, name or f"this {type(model).__name__}")
        with one_config_for_all():
            log = calibrate(loaded, models, config, calibration, workspace)
    for name, model in _models(loaded, components).items():
        if not packed_layers(model):
            raise ConfigError(f"no layer of {name or f'this {type(model).__name__}'} is quantized by these settings")
    return loaded, log


def _save(loaded: Any, folder: Path, logs: dict[str, Any]) -> None:
    """Write a model or pipeline, and the logs of its calibration."""
    loaded.save_pretrained(folder)
    for component, log in logs.items():
        write_text(folder / component / CALIBRATION_LOG, json.dumps(log, indent=1) + "\n")


def _models(loaded: Any, components: Sequence[str] | None) -> dict[str, Any]:
    """The models to quantize, by component name; the name of a bare model is empty."""
    if not hasattr(loaded, "components"):
        if components:
            raise ConfigError(f"a single {type(loaded).__name__} has no component {', '.join(components)}")
        chosen = {"": loaded}
    else:
        available = {name: part for name, part in loaded.components.items() if hasattr(part, "parameters")}
        chosen = {name: available[name] for name in _choose(available, components, type(loaded).__name__)}
    return chosen


def check_finite(loaded: Any) -> None:
    """Make sure that a model, or every model of a pipeline, is free of NaN and infinity.

    Raises:
        QDiffError: names a tensor with NaN or infinity.
    """
    parts = getattr(loaded, "components", {"": loaded})
    for component, model in parts.items():
        if not isinstance(model, nn.Module):
            continue
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and not tensor.is_meta and not tensor.float().isfinite().all():
                where = f"{component}: " if component else ""
                raise QDiffError(f"{where}{name} holds NaN or infinity, so the model cannot compute; nothing is written")


def _load(
    source: str | Path, config: QDiffConfig | None, components: Sequence[str] | None, dtype: torch.dtype, loading: dict[str, Any]
) -> Any:
    """Load a model or pipeline, quantized by ``config``, or dense without one."""
    from diffusers import AutoModel, DiffusionPipeline, PipelineQuantizationConfig

    available = pipeline_components(source, loading.get("revision"))
    if available is None:
        if components:
            raise ConfigError(f"{source} is a single model, it has no component {', '.join(components)}")
        check_source(source, "", loading, dense=config is None)
        given = {"quantization_config": config} if config else {}
        return AutoModel.from_pretrained(str(source), **given, **loading, dtype=dtype)
    components = _choose(available, components, str(source))
    for name in components:
        check_source(source, name, loading, dense=config is None)
    local = Path(source)
    if not local.is_dir():
        local = Path(DiffusionPipeline.download(str(source), **loading))
        for name in components:
            check_source(local, name, loading, dense=config is None)
    for name in set(available) - set(components):
        check_dense(local, name, loading)
    if config is None:
        return DiffusionPipeline.from_pretrained(str(source), dtype=dtype, **loading)
    quantization = PipelineQuantizationConfig(quant_mapping=dict.fromkeys(components, config))
    with one_config_for_all():
        return DiffusionPipeline.from_pretrained(str(source), quantization_config=quantization, dtype=dtype, **loading)


def _choose(available: Collection[str], components: Sequence[str] | None, owner: str) -> Sequence[str]:
    """The components to quantize, checked."""
    if components is None:
        components = [name for name in available if name.startswith(DENOISERS)]
    missing = sorted(set(components) - set(available))
    if missing or not components:
        wanted = ", ".join(missing) or " or ".join(DENOISERS)
        raise ConfigError(f"{owner} has no component {wanted}; it has {', '.join(available)}")
    return components
