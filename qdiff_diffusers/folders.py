"""Output folders that appear when everything is in them, not before."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import ConfigError

INDEX, CONFIG = "model_index.json", "config.json"


def check_output(folder: Path, overwrite: bool) -> None:
    """Make sure that a model may be written to ``folder``.

    Raises:
        ConfigError: it holds something that must not be replaced.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not overwrite:
        raise ConfigError(f"{folder} is not empty; choose another folder, or overwrite it")
    if not _is_saved_model(folder):
        raise ConfigError(f"{folder} holds no saved model, so it is not overwritten; choose another folder")


@contextmanager
def written_at_once(folder: Path) -> Iterator[Path]:
    """A folder to write to, which takes the place of ``folder`` when the block ends without an error, and vanishes otherwise."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as workspace:
        written, replaced = Path(workspace, "new"), Path(workspace, "old")
        written.mkdir()
        yield written
        if folder.exists():
            folder.rename(replaced)
        written.rename(folder)


def _is_saved_model(folder: Path) -> bool:
    try:
        file = folder / INDEX if (folder / INDEX).is_file() else folder / CONFIG
        return "_class_name" in json.loads(file.read_text())
    except (OSError, ValueError):
        return False
