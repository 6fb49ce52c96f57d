"""Results on disk: a folder per row, named by a digest of what decides it, so that a later run continues from there."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..calibration import fingerprints
from ..checkpoint.writing import write_text, written_file
from ..errors import ConfigError

ROWS = "rows"  # folder of all rows
RECORDINGS = "recordings"  # folder of the trajectories that rows are calibrated on
MODEL = "model"  # in a row's folder: its quantized model
IMAGES, PROBES, FACTS = "images", "probes.pt", "row.json"


def digest(definition: Any) -> str:
    """A short hash of a value by its content."""
    return fingerprints.digest(definition)


class RowStore:
    """The folder of one row.

    Images are stored in parts, each with the next few of the row's sequence of seeds, in float16: rounding them moves a PSNR of
    62 dB by hundredths. ``row.json`` holds everything else about the row.
    """

    def __init__(self, root: Path, name: str, definition: dict[str, Any]) -> None:
        slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40]
        self.key = digest(definition)
        found = sorted(root.glob(f"*-{self.key}"))  # the row's name does not matter
        self.folder = found[0] if found else root / f"{slug}-{self.key}"

    def facts(self) -> dict[str, Any]:
        """The content of ``row.json`` so far.

        Raises:
            ConfigError: the file was damaged.
        """
        path = self.folder / FACTS
        try:
            return json.loads(path.read_text()) if path.is_file() else {}
        except ValueError as error:
            raise ConfigError(f"{path} is damaged; remove {self.folder} to make the row again") from error

    def write_facts(self, facts: dict[str, Any]) -> None:
        write_text(self.folder / FACTS, json.dumps(facts, indent=1) + "\n")

    def add_images(self, start: int, images: Tensor) -> None:
        """Keep images ``[n, channels, height, width]`` whose first is number ``start`` of the row."""
        with written_file(self.folder / f"{IMAGES}-{start:06d}.safetensors") as part:
            save_file({IMAGES: images.half().contiguous()}, part)

    def count_images(self) -> int:
        """Number of stored images, from the first without a gap."""
        count = 0
        for path in self._parts():
            if int(path.stem.rpartition("-")[2]) != count:
                break
            with safe_open(path, "pt") as file:
                count += file.get_slice(IMAGES).get_shape()[0]
        return count

    def images(self, count: int) -> Tensor:
        """The first ``count`` images, float32."""
        return images_in(self.folder, count)

    def _parts(self) -> list[Path]:
        return _parts(self.folder)


def images_in(folder: Path, count: int) -> Tensor:
    """The first ``count`` images of a row's folder, float32 ``[n, channels, height, width]``."""
    found, parts = 0, []
    for path in _parts(folder):
        if found < count:
            with safe_open(path, "pt") as file:
                parts.append(file.get_slice(IMAGES)[: count - found])
            found += len(parts[-1])
    return torch.cat(parts).float()


def _parts(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"{IMAGES}-*.safetensors"))
