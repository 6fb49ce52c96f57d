"""Seeded sampling from a class-conditional pipeline such as diffusers' ``DiTPipeline``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

SEED_STRIDE = 100_000  # image sets of different base seeds do not overlap below this many images


def image_seeds(count: int, seed: int = 0) -> list[int]:
    """One seed per image. A smaller set is the beginning of a larger one with the same base ``seed``."""
    return [SEED_STRIDE * seed + i for i in range(count)]


def image_labels(count: int, num_classes: int) -> list[int]:
    """Labels that walk through the classes in turn, so that any set is as balanced as its size allows."""
    return [i % num_classes for i in range(count)]


def sample(
    pipe: Any,
    labels: Sequence[int],
    seeds: Sequence[int],
    *,
    steps: int = 20,
    guidance_scale: float = 2.0,
    batch_size: int = 50,
    on_step: Callable[[], None] | None = None,
) -> Tensor:
    """Images of a stock class-conditional pipeline, with classifier-free guidance.

    The noise of an image depends on its own seed alone (each has its CPU generator), so images of two models can be
    compared one by one, whatever the batch size and the device.

    Args:
        pipe: a ``DiTPipeline`` or a pipeline that is called like one. Its own progress bar is switched off.
        labels: one class per image.
        seeds: one seed per image.
        steps: denoising steps.
        guidance_scale: 1 switches guidance off.
        batch_size: images per call of the pipeline; packed weights are decoded once per step and batch.
        on_step: called after each denoising step of each batch, :func:`num_steps` times in all.

    Returns:
        ``[images, channels, height, width]`` float32 on the CPU, in [0, 1].
    """
    if len(labels) != len(seeds):
        raise ValueError(f"every image needs a label and a seed, got {len(labels)} labels and {len(seeds)} seeds")
    pipe.set_progress_bar_config(disable=True)
    hook = pipe.transformer.register_forward_hook(lambda *_: on_step()) if on_step else None
    try:
        batches = []
        for start in range(0, len(labels), batch_size):
            chosen = slice(start, start + batch_size)
            output = pipe(
                class_labels=list(labels[chosen]),
                generator=[torch.Generator().manual_seed(seed) for seed in seeds[chosen]],
                guidance_scale=guidance_scale,
                num_inference_steps=steps,
                output_type="np",
            )
            batches.append(torch.from_numpy(output.images).permute(0, 3, 1, 2))
    finally:
        if hook:
            hook.remove()
    return torch.cat(batches)


def num_steps(images: int, *, steps: int = 20, batch_size: int = 50) -> int:
    """How often :func:`sample` calls ``on_step``."""
    return steps * -(-images // batch_size)
