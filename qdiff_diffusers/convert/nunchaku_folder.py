"""``qdiff convert nunchaku``: from one of Nunchaku's folders or files to a folder that ``from_pretrained`` loads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from ..checkpoint.files import read_json, weight_files
from ..checkpoint.folders import CONFIG, INDEX, check_output, written_at_once
from ..config import FORMAT_VERSION, QDiffConfig, SVDQuantConfig
from ..errors import CheckpointError, ConfigError
from .importing import Import, Reader, described, diffusers_class, prepare, skeleton
from .layouts import plan_lite, plan_original
from .stream import Source, stored_bytes, write_file

WEIGHTS = "diffusion_pytorch_model.safetensors"
LITE = "nunchaku_lite"
PRECISIONS = {"int4": 64, "nvfp4": 16}
Advance = Callable[[int, int, str], None]


class Checkpoint(NamedTuple):
    """A model as Nunchaku stores it: the config of the model and the files with its weights."""

    config: dict[str, Any]
    files: list[Path]

    @property
    def lite(self) -> dict[str, Any] | None:
        """The quantization config of a ``nunchaku_lite`` folder."""
        stored = self.config.get("quantization_config")
        return stored if is_lite(stored) else None


def is_lite(quantization_config: Any) -> bool:
    """Whether a ``quantization_config`` is diffusers' NunchakuLite."""
    if isinstance(quantization_config, dict):
        return quantization_config.get("quant_method") == LITE
    method = getattr(quantization_config, "quant_method", None)
    return getattr(method, "value", method) == LITE


def convert_nunchaku(
    source: str | Path,
    output_dir: str | Path,
    *,
    config: str | Path | None = None,
    overwrite: bool = False,
    advance: Advance | None = None,
) -> Path:
    """Write a Nunchaku checkpoint as a qdiff checkpoint: every code and scale stays as it is.

    Args:
        source: a folder of a model or pipeline, or a safetensors file.
        output_dir: folder to write, which appears only once it is complete.
        config: folder or config.json of the dense model, for files that hold no config.
        overwrite: replace a model that is in ``output_dir``.
        advance: called with (tensors written, tensors in all, name) after each tensor.

    Returns:
        ``output_dir``.

    Raises:
        ConfigError: there is nothing to convert at ``source``, or ``output_dir`` holds something that must not be replaced.
        CheckpointError: the checkpoint is incomplete, misshapen, or of a precision or layout that is not known.
    """
    source, output_dir = Path(source), Path(output_dir)
    check_output(output_dir, overwrite, source, config)
    component = _component(source)
    checkpoint = open_checkpoint(component or source, config)
    model, imported, opened = plan_checkpoint(checkpoint)
    quantization = described(nearest_config(imported), model, imported.layers, f"Nunchaku, {source.name}")
    with written_at_once(output_dir, overwrite, source, config, nbytes=stored_bytes(imported.infos)) as folder:
        target = folder
        if component is not None:
            shutil.copytree(source, folder, dirs_exist_ok=True, ignore=lambda where, names: _left_out(component, where, names))
            target = folder / component.name
            target.mkdir(exist_ok=True)
        kept = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
        kept["_class_name"] = type(model).__name__
        (target / CONFIG).write_text(json.dumps(kept | {"quantization_config": quantization.to_dict()}, indent=2) + "\n")
        tensors = counted(Reader(imported, opened).everything(), len(imported.infos), advance)
        metadata = {"format": "pt", "qdiff_format_version": str(FORMAT_VERSION)}
        write_file(target / WEIGHTS, imported.infos, tensors, metadata)
    return output_dir


def plan_checkpoint(checkpoint: Checkpoint) -> tuple[Any, Import, Source]:
    """The model's skeleton, everything known before its weights are read, and where they are."""
    model = skeleton(checkpoint.config)
    opened = Source(checkpoint.files)
    if checkpoint.lite is not None:
        plan = plan_lite(model, lite_targets(checkpoint.lite), opened.infos)
    else:
        plan = plan_original(model, opened.infos)
    imported = prepare(model, plan, opened)
    if not imported.layers:
        raise CheckpointError(f"{checkpoint.files[0]} holds no layer that Nunchaku quantized (no tensor named ...qweight)")
    if checkpoint.lite is not None:
        check_lite(checkpoint.lite, imported)
    return model, imported, opened


def open_checkpoint(source: Path, config: str | Path | None) -> Checkpoint:
    """Find a model's config and weight files.

    Raises:
        ConfigError: there is no model, or no config.
    """
    if source.is_dir():
        files = weight_files(source)
        found = read_json(source / CONFIG) if (source / CONFIG).is_file() and config is None else None
    elif source.is_file() and source.suffix == ".safetensors":
        files, found = [source], None
    else:
        raise ConfigError(f"{source} is neither a model's folder nor a safetensors file")
    found = found or (read_config(Path(config)) if config is not None else _config_in(files))
    if not isinstance(found, dict) or "_class_name" not in found:
        raise ConfigError(f"{source} carries no config of its model; give the dense model's folder with --config")
    return Checkpoint(found, files)


def read_config(path: Path) -> Any:
    """A model's config, from its folder or its file. Raises ConfigError if there is none."""
    file = path / CONFIG if path.is_dir() else path
    if not file.is_file():
        raise ConfigError(f"{path} holds no {CONFIG}")
    return read_json(file)


def _config_in(files: list[Path]) -> Any:
    """The model's config in the metadata of a file."""
    for path in files:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        if "config" in metadata:
            try:
                config = json.loads(metadata["config"])
            except ValueError as error:
                raise CheckpointError(f"{path}: the config in its metadata is not valid JSON: {error}") from error
            if isinstance(config, dict) and "model_class" in metadata:
                config.setdefault("_class_name", diffusers_class(metadata["model_class"]))
            return config
    return None


def _component(source: Path) -> Path | None:
    """The quantized component of a pipeline folder; ``None`` for a model."""
    if not (source / INDEX).is_file():
        return None
    found = [folder for folder in sorted(source.iterdir()) if (folder / CONFIG).is_file() and is_lite(_quantization(folder))]
    if len(found) != 1:
        names = ", ".join(folder.name for folder in found) or "none"
        raise ConfigError(f"{source} should have one {LITE} component, it has {names}; convert components one by one")
    return found[0]


def _quantization(folder: Path) -> Any:
    config = read_json(folder / CONFIG)
    return config.get("quantization_config") if isinstance(config, dict) else None


def _left_out(component: Path, where: str, names: list[str]) -> list[str]:
    return names if Path(where) == component else [name for name in names if name == ".git"]


def lite_targets(config: dict[str, Any]) -> list[str]:
    """The layers that a ``nunchaku_lite`` config names.

    Raises:
        CheckpointError: the config is malformed, or names an unknown precision.
    """
    targets: list[str] = []
    for section, precisions in (("svdq_w4a4", PRECISIONS), ("awq_w4a16", {"int4": 64})):
        raw = config.get(section)
        if raw is None:
            continue
        if not isinstance(raw, dict) or not isinstance(raw.get("targets"), list):
            raise CheckpointError(f"quantization_config.{section} needs a list of targets, got {raw!r}")
        precision = raw.get("precision")
        if precision not in precisions:
            raise CheckpointError(f"quantization_config.{section} has precision {precision!r}; known: {', '.join(precisions)}")
        if raw.get("group_size") != precisions[precision]:
            raise CheckpointError(
                f"quantization_config.{section} has group_size {raw.get('group_size')!r}; {precision} has {precisions[precision]}"
            )
        targets += raw["targets"]
    return targets


def check_lite(config: dict[str, Any], imported: Import) -> None:
    """Compare what a ``nunchaku_lite`` config promises with what the tensors are.

    Raises:
        CheckpointError: a layer is of another kind or rank.
    """
    for section in ("svdq_w4a4", "awq_w4a16"):
        raw = config.get(section) or {}
        for name in raw.get("targets", ()):
            header = imported.headers[name]
            wanted = "awq" if section == "awq_w4a16" else raw["precision"]
            if header.kind != wanted:
                raise CheckpointError(f"layer {name} is stored as {header.kind}, quantization_config.{section} says {wanted}")
            rank = header.infos["down"].shape[1] if "down" in header.infos else 0
            if wanted != "awq" and rank != raw.get("rank"):
                raise CheckpointError(
                    f"layer {name} is stored with rank {rank}, quantization_config.{section} says {raw.get('rank')!r}"
                )


def nearest_config(imported: Import) -> QDiffConfig:
    """The settings that describe a checkpoint best."""
    kinds = [header.kind for header in imported.headers.values()]
    kind = "nvfp4" if "nvfp4" in kinds else "int4"
    dtypes = [info.dtype for info in imported.infos.values()]
    compute = "bfloat16" if dtypes.count(torch.bfloat16) >= dtypes.count(torch.float16) else "float16"
    return SVDQuantConfig(bits=4, weight_format=kind, activations=kind, compute_dtype=compute)  # type: ignore[call-arg]


def counted(tensors: Iterator[tuple[str, Tensor]], total: int, advance: Advance | None) -> Iterator[tuple[str, Tensor]]:
    """The same tensors, reporting progress."""
    for done, (name, tensor) in enumerate(tensors):
        yield name, tensor
        if advance is not None:
            advance(done + 1, total, name)
