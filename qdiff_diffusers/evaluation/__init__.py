"""Quality and cost of quantized models: seeded sampling, image metrics, grids and reports."""

from __future__ import annotations

from .classifier import FashionCNN, load_classifier
from .metrics import (
    Statistics,
    class_accuracy,
    feature_statistics,
    frechet_distance,
    load_statistics,
    psnr,
    save_statistics,
    ssim,
)
from .sampling import image_labels, image_seeds, sample

__all__ = [
    "FashionCNN",
    "Statistics",
    "class_accuracy",
    "feature_statistics",
    "frechet_distance",
    "image_labels",
    "image_seeds",
    "load_classifier",
    "load_statistics",
    "psnr",
    "sample",
    "save_statistics",
    "ssim",
]
