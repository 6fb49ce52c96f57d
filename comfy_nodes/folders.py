"""The checkpoints that the nodes offer. It is cheap and needs no qdiff package: ComfyUI asks at start and at every refresh."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import folder_paths

OURS = "qdiff"
PIPELINES = "model_index.json"
DEMO = "demo model (bundled)"


def add_folders() -> None:
    """Register ``models/qdiff``, and the paths under ``qdiff:`` in extra_model_paths.yaml."""
    folder_paths.add_model_folder_path(OURS, os.path.join(folder_paths.models_dir, OURS))
    paths, _ = folder_paths.folder_names_and_paths[OURS]
    folder_paths.folder_names_and_paths[OURS] = (paths, {".safetensors"})  # an empty set would mean every file


def checkpoints(*kinds: str) -> dict[str, Path]:
    """Quantized models by the name that a node shows: everything in ``models/qdiff``, and qdiff's models in the other folders."""
    out: dict[str, Path] = {}
    for kind in kinds:
        for base in map(Path, folder_paths.get_folder_paths(kind)):
            for path in _models(base):
                if kind == OURS or _is_ours(path, _signature(path / "config.json" if path.is_dir() else path)):
                    out.setdefault(path.relative_to(base).as_posix(), path)
    return dict(sorted(out.items()))


def pipelines() -> dict[str, Path]:
    """Folders of whole pipelines in ``models/qdiff`` and ``models/diffusers``."""
    bases = [Path(p) for kind in (OURS, "diffusers") for p in folder_paths.get_folder_paths(kind)]
    return {p.parent.relative_to(base).as_posix(): p.parent for base in bases for p in sorted(base.glob(f"*/{PIPELINES}"))}


def fingerprint(*paths: Path) -> str:
    """A text that changes with the files, so that ComfyUI reloads a replaced checkpoint.

    A single file is described by the config.json beside it, if not by itself.
    """
    files = [file for path in paths for file in (sorted(_files(path)) if path.is_dir() else (path, path.with_name("config.json")))]
    return "|".join(f"{file}:{signature}" for file in files if (signature := _signature(file)))


def _files(folder: Path) -> Iterator[Path]:
    """All files below a folder, those behind links too."""
    for place, _, names in _walk(folder):
        yield from (Path(place, name) for name in names)


def _signature(path: Path) -> tuple[int, ...] | None:
    """Facts that differ if another file takes this one's place, even with the same size and time; ``None`` if there is no file."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size, stat.st_ino


def _walk(base: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """``os.walk`` through links, which may lead in circles. Folders that begin with a dot are left out."""
    seen = {os.path.realpath(base)}
    for folder, subfolders, files in os.walk(base, followlinks=True):
        yield folder, subfolders, files
        real = {name: os.path.realpath(os.path.join(folder, name)) for name in subfolders if not name.startswith(".")}
        subfolders[:] = [name for name in real if real[name] not in seen]
        seen.update(real.values())


def _models(base: Path) -> list[Path]:
    """Model folders (those with a config.json) and the safetensors files outside of them."""
    found = []
    for folder, subfolders, files in _walk(base):
        if "config.json" in files and Path(folder) != base:
            found.append(Path(folder))
            subfolders.clear()
            continue
        found += [path for name in files if name.endswith(".safetensors") and (path := Path(folder, name)).is_file()]
    return found


@lru_cache(maxsize=4096)
def _is_ours(path: Path, signature: tuple[int, ...] | None) -> bool:
    """Whether a model's description names qdiff. ``signature`` is that of the file with the description."""
    try:
        if path.is_dir():
            config = json.loads((path / "config.json").read_text(encoding="utf-8"))
            return config["quantization_config"]["quant_method"] == OURS
        with path.open("rb") as file:
            return b'"qdiff_config"' in file.read(min(int.from_bytes(file.read(8), "little"), 1 << 24))
    except (OSError, ValueError, KeyError, TypeError):
        return False
