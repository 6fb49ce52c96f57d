"""A small classifier of Fashion-MNIST images: class accuracy, and features for a Frechet distance."""

from __future__ import annotations

from itertools import pairwise
from os import PathLike

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

WIDTHS = (1, 32, 64, 128, 128)
NUM_CLASSES = 10


class FashionCNN(nn.Module):
    """Four 3x3 convolutions, each with batch norm; the average over the image gives 128 features.

    Input: ``[images, 1, 32, 32]`` in [0, 1].
    """

    def __init__(self) -> None:
        super().__init__()
        pairs = list(pairwise(WIDTHS))
        self.convs = nn.ModuleList(nn.Conv2d(i, o, 3, padding=1, bias=False) for i, o in pairs)
        self.norms = nn.ModuleList(nn.BatchNorm2d(o) for _, o in pairs)
        self.head = nn.Linear(WIDTHS[-1], NUM_CLASSES)

    def features(self, images: Tensor) -> Tensor:
        """Features ``[images, 128]``, which the Frechet distance compares."""
        x = 2 * images - 1
        for depth, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = F.relu(norm(conv(x)))
            if depth < len(self.convs) - 1:
                x = F.max_pool2d(x, 2)
        return x.mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[images, 10]``."""
        return self.head(F.dropout(self.features(images), 0.2, self.training))


def load_classifier(path: str | PathLike[str]) -> FashionCNN:
    """The classifier stored in a safetensors file, in float32 and in evaluation mode."""
    classifier = FashionCNN()
    classifier.load_state_dict(load_file(path))
    return classifier.eval()


@torch.inference_mode()
def classify(classifier: FashionCNN, images: Tensor, batch_size: int = 500) -> tuple[Tensor, Tensor]:
    """Features ``[images, 128]`` and logits ``[images, 10]``."""
    features = torch.cat([classifier.features(batch) for batch in images.split(batch_size)])
    return features, classifier.head(features)
