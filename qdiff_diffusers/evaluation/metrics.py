"""Image metrics: PSNR and SSIM against a reference, Frechet distance, precision and recall of features, class accuracy."""

from __future__ import annotations

from os import PathLike
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def psnr(images: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB, ``[images]``; infinite where an image equals its reference.

    Args:
        images, reference: ``[images, channels, height, width]`` in [0, 1].
    """
    _check_pair(images, reference)
    error = (images.double() - reference.double()).square().mean((1, 2, 3))
    return -10 * error.log10()


def ssim(images: Tensor, reference: Tensor, *, window: int = 11, sigma: float = 1.5) -> Tensor:
    """Structural similarity of each image, ``[images]``, 1 for equal images.

    Wang et al., "Image Quality Assessment: From Error Visibility to Structural Similarity" (2004): Gaussian window of 11
    pixels with sigma 1.5, K1 = 0.01, K2 = 0.03, only windows that lie inside the image.

    Args:
        images, reference: ``[images, channels, height, width]`` in [0, 1].

    Raises:
        ValueError: shapes differ, or an image is smaller than the window.
    """
    _check_pair(images, reference)
    if min(images.shape[2:]) < window:
        raise ValueError(f"ssim needs images of at least {window} x {window} pixels, got {tuple(images.shape[2:])}")
    x, y = images.double(), reference.double()
    mean_x, mean_y, xx, yy, xy = (_blur(z, window, sigma) for z in (x, y, x * x, y * y, x * y))
    var_x, var_y, cov = xx - mean_x**2, yy - mean_y**2, xy - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * cov + c2) / (var_x + var_y + c2)
    return (luminance * structure).mean((1, 2, 3))


class Statistics(NamedTuple):
    """Mean ``[features]`` and covariance ``[features, features]`` of a set of feature vectors, float64."""

    mean: np.ndarray
    covariance: np.ndarray


def feature_statistics(features: Tensor) -> Statistics:
    """Statistics of ``features`` ``[samples, features]``. A single sample has zero covariance."""
    x = features.double().cpu().numpy()
    mean = x.mean(0)
    centered = x - mean
    return Statistics(mean, centered.T @ centered / max(len(x) - 1, 1))


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """Squared Frechet distance of two Gaussians, as in FID (Heusel et al. 2017, section 3).

    ``|mean_a - mean_b|^2 + tr(A) + tr(B) - 2 tr((A^1/2 B A^1/2)^1/2)``: the symmetric form has the trace that FID's
    ``(A B)^1/2`` has, and its eigenvalues are real and not negative. With few samples the distance is biased upwards; compare
    only sets of equal size.
    """
    values, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ b.covariance @ root).clip(0)).sum()
    shift = np.square(a.mean - b.mean).sum()
    return float(shift + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross)


def precision_recall(features: Tensor, reference: Tensor, neighbours: int = 3) -> tuple[Tensor, Tensor]:
    """Which samples lie on the other set's manifold (Kynkaanniemi et al. 2019, "Improved Precision and Recall Metric").

    A set's manifold is the union of balls around its samples, each reaching to the sample's ``neighbours``-th nearest neighbour.
    The mean of the first result is the precision (the share of plausible samples), that of the second the recall (the share of
    the reference that is covered). Both grow with the size of the sets: compare only sets of equal size.

    Args:
        features, reference: ``[samples, features]`` and ``[references, features]``.

    Returns:
        ``(inside, covered)``, bool ``[samples]`` and ``[references]``.

    Raises:
        ValueError: a set has no more than ``neighbours`` samples.
    """
    if min(len(features), len(reference)) <= neighbours:
        raise ValueError(f"precision and recall need more than {neighbours} samples, got {len(features)} and {len(reference)}")
    x, y = features.double(), reference.double()
    between = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
    return (between <= _radii(y, neighbours)).any(1), (between <= _radii(x, neighbours)[:, None]).any(0)


def relative_error(output: Tensor, reference: Tensor) -> float:
    """``|output - reference| / |reference|`` of each entry of the first dimension, averaged; 0 where both are zero."""
    error = (output.double() - reference.double()).flatten(1).norm(dim=1)
    return (error / reference.double().flatten(1).norm(dim=1).clamp_min(1e-30)).mean().item()


def class_accuracy(logits: Tensor, labels: list[int]) -> float:
    """Share of rows of ``logits`` ``[samples, classes]`` whose largest entry is at the label that was asked for."""
    return (logits.argmax(1).cpu() == torch.tensor(labels)).double().mean().item()


def save_statistics(path: str | PathLike[str], statistics: Statistics) -> None:
    """Write statistics as an .npz of float32 arrays ``mean`` and ``covariance``."""
    np.savez_compressed(path, **{k: v.astype(np.float32) for k, v in statistics._asdict().items()})


def load_statistics(path: str | PathLike[str]) -> Statistics:
    """Inverse of :func:`save_statistics`."""
    with np.load(path) as file:
        return Statistics(file["mean"].astype(np.float64), file["covariance"].astype(np.float64))


def _radii(points: Tensor, neighbours: int) -> Tensor:
    """Distance of each point to its ``neighbours``-th nearest other one; the nearest of all is the point itself."""
    distances = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
    return distances.kthvalue(neighbours + 1, dim=1).values


def _blur(images: Tensor, window: int, sigma: float) -> Tensor:
    """Separable Gaussian filter, each channel on its own, without padding."""
    offsets = torch.arange(window, dtype=images.dtype, device=images.device) - (window - 1) / 2
    kernel = torch.exp(-0.5 * (offsets / sigma).square())
    kernel = (kernel / kernel.sum()).expand(images.shape[1], 1, 1, window)
    images = F.conv2d(images, kernel, groups=images.shape[1])
    return F.conv2d(images, kernel.transpose(2, 3), groups=images.shape[1])


def _check_pair(images: Tensor, reference: Tensor) -> None:
    if images.shape != reference.shape or images.ndim != 4:
        raise ValueError(
            "images and reference must have one shape [images, channels, height, width], "
            f"got {list(images.shape)} and {list(reference.shape)}"
        )
