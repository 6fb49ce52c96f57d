"""Sampling inside a node that shows pictures of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.sample
from torch import Tensor


def sample_latent(
    model: Any,
    seed: int,
    steps: int,
    cfg: float,
    sampler_name: str,
    scheduler: str,
    positive: Any,
    negative: Any,
    latent: dict[str, Any],
    on_step: Callable[[], None],
) -> Tensor:
    """Sample as KSampler does, without its previews, which ComfyUI would go on showing in place of the node's result."""
    ratios = {key: value for key, value in latent.items() if key.startswith("downscale_ratio_")}
    start = comfy.sample.fix_empty_latent_channels(model, latent["samples"], **ratios)
    noise = comfy.sample.prepare_noise(start, seed, latent.get("batch_index"))
    return comfy.sample.sample(
        model,
        noise,
        steps,
        cfg,
        sampler_name,
        scheduler,
        positive,
        negative,
        start,
        noise_mask=latent.get("noise_mask"),
        callback=lambda *_: on_step(),
        seed=seed,
    )
