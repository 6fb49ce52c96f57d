"""Quantize a model or pipeline, with or without calibration, and write the result, in one call."""

from __future__ import annotations

import importlib
import json
from collections.abc import Collection, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .calibration import Calibration, as_calibration, calibrate, check_places, discard_workspace, parallel
from .config import QDiffConfig
from .errors import ConfigError, QDiffError
from .folders import CONFIG, INDEX, reserved
from .hub.push import check_name, push_folder
from .packing import packed_layers
from .patterns import one_config_for_all
from .prequantized import check_dense, check_source, refuse_quantized_model
from .writing import write_text

DENOISERS = ("transformer", "unet")  # with a suffix too: "transformer_2" is the second expert of some video models
CALIBRATION_LOG = "calibration.json"


def quantize(
    source: Any,
    config: QDiffConfig,
    output_dir: str | Path | None = None,
    *,
    calibration: Any = None,
    components: str | Sequence[str] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    overwrite: bool = False,
    push_to_hub: str | None = None,
    use_safetensors: bool | None = None,
    variant: str | None = None,
    revision: str | None = None,
) -> Any:
    """Quantize a model or a pipeline's denoisers and save them, so that ``from_pretrained(output_dir)`` needs no settings.

    Args:
        source: a pipeline folder, a bare model folder, or the Hub name of a pipeline; it is quantized while it loads, unless there
            is a calibration. Or a loaded pipeline or model, which is quantized in place.
        config: method and settings.
        output_dir: where to write. It appears when everything is in it, not before. Optional for a loaded source.
        calibration: prompts, class labels, a file of prompts, or a :class:`Calibration`: quantize for what the layers see on the
            full-precision model's own trajectories. Interrupted, the same call resumes.
        components: of a pipeline, those to quantize; its transformer or UNet, all of them if it has several, by default.
        dtype: of everything that is not quantized.
        overwrite: replace a model that is already in ``output_dir``.
        push_to_hub: also upload the result under this Hub name.
        use_safetensors: of a stored ``source``: ``False`` reads its pickles (``.bin``), ``True`` only safetensors, ``None`` pickles
            where it has nothing else.
        variant: of a stored ``source``: which of its files to read, such as "fp16".
        revision: of a ``source`` on the Hub: a branch, tag or commit.

    Returns:
        ``output_dir``, or without one the quantized ``source``.

    Raises:
        ConfigError: no such component, ``source`` is no model or is quantized already, or ``output_dir`` holds something that must
            not be replaced.
        CheckpointError: weights of ``source`` are damaged, or stored in a way that is not known here.
        CalibrationError: calibration cannot go on; what it has finished waits beside ``output_dir``.
        HubError: the upload failed; ``output_dir`` is complete all the same, and ``qdiff push`` sends it again.
    """
    _check_kinds(source, config, dtype)
    if calibration is None:
        config.check_uncalibrated()
    stored = isinstance(source, str | Path)
    if output_dir is None and (stored or push_to_hub):
        raise ConfigError("give output_dir, the folder to write")
    if output_dir is not None and not isinstance(output_dir, str | Path):
        raise ConfigError(f"output_dir must be the path of a folder, got {output_dir!r}")
    if push_to_hub:
        check_name(push_to_hub)
    loading = {"use_safetensors": use_safetensors, "variant": variant, "revision": revision}
    loading = {key: value for key, value in loading.items() if value is not None}
    if loading and not stored:
        raise ConfigError(f"{', '.join(loading)} say how to read files; {type(source).__name__} is loaded already")
    components = [components] if isinstance(components, str) else components
    settings = None
    if calibration is not None or not stored:
        settings = as_calibration({"hessian": False} if calibration is None else calibration)
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
    parallel.share(None, 0)  # until it is written
    if push_to_hub and parallel.rank() == 0:
        push_folder(folder, push_to_hub)
    return folder


def _check_kinds(source: Any, config: Any, dtype: Any) -> None:
    """Raise a :class:`ConfigError` for what is no source, config or dtype at all."""
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
    """The models to quantize, by component name; a bare model's is empty."""
    if not hasattr(loaded, "components"):
        if components:
            raise ConfigError(f"a single {type(loaded).__name__} has no component {', '.join(components)}")
        chosen = {"": loaded}
    else:
        available = {name: part for name, part in loaded.components.items() if hasattr(part, "parameters")}
        chosen = {name: available[name] for name in _choose(available, components, type(loaded).__name__)}
    return chosen


def check_finite(loaded: Any) -> None:
    """Make sure that a model, or every model of a pipeline, holds numbers only.

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


def pipeline_components(source: str | Path, revision: str | None = None) -> list[str] | None:
    """Names of a pipeline's components with weights; ``None`` if ``source`` is a bare model folder.

    Raises:
        ConfigError: there is no model at ``source``.
    """
    from diffusers import DiffusionPipeline  # late: pipelines take seconds to import

    root = Path(source)
    if root.is_dir() and not (root / INDEX).is_file():
        if (root / CONFIG).is_file():
            return None
        raise ConfigError(f"{source} holds neither {INDEX} (a pipeline) nor {CONFIG} (a model)")
    if root.exists() and not root.is_dir():
        raise ConfigError(f"{source} is a file; give the folder of a pipeline or model")
    try:
        index = DiffusionPipeline.load_config(str(source), **({"revision": revision} if revision else {}))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{source} is no local folder, and no pipeline on the Hub that could be reached") from error
    parts = {name: value for name, value in index.items() if isinstance(value, list | tuple) and len(value) == 2 and value[0]}
    return [name for name, (library, kind) in parts.items() if _has_weights(library, kind)]


def _has_weights(library: str, kind: str) -> bool:
    """Whether a component of this class is a model, and no scheduler, tokenizer or the like; ``True`` where nobody knows."""
    if library not in ("diffusers", "transformers"):
        return True
    try:
        found = getattr(importlib.import_module(library), str(kind))
        return not isinstance(found, type) or issubclass(found, nn.Module)
    except (ImportError, AttributeError):
        return True


def _load(
    source: str | Path, config: QDiffConfig | None, components: Sequence[str] | None, dtype: torch.dtype, loading: dict[str, Any]
) -> Any:
    """A stored model or pipeline, quantized by ``config`` while it loads, or dense if there is none."""
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
    # Each component records its own layers, so each gets its own config.
    mapping = {name: type(config).from_dict(config.to_dict()) for name in components}
    quantization = PipelineQuantizationConfig(quant_mapping=mapping)
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
