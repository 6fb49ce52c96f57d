"""Measured quality that travels with a checkpoint: ``qdiff_results.json``, see docs/hub.md."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import CheckpointError
from .writing import write_text

RESULTS = "qdiff_results.json"
SAMPLES = "samples"  # folder of images that a card shows
DENSE_SUFFIX = "-16bit"  # ends the name of the full-precision model's picture
TEXTS = ("protocol", "command", "machine", "date")


class Result(NamedTuple):
    """One number: ``metric`` is an identifier ("psnr"), ``baseline`` the 16-bit model's value if it has one, ``margin`` half the
    width of a confidence interval."""

    metric: str
    name: str
    value: float
    unit: str = ""
    baseline: float | None = None
    margin: float | None = None

    @property
    def text(self) -> str:
        """The value with its margin, rounded to the margin's second digit."""
        if not self.margin:
            return f"{self.value:.4g}"
        digits = max(0, 1 - math.floor(math.log10(self.margin)))
        return f"{self.value:.{digits}f} ± {self.margin:.{digits}f}"


class Results(NamedTuple):
    """Measured numbers, with their dataset and protocol."""

    results: list[Result]
    dataset_id: str
    dataset_name: str
    protocol: str
    notes: dict[str, str]


def read_results(folder: str | Path) -> Results | None:
    """The results beside a checkpoint; ``None`` if there are none.

    Raises:
        CheckpointError: the file is malformed; the message names the entry.
    """
    path = Path(folder) / RESULTS
    if not path.is_file():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        dataset = data["dataset"]
        results = [_result(entry) for entry in data["results"]]
        texts = {key: _text(data.get(key, ""), key) for key in TEXTS}
        found = Results(results, _text(dataset["id"], "id"), _text(dataset["name"], "name"), texts.pop("protocol"), texts)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not what docs/hub.md describes: {type(error).__name__} {error}") from error
    if not results or not found.protocol:
        raise CheckpointError(f"{path} needs at least one result and a protocol: how it was measured")
    return found


def write_results(folder: str | Path, results: Results) -> None:
    """Write ``qdiff_results.json``; :func:`read_results` gives back the same."""
    write_text(Path(folder) / RESULTS, results_text(results))


def results_text(results: Results) -> str:
    """Content of ``qdiff_results.json``."""
    data = {
        "protocol": results.protocol,
        "dataset": {"id": results.dataset_id, "name": results.dataset_name},
        "results": [{key: v for key, v in r._asdict().items() if v not in ("", None)} for r in results.results],
    }
    data |= {key: text for key, text in results.notes.items() if text}
    return json.dumps(data, indent=1) + "\n"


def _result(entry: Any) -> Result:
    if unknown := sorted(set(entry) - set(Result._fields)):
        raise ValueError(f"unknown keys {', '.join(unknown)}")
    numbers = {key: None if (given := entry.get(key)) is None else _number(given) for key in ("baseline", "margin")}
    metric = _text(entry["metric"], "metric")
    name, unit = _text(entry.get("name", metric), "name"), _text(entry.get("unit", ""), "unit")
    return Result(metric, name, _number(entry["value"]), unit, **numbers)


def _number(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"a value must be a finite number, got {value!r}")
    return value


def _text(value: Any, key: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{key} must be a text, got {value!r}")
    return " ".join(value.split()).replace("|", "/")  # it goes into a table
