"""Whole diffusers pipelines, for models that ComfyUI has no class for."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.model_management
import diffusers
import torch
from PIL import Image
from torch import Tensor

import qdiff_diffusers
from qdiff_diffusers.errors import ConfigError

from .folders import DEMO

DENOISERS = ("transformer", "unet")
Step = Callable[[int, Callable[[], Image.Image]], None]


def load_pipeline(name: str, folder: Path | None, config: Any | None = None) -> Any:
    """A pipeline from a folder, or the bundled demo model; with ``config`` its denoiser is quantized while loading.

    Raises:
        ConfigError: the pipeline has no denoiser to quantize.
    """
    folder = Path(qdiff_diffusers.__file__).parent / "demo_model" if name == DEMO else folder
    options: dict[str, Any] = {}
    if config is not None:
        index = diffusers.DiffusionPipeline.load_config(str(folder))
        parts = [part for part in DENOISERS if index.get(part)]
        if not parts:
            raise ConfigError(f"{name} has no {' or '.join(DENOISERS)} to quantize")
        options["quantization_config"] = diffusers.PipelineQuantizationConfig(quant_mapping=dict.fromkeys(parts, config))
    dtype = torch.float32 if comfy.model_management.get_torch_device().type == "cpu" else torch.bfloat16
    pipe = diffusers.DiffusionPipeline.from_pretrained(str(folder), torch_dtype=dtype, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe: Any, prompt: str, *, seed: int, steps: int, guidance: float, images: int, on_step: Step) -> Tensor:
    """Images from a prompt, or from class names or numbers.

    Args:
        pipe: a text-to-image or class-conditional pipeline.
        prompt: the text, or classes separated by commas, which the images go through in turn.
        seed: seed of the first image; each further image has the next number.
        on_step: called after every step with its number and a function that draws a rough preview; it may raise to interrupt.

    Returns:
        ``[images, height, width, 3]`` in [0, 1].

    Raises:
        ConfigError: the model knows no such class.
    """
    taken = inspect.signature(type(pipe).__call__).parameters
    seeds = [torch.Generator().manual_seed(seed + i) for i in range(images)]
    if "class_labels" in taken:
        labels = class_labels(pipe, prompt)
        subject: dict[str, Any] = {"class_labels": [labels[i % len(labels)] for i in range(images)]}
    else:
        subject = {"prompt": [prompt] * images}
    pipe.to(comfy.model_management.get_torch_device())
    done, step = 0, pipe.scheduler.step

    def watched(*args: Any, **kwargs: Any) -> Any:
        nonlocal done
        result = step(*args, **kwargs)
        done += 1
        latents = result[0] if isinstance(result, tuple) else result.prev_sample
        on_step(done, lambda: rough_preview(getattr(result, "pred_original_sample", None), latents))
        return result

    pipe.scheduler.step = watched
    try:
        out = pipe(**subject, generator=seeds, guidance_scale=guidance, num_inference_steps=steps, output_type="pt").images
    finally:
        pipe.scheduler.step = step
    out = torch.as_tensor(out).float().cpu()
    out = out if out.shape[-1] in (1, 3) else out.movedim(1, -1)
    return out.expand(*out.shape[:3], 3).clamp(0, 1).contiguous()


def class_labels(pipe: Any, text: str) -> list[int]:
    """Class numbers from names or numbers separated by commas."""
    count = int(pipe.transformer.config.num_embeds_ada_norm)
    names = {name.lower(): number for name, number in (getattr(pipe, "labels", None) or {}).items()}
    out = []
    for part in filter(None, (p.strip() for p in text.split(","))):
        number = int(part) if part.isdigit() else names.get(part.lower())
        if number is None or number >= count:
            known = ", ".join(list(names)[:12]) or f"numbers from 0 to {count - 1}"
            raise ConfigError(f"the model knows no class {part!r}; it knows {known}")
        out.append(number)
    if not out:
        raise ConfigError(f"name at least one class, for example a number from 0 to {count - 1}")
    return out


def rough_preview(predicted: Tensor | None, latents: Tensor, size: int = 256) -> Image.Image:
    """A rough preview: up to three latent channels of the first image, shown as colours."""
    x = (latents if predicted is None else predicted)[0].detach().float().cpu()
    x = x.reshape(-1, *x.shape[-2:])[:3] if x.ndim > 3 else x[:3]
    x = x if len(x) == 3 else x[:1].expand(3, -1, -1)
    low, high = x.amin(), x.amax()
    pixels = ((x - low) / (high - low).clamp_min(1e-6) * 255).byte().permute(1, 2, 0).numpy()
    return Image.fromarray(pixels).resize((size, size * pixels.shape[0] // pixels.shape[1]), Image.Resampling.NEAREST)
