"""Quantize a model or pipeline, with or without calibration, and write the result, in one call."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch

from .calibration import as_calibration, calibrate
from .config import QDiffConfig
from .errors import ConfigError
from .folders import CONFIG, INDEX, check_output, written_at_once
from .hub.push import check_name, push_folder
from .patterns import one_config_for_all

DENOISERS = ("transformer", "unet")  # with a suffix too: "transformer_2" is the second expert of some video models
CALIBRATION_LOG = "calibration.json"


def quantize(
    source: Any,
    config: QDiffConfig,
    output_dir: str | Path | None = None,
    *,
    calibration: Any = None,
    components: Sequence[str] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    overwrite: bool = False,
    push_to_hub: str | None = None,
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

    Returns:
        ``output_dir``, or without one the quantized ``source``.

    Raises:
        ConfigError: no such component, ``source`` is no model, or ``output_dir`` holds something that must not be replaced.
        CalibrationError: calibration cannot go on; what it has finished waits beside ``output_dir``.
        HubError: the upload failed; ``output_dir`` is complete all the same, and ``qdiff push`` sends it again.
    """
    if calibration is None:
        config.check_uncalibrated()
    stored = isinstance(source, str | Path)
    if output_dir is None and (stored or push_to_hub):
        raise ConfigError("give output_dir, the folder to write")
    folder = None if output_dir is None else Path(output_dir)
    if folder:
        check_output(folder, overwrite)
    if push_to_hub:
        check_name(push_to_hub)
    if stored and calibration is None:
        loaded, log = _load(source, config, components, dtype), {}
    else:
        settings = as_calibration({"hessian": False} if calibration is None else calibration)
        loaded = _load(source, None, components, dtype) if stored else source
        workspace = folder.parent / f".{folder.name}-calibration" if folder else None
        with one_config_for_all():
            log = calibrate(loaded, _denoisers(loaded, components), config, settings, workspace)
    if folder is None:
        return loaded
    _save(loaded, folder, log)
    if push_to_hub:
        push_folder(folder, push_to_hub)
    return folder


def _save(loaded: Any, output_dir: Path, logs: dict[str, Any]) -> None:
    """Write a model or pipeline, and the logs of its calibration; ``output_dir`` appears when all is there."""
    with written_at_once(output_dir) as folder:
        loaded.save_pretrained(folder)
        for component, log in logs.items():
            (folder / component / CALIBRATION_LOG).write_text(json.dumps(log, indent=1) + "\n")


def _denoisers(loaded: Any, components: Sequence[str] | None) -> dict[str, Any]:
    """The models to calibrate, by component name; a bare model's is empty."""
    if not hasattr(loaded, "components"):
        if components:
            raise ConfigError(f"a single {type(loaded).__name__} has no component {', '.join(components)}")
        return {"": loaded}
    available = {name: part for name, part in loaded.components.items() if hasattr(part, "parameters")}
    return {name: available[name] for name in _choose(available, components, type(loaded).__name__)}


def pipeline_components(source: str | Path) -> list[str] | None:
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
        index = DiffusionPipeline.load_config(str(source))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{source} is no local folder, and no pipeline on the Hub that could be reached") from error
    return [name for name, value in index.items() if isinstance(value, list | tuple) and len(value) == 2 and value[0]]


def _load(source: str | Path, config: QDiffConfig | None, components: Sequence[str] | None, dtype: torch.dtype) -> Any:
    from diffusers import AutoModel, DiffusionPipeline, PipelineQuantizationConfig

    available = pipeline_components(source)
    if available is None:
        if components:
            raise ConfigError(f"{source} is a single model, it has no component {', '.join(components)}")
        return AutoModel.from_pretrained(str(source), **({"quantization_config": config} if config else {}), dtype=dtype)
    components = _choose(available, components, str(source))
    if config is None:
        return DiffusionPipeline.from_pretrained(str(source), dtype=dtype)
    # Each component records its own layers, so each gets its own config.
    mapping = {name: type(config).from_dict(config.to_dict()) for name in components}
    quantization = PipelineQuantizationConfig(quant_mapping=mapping)
    with one_config_for_all():
        return DiffusionPipeline.from_pretrained(str(source), quantization_config=quantization, dtype=dtype)


def _choose(available: Collection[str], components: Sequence[str] | None, owner: str) -> Sequence[str]:
    """The components to quantize, checked."""
    if components is None:
        components = [name for name in available if name.startswith(DENOISERS)]
    missing = sorted(set(components) - set(available))
    if missing or not components:
        wanted = ", ".join(missing) or " or ".join(DENOISERS)
        raise ConfigError(f"{owner} has no component {wanted}; it has {', '.join(available)}")
    return components
