"""Quantize a stored model or pipeline and write the result, in one call."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .config import QDiffConfig
from .errors import ConfigError
from .hub.push import check_name, push_folder

DENOISERS = ("transformer", "unet")  # with a suffix too: "transformer_2" is the second expert of some video models
INDEX, CONFIG = "model_index.json", "config.json"


def quantize(
    source: str | Path,
    config: QDiffConfig,
    output_dir: str | Path,
    *,
    components: Sequence[str] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    overwrite: bool = False,
    push_to_hub: str | None = None,
) -> Path:
    """Quantize while loading and save, so that ``from_pretrained(output_dir)`` needs no settings.

    Args:
        source: a pipeline folder, a bare model folder, or the Hub name of a pipeline.
        config: method and settings.
        output_dir: where to write. It appears when everything is in it, not before.
        components: of a pipeline, those to quantize; its transformer or UNet, all of them if it has several, by default.
        dtype: of everything that is not quantized.
        overwrite: replace a model that is already in ``output_dir``.
        push_to_hub: also upload the result under this Hub name.

    Returns:
        ``output_dir``.

    Raises:
        ConfigError: no such component, ``source`` is no model, or ``output_dir`` holds something that must not be replaced.
        HubError: the upload failed; ``output_dir`` is complete all the same, and ``qdiff push`` sends it again.
    """
    output_dir = Path(output_dir)
    _check_output(output_dir, overwrite)
    if push_to_hub:
        check_name(push_to_hub)
    loaded = _load(source, config, components, dtype)
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_dir.parent, prefix=f".{output_dir.name}-") as workspace:
        written, replaced = Path(workspace, "new"), Path(workspace, "old")
        loaded.save_pretrained(written)
        if output_dir.exists():
            output_dir.rename(replaced)
        written.rename(output_dir)
    if push_to_hub:
        push_folder(output_dir, push_to_hub)
    return output_dir


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


def _load(source: str | Path, config: QDiffConfig, components: Sequence[str] | None, dtype: torch.dtype) -> Any:
    from diffusers import AutoModel, DiffusionPipeline, PipelineQuantizationConfig

    available = pipeline_components(source)
    if available is None:
        if components:
            raise ConfigError(f"{source} is a single model, it has no component {', '.join(components)}")
        return AutoModel.from_pretrained(str(source), quantization_config=config, dtype=dtype)
    if components is None:
        components = [name for name in available if name.startswith(DENOISERS)]
    missing = sorted(set(components) - set(available))
    if missing or not components:
        wanted = ", ".join(missing) or " or ".join(DENOISERS)
        raise ConfigError(f"{source} has no component {wanted}; it has {', '.join(available)}")
    # Each component records its own layers, so each gets its own config.
    mapping = {name: type(config).from_dict(config.to_dict()) for name in components}
    quantization = PipelineQuantizationConfig(quant_mapping=mapping)
    return DiffusionPipeline.from_pretrained(str(source), quantization_config=quantization, dtype=dtype)


def _check_output(folder: Path, overwrite: bool) -> None:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not overwrite:
        raise ConfigError(f"{folder} is not empty; choose another folder, or overwrite it")
    if not _is_saved_model(folder):
        raise ConfigError(f"{folder} holds no saved model, so it is not overwritten; choose another folder")


def _is_saved_model(folder: Path) -> bool:
    try:
        file = folder / INDEX if (folder / INDEX).is_file() else folder / CONFIG
        return "_class_name" in json.loads(file.read_text())
    except (OSError, ValueError):
        return False
