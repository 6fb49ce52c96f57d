"""Scores and images of a checkpoint from ``qdiff eval``, for its model card."""

from __future__ import annotations

import io
import json
import shlex
from pathlib import Path
from typing import Any, NamedTuple, overload

from PIL import Image
from torch import Tensor

from ..checkpoint.results import DENSE_SUFFIX, RESULTS, SAMPLES, Result, Results, results_text
from ..errors import CheckpointError, ConfigError

TABLE = "results.json"
SHOWN = 4
LEAST, MOST = 128, 512  # height of a sample: small pictures are enlarged by a whole number, large ones made smaller
NAMES = {
    "psnr": "PSNR against the 16-bit images",
    "ssim": "SSIM against the 16-bit images",
    "lpips": "LPIPS against the 16-bit images",
    "frechet": "Fréchet distance to real images",
    "frechet_16bit": "Fréchet distance to the 16-bit images",
    "precision": "Precision among real images",
    "recall": "Recall of real images",
    "precision_16bit": "Precision among the 16-bit images",
    "recall_16bit": "Recall of the 16-bit images",
    "accuracy": "Recognised as what was asked for",
}
BUNDLED = {"dit": ("zalando-datasets/fashion_mnist", "Fashion-MNIST"), "unet": ("zalando-datasets/fashion_mnist", "Fashion-MNIST")}


class Evaluated(NamedTuple):
    """Scores of a checkpoint, and PNG files by name: the first pictures of both models, one name with ``-16bit``."""

    results: Results
    samples: dict[str, bytes]

    def files(self) -> dict[str, bytes]:
        """The files to upload beside a checkpoint, by path."""
        return {RESULTS: results_text(self.results).encode()} | {f"{SAMPLES}/{name}": png for name, png in self.samples.items()}


def read_evaluation(output: str | Path, folder: str | Path) -> Evaluated:
    """The row of a checkpoint in the output folder of ``qdiff eval``.

    Args:
        output: the folder that ``qdiff eval -o`` wrote.
        folder: the checkpoint, evaluated as a row of its own, or quantized and kept by the evaluation.

    Raises:
        ConfigError: ``output`` is no such folder, or has no finished row of this checkpoint.
        CheckpointError: the checkpoint was changed after it was evaluated.
    """
    output, folder = Path(output), Path(folder)
    try:
        data = json.loads((output / TABLE).read_text(encoding="utf-8"))
        rows, run = data["rows"], data["run"]
        row = _row_of(rows, output, folder)
        if "failed" in row or not row.get("scores"):
            raise ConfigError(f"the row {row['name']!r} in {output} is not finished; run the same `qdiff eval` again")
        return Evaluated(_results(row, rows[0], run), _samples(output, row, rows[0]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        if isinstance(error, ConfigError | CheckpointError):
            raise
        raise ConfigError(f"{output} is no output folder of `qdiff eval`: {type(error).__name__} {error}") from error


def _row_of(rows: list[dict[str, Any]], output: Path, folder: Path) -> dict[str, Any]:
    from .rows import EvalRow
    from .store import MODEL, ROWS

    place = folder.resolve()
    for row in rows:
        if (output / ROWS / row["folder"] / MODEL).resolve() == place:
            return row
    folders = [row for row in rows if row["kind"] == "folder"]
    now = EvalRow("", "folder", target=str(folder)).definition()["config"] if folders else ""
    for row in folders:
        if row["definition"]["config"] == now:
            return row
        if Path(row["definition"]["target"]).resolve() == place:
            raise CheckpointError(f"{folder} was changed after {output} evaluated it; run the same `qdiff eval` again")
    names = ", ".join(repr(row["name"]) for row in folders) or "no folder"
    raise ConfigError(f"{output} has no row of {folder}; it evaluated {names}. Run `qdiff eval MODEL -c {folder} -o {output}`")


def _results(row: dict[str, Any], reference: dict[str, Any], run: dict[str, Any]) -> Results:
    from .tables import COLUMNS

    scores = []
    for column in COLUMNS:
        value, baseline = column.value(row), column.value(reference)
        if column.is_score and value is not None:
            unit = column.note if column.note in ("dB", "%") else ""
            name = NAMES.get(column.key, column.heading)
            scores.append(Result(column.key, name, _short(value), unit, _short(baseline), _short(column.margin(row))))
    machine = row.get("machine", {})
    notes = {
        "command": _without_folders(run["command"]),
        "machine": machine.get("gpu") or machine.get("processor"),
        "date": machine.get("date", "").split(" ")[0],
    }
    return Results(scores, *_dataset(run), _protocol(run), {key: str(text) for key, text in notes.items() if text})


@overload
def _short(value: float) -> float: ...
@overload
def _short(value: None) -> None: ...
def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


def _dataset(run: dict[str, Any]) -> tuple[str, str]:
    """Identifier and name of the dataset for the card: a bundled model's training data, or the user's own prompts or classes."""
    if run["model"] in BUNDLED:
        return BUNDLED[run["model"]]
    count = len(run["labels"])
    return {
        "prompts": ("prompts", f"{count} prompts"),
        "classes": ("classes", f"{count} classes"),
        "nothing": ("noise", "Unconditional images"),
    }[run["asked for"]]


def _protocol(run: dict[str, Any]) -> str:
    images, paired = run["images"], min(run["paired"], run["images"])
    parts = [f"{images} images per model, all of them" if paired == images else f"{images} images per model, the first {paired}"]
    parts[0] += " compared one by one"
    parts += [f"{run['steps']} steps"] if run["steps"] is not None else []
    parts += [f"guidance {run['guidance_scale']:g}"] if run["guidance_scale"] is not None else []
    parts += [
        f"base seed {run['seed']}",
        f"{run['dtype']} arithmetic",
        "the same for both models; ± half of a 95 % bootstrap interval",
    ]
    return ", ".join(parts) + "."


def _without_folders(text: str) -> str:
    """A command line without the folders of the files that it names, which are private."""
    words = [Path(word).name if word.startswith(("/", "~", "..")) else word for word in shlex.split(text)]
    return shlex.join(words)


def _samples(output: Path, row: dict[str, Any], reference: dict[str, Any]) -> dict[str, bytes]:
    from .store import ROWS, images_in

    count = min(SHOWN, row["images"])
    name = f"the-first-{count}-images"
    pictures = {
        f"{name}.png": images_in(output / ROWS / row["folder"], count),
        f"{name}{DENSE_SUFFIX}.png": images_in(output / ROWS / reference["folder"], count),
    }
    return {name: _strip(images) for name, images in pictures.items()}


def _strip(images: Tensor) -> bytes:
    """PNG of images ``[n, channels, height, width]`` side by side."""
    row = (images.clamp(0, 1) * 255).round().byte().permute(2, 0, 3, 1).flatten(1, 2).numpy()
    picture = Image.fromarray(row[..., 0] if row.shape[-1] == 1 else row)
    if picture.height > MOST:
        picture = picture.resize((picture.width * MOST // picture.height, MOST), Image.Resampling.LANCZOS)
    zoom = max(1, LEAST // picture.height)
    picture = picture.resize((zoom * picture.width, zoom * picture.height), Image.Resampling.NEAREST)
    file = io.BytesIO()
    picture.save(file, format="PNG", optimize=True)
    return file.getvalue()
