"""What the tests of conversions share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_models


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``dense(name)``: the folder of a tiny model."""
    root = tmp_path_factory.mktemp("dense")

    def folder(name: str) -> Path:
        if not (root / name).is_dir():
            tiny_models.make(name).save_pretrained(root / name)
        return root / name

    return folder
