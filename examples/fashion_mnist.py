"""Fashion-MNIST (Xiao et al. 2017, MIT licence) as tensors, from the four files of Debian's ``dataset-fashion-mnist``."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

DEFAULT_FOLDER = Path("/usr/share/datasets/fashion-mnist")
SOURCE = "https://github.com/zalandoresearch/fashion-mnist"
CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
IMAGE_HEADER, LABEL_HEADER = 16, 8  # bytes of an IDX file before its data


def load_split(split: Literal["train", "t10k"], folder: Path = DEFAULT_FOLDER) -> tuple[Tensor, Tensor]:
    """Images ``[n, 1, 32, 32]`` float32 in [0, 1], padded by two black pixels on each side, and labels ``[n]`` int64."""
    pixels = _read(folder / f"{split}-images-idx3-ubyte.gz", IMAGE_HEADER).reshape(-1, 1, 28, 28)
    labels = _read(folder / f"{split}-labels-idx1-ubyte.gz", LABEL_HEADER)
    return F.pad(torch.from_numpy(pixels).float() / 255, (2, 2, 2, 2)), torch.from_numpy(labels).long()


def _read(path: Path, header: int) -> np.ndarray:
    if not path.is_file():
        raise SystemExit(f"{path} is missing: apt-get install dataset-fashion-mnist, or fetch the files from {SOURCE}")
    with gzip.open(path) as file:
        return np.frombuffer(file.read(), np.uint8, offset=header).copy()
