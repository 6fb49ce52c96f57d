"""Seeded sampling from any pipeline that draws images: by class, by prompt, or from noise alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..checkpoint.components import DENOISERS

SEED_STRIDE = 100_000  # image sets of different base seeds do not overlap below this many images


def image_seeds(count: int, seed: int = 0) -> list[int]:
    """One seed per image. A smaller set is the beginning of a larger one with the same base ``seed``."""
    return [SEED_STRIDE * seed + i for i in range(count)]


def image_labels(count: int, num_classes: int) -> list[int]:
    """Labels that walk through the classes in turn, so that any set is as balanced as its size allows."""
    return [i % num_classes for i in range(count)]


def sample(
    pipe: Any,
    labels: Sequence[int] | Sequence[str] | None,
    seeds: Sequence[int],
    *,
    steps: int | None = 20,
    guidance_scale: float | None = 2.0,
    batch_size: int = 50,
    on_step: Callable[[], None] | None = None,
    **arguments: Any,
) -> Tensor:
    """Draw images with a pipeline, from labels, prompts or noise alone.

    The noise of an image depends on its own seed alone (each has its CPU generator), so images of two models can be
    compared one by one, whatever the batch size and the device.

    Args:
        pipe: any pipeline that draws images or videos. Its own progress bar is switched off.
        labels: one class (``DiTPipeline`` and its like) or one prompt per image, ``None`` for a pipeline that takes neither.
        seeds: one seed per image.
        steps: denoising steps, ``None`` for the pipeline's default.
        guidance_scale: 1 switches classifier-free guidance off; ``None`` for the pipeline's default.
        batch_size: images per call of the pipeline; packed weights are decoded once per step and batch.
        on_step: called after each denoising step of each batch, :func:`num_steps` times in all.
        arguments: more arguments of the pipeline, such as ``height``.

    Returns:
        ``[images, channels, height, width]`` float32 on the CPU, in [0, 1]. The frames of a video stand below one another.
    """
    if labels is not None and len(labels) != len(seeds):
        raise ValueError(f"every image needs a label and a seed, got {len(labels)} labels and {len(seeds)} seeds")
    pipe.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": steps, "guidance_scale": guidance_scale} | arguments
    settings = {name: value for name, value in settings.items() if value is not None}
    hook = denoisers(pipe)[0][1].register_forward_hook(lambda *_: on_step()) if on_step else None
    try:
        batches = []
        for start in range(0, len(seeds), batch_size):
            chosen = slice(start, start + batch_size)
            generators = [torch.Generator().manual_seed(seed) for seed in seeds[chosen]]
            question = _question(None if labels is None else labels[chosen], len(generators))
            batches.append(_to_images(pipe(**question, **settings, generator=generators, output_type="np")))
    finally:
        if hook:
            hook.remove()
    return torch.cat(batches)


def denoisers(pipe: Any) -> list[tuple[str, nn.Module]]:
    """A pipeline's transformers or UNets, by the names of its components."""
    parts = pipe.components if hasattr(pipe, "components") else vars(pipe) | getattr(pipe, "_modules", {})
    return [(name, part) for name, part in parts.items() if name.startswith(DENOISERS) and isinstance(part, nn.Module)]


def question_argument(labels: Sequence[int] | Sequence[str] | None) -> str:
    """The argument of a pipeline's call that takes such labels."""
    if labels is None:
        return "batch_size"
    return "prompt" if isinstance(labels[0], str) else "class_labels"


def _question(labels: Sequence[int] | Sequence[str] | None, count: int) -> dict[str, Any]:
    return {question_argument(labels): count if labels is None else list(labels)}


def _to_images(output: Any) -> Tensor:
    """The output of a pipeline, images or videos as numpy arrays with channels last, as ``[images, channels, height, width]``."""
    frames = output.images if hasattr(output, "images") else output.frames
    frames = torch.from_numpy(np.asarray(frames)).float()
    if frames.ndim == 5:
        frames = frames.flatten(1, 2)
    return frames.permute(0, 3, 1, 2)


def num_steps(images: int, *, steps: int = 20, batch_size: int = 50) -> int:
    """Number of times that :func:`sample` calls ``on_step``."""
    return steps * -(-images // batch_size)
