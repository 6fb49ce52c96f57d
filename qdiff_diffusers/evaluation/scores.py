"""Scores of a row's images against the 16-bit model's images, against real ones, and against the classes asked for."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from .classifier import FashionCNN, classify, load_classifier
from .intervals import Estimate, bootstrap, mean_estimate
from .metrics import feature_statistics, frechet_distance, load_statistics, precision_recall, psnr, ssim

FRECHET_RESAMPLES = 100
NEIGHBOURS = 3
LPIPS_PIXELS = 64  # smallest side of an image that the LPIPS network accepts
Scores = dict[str, Any]


class Scorer:
    """Scores images against one reference.

    Args:
        reference: the 16-bit model's images ``[images, channels, height, width]``.
        paired: how many images, from the first, are compared with the reference one by one.
        labels: class asked for in each image; ``None`` if the pipeline takes no classes.
        classifier: a folder with ``model.safetensors``, ``statistics.npz`` and ``features.safetensors``; ``None`` if there is none.
    """

    def __init__(self, reference: Tensor, paired: int, labels: Sequence[int] | None, classifier: Path | None) -> None:
        self.reference, self.paired, self.labels = reference, min(paired, len(reference)), labels
        self.folder = classifier

    @cached_property
    def classifier(self) -> FashionCNN | None:
        return load_classifier(self.folder / "model.safetensors") if self.folder else None

    @cached_property
    def real(self) -> Tensor | None:
        """Features of real images, at most as many as there are reference images."""
        path = self.folder / "features.safetensors" if self.folder else None
        return load_file(path)["features"].float()[: len(self.reference)] if path and path.is_file() else None

    @cached_property
    def reference_features(self) -> Tensor | None:
        return classify(self.classifier, self.reference)[0] if self.classifier else None

    def scores(self, images: Tensor, is_reference: bool) -> Scores:
        """Every score by name: ``[value, half the width of its 95 % interval]``, or ``None`` where the score is undefined."""
        found: dict[str, Estimate | None] = {} if is_reference else self._paired(images)
        if self.classifier:
            found |= self._of_features(images, is_reference)
        return {name: None if value is None else _rounded(value) for name, value in found.items()}

    def _paired(self, images: Tensor) -> dict[str, Estimate | None]:
        mine, other = images[: self.paired], self.reference[: self.paired]
        decibels = psnr(mine, other)
        out: dict[str, Estimate | None] = {"psnr": mean_estimate(decibels) if decibels.isfinite().all() else None}
        out["ssim"] = mean_estimate(ssim(mine, other)) if min(mine.shape[2:]) >= 11 else None
        distances = lpips(mine, other)
        return out | {"lpips": None if distances is None else mean_estimate(distances)}

    def _of_features(self, images: Tensor, is_reference: bool) -> dict[str, Estimate | None]:
        assert self.classifier and self.folder and self.reference_features is not None
        features, logits = classify(self.classifier, images)
        out: dict[str, Estimate | None] = {}
        if (path := self.folder / "statistics.npz").is_file():
            statistics = load_statistics(path)
            out["frechet"] = bootstrap(
                lambda index: frechet_distance(feature_statistics(features[index]), statistics), len(features), FRECHET_RESAMPLES
            )
        if self.real is not None:
            out |= _manifolds(features, self.real, "")
        if not is_reference:
            out["frechet_16bit"] = _paired_frechet(features, self.reference_features)
            out |= _manifolds(features, self.reference_features, "_16bit")
        if self.labels is not None:
            out["accuracy"] = mean_estimate((logits.argmax(1) == torch.tensor(self.labels)).double())
        return out


def lpips(images: Tensor, reference: Tensor) -> Tensor | None:
    """LPIPS of each image (Zhang et al. 2018, AlexNet); ``None`` without the ``lpips`` package or its network's weights.

    Nothing is downloaded: torchvision's AlexNet must be in torch's cache already.
    """
    if not list(Path(torch.hub.get_dir(), "checkpoints").glob("alexnet-*.pth")):
        return None
    try:
        import lpips as package
    except ImportError:
        return None
    network = package.LPIPS(net="alex", verbose=False).eval()
    zoom = -(-LPIPS_PIXELS // min(images.shape[2:]))

    def prepared(x: Tensor) -> Tensor:
        return torch.nn.functional.interpolate(2 * x.expand(-1, 3, -1, -1) - 1, scale_factor=zoom) if zoom > 1 else 2 * x - 1

    with torch.inference_mode():
        return network(prepared(images), prepared(reference)).flatten()


def _paired_frechet(features: Tensor, reference: Tensor) -> Estimate:
    """Image ``i`` of both sets has the same seed, so they are resampled together: what they share does not blur the distance."""

    def statistic(index: Tensor) -> float:
        return frechet_distance(feature_statistics(features[index]), feature_statistics(reference[index]))

    return bootstrap(statistic, len(features), FRECHET_RESAMPLES)


def _manifolds(features: Tensor, reference: Tensor, suffix: str) -> dict[str, Estimate | None]:
    """Precision and recall with intervals over the samples, the two manifolds held fixed."""
    if min(len(features), len(reference)) <= NEIGHBOURS:
        return {}
    inside, covered = precision_recall(features, reference, NEIGHBOURS)
    return {f"precision{suffix}": mean_estimate(inside), f"recall{suffix}": mean_estimate(covered)}


def _rounded(estimate: Estimate) -> list[float | None]:
    value, margin = estimate
    return [float(f"{value:.6g}"), None if margin != margin else float(f"{margin:.3g}")]
