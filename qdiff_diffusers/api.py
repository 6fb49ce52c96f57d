"""Quantize a model or pipeline, with or without calibration, and write the result, in one call."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .calibration import parallel
from .calibration.quantize import quantize_source
from .config import QDiffConfig
from .errors import ConfigError
from .hub.push import check_name, push_folder


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
        source: a pipeline folder, a model folder, or the Hub name of a pipeline; it is quantized while it loads, unless there is a
            calibration. Or a loaded pipeline or model, which is quantized in place.
        config: method and settings.
        output_dir: folder to write, which appears only once it is complete. Optional for a loaded source.
        calibration: prompts, class labels, a file of prompts, or a :class:`Calibration`: quantize for the inputs that the layers
            have on the full-precision model's own trajectories. The same call resumes an interrupted calibration.
        components: names of the pipeline's components to quantize; by default all its transformers or UNets.
        dtype: dtype of everything that is not quantized.
        overwrite: replace a model that is already in ``output_dir``.
        push_to_hub: also upload the result under this Hub name.
        use_safetensors: which files of a stored ``source`` to read: ``False`` its pickles (``.bin``), ``True`` only safetensors,
            ``None`` pickles where there is nothing else.
        variant: variant of a stored ``source``'s files to read, such as "fp16".
        revision: branch, tag or commit of a ``source`` on the Hub.

    Returns:
        ``output_dir``, or without one the quantized ``source``.

    Raises:
        ConfigError: ``source`` is no model, is quantized already or lacks one of the ``components``, or ``output_dir`` holds
            something that must not be replaced.
        CheckpointError: weights of ``source`` are damaged, or stored in a way that is not known here.
        CalibrationError: the calibration cannot go on; its finished work stays beside ``output_dir`` for another run.
        HubError: the upload failed; ``output_dir`` is complete all the same, and ``qdiff push`` uploads it.
    """
    if push_to_hub:
        if output_dir is None:
            raise ConfigError("give output_dir, the folder to write")
        check_name(push_to_hub)
    quantized = quantize_source(
        source,
        config,
        output_dir,
        calibration=calibration,
        components=components,
        dtype=dtype,
        overwrite=overwrite,
        use_safetensors=use_safetensors,
        variant=variant,
        revision=revision,
    )
    if push_to_hub and parallel.rank() == 0:
        push_folder(quantized, push_to_hub)
    return quantized
